"""Original checkpoints, ConvNeXt towers and language models into ConvLLaVA's layout.

Nothing heavy is imported before one of the two functions is asked for.
"""

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .assembly import assemble
    from .checkpoint import convert_checkpoint

__all__ = ["assemble", "convert_checkpoint"]


def __getattr__(name: str):
    if name == "convert_checkpoint":
        from .checkpoint import convert_checkpoint

        return convert_checkpoint
    if name == "assemble":
        from .assembly import assemble

        return assemble
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
