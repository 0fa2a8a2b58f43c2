"""The web page behind `convllava demo`, and the same files as a Space on the Hub.

Importing this needs nothing beyond the standard library and huggingface_hub; `serve` needs the extra `demo` (gradio).
"""

from typing import TYPE_CHECKING

from .space import space_files


if TYPE_CHECKING:
    from .serving import serve

__all__ = ["serve", "space_files"]


def __getattr__(name: str):
    if name == "serve":  # not before it is needed: it imports torch
        from .serving import serve

        return serve
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
