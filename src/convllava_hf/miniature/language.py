"""Scenes as words: captions, questions with their answers, and text images."""

from dataclasses import dataclass

import numpy as np

from .world import CELLS, COLORS, SHAPES, UNITS, Box, Scene, Thing, cell_of


GENERAL = ("color", "shape", "presence", "count")
KINDS = ("reading", *GENERAL, "grounding")
NUMBERS = ("zero", "one", "two", "three")
_PERIODS = UNITS * np.array([2, 1, 1 / 2])
EDGES = 4 * 2 * len(_PERIODS)  # numbers that tell a reader of text images where a box is
CAPTION_PROMPT = "Describe the picture."
GROUNDED_PROMPT = "Describe the picture with bounding boxes."


@dataclass(frozen=True)
class Mix:
    """What conversations are about.

    Args:
        captions, grounded_captions: share of captions, without boxes and with them.
        boxes: share of conversations about the boxes of all things. The rest is questions of the other kinds.
        boxes_at_end: how many boxes are asked for after those.
    """

    captions: float = 0.0
    grounded_captions: float = 0.0
    boxes: float = 0.0
    boxes_at_end: int = 0


@dataclass(frozen=True)
class Question:
    """A question about a scene. `kind` is one of `KINDS`, or `"caption"`."""

    kind: str
    text: str
    answer: str


def box_text(box: Box) -> str:
    """`[left, top, right, bottom]` from 0 to 1, as LLaVA's data sets write boxes."""
    return f"[{', '.join(f'{value / UNITS:.2f}' for value in box)}]"


def caption(scene: Scene, boxes: bool = False) -> str:
    """Everything in a scene, in reading order; with its boxes if so asked."""
    facts = [(cell_of(thing.box), f"{_article(thing.color)} {thing.shape}", thing.box) for thing in scene.things]
    facts.append((cell_of(scene.sign.box), f"a sign that says {scene.sign.digit}", scene.sign.box))
    return ", ".join(f"{what} {box_text(box)}" if boxes else what for _, what, box in sorted(facts)) + "."


def text_image(scene: Scene) -> list[tuple[str, ...]]:
    """A scene in words, some for each cell in reading order: what a language model can look at.

    The words of a cell are said at once, at the very position where its visual token will be. Text images are to the
    miniature's language model what all that it has read is to Vicuna: a way to know about things, places and questions
    about them before it ever sees an image.
    """
    words = {cell_of(thing.box): (thing.color, thing.shape) for thing in scene.things}
    words[cell_of(scene.sign.box)] = ("sign", str(scene.sign.digit))
    return [words.get((row, column), ("ground",)) for row in range(CELLS) for column in range(CELLS)]


def edges_of_cells(scene: Scene) -> np.ndarray:
    """Where the edges of what stands in the cells of a text image are, (16, 24); 0 where there is nothing.

    Sines and cosines of left, top, right and bottom, with periods of twice the image's side, once and half of it:
    the long ones say where roughly, the short ones exactly. Told of places within the cell instead, the language
    model would have to know which column a cell is in, and does not learn it in the time.
    """
    edges = np.zeros((CELLS, CELLS, EDGES), np.float32)
    for box in (*(thing.box for thing in scene.things), scene.sign.box):
        angles = np.outer(box, 2 * np.pi / _PERIODS).reshape(-1)
        edges[cell_of(box)] = np.concatenate([np.sin(angles), np.cos(angles)])
    return edges.reshape(-1, EDGES)


def conversation(scene: Scene, rng: np.random.Generator, mix: Mix) -> list[tuple[str, str]]:
    """What is said about a scene, in turns of a prompt and its answer.

    It is a caption, or the boxes of all things in random order, or one question of each other kind in random order,
    with boxes after them. Before them there are none: whoever has been asked for the box of the red square need not
    look any more to know that there is one.
    """
    boxes = [grounding_question(scene.things[i]) for i in rng.permutation(len(scene.things))]
    drawn = rng.random()
    if drawn < mix.captions:
        return [(CAPTION_PROMPT, caption(scene))]
    if (drawn := drawn - mix.captions) < mix.grounded_captions:
        return [(GROUNDED_PROMPT, caption(scene, boxes=True))]
    if drawn - mix.grounded_captions < mix.boxes:
        asked = boxes
    else:
        others = [question for question in questions(scene, rng) if question.kind != "grounding"]
        asked = [others[i] for i in rng.permutation(len(others))] + boxes[: mix.boxes_at_end]
    return [(question.text, question.answer) for question in asked]


def questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """One question of every kind that the scene allows, drawn by `rng`, in the order of `KINDS`.

    No constant answer is right much more often than any other: numbers are drawn before things are, half the answers
    about presence are yes, and colors, shapes, digits and places are alike by symmetry.
    """
    found = [Question("reading", "What does the sign say?", str(scene.sign.digit))]
    if alone := _alone(scene, "shape"):
        thing = alone[rng.integers(len(alone))]
        found.append(Question("color", f"What color is the {thing.shape}?", thing.color))
    if alone := _alone(scene, "color"):
        thing = alone[rng.integers(len(alone))]
        found.append(Question("shape", f"What shape is the {thing.color} object?", thing.shape))
    found.append(_presence(scene, rng))
    found.append(count_question(scene, scene.counted))
    found.append(grounding_question(scene.things[rng.integers(len(scene.things))]))
    return found


def count_question(scene: Scene, counted: str) -> Question:
    """How many things have a color or a shape."""
    number = sum(counted in (thing.color, thing.shape) for thing in scene.things)
    return Question("count", f"How many {_plural(counted)} are there?", NUMBERS[number])


def grounding_question(thing: Thing) -> Question:
    """Where a thing is."""
    return Question("grounding", f"Give the bounding box of the {thing.color} {thing.shape}.", box_text(thing.box))


def _presence(scene: Scene, rng: np.random.Generator) -> Question:
    there = [(thing.color, thing.shape) for thing in scene.things]
    if rng.random() < 0.5:
        color, shape = there[rng.integers(len(there))]
        return Question("presence", f"Is there {_article(color)} {shape}?", "yes")
    # Half of what is not there has the color of one thing and the shape of another, where there are such.
    mixed = {(color, shape) for color, _ in there for _, shape in there}.difference(there)
    absent = sorted(mixed) if mixed and rng.random() < 0.5 else [
        (color, shape) for color in COLORS for shape in SHAPES if (color, shape) not in there
    ]  # fmt: skip
    color, shape = absent[rng.integers(len(absent))]
    return Question("presence", f"Is there {_article(color)} {shape}?", "no")


def _alone(scene: Scene, attribute: str) -> list[Thing]:
    """Things whose color or shape no other thing has."""
    values = [getattr(thing, attribute) for thing in scene.things]
    return [thing for thing, value in zip(scene.things, values, strict=True) if values.count(value) == 1]


def _article(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def _plural(counted: str) -> str:
    if counted in COLORS:
        return f"{counted} objects"
    return counted + ("es" if counted.endswith("s") else "s")
