"""What users can say about images, loading and answers, each option defined once.

The command line, the recipes, the plug-ins of evaluation frameworks, the web page, the model card and the records of
evaluation runs all take their options, names and descriptions from here. Importing it loads nothing heavy, so that
`convllava --help` answers at once.

To add an option, add a field to one of the dataclasses. To add an image mode, add it to the image processor
(`modeling/`) and to `IMAGE_MODES`.
"""

import argparse
import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from .errors import ConvLlavaError


if TYPE_CHECKING:
    from .modeling.configuration_convllava import ImageSizing

DTYPES = ("bfloat16", "float16", "float32")
QUANTIZATIONS = ("4bit", "8bit")
VISION_BACKENDS = {
    "eager": "as transformers runs it",
    "fused": "bias, GELU and layer scale within the matrix products (CPU, bfloat16)",
    "int8": "matrix products of 8-bit integers, features change a little (CPU with AVX512-VNNI or AMX)",
    "channels-last": "convolutions on pixels whose channels lie together (any device)",
    "compiled": "channels-last and torch.compile: a compilation for each new size of image (any device)",
    "cuda-graphs": "compiled, and each size of image recorded as one launch (CUDA)",
    "triton": "channels-last, with kernels in Triton for all but the matrix products (CUDA, experimental)",
    "triton-graphs": "triton, and each size of image recorded as one launch (CUDA, experimental)",
}
# The image processor's presets, with their visual tokens at stride 64.
PRESETS = {"tiny": 64, "small": 144, "base": 256, "large": 576, "full": 2304}
# Bounds that nobody needs to pass, and beyond which the answer would be a machine out of memory.
MOST = 2**31 - 1
LONGEST_SIDE = 8192  # pixels; 16,384 visual tokens as a square
# The least and the most that an option for images may be, both included, in pixels.
IMAGE_RANGES = {"size": (1, LONGEST_SIDE), "min_pixels": (1, LONGEST_SIDE**2), "max_pixels": (1, LONGEST_SIDE**2)}


@dataclass(frozen=True)
class ImageMode:
    """A value of the image processor's `image_aspect_ratio`.

    `help`: what it does, for `--help`. `square`: whether images are padded to a square of `size`, so that all have one
    shape and boxes are fractions of that square. `settings`: which of `size`, `min_pixels` and `max_pixels` decide.

    The others are format strings over what `sizing_values` returns: `record_text` describes an evaluation run,
    `page_text` a choice on the web page, `card_text` and `card_paragraph` a model on its card.
    """

    help: str
    square: bool
    settings: tuple[str, ...]
    record_text: str
    page_text: str
    card_text: str
    card_paragraph: str


IMAGE_MODES = {
    "pad": ImageMode(
        help="padded to a square",
        square=True,
        settings=("size",),
        record_text="{size} px",
        page_text="{size} × {size} px · {tokens}",
        card_text="{size} x {size} pixels as {most_tokens} visual tokens",
        card_paragraph="An image is padded to a square and resized to {size} x {size} pixels. It costs one token for "
        "every {stride} x {stride} pixels.",
    ),
    "native": ImageMode(
        help="in their own shape",
        square=False,
        settings=("min_pixels", "max_pixels"),
        record_text="images in their own shape, up to {max_pixels} px",
        page_text="own shape · up to {tokens}",
        card_text="up to {max_pixels:,} pixels in their own shape as up to {most_tokens} visual tokens",
        card_paragraph="An image keeps its own shape and, if its area is between {min_pixels:,} and {max_pixels:,} "
        "pixels, its size; others are scaled to these bounds. Sides are rounded to multiples of {stride}, and every "
        "{stride} x {stride} pixels cost one token: {most_tokens} at most.",
    ),
    "shortest_edge": ImageMode(
        help="with a shorter side of size",
        square=False,
        settings=("size", "max_pixels"),
        record_text="shorter side {size} px",
        page_text="shorter side {size} px · up to {tokens}",
        card_text="a shorter side of {size} pixels, in up to {most_tokens} visual tokens",
        card_paragraph="An image keeps its own shape. Its shorter side becomes {size} pixels, the longer one a "
        "multiple of {stride}; every {stride} x {stride} pixels cost one token, {most_tokens} at most.",
    ),
}


def mode_of(sizes: "ImageSizing") -> ImageMode:
    """The mode of an image processor's sizes, as `image_sizing` returns them."""
    return IMAGE_MODES[sizes.mode]


def sizing_values(sizes: "ImageSizing") -> dict[str, Any]:
    """What the descriptions of a mode can name."""
    most = sizes.most_tokens
    return {
        "size": sizes.size,
        "stride": sizes.stride,
        "min_pixels": sizes.least_pixels,
        "max_pixels": sizes.most_pixels,
        "most_tokens": most,
        "tokens": f"{most} visual token{'s' if most > 1 else ''}",
    }


def sizing_record(sizes: "ImageSizing") -> dict[str, Any]:
    """How large images are seen, for the record of a run: the mode, what decides in it, else `None`, and the cost."""
    values, decides = sizing_values(sizes), mode_of(sizes).settings
    settings = {name: values[name] if name in decides else None for name in IMAGE_RANGES}
    return {"mode": sizes.mode, **settings, "most_tokens": sizes.most_tokens}


