"""The miniature world: scenes of colored shapes and one sign with a digit, as facts; nothing is drawn here."""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np


COLORS = {
    "red": (214, 45, 45),
    "green": (45, 165, 70),
    "blue": (45, 80, 215),
    "yellow": (235, 205, 45),
    "purple": (140, 60, 180),
    "orange": (238, 135, 35),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
UNITS = 20  # every edge of a box lies on a multiple of 1/20 of the image's side
CELLS = 4  # rows and columns of text images; no cell holds the centers of two things

SPLITS = ("train", "test")
_TEST_SHARE = 8  # one scene in so many belongs to the test split
_MOST_THINGS = 4
_TRIES = 100
_MOST_SMALLEST, _MOST_LARGEST = 6, 8  # units: five larger ones would seldom fit

Box = tuple[int, int, int, int]  # left, top, right, bottom in twentieths of the image's side


@dataclass(frozen=True)
class Thing:
    """A colored shape."""

    color: str
    shape: str
    box: Box


@dataclass(frozen=True)
class Sign:
    """A white sign with one digit: printed, or the handwritten image of that number."""

    digit: int
    box: Box
    handwriting: int | None = None


@dataclass(frozen=True)
class Scene:
    """What is in an image.

    Attributes:
        things: no two of the same color and shape; in random order.
        sign: there is one in every scene.
        counted: the color or the shape that one, two or three things have, each as often.
        background: red, green and blue, 0-255.
    """

    things: tuple[Thing, ...]
    sign: Sign
    counted: str
    background: tuple[int, int, int]

    @property
    def split(self) -> str:
        """`"test"` or `"train"`, by what is in the scene: no scene can be in both."""
        facts = repr((sorted((t.color, t.shape, t.box) for t in self.things), self.sign.digit, self.sign.box))
        return "test" if zlib.crc32(facts.encode()) % _TEST_SHARE == 0 else "train"


@dataclass(frozen=True)
class World:
    """What scenes can be like. Sizes are sides of boxes in twentieths of the image's, smallest and largest.

    Args:
        thing_sizes: of the colored shapes.
        sign_sizes: of the sign.
        handwritten: share of signs with a handwritten digit.

    Raises:
        ValueError: things of these sizes do not fit into an image.
    """

    thing_sizes: tuple[int, int] = (4, 7)
    sign_sizes: tuple[int, int] = (4, 6)
    handwritten: float = 0.5

    def __post_init__(self):
        for name in ("thing_sizes", "sign_sizes"):
            smallest, largest = getattr(self, name)
            if not 1 <= smallest <= largest <= _MOST_LARGEST or smallest > _MOST_SMALLEST:
                raise ValueError(
                    f"{name}={(smallest, largest)}: {_MOST_THINGS} things and a sign would not fit into an image of "
                    f"{UNITS} units; expected a smallest of 1 to {_MOST_SMALLEST} and a largest up to {_MOST_LARGEST}."
                )

    def scenes(self, split: str, seed: int | Sequence[int]) -> Iterator[Scene]:
        """Scenes without end; the same ones for the same world, split and seed.

        Raises:
            ValueError: there is no such split.
        """
        if split not in SPLITS:
            raise ValueError(f"There is no split {split!r}; expected {' or '.join(SPLITS)}.")
        rng = np.random.default_rng([*np.atleast_1d(seed), SPLITS.index(split)])
        while True:
            scene = self._draw(rng)
            if scene.split == split:
                yield scene

    def _draw(self, rng: np.random.Generator) -> Scene:
        kinds, counted = _draw_kinds(rng)
        boxes = None
        while boxes is None:  # for the same things, else crowded scenes would be rarer
            sizes = [int(rng.integers(self.thing_sizes[0], self.thing_sizes[1] + 1)) for _ in kinds]
            sizes.append(int(rng.integers(self.sign_sizes[0], self.sign_sizes[1] + 1)))
            boxes = _place(sizes, rng)
        things = [Thing(color, shape, box) for (color, shape), box in zip(kinds, boxes[:-1], strict=True)]
        sign = Sign(digit=int(rng.integers(10)), box=boxes[-1])
        if rng.random() < self.handwritten:
            sign = replace(sign, handwriting=int(rng.integers(2**31)))
        order = rng.permutation(len(things))
        gray = rng.integers(85, 200)
        background = tuple(int(value) for value in gray + rng.integers(-15, 16, 3))
        return Scene(tuple(things[i] for i in order), sign, counted, background)


def cell_of(box: Box) -> tuple[int, int]:
    """Row and column, from 0, of the sixteenth of the image that holds the center of a box."""
    left, top, right, bottom = box
    return (top + bottom) * CELLS // (2 * UNITS), (left + right) * CELLS // (2 * UNITS)


def _draw_kinds(rng: np.random.Generator) -> tuple[list[tuple[str, str]], str]:
    """Colors and shapes of a scene's things, and the color or shape that one to three of them share.

    Drawing the number first makes each as likely; colors and shapes are then alike by symmetry.
    """
    count = int(rng.integers(1, 4))
    others = int(rng.integers(0, min(2, _MOST_THINGS - count) + 1))
    colors, shapes = list(rng.permutation(list(COLORS))), list(rng.permutation(SHAPES))
    if rng.random() < 0.5:
        counted = shapes[0]
        kinds = [(color, counted) for color in colors[:count]]
        rest = [(color, shape) for color in colors for shape in shapes[1:]]
    else:
        counted = colors[0]
        kinds = [(counted, shape) for shape in shapes[:count]]
        rest = [(color, shape) for color in colors[1:] for shape in shapes]
    kinds += [rest[i] for i in rng.choice(len(rest), others, replace=False)]
    return [(str(color), str(shape)) for color, shape in kinds], str(counted)


def _place(sizes: list[int], rng: np.random.Generator) -> list[Box] | None:
    """Squares of the given sides that do not touch, their centers in different cells; `None` if there is no room."""
    boxes: list[Box] = []
    for size in sizes:
        for _ in range(_TRIES):
            left, top = (int(value) for value in rng.integers(0, UNITS - size + 1, 2))
            box = (left, top, left + size, top + size)
            if all(_apart(box, other) and cell_of(box) != cell_of(other) for other in boxes):
                boxes.append(box)
                break
        else:
            return None
    return boxes


def _apart(one: Box, other: Box) -> bool:
    return one[2] < other[0] or other[2] < one[0] or one[3] < other[1] or other[3] < one[1]
