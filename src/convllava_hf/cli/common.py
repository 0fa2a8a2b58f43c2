"""What several commands share: options of generation, loading a model, and what it says meanwhile."""

import argparse
import sys
from collections.abc import Callable
from importlib.util import find_spec

from ..errors import ConvLlavaError


DTYPES = ("bfloat16", "float16", "float32")
ASPECT_RATIOS = ("pad", "native", "shortest_edge")
PRESETS = ("tiny", "small", "base", "large", "full")
VISION_BACKENDS = ("eager", "fused", "int8", "channels-last", "compiled", "cuda-graphs")
MODEL_HELP = "folder of a checkpoint, or its id on the Hub; one of the original code is converted once into a cache"
# Bounds that nobody needs to pass, and beyond which the answer would be a machine out of memory.
MOST = 2**31 - 1
LONGEST_SIDE = 8192  # pixels; 16,384 visual tokens as a square
_TRAINING = ("datasets", "matplotlib", "peft", "trl", "yaml")


def add_generation_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the commands that load a model and let it answer."""
    parser.add_argument(
        "--max-new-tokens",
        type=positive_int,
        default=512,
        metavar="N",
        help="length of an answer at most (default: %(default)s)",
    )
    parser.add_argument(
        "--temperature",
        type=temperature,
        default=0.0,
        metavar="T",
        help="0 always takes the likeliest token, more draws (default: %(default)s)",
    )
    parser.add_argument("--system", metavar="TEXT", help="system message, in place of the chat template's own")
    add_loading_arguments(parser)


def add_loading_arguments(parser) -> None:
    """Options that say where and how a model is loaded, for `load_assistant`; also into a group of a parser."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="default: bfloat16 where the device has it, else float16 on GPU, float32 on CPU",
    )
    parser.add_argument(
        "--quantization",
        choices=("4bit", "8bit"),
        help="load the language model in 4 or 8 bits by bitsandbytes",
    )
    parser.add_argument(
        "--vision-backend",
        choices=VISION_BACKENDS,
        help="how the vision tower runs (default: fused on a CPU with bfloat16, else eager)",
    )
    add_trust_argument(parser)


def add_trust_argument(parser) -> None:
    """The option by which code of a checkpoint may run; without it none does."""
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python code that comes with the checkpoint, where it names classes that are not this package's",
    )


def add_image_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that say how large the model sees images; what is not given is the checkpoint's own."""
    group = parser.add_argument_group("images", "How large the model sees them (default: as the checkpoint says).")
    group.add_argument(
        "--preset", choices=PRESETS, help="their own shape, in up to 64, 144, 256, 576 or 2304 visual tokens"
    )
    group.add_argument(
        "--image-aspect-ratio",
        choices=ASPECT_RATIOS,
        help="padded to a square, in their own shape, or with a shorter side of --size",
    )
    group.add_argument(
        "--size", type=side, metavar="PIXELS", help="side of the square, or shorter side; a multiple of 64"
    )
    group.add_argument("--min-pixels", type=pixels, metavar="N", help="smaller ones in their own shape grow to N")
    group.add_argument("--max-pixels", type=pixels, metavar="N", help="larger ones in their own shape shrink to N")


def image_options(args: argparse.Namespace) -> dict:
    """What was said about images, as arguments of the image processor."""
    options = {
        name: getattr(args, name) for name in ("preset", "image_aspect_ratio", "size", "min_pixels", "max_pixels")
    }
    return {name: value for name, value in options.items() if value is not None}


def whole_number(lowest: int, highest: int) -> Callable[[str], int]:
    """The type of an option that takes a whole number within bounds, both of them included."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:  # also from a text of thousands of digits
            value = None
        if value is None or not lowest <= value <= highest:
            raise argparse.ArgumentTypeError(
                f"{shortened(text)} is no whole number from {lowest} to {highest}"
                if highest != MOST
                else f"{shortened(text)} is no whole number from {lowest} up"
            )
        return value

    return number


positive_int = whole_number(1, MOST)
seed = whole_number(0, 2**32 - 1)
side = whole_number(1, LONGEST_SIDE)
pixels = whole_number(1, LONGEST_SIDE**2)


def temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    # Logits divided by less overflow, and by more all tokens are equally likely.
    if value != 0 and not 0.001 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{shortened(text)} is neither 0 nor a number from 0.001 to 100")
    return value


def shortened(text: str) -> str:
    """A text for a message, in quotes: what is no character is written as an escape, and what is long is cut."""
    return ascii(text) if len(text) <= 80 else f"{ascii(text[:60])}... ({len(text)} characters)"


def load_assistant(args: argparse.Namespace, checkpoint: str | None = None):
    """The model that the options name, loaded; from `checkpoint`, if the model's name is not what is loaded."""
    quiet_unless_tty()
    set_verbosity_error()
    from ..inference import load

    return load(
        checkpoint or args.model,
        device=args.device,
        dtype=args.dtype,
        quantization=args.quantization,
        vision_backend=args.vision_backend,
        trust_remote_code=args.trust_remote_code,
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


def quiet_unless_tty() -> None:
    """Switch off transformers' progress bars where stderr is no terminal."""
    if not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()


def set_verbosity_error() -> None:
    """Let transformers log errors alone: its warnings are about code, which whoever asks a question did not write."""
    from transformers.utils import logging

    logging.set_verbosity_error()


def show(text: str) -> None:
    """Print a piece of a streaming answer."""
    print(text, end="", flush=True)
