"""What several commands share: options, loading a model, printing an answer."""

import argparse
from importlib.util import find_spec

from ..errors import ConvLlavaError
from ..options import (
    MOST,
    GenerationOptions,
    ImageOptions,
    LoadingOptions,
    add_options,
    options_from,
    whole_number,
)
from ..utils.logging_utils import quiet_unless_tty, set_verbosity_error


MODEL_HELP = "folder of a checkpoint, or its id on the Hub; one of the original code is converted once into a cache"
_TRAINING = ("datasets", "matplotlib", "peft", "trl", "yaml")

positive_int = whole_number(1, MOST)
seed = whole_number(0, 2**32 - 1)


def add_generation_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the commands that load a model and let it answer."""
    add_options(parser, GenerationOptions)
    parser.add_argument("--system", metavar="TEXT", help="system message, in place of the chat template's own")
    add_options(parser, LoadingOptions)


def add_trust_argument(parser) -> None:
    """The option by which code of a checkpoint may run; without it none does."""
    add_options(parser, LoadingOptions, ("trust_remote_code",))


def add_image_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that say how large the model sees images; what is not given is the checkpoint's own."""
    group = parser.add_argument_group("images", "How large the model sees them (default: as the checkpoint says).")
    add_options(group, ImageOptions)


def load_assistant(args: argparse.Namespace, checkpoint: str | None = None):
    """The model that the options name, loaded; from `checkpoint`, if the model's name is not what is loaded."""
    quiet_unless_tty()
    set_verbosity_error()
    from ..inference import load

    return load(
        checkpoint or args.model,
        **options_from(args, LoadingOptions),
        image_options=options_from(args, ImageOptions),
    )


def require_training() -> None:
    """Refuses to train where what training needs is not installed.

    Raises:
        ConvLlavaError: names what is lacking.
    """
    import transformers
    from packaging.version import Version

    lacking = [name for name in _TRAINING if find_spec(name) is None]
    if lacking or Version(transformers.__version__) < Version("5.18"):
        raise ConvLlavaError(
            f"Training needs transformers 5.18 or newer (this is {transformers.__version__}) and "
            f"{', '.join(lacking) or 'what goes with it'}: pip install 'convllava-hf[train]'"
        )


def show(text: str) -> None:
    """Print a piece of a streaming answer."""
    print(text, end="", flush=True)
