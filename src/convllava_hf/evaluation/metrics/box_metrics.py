"""Boxes as answers name them, and how well two of them agree: RefCOCO, RefCOCO+, RefCOCOg.

A box is left, top, right, bottom. RefCOCO's accuracy (arXiv 1608.00272) is the share of samples whose
`box_iou` with the truth is 0.5 or more.
"""

from collections.abc import Sequence

from ...boxes import Box, four_numbers, square_to_image
from ...errors import ConvLlavaError


def parse_boxes(text: str) -> list[Box]:
    """Every four numbers in brackets or parentheses, in the text's order, as written; `[]` if there are none.

    Numbers out of range, boxes turned inside out and repeated ones are kept. What is not exactly four numbers between
    two brackets of a kind (three, five, an unclosed bracket, a word) is no box.
    """
    return [numbers for numbers, _, _ in four_numbers(text)]


def box_iou(one: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union of two boxes in the same unit; 0 if either is empty or turned inside out."""
    _check(one)
    _check(other)
    if any(box[0] >= box[2] or box[1] >= box[3] for box in (one, other)):
        return 0.0
    across = min(one[2], other[2]) - max(one[0], other[0])
    down = min(one[3], other[3]) - max(one[1], other[1])
    if across <= 0 or down <= 0:
        return 0.0
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return across * down / (areas - across * down)


def undo_square_padding(box: Sequence[float], width: int, height: int) -> Box:
    """A box in fractions of the padded square as one in fractions of the image that stands in its middle.

    The square's side is the image's longer one. Of an odd remainder, one pixel less stands before the image, as
    the image processor (and the original's `expand2square`) has it. What lies in the padding comes out below 0 or
    above 1, and is not cut off: the IoU with the truth is then the same as in the square.

    Args:
        width, height: of the image in pixels.

    Raises:
        ConvLlavaError: a side of the image is not positive.
    """
    _check(box)
    if width < 1 or height < 1:
        raise ConvLlavaError(f"The image is {width} x {height} pixels, and sides of at least 1 are expected.")
    return square_to_image(box, height, width)


def to_unit_box(box: Sequence[float]) -> Box:
    """A box in fractions, of one that is in fractions already or in thousandths; it tells from the numbers.

    They are thousandths if one is larger than 2, or larger than 1 while all are whole. So a fraction somewhat out of
    range stays a fraction. Nothing is cut off.
    """
    _check(box)
    largest = max(box)
    thousandths = largest > 2 or (largest > 1 and all(float(number).is_integer() for number in box))
    left, top, right, bottom = (number / 1000 if thousandths else float(number) for number in box)
    return left, top, right, bottom


def _check(box: Sequence[float]) -> None:
    if len(box) != 4:
        raise ConvLlavaError(f"The box {box!r} has {len(box)} numbers, and left, top, right, bottom are expected.")
