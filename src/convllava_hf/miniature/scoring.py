"""How many questions about unseen scenes a model answers rightly, beside chance and beside answering blind."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from PIL import Image

from ..evaluation.engine import answer_batch
from ..evaluation.metrics import MIN_IOU, Box, box_iou, parse_boxes
from ..inference import Assistant, user_turn
from .drawing import draw
from .language import KINDS, Question, questions
from .world import Scene, World


_MAX_NEW_TOKENS = 16  # the longest answer, a box, takes five with the end
_BATCH = 64
_SCENES_FOR_CHANCE = 2000  # to choose the constant answer, and again to judge it

OnStep = Callable[[int, int], None]  # questions answered, questions in all


@dataclass(frozen=True)
class Answered:
    """A question, what the model answered, and what it answered to another scene's image."""

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

    Blind means that the image is another scene's, so that nothing is wrong with it but that it does not help.

    Args:
        scenes: their number.
        seed: of the scenes and questions.
        side: height and width of the images in pixels.
        kinds: of the questions.
    """
    shown = list(islice(world.scenes("test", seed), scenes))
    rng = np.random.default_rng([seed, 400])
    asked = [(index, question) for index, scene in enumerate(shown) for question in questions(scene, rng)]
    asked = [item for item in asked if item[1].kind in kinds]
    asked.sort(key=lambda item: KINDS.index(item[1].kind))  # answers of a batch are then of like length
    images = [draw(scene, side) for scene in shown]
    answers: list[list[str]] = []
    for offset in (0, scenes // 2):
        prompts = [(images[(index + offset) % scenes], question.text) for index, question in asked]
        done = len(answers) * len(asked)
        answers.append(_answer(Assistant(model, processor), prompts, on_step, done, 2 * len(asked)))
    return [
        Answered(shown[index], question, answer, blind)
        for (index, question), answer, blind in zip(asked, *answers, strict=True)
    ]


def chance(world: World, *, seed: int) -> dict[str, float]:
    """By kind, the accuracy of a constant answer: of the one that is right most often about other scenes.

    All are training scenes, and so many that it is known to two hundredths.
    """
    rng = np.random.default_rng([seed, 500])
    scenes = world.scenes("train", [seed, 500])
    chosen, judged = (_count_answers(islice(scenes, _SCENES_FOR_CHANCE), rng) for _ in range(2))
    result = {}
    for kind in KINDS:
        constant = _most_often_right(kind, chosen[kind])
        right = sum(number for truth, number in judged[kind].items() if is_right(kind, constant, truth))
        result[kind] = round(right / judged[kind].total(), 4)
    return result


def score(answered: Sequence[Answered]) -> dict[str, dict]:
    """`accuracy` and `blind`, from 0 to 1, and the number of `questions`, each by kind."""
    result: dict[str, dict] = {"accuracy": {}, "blind": {}, "questions": {}}
    for kind in dict.fromkeys(row.question.kind for row in answered):
        rows = [row for row in answered if row.question.kind == kind]
        result["accuracy"][kind] = _share(is_right(kind, row.answer, row.question.answer) for row in rows)
        result["blind"][kind] = _share(is_right(kind, row.blind, row.question.answer) for row in rows)
        result["questions"][kind] = len(rows)
    return result


def is_right(kind: str, answer: str, truth: str) -> bool:
    """Whether an answer is the true one; for grounding, whether its box overlaps the true one enough."""
    if kind != "grounding":
        return answer.strip() == truth
    box, true_box = parse_box(answer), parse_box(truth)
    return box is not None and box_iou(box, true_box) >= MIN_IOU


def parse_box(text: str) -> Box | None:
    """The box that a text is, `None` if it is anything but a box in the miniature's own notation."""
    boxes = parse_boxes(text)
    written = [f"[{', '.join(f'{number:.2f}' for number in box)}]" for box in boxes]
    return boxes[0] if written == [text.strip()] else None


def _count_answers(scenes: Iterable[Scene], rng: np.random.Generator) -> dict[str, Counter]:
    answers: dict[str, Counter] = {kind: Counter() for kind in KINDS}
    for scene in scenes:
        for question in questions(scene, rng):
            answers[question.kind][question.answer] += 1
    return answers


def _most_often_right(kind: str, truths: Counter) -> str:
    if kind != "grounding":
        return truths.most_common(1)[0][0]
    boxes = np.array([parse_box(text) for text in truths])
    right = box_iou(boxes[:, None], boxes[None]) >= MIN_IOU
    return list(truths)[np.argmax(right @ np.array(list(truths.values())))]


def _share(right: Iterable[bool]) -> float:
    return round(float(np.mean(list(right))), 4)


def _answer(
    assistant: Assistant, prompts: list[tuple[Image.Image, str]], on_step: OnStep | None, done: int, total: int
) -> list[str]:
    answers: list[str] = []
    for start in range(0, len(prompts), _BATCH):
        conversations = [[user_turn(text, [image])] for image, text in prompts[start : start + _BATCH]]
        replies = answer_batch(assistant, conversations, max_new_tokens=_MAX_NEW_TOKENS)
        answers += [reply.text for reply in replies]
        if on_step:
            on_step(done + len(answers), total)
    return answers
