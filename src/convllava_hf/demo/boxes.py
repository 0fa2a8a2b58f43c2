"""Boxes that an answer names, such as `[0.10, 0.20, 0.40, 0.55]`, and the picture with them drawn on it."""

import re
from dataclasses import dataclass

from PIL import Image, ImageColor, ImageDraw, ImageFont

from .presets import View


_NUMBER = r"\s*(\d*\.?\d+|\d+\.)\s*"
_BOX = re.compile(r"\[" + ",".join([_NUMBER] * 4) + r"\]")
COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#f032e6")
_DRAWN = 24  # boxes at most: more than these cover the picture
_DRAWN_SIDE = 1280  # pixels of the picture that is shown


@dataclass(frozen=True)
class Box:
    """Left, top, right, bottom, in fractions of whatever it refers to, each in [0, 1]."""

    left: float
    top: float
    right: float
    bottom: float


def boxes_in(text: str) -> list[Box]:
    """The boxes that a text names, in its order, each once; they refer to what the model saw, padding included.

    Four numbers in brackets are a box when all lie in [0, 1], the third is larger than the first, and the fourth than
    the second.
    """
    found = []
    for match in _BOX.finditer(text):
        box = Box(*(float(number) for number in match.groups()))
        inside = all(0 <= number <= 1 for number in (box.left, box.top, box.right, box.bottom))
        if inside and box.left < box.right and box.top < box.bottom and box not in found:
            found.append(box)
    return found


def on_picture(box: Box, seen: View) -> Box | None:
    """A box of the model's view as one of the picture in it; `None` where it holds nothing but padding."""
    left, right = ((x - seen.left) / seen.across for x in (box.left, box.right))
    top, bottom = ((y - seen.top) / seen.down for y in (box.top, box.bottom))
    left, top, right, bottom = (min(max(edge, 0.0), 1.0) for edge in (left, top, right, bottom))
    return Box(left, top, right, bottom) if left < right and top < bottom else None


def draw(picture: Image.Image, boxes: list[Box]) -> Image.Image:
    """A copy of an RGB picture, small enough for a page, with numbered boxes given in fractions of it."""
    copy = picture.copy()
    copy.thumbnail((_DRAWN_SIDE, _DRAWN_SIDE), Image.Resampling.LANCZOS)
    width, height = copy.size
    line = max(2, round(max(width, height) / 200))
    font = ImageFont.load_default(size=max(12, round(max(width, height) / 28)))
    pen = ImageDraw.Draw(copy)
    for number, box in enumerate(boxes[:_DRAWN], 1):
        colour = COLOURS[(number - 1) % len(COLOURS)]
        # The last pixel that a box covers, so that one of the whole picture stays visible on all four sides.
        left, right = round(box.left * (width - 1)), round(box.right * (width - 1))
        top, bottom = round(box.top * (height - 1)), round(box.bottom * (height - 1))
        pen.rectangle((left, top, right, bottom), outline=colour, width=line)
        if len(boxes) > 1:
            _label(pen, str(number), (left, top), colour, font, line)
    return copy


def _label(pen: ImageDraw.ImageDraw, text: str, corner: tuple[int, int], colour: str, font, line: int) -> None:
    """A number in the upper left corner of its box, on the box's colour."""
    left, top = corner
    x0, y0, x1, y1 = pen.textbbox((0, 0), text, font=font)
    pen.rectangle((left, top, left + x1 - x0 + 4 * line, top + y1 - y0 + 4 * line), fill=ImageColor.getrgb(colour))
    pen.text((left + 2 * line - x0, top + 2 * line - y0), text, fill="white", font=font)
