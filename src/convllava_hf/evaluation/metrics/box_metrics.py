"""Boxes as answers name them, and how well two of them agree: RefCOCO, RefCOCO+, RefCOCOg.

A box is left, top, right, bottom. RefCOCO's accuracy (arXiv 1608.00272) is the share of samples whose
`box_iou` with the truth is `MIN_IOU` or more.
"""

from collections.abc import Sequence
from typing import Any

from ...boxes import Box, four_numbers, square_to_image
from ...errors import ConvLlavaError


MIN_IOU = 0.5  # of a box that counts as found


def parse_boxes(text: str) -> list[Box]:
    """Every four numbers in brackets or parentheses, in the text's order, as written; `[]` if there are none.

    Numbers out of range, boxes turned inside out and repeated ones are kept. What is not exactly four numbers between
    two brackets of a kind (three, five, an unclosed bracket, a word) is no box.
    """
    return [numbers for numbers, _, _ in four_numbers(text)]


def box_in_answer(text: str, width: int, height: int, padded: bool) -> Box | None:
    """The first box that an answer names, in fractions of the image; `None` if there is none.

    Args:
        text: with boxes in fractions or thousandths of what the model saw.
        width, height: of the image in pixels.
        padded: whether the model saw the image in the middle of a square.
    """
    boxes = parse_boxes(text)
    if not boxes:
        return None
    box = to_unit_box(boxes[0])
    return undo_square_padding(box, width, height) if padded else box


def box_iou(ones: Any, others: Any) -> Any:
    """Intersection over union of boxes in the same unit; 0 if either is empty or turned inside out.

    Args:
        ones, others: boxes, or arrays of them, (..., 4), whose shapes broadcast.

    Returns:
        A number for two boxes, an array for several.

    Raises:
        ConvLlavaError: what is given has other than four numbers.
    """
    import numpy as np

    one, other = (np.asarray(boxes, float) for boxes in (ones, others))
    for boxes in (one, other):
        _check(boxes if boxes.ndim < 2 else boxes.reshape(-1, boxes.shape[-1])[0])
    with np.errstate(over="ignore", invalid="ignore"):  # a model may answer with numbers as large as it likes
        sides = np.minimum(one[..., 2:], other[..., 2:]) - np.maximum(one[..., :2], other[..., :2])
        shared = np.clip(sides, 0, None).prod(-1)  # (...), 0 with a box that is turned inside out
        areas = [(boxes[..., 2:] - boxes[..., :2]).prod(-1) for boxes in (one, other)]
        overlaps = np.divide(shared, sum(areas) - shared, out=np.zeros_like(shared), where=shared > 0)
    return overlaps if overlaps.ndim else overlaps.item()


def undo_square_padding(box: Sequence[float], width: int, height: int) -> Box:
    """A box in fractions of the padded square as one in fractions of the image in its middle.

    The square's side is the image's longer one. Of an odd remainder, one pixel less is before the image, as the
     image processor (and the original's `expand2square`) has it. What lies in the padding comes out below 0 or
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


def _check(box: Any) -> None:
    if len(box) != 4:
        raise ConvLlavaError(f"The box {box!r} has {len(box)} numbers, and left, top, right, bottom are expected.")
