"""Scenes as images."""

import functools

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..errors import ConvLlavaError
from .world import COLORS, UNITS, Scene, Sign, Thing


_PAPER = (248, 248, 248)
_INK = 20
_TEST_WRITERS = 5  # one handwritten digit in so many is kept for the test split
_DIGIT_HEIGHT = 0.72  # of the sign's side
_CAP_HEIGHT = 0.72  # of a font's size


def draw(scene: Scene, side: int = 256) -> Image.Image:
    """The image of a scene, RGB.

    Args:
        side: height and width in pixels.
    """
    image = Image.new("RGB", (side, side), scene.background)
    for thing in scene.things:
        draw_thing(image, thing, side / UNITS)
    draw_sign(image, scene.sign, side / UNITS, scene.split)
    return image


def draw_thing(image: Image.Image, thing: Thing, unit: float) -> None:
    """Draws a thing into an image in which one unit of boxes is `unit` pixels."""
    left, top, right, bottom = (value * unit for value in thing.box)
    right, bottom = right - 1, bottom - 1  # PIL draws up to and with its last pixel
    color, pen = COLORS[thing.color], ImageDraw.Draw(image)
    third = (right - left) / 3
    if thing.shape == "circle":
        pen.ellipse((left, top, right, bottom), fill=color)
    elif thing.shape == "square":
        pen.rectangle((left, top, right, bottom), fill=color)
    elif thing.shape == "triangle":
        pen.polygon([((left + right) / 2, top), (right, bottom), (left, bottom)], fill=color)
    elif thing.shape == "cross":
        pen.rectangle((left + third, top, right - third, bottom), fill=color)
        pen.rectangle((left, top + third, right, bottom - third), fill=color)
    elif thing.shape == "ring":
        pen.ellipse((left, top, right, bottom), outline=color, width=max(1, round(third * 0.6)))
    else:
        raise ValueError(f"There is no shape {thing.shape!r}.")


def draw_sign(image: Image.Image, sign: Sign, unit: float, split: str) -> None:
    """Draws a sign. Handwritten digits of the two splits are different images."""
    left, top, right, bottom = (round(value * unit) for value in sign.box)
    side = right - left
    ImageDraw.Draw(image).rectangle((left, top, right - 1, bottom - 1), fill=_PAPER, outline=(_INK,) * 3)
    if sign.handwriting is None:
        font = _font(max(4, round(side * _DIGIT_HEIGHT / _CAP_HEIGHT)))
        middle = ((left + right) / 2, (top + bottom) / 2)
        ImageDraw.Draw(image).text(middle, str(sign.digit), fill=(_INK,) * 3, font=font, anchor="mm")
        return
    images = handwritten_digits(split)[sign.digit]
    ink = Image.fromarray(images[sign.handwriting % len(images)])
    inner = max(1, side - 2 * max(1, round(side * 0.08)))
    ink = ink.resize((inner, inner), Image.Resampling.BICUBIC)
    offset = (side - inner) // 2
    image.paste((_INK,) * 3, (left + offset, top + offset), mask=ink)


@functools.cache
def handwritten_digits(split: str) -> list[np.ndarray]:
    """scikit-learn's handwritten digits, (n, 8, 8) of ink from 0 to 255 for each of the ten digits.

    Raises:
        ConvLlavaError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConvLlavaError(
            "The miniature world takes its handwritten digits from scikit-learn, which is not installed: "
            "pip install 'convllava-hf[quickstart]'"
        ) from error
    digits = load_digits()
    ink = (digits.images * (255 / 16)).round().astype(np.uint8)
    for_test = np.arange(len(ink)) % _TEST_WRITERS == 0
    chosen = for_test if split == "test" else ~for_test
    return [ink[chosen & (digits.target == digit)] for digit in range(10)]


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=size)