def whole_number(lowest: int, highest: int) -> Callable[[str], int]:
    """The type of an option that takes a whole number within bounds, both of them included."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:  # also from a text of thousands of digits
            value = None
        if value is None or not lowest <= value <= highest:
            upper = f"from {lowest} up" if highest == MOST else f"from {lowest} to {highest}"
            raise argparse.ArgumentTypeError(f"{shortened(text)} is not a whole number {upper}")
        return value

    return number


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
    """A text for a message, in quotes: what is not printable is escaped, and what is long is cut."""
    return ascii(text) if len(text) <= 80 else f"{ascii(text[:60])}... ({len(text)} characters)"


def _option(default: Any, help: str, **argument: Any) -> Any:
    """A field that is also an option. `argument`: of argparse's `add_argument`."""
    return field(default=default, metadata={"help": help, **argument})


@dataclass
class ImageOptions:
    """How large the model sees images, as arguments of the image processor; `None` is the checkpoint's own.

    Recipes take these as keys. Options take effect once, when the processor is loaded: see `with_image_options`.
    """

    preset: str | None = _option(
        None,
        "images in their own shape, of up to "
        + ", ".join(f"{tokens} ({name})" for name, tokens in PRESETS.items())
        + " visual tokens",
        choices=tuple(PRESETS),
    )
    image_aspect_ratio: str | None = _option(
        None,
        "how images come to the vision tower: "
        + ", ".join(f"{mode.help} ({name})" for name, mode in IMAGE_MODES.items()),
        choices=tuple(IMAGE_MODES),
    )
    size: int | None = _option(
        None,
        "side of the square, or shorter side, in pixels; a multiple of the tower's stride, mostly 64",
        type=whole_number(*IMAGE_RANGES["size"]),
        metavar="PIXELS",
    )
    min_pixels: int | None = _option(
        None,
        "smaller images in their own shape are enlarged to N pixels",
        type=whole_number(*IMAGE_RANGES["min_pixels"]),
        metavar="N",
    )
    max_pixels: int | None = _option(
        None,
        "larger images in their own shape are reduced to N pixels",
        type=whole_number(*IMAGE_RANGES["max_pixels"]),
        metavar="N",
    )

    @property
    def image_options(self) -> dict[str, Any]:
        """The options that are given."""
        return options_from(self, ImageOptions)


IMAGE_OPTIONS = tuple(one.name for one in fields(ImageOptions))


@dataclass
class LoadingOptions:
    """Where and how a model is loaded: arguments of `convllava_hf.inference.load`."""

    device: str | None = _option(None, "cpu, cuda, cuda:1, mps (default: the best there is)")
    dtype: str | None = _option(
        None, "default: bfloat16 where the device has it, else float16 on GPU, float32 on CPU", choices=DTYPES
    )
    quantization: str | None = _option(
        None, "load the language model in 4 or 8 bits by bitsandbytes", choices=QUANTIZATIONS
    )
    vision_backend: str | None = _option(
        None,
        "how the vision tower runs (default: fused on a CPU with bfloat16, else eager)",
        choices=tuple(VISION_BACKENDS),
    )
    trust_remote_code: bool = _option(
        False, "run Python code that comes with the checkpoint, where it names classes that are not this package's"
    )


@dataclass
class GenerationOptions:
    """How answers are generated: arguments of `Assistant.answer`, which hands the rest on to `generate`."""

    max_new_tokens: int = _option(
        512, "length of an answer at most (default: %(default)s)", type=whole_number(1, MOST), metavar="N"
    )
    temperature: float = _option(
        0.0, "0 always takes the likeliest token, more draws (default: %(default)s)", type=temperature, metavar="T"
    )


def add_options(parser: Any, kind: type, names: tuple[str, ...] | None = None) -> None:
    """Adds the fields of one of the dataclasses to a parser or to a group of one.

    Args:
        names: of the fields; default: all.
    """
    for one in fields(kind):
        if names is None or one.name in names:
            how = {"action": "store_true"} if one.type is bool else {"default": one.default}
            parser.add_argument(f"--{one.name.replace('_', '-')}", **how, **one.metadata)


def options_from(arguments: Any, kind: type, names: tuple[str, ...] | None = None) -> dict[str, Any]:
    """The values of the fields of one of the dataclasses, by name, without those that are `None`.

    Args:
        arguments: what has them as attributes, such as what argparse returns.
        names: of the fields; default: all.
    """
    names = names or tuple(one.name for one in fields(kind))
    return {name: value for name in names if (value := getattr(arguments, name, None)) is not None}


def with_image_options(processor: Any, options: Mapping[str, Any] | None) -> Any:
    """A `ConvLlavaProcessor` that sees images as the options say; the one given stays as it is.

    Args:
        options: some of `IMAGE_OPTIONS`; those that are `None` count as not given.

    Raises:
        ConvLlavaError: there is no such option, or the options do not go together, or with the tower.
    """
    given = {name: value for name, value in (options or {}).items() if value is not None}
    if unknown := sorted(set(given) - set(IMAGE_OPTIONS)):
        raise ConvLlavaError(f"There is no image option {', '.join(unknown)}: choose of {', '.join(IMAGE_OPTIONS)}.")
    if not given:
        return processor
    before = processor.image_processor
    try:
        after = type(before).from_dict(before.to_dict(), **given)
    except ValueError as error:
        raise ConvLlavaError(f"These image options cannot be used: {error}") from error
    processor = copy.copy(processor)
    processor.image_processor = after
    return processor
