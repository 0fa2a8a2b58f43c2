"""Boxes in texts, such as `[0.10, 0.16, 0.40, 0.39]`: found, converted between frames, and drawn.

A box is left, top, right, bottom, in fractions or thousandths of a frame. There are two frames:

- `"square"`: the square that an image is padded to. Its side is the image's longer one, the image is in its middle,
  and of an odd remainder one pixel less is before the image, as the image processor pads (and the original's
  `expand2square`). LLaVA's data and the original's answers are in this frame.
- `"image"`: the image itself, upright as its EXIF says. Models that see images in their own shape answer in it.

A 640 x 480 image with a box from pixel (64, 24) to (256, 168): `[0.10, 0.16, 0.40, 0.39]` in the square,
`[0.10, 0.05, 0.40, 0.35]` in the image.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from numbers import Real
from typing import Any, cast

from .errors import ConvLlavaError
from .options import IMAGE_MODES


Box = tuple[float, float, float, float]
Spans = tuple[tuple[int, int], ...]

FRAMES = ("square", "image")
DEFAULT_FRAME = "square"  # of data that does not say another, such as LLaVA's
# In this order, so that neighboring boxes differ.
COLORS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#f032e6")
_MAX_DRAWN = 24  # more boxes than these cover the image
_THOUSAND = 1000
_SURELY_THOUSANDTHS = 100  # `[1, 2, 3, 4]` is a list of numbers
_MAX_DECIMALS = 17  # more than these are noise of floating point

_NUMBER = r"\s*([+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*"
_FOUR = ",".join([_NUMBER] * 4)
_FOUR_NUMBERS = re.compile(rf"\[{_FOUR}\]|\({_FOUR}\)")


def four_numbers(text: str) -> Iterator[tuple[Box, Spans, bool]]:
    """Every four finite numbers between brackets or parentheses, as written.

    Yields:
        The numbers, where each is in the text, and whether they are between brackets.
    """
    for match in _FOUR_NUMBERS.finditer(text):
        bracketed = match[1] is not None
        groups = range(1, 5) if bracketed else range(5, 9)
        numbers = tuple(float(match[group]) for group in groups)
        if all(map(math.isfinite, numbers)):  # 1e999
            yield cast(Box, numbers), tuple(match.span(group) for group in groups), bracketed


@dataclass(frozen=True)
class TextBox:
    """A box that a text names.

    `box`: in fractions of its frame. `spans`: where its four numbers are in the text. `decimals`: those of the number
    with the most; `None` if they are thousandths. `bracketed`: between brackets, not parentheses.
    """

    box: Box
    spans: Spans
    decimals: int | None
    bracketed: bool

    def fits_image(self, height: int, width: int) -> bool:
        """Whether the box, in the square, is on the image at least in part and not only in the padding."""
        left, top, right, bottom = _moved(self.box, height, width, "image")
        # A box at the edge may be in the padding by rounding.
        unit = 10.0 ** -(3 if self.decimals is None else self.decimals)
        slack = unit * max(height, width) / min(height, width)
        return right >= -slack and left <= 1 + slack and bottom >= -slack and top <= 1 + slack


def find_boxes(text: str) -> list[TextBox]:
    """The boxes that a text names, in its order.

    Four numbers in brackets or parentheses are a box if the third is not smaller than the first, the fourth not
    smaller than the second, and if they are fractions: all from 0 to 1; or thousandths: all whole, from 0 to 1000, one
    of them at least 100. Other lists of numbers are not boxes.
    """
    found = []
    for numbers, spans, bracketed in four_numbers(text):
        written = [text[start:end] for start, end in spans]
        left, top, right, bottom = numbers
        if left > right or top > bottom or min(numbers) < 0:
            continue
        whole = all(digits.isdecimal() for digits in written)
        if whole and _SURELY_THOUSANDTHS <= max(numbers) <= _THOUSAND:
            box, decimals = tuple(number / _THOUSAND for number in numbers), None
        elif max(numbers) <= 1:
            box, decimals = numbers, min(max(map(_decimals, written)), _MAX_DECIMALS)
        else:
            continue
        found.append(TextBox(cast(Box, box), spans, decimals, bracketed))
    return found


def convert_boxes(
    boxes: str | Sequence[float], height: int, width: int, source: str = "square", target: str = "image"
) -> Any:
    """The same boxes in another frame.

    Args:
        boxes: a text, in which every box is converted that `find_boxes` finds; or one box: left, top, right, bottom in
            fractions, or in thousandths if all four are whole and one is larger than 1.
        height, width: of the image in pixels, upright (turned as its EXIF says).
        source, target: frames of the given boxes and of the result: `"square"`, the square that the image is padded
            to, or `"image"`.

    Returns:
        Of a text, the text with the numbers of its boxes replaced where they change: clipped to the frame, with the
        same number of decimals (that of the box's number with the most) and the same spacing; thousandths stay
        thousandths. A box that is in the padding alone belongs to no place on the image and is left as it is. Of one
        box a tuple of four numbers, clipped to the frame.

    Raises:
        ConvLlavaError: an unknown frame, a side that is not positive, or a box that is not four numbers in range.
    """
    check_frame(source)
    check_frame(target)
    if height < 1 or width < 1:
        raise ConvLlavaError(
            f"The image is {width} x {height} pixels (width x height); expected sides of at least 1 pixel."
        )
    if isinstance(boxes, str):
        return _convert_text(boxes, height, width, source, target)
    box = tuple(boxes)
    scale = _scale_of(box)
    if source == target:
        return box
    moved = _clipped(_moved([number / scale for number in box], height, width, target))
    return tuple(round(_THOUSAND * number) for number in moved) if scale == _THOUSAND else moved


def check_frame(frame: Any) -> str:
    """The frame, if there is one of that name.

    Raises:
        ConvLlavaError: there is none.
    """
    if frame not in FRAMES:
        raise ConvLlavaError(
            f"The frame of boxes is {frame!r}; expected square (fractions of the padded square, as LLaVA's data has "
            "them) or image (fractions of the image)."
        )
    return frame


def frame_of_mode(mode: str) -> str:
    """The frame in which a model names boxes, by its image processor's `image_aspect_ratio`: that of what it sees."""
    return "square" if IMAGE_MODES[mode].square else "image"


def place_in_square(height: int, width: int) -> Box:
    """Left, top, width and height of an image in the square that it is padded to, in fractions of the square's side.

    Args:
        height, width: of the image in pixels.
    """
    side = max(height, width)
    return (side - width) // 2 / side, (side - height) // 2 / side, width / side, height / side


def square_to_image(box: Sequence, height: int, width: int) -> tuple:
    """A box in fractions of the padded square as one in fractions of the image, not clipped."""
    side = max(height, width)
    left, top = (side - width) // 2, (side - height) // 2  # pixels
    return (
        (box[0] * side - left) / width,
        (box[1] * side - top) / height,
        (box[2] * side - left) / width,
        (box[3] * side - top) / height,
    )


def image_to_square(box: Sequence, height: int, width: int) -> tuple:
    """A box in fractions of the image as one in fractions of the padded square."""
    side = max(height, width)
    left, top = (side - width) // 2, (side - height) // 2  # pixels
    return (
        (box[0] * width + left) / side,
        (box[1] * height + top) / side,
        (box[2] * width + left) / side,
        (box[3] * height + top) / side,
    )


def draw_boxes(image: Any, boxes: Sequence[Sequence[float]]) -> Any:
    """A copy of an RGB image of PIL's with boxes in fractions of it, numbered if there are several."""
    from PIL import ImageDraw, ImageFont

    copy = image.copy()
    width, height = copy.size
    line = max(2, round(max(width, height) / 200))
    font = ImageFont.load_default(size=max(12, round(max(width, height) / 28)))
    pen = ImageDraw.Draw(copy)
    for number, box in enumerate(boxes[:_MAX_DRAWN], 1):
        color = COLORS[(number - 1) % len(COLORS)]
        # The last pixel that a box covers, so that one of the whole image stays visible on all four sides.
        left, right = (round(edge * (width - 1)) for edge in (box[0], box[2]))
        top, bottom = (round(edge * (height - 1)) for edge in (box[1], box[3]))
        pen.rectangle((left, top, right, bottom), outline=color, width=line)
        if len(boxes) > 1:
            _label(pen, str(number), (left, top), color, font, line)
    return copy


def _label(pen: Any, text: str, corner: tuple[int, int], color: str, font: Any, line: int) -> None:
    """A number in the upper left corner of its box, on the box's color."""
    left, top = corner
    x0, y0, x1, y1 = pen.textbbox((0, 0), text, font=font)
    pen.rectangle((left, top, left + x1 - x0 + 4 * line, top + y1 - y0 + 4 * line), fill=color)
    pen.text((left + 2 * line - x0, top + 2 * line - y0), text, fill="white", font=font)


def _convert_text(text: str, height: int, width: int, source: str, target: str) -> str:
    if source == target or height == width:
        return text
    pieces, end = [], 0
    for found in find_boxes(text):
        if source == "square" and not found.fits_image(height, width):
            continue
        # Decimal: what is written is rounded once, and not the float nearest to it.
        numbers = [Decimal(text[slice(*span)]) for span in found.spans]
        if found.decimals is None:
            numbers = [number / _THOUSAND for number in numbers]
        moved = _clipped(_moved(numbers, height, width, target))
        for (first, last), before, after in zip(found.spans, numbers, moved, strict=True):
            if before != after:
                pieces += [text[end:first], _written(after, found.decimals)]
                end = last
    return "".join([*pieces, text[end:]])


def _written(number: Decimal, decimals: int | None) -> str:
    return f"{number * _THOUSAND:.0f}" if decimals is None else f"{number:.{decimals}f}"


def _moved(box: Sequence, height: int, width: int, target: str) -> tuple:
    return (square_to_image if target == "image" else image_to_square)(box, height, width)


def _clipped(box: Sequence) -> tuple:
    """Numbers from 0 to 1."""
    return tuple(min(max(number, type(number)(0)), type(number)(1)) for number in box)


def _decimals(number: str) -> int:
    """Decimals of a number as it is written: 2 of `0.10`, 5 of `1e-05`."""
    exponent = Decimal(number).as_tuple().exponent
    return max(0, -exponent) if isinstance(exponent, int) else 0  # a number that is infinite has no decimals


def _scale_of(box: Sequence[float]) -> int:
    """1 for fractions, 1000 for thousandths.

    Raises:
        ConvLlavaError: the box is neither.
    """
    numbers = len(box) == 4 and all(isinstance(one, Real) and not isinstance(one, bool) for one in box)
    if numbers and all(0 <= one <= 1 for one in box):
        return 1
    if numbers and all(0 <= one <= _THOUSAND and float(one).is_integer() for one in box):
        return _THOUSAND
    raise ConvLlavaError(
        f"The box is {box!r}; expected left, top, right and bottom, in fractions (0 to 1) or whole thousandths. "
        "Divide pixels by the sides of the frame."
    )
