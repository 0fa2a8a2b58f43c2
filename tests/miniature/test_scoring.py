"""What counts as right, and what chance is: against counting squares and against trying every answer."""

from itertools import islice

import numpy as np
import pytest

from convllava_hf.evaluation.metrics import box_iou
from convllava_hf.miniature.language import KINDS, Question, questions
from convllava_hf.miniature.scoring import (
    Answered,
    chance,
    is_right,
    parse_box,
    score,
)
from convllava_hf.miniature.world import World


def covered(box) -> set[tuple[int, int]]:
    left, top, right, bottom = box
    return {(x, y) for x in range(left, right) for y in range(top, bottom)}


def test_overlap_is_that_of_the_squares_that_both_cover():
    rng = np.random.default_rng(0)
    corners = rng.integers(0, 8, (2, 300, 2))
    boxes = np.concatenate([corners, corners + rng.integers(1, 6, (2, 300, 2))], axis=-1)
    overlaps = box_iou(*boxes)
    for one, other, overlap in zip(*boxes.tolist(), overlaps, strict=True):
        one, other = covered(one), covered(other)
        assert overlap == pytest.approx(len(one & other) / len(one | other))
    assert 0 < (overlaps == 0).mean() < 1
    table = box_iou(boxes[0][:5, None], boxes[1][None, :7])
    assert table.shape == (5, 7) and np.array_equal(table.diagonal(), overlaps[:5])


@pytest.mark.parametrize("box", [(0.5, 0.1, 0.2, 0.3), (0.1, 0.3, 0.2, 0.3), (0.9, 0.9, 0.1, 0.1)])
def test_a_box_turned_inside_out_overlaps_nothing(box):
    assert box_iou(box, (0.1, 0.1, 0.5, 0.5)) == 0
    assert box_iou(box, box) == 0


@pytest.mark.parametrize(
    "kind, answer, truth, right",
    [
        ("color", " red ", "red", True),
        ("color", "red.", "red", False),
        ("grounding", "[0.10, 0.10, 0.30, 0.30]", "[0.10, 0.10, 0.30, 0.30]", True),
        ("grounding", "[0.10, 0.10, 0.30, 0.20]", "[0.10, 0.10, 0.30, 0.30]", True),  # exactly half
        ("grounding", "[0.10, 0.10, 0.29, 0.20]", "[0.10, 0.10, 0.30, 0.30]", False),
        ("grounding", "[0.10, 0.10, 0.30]", "[0.10, 0.10, 0.30, 0.30]", False),
        ("grounding", "red", "[0.10, 0.10, 0.30, 0.30]", False),
    ],
)
def test_what_is_right(kind, answer, truth, right):
    assert is_right(kind, answer, truth) is right


@pytest.mark.parametrize("text", ["", "[0.1, 0.2, 0.3]", "[1, 2, 3, 4]", "[0.10, 0.10, 0.30, 0.30], and more"])
def test_what_is_no_box(text):
    assert parse_box(text) is None


def test_score_counts_each_kind_by_itself():
    def row(kind: str, truth: str, answer: str, blind: str) -> Answered:
        return Answered(None, Question(kind, "", truth), answer, blind)

    answered = [
        row("color", "red", "red", "blue"),
        row("color", "blue", "red", "blue"),
        row("color", "green", "green", "blue"),
        row("count", "one", "two", "one"),
    ]
    assert score(answered) == {
        "accuracy": {"color": 0.6667, "count": 0.0},
        "blind": {"color": 0.3333, "count": 1.0},
        "questions": {"color": 3, "count": 1},
    }


@pytest.mark.slow
def test_chance_is_of_the_best_constant_answer_on_scenes_that_did_not_choose_it(monkeypatch):
    monkeypatch.setattr("convllava_hf.miniature.scoring._SCENES_FOR_CHANCE", 150)
    world, seed = World(), 3
    answers = [{kind: [] for kind in KINDS} for _ in range(2)]
    rng = np.random.default_rng([seed, 500])
    for number, scene in enumerate(islice(world.scenes("train", [seed, 500]), 300)):
        for question in questions(scene, rng):
            answers[number // 150][question.kind].append(question.answer)
    for kind, accuracy in chance(world, seed=seed).items():
        first, second = (
            {one: np.mean([is_right(kind, one, truth) for truth in half[kind]]) for one in answers[0][kind]}
            for half in answers
        )
        best = [second[one] for one, share in first.items() if share == max(first.values())]
        assert min(abs(accuracy - share) for share in best) < 1e-4, kind


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_chance_is_one_of_the_classes(seed):
    by_kind = chance(World(), seed=seed)
    assert tuple(by_kind) == KINDS
    grounding = by_kind.pop("grounding")
    assert 0.02 < grounding < 0.055
    for accuracy, classes in zip(by_kind.values(), (10, 6, 5, 2, 3), strict=True):
        assert accuracy == pytest.approx(1 / classes, abs=0.04)
