"""Boxes that an answer names, such as `[0.10, 0.20, 0.40, 0.55]`, and the image with them drawn on it."""

from dataclasses import astuple, dataclass

from PIL import Image

from ..boxes import draw_boxes, find_boxes
from .presets import View


_DRAWN_SIDE = 1280  # pixels of the image that is shown


@dataclass(frozen=True)
class Box:
    """Left, top, right, bottom, in fractions of what the box is on, each in [0, 1]."""

    left: float
    top: float
    right: float
    bottom: float


def boxes_in(text: str) -> list[Box]:
    """The boxes that a text names in brackets, in its order, each once; they refer to what the model saw, padding
    included.

    Four numbers in brackets are a box when they are fractions (or thousandths), the third is larger than the first,
    and the fourth than the second.
    """
    found = []
    for one in find_boxes(text):
        box = Box(*one.box)
        if one.bracketed and box.left < box.right and box.top < box.bottom and box not in found:
            found.append(box)
    return found


def on_image(box: Box, seen: View) -> Box | None:
    """A box of the model's view as one of the image in it; `None` where it holds nothing but padding."""
    left, right = ((x - seen.left) / seen.across for x in (box.left, box.right))
    top, bottom = ((y - seen.top) / seen.down for y in (box.top, box.bottom))
    left, top, right, bottom = (min(max(edge, 0.0), 1.0) for edge in (left, top, right, bottom))
    return Box(left, top, right, bottom) if left < right and top < bottom else None


def draw(image: Image.Image, boxes: list[Box]) -> Image.Image:
    """A copy of an RGB image, small enough for a page, with numbered boxes given in fractions of it."""
    copy = image.copy()
    copy.thumbnail((_DRAWN_SIDE, _DRAWN_SIDE), Image.Resampling.LANCZOS)
    return draw_boxes(copy, [astuple(box) for box in boxes])
