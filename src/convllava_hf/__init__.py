"""ConvLLaVA for the Hugging Face ecosystem. Importing this registers the model with transformers' Auto classes.

Afterwards `AutoModelForImageTextToText`, `AutoModelForVision2Seq` (transformers 4), `AutoModel`, `AutoProcessor`,
`AutoImageProcessor` and `AutoConfig` load ConvLLaVA checkpoints without `trust_remote_code`.
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .boxes import convert_boxes
    from .inference import assistant_turn, load, open_image, user_turn
    from .registration import (
        AutoModelForVision2Seq,
        ConvLlavaConfig,
        ConvLlavaForConditionalGeneration,
        ConvLlavaImageProcessor,
        ConvLlavaModel,
        ConvLlavaProcessor,
    )

__version__ = "0.1.0.dev0"

__all__ = [
    "AutoModelForVision2Seq",
    "ConvLlavaConfig",
    "ConvLlavaForConditionalGeneration",
    "ConvLlavaImageProcessor",
    "ConvLlavaModel",
    "ConvLlavaProcessor",
    "assistant_turn",
    "convert_boxes",
    "load",
    "open_image",
    "user_turn",
]
# Where the names are that are not in `registration`.
_MODULES = {
    "convert_boxes": "boxes",
    **dict.fromkeys(("assistant_turn", "load", "open_image", "user_turn"), "inference"),
}


def __getattr__(name: str):
    if name in __all__:
        return getattr(import_module(f"{__name__}.{_MODULES.get(name, 'registration')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _command_line_starts() -> bool:
    """Whether this process is `convllava ...` or `python -m convllava_hf ...`, or one that it has started."""
    program = sys.argv[0] if sys.argv else ""
    if program == "-m":  # what it is while Python looks for the module to run
        return __name__ in sys.orig_argv
    program = Path(program)
    return program.name in ("convllava", "convllava.exe") or program == Path(__file__).with_name("__main__.py")


# The command line answers --help and mistakes without waiting for torch; it registers before it runs a command, or the
# command does where it can begin without.
if _command_line_starts():
    import_module(f"{__name__}.utils.interrupts").exit_quietly()
else:
    import_module(f"{__name__}.registration")
