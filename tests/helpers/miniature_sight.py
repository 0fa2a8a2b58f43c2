"""A second pair of eyes for the miniature world: what its pixels show, and what follows for a question."""

import functools
import re
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage
from sklearn.datasets import load_digits

from convllava_hf.miniature.world import COLORS


NUMBERS = ["zero", "one", "two", "three", "four"]
_SIGN_COLORS = ((20, 20, 20), (248, 248, 248))  # its frame and its paper


@dataclass(frozen=True)
class DetectedThing:
    """A thing found in an image; its box in pixels, right and bottom past the last one, or unknown."""

    color: str
    shape: str
    box: tuple[int, int, int, int] | None = None


@functools.cache
def digits():
    """scikit-learn's handwritten digits: `images` (n, 8, 8) of ink from 0 to 16, `target` (n,)."""
    return load_digits()


def see(image: Image.Image) -> list[DetectedThing]:
    """The things in an image: connected pixels of a thing's very color, named by what of their box they fill."""
    pixels = np.asarray(image)
    things = []
    for color, value in COLORS.items():
        labels, _ = ndimage.label((pixels == value).all(-1), np.ones((3, 3)))
        for number, where in enumerate(ndimage.find_objects(labels), start=1):
            things.append(DetectedThing(color, _shape(labels[where] == number), _box(where)))
    return things


def see_signs(image: Image.Image) -> list[tuple[int, int, int, int]]:
    """The boxes in pixels of signs: connected parts of their two colors that are not within others."""
    pixels = np.asarray(image)
    labels, _ = ndimage.label(np.any([(pixels == value).all(-1) for value in _SIGN_COLORS], axis=0))
    boxes = [_box(where) for where in ndimage.find_objects(labels)]
    return [box for box in boxes if not any(box != other and _within(box, other) for other in boxes)]


def see_sign(image: Image.Image) -> tuple[int, int, int, int]:
    """The box in pixels of the only sign."""
    (box,) = see_signs(image)
    return box


def handwriting_in(image: Image.Image, box) -> int:
    """The index in scikit-learn's set of the handwritten digit that is most like what stands in the box of a sign."""
    ink = 255 - np.asarray(_inside(image, box).resize((8, 8), Image.Resampling.BOX)).astype(float)
    return int(np.argmax(_likeness(ink, digits().images)))


def print_in(image: Image.Image, box) -> int:
    """The printed digit that is most like what stands in the box of a sign."""
    return int(np.argmax(_likeness(_cut_out(_inside(image, box)), _printed())))


def answer_of(text: str, things: list[DetectedThing], digit: int, side: int = 256) -> str:
    """The answer to a question about these things and a sign with this digit; `side` of the image in pixels."""
    if text == "What does the sign say?":
        return str(digit)
    if match := re.fullmatch(r"What color is the (\w+)\?", text):
        (thing,) = [thing for thing in things if thing.shape == match[1]]
        return thing.color
    if match := re.fullmatch(r"What shape is the (\w+) object\?", text):
        (thing,) = [thing for thing in things if thing.color == match[1]]
        return thing.shape
    if match := re.fullmatch(r"Is there an? (\w+) (\w+)\?", text):
        return "yes" if match.groups() in [(thing.color, thing.shape) for thing in things] else "no"
    if match := re.fullmatch(r"How many (\w+) objects are there\?", text):
        return NUMBERS[len([thing for thing in things if thing.color == match[1]])]
    if match := re.fullmatch(r"How many (\w+?)(?:es|s) are there\?", text):
        shape = {"circl": "circle", "squar": "square", "triangl": "triangle"}.get(match[1], match[1])
        return NUMBERS[len([thing for thing in things if thing.shape == shape])]
    if match := re.fullmatch(r"Give the bounding box of the (\w+) (\w+)\.", text):
        (thing,) = [thing for thing in things if (thing.color, thing.shape) == match.groups()]
        return written(thing.box, side)
    if text in ("Describe the picture.", "Describe the picture with bounding boxes."):
        return ", ".join(names_in_order(things, digit, side, boxes="boxes" in text)) + "."
    raise AssertionError(f"An unknown question: {text!r}")


