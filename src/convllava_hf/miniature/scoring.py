"""How many questions about unseen scenes a model answers rightly, beside chance and beside answering blind."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from PIL import Image

from .drawing import draw
from .language import KINDS, Question, questions
from .world import Scene, World


MIN_OVERLAP = 0.5  # intersection over union of a box that counts as found, as in RefCOCO
_MAX_NEW_TOKENS = 16  # a box takes ten
_BATCH = 64
_BOX = re.compile(r"\[(\d\.\d+), (\d\.\d+), (\d\.\d+), (\d\.\d+)\]")

OnStep = Callable[[int, int], None]  # questions answered, questions in all


@dataclass(frozen=True)
class Answered:
    """A question, what the model answered, and what it answered to another scene's picture."""

    scene: Scene
    question: Question
    answer: str
    blind: str

    @property
    def correct(self) -> bool:
        return is_right(self.question.kind, self.answer, self.question.answer)


def ask_about_scenes(
    model,
    processor,
    world: World,
    *,
    scenes: int,
    seed: int,
    side: int = 256,
    kinds: Sequence[str] = KINDS,
    on_step: OnStep | None = None,
) -> list[Answered]:
    """Asks a model one question of each kind about scenes of the test split, twice: seeing and blind.

    Blind means that the picture is another scene's, so that nothing is wrong with it but that it does not help.

    Args:
        scenes: their number.
        seed: of the scenes and questions.
        side: height and width of the pictures in pixels.
        kinds: of the questions.
    """
    shown = list(islice(world.scenes("test", seed), scenes))
    rng = np.random.default_rng([seed, 400])
    asked = [(index, question) for index, scene in enumerate(shown) for question in questions(scene, rng)]
    asked = [item for item in asked if item[1].kind in kinds]
    asked.sort(key=lambda item: KINDS.index(item[1].kind))  # answers of a batch are then of like length
    pictures = [draw(scene, side) for scene in shown]
    answers: list[list[str]] = []
    for offset in (0, scenes // 2):
        prompts = [(pictures[(index + offset) % scenes], question.text) for index, question in asked]
        done = len(answers) * len(asked)
        answers.append(_answer(model, processor, prompts, on_step, done, 2 * len(asked)))
    return [
        Answered(shown[index], question, answer, blind)
        for (index, question), answer, blind in zip(asked, *answers, strict=True)
    ]


def score(answered: Sequence[Answered]) -> dict[str, dict]:
    """`accuracy`, `chance` and `blind`, from 0 to 1, and the number of `questions`, each by kind.

    `chance` is the accuracy of the constant answer that is right most often.
    """
    result: dict[str, dict] = {"accuracy": {}, "chance": {}, "blind": {}, "questions": {}}
    for kind in dict.fromkeys(row.question.kind for row in answered):
        rows = [row for row in answered if row.question.kind == kind]
        truths = [row.question.answer for row in rows]
        result["accuracy"][kind] = _share(is_right(kind, row.answer, row.question.answer) for row in rows)
        result["blind"][kind] = _share(is_right(kind, row.blind, row.question.answer) for row in rows)
        constants = [answer for answer, _ in Counter(truths).most_common(_BATCH)]
        result["chance"][kind] = max(_share(is_right(kind, constant, t) for t in truths) for constant in constants)
        result["questions"][kind] = len(rows)
    return result


def is_right(kind: str, answer: str, truth: str) -> bool:
    """Whether an answer is the true one; for grounding, whether its box overlaps the true one enough."""
    if kind != "grounding":
        return answer.strip() == truth
    box, true_box = parse_box(answer), parse_box(truth)
    return box is not None and intersection_over_union(box, true_box) >= MIN_OVERLAP


def parse_box(text: str) -> tuple[float, ...] | None:
    """`[left, top, right, bottom]` as numbers, `None` if the text is no such box."""
    match = _BOX.fullmatch(text.strip())
    return tuple(map(float, match.groups())) if match else None


def intersection_over_union(one: Sequence[float], other: Sequence[float]) -> float:
    """Area of what two boxes share over the area that they cover together; 0 if either is turned inside out."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return width * height / (sum(areas) - width * height)


def _share(right) -> float:
    return round(float(np.mean(list(right))), 4)


def _answer(
    model, processor, prompts: list[tuple[Image.Image, str]], on_step: OnStep | None, done: int, total: int
) -> list[str]:
    answers: list[str] = []
    for start in range(0, len(prompts), _BATCH):
        conversations = []
        for picture, text in prompts[start : start + _BATCH]:
            content = [{"type": "image", "image": picture}, {"type": "text", "text": text}]
            conversations.append([{"role": "user", "content": content}])
        inputs = processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            padding=True,
        ).to(model.device)
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=_MAX_NEW_TOKENS, do_sample=False)
        new = output[:, inputs["input_ids"].shape[1] :]
        answers += [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
        if on_step:
            on_step(done + len(answers), total)
    return answers
