"""What the miniature's vision tower learns from: images with a name for every place."""

import itertools
import math
from collections.abc import Iterator

import numpy as np
from PIL import Image

from .drawing import draw_sign, draw_thing
from .world import COLORS, SHAPES, UNITS, Sign, Thing


# What can be at a place: any colored shape, a sign with any digit, or nothing.
NAMES = [*((color, shape) for color in COLORS for shape in SHAPES), *range(10), "ground"]
SIDE = 128  # pixels of the tower's images
STRIDE = 32  # pixels of the four-stage tower
SIZES = (48, 102)  # pixels of what is in them: those of scenes of 256 pixels, and some more


def labeled_image(
    rng: np.random.Generator, sizes: tuple[int, int] = SIZES
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """An image of up to three things with sides of so many pixels, and what is at its places.

    Returns:
        The image, (128, 128, 3) of 0-255. The index of what is at the center of each place, (4, 4), or of what lies
        within the place and is too small for any center. How far it reaches from there to the left, top, right and
        bottom, (4, 4, 4) in strides.
    """
    gray = rng.integers(85, 200)
    image = Image.new("RGB", (SIDE, SIDE), tuple(int(value) for value in gray + rng.integers(-15, 16, 3)))
    places = SIDE // STRIDE
    names = np.full((places, places), NAMES.index("ground"))
    edges = np.zeros((places, places, 4), np.float32)
    unit = SIDE / UNITS
    taken: list[tuple[float, ...]] = []
    for _ in range(3):
        side = math.exp(rng.uniform(*np.log(sizes))) / unit
        left, top = rng.uniform(0, UNITS - side, 2)
        box = (left, top, left + side, top + side)
        if any(box[0] < o[2] and o[0] < box[2] and box[1] < o[3] and o[1] < box[3] for o in taken):
            continue
        taken.append(box)
        if rng.random() < 0.5:
            name = int(rng.integers(len(COLORS) * len(SHAPES)))
            draw_thing(image, Thing(*NAMES[name], box), unit)
        else:
            digit, handwriting = int(rng.integers(10)), int(rng.integers(2**31))
            name = NAMES.index(digit)
            draw_sign(image, Sign(digit, box, handwriting if rng.random() < 0.5 else None), unit, "train")
        in_strides = np.array(box) * unit / STRIDE
        for row, column in _places_of(in_strides):
            names[row, column] = name
            edges[row, column] = in_strides - np.array([column, row, column, row]) - 0.5
    return np.asarray(image), names, edges


def _places_of(box: np.ndarray) -> Iterator[tuple[int, int]]:
    """Row and column of the places whose centers are in a box, in strides; or of the one that holds the box's own."""
    left, top, right, bottom = box.round().astype(int)
    rows, columns = range(top, bottom), range(left, right)
    if not rows:
        rows = (int((box[1] + box[3]) / 2),)
    if not columns:
        columns = (int((box[0] + box[2]) / 2),)
    return itertools.product(rows, columns)