def names_in_order(things: list[DetectedThing], digit: int, side: int, boxes: bool) -> list[str]:
    """Names of things, the sign's among them (a thing of shape `sign`), row by row and from left to right."""
    named = []
    for thing in sorted(things, key=lambda thing: place(thing.box, side)):
        article = "an" if thing.color == "orange" else "a"
        sign = f"a sign that says {digit}"
        name = sign if thing.shape == "sign" else f"{article} {thing.color} {thing.shape}"
        named.append(f"{name} {written(thing.box, side)}" if boxes else name)
    return named


def place(box, side: int) -> tuple[int, int]:
    """Row and column, from 1 to 4, that the middle of a box in pixels lies in."""
    left, top, right, bottom = nearest_twentieths(box, side)
    return int((top + bottom) / 2 / 0.25 + 1e-9) + 1, int((left + right) / 2 / 0.25 + 1e-9) + 1


def nearest_twentieths(box, side: int) -> list[float]:
    return [round(value / side * 20) / 20 for value in box]


def written(box, side: int) -> str:
    return "[{:.2f}, {:.2f}, {:.2f}, {:.2f}]".format(*nearest_twentieths(box, side))


def _box(where: tuple[slice, slice]) -> tuple[int, int, int, int]:
    rows, columns = where
    return columns.start, rows.start, columns.stop, rows.stop


def _shape(filled: np.ndarray) -> str:
    """By corners, the middle, and how much of the box is filled: 1, pi/4, 1/2 or 5/9 of it, or a band."""
    height, width = filled.shape
    if not filled[height // 2, width // 2]:
        return "ring"
    if filled[1, 1] and filled[1, -2]:
        return "square"
    if filled[-2, 2] and filled[-2, -3] and not filled[1, 1]:
        return "triangle"
    return "circle" if filled.mean() > 0.68 else "cross"


def _within(box, other) -> bool:
    return other[0] <= box[0] and other[1] <= box[1] and box[2] <= other[2] and box[3] <= other[3]


def _inside(image: Image.Image, box) -> Image.Image:
    """What stands on the sign, without its frame."""
    left, top, right, bottom = box
    edge = max(1, round((right - left) * 0.08))
    return image.convert("L").crop((left + edge, top + edge, right - edge, bottom - edge))


@functools.cache
def _printed() -> np.ndarray:
    font = ImageFont.load_default(size=60)
    pages = []
    for digit in range(10):
        page = Image.new("L", (80, 80), 248)
        ImageDraw.Draw(page).text((20, 5), str(digit), fill=20, font=font)
        pages.append(_cut_out(page))
    return np.stack(pages)


def _cut_out(page: Image.Image) -> np.ndarray:
    """The ink of a page: its digit alone, in the middle of a square of its height, (16, 16)."""
    ink = 248 - np.asarray(page).astype(int)
    rows, columns = np.nonzero((ink > 100).any(1))[0], np.nonzero((ink > 100).any(0))[0]
    height, middle = rows[-1] + 1 - rows[0], (columns[0] + columns[-1] + 1) / 2
    box = (middle - height / 2, rows[0], middle + height / 2, rows[-1] + 1)
    padded = Image.fromarray(ink.clip(0, 255).astype(np.uint8)).transform(
        (64, 64), Image.Transform.EXTENT, box, Image.Resampling.BILINEAR
    )
    return np.asarray(padded.resize((16, 16), Image.Resampling.BOX)).astype(float)


def _likeness(one: np.ndarray, many: np.ndarray) -> np.ndarray:
    """Correlations of an image (height, width) with many (n, height, width)."""
    one, many = one.reshape(-1) - one.mean(), many.reshape(len(many), -1)
    many = many - many.mean(1, keepdims=True)
    return many @ one / np.linalg.norm(many, axis=1) / np.linalg.norm(one)
