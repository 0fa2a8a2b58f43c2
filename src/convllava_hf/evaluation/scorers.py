"""How one answer is scored, and what a benchmark's score is made of."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..errors import ConvLlavaError
from .metrics import (
    MIN_IOU,
    MME_COGNITION,
    MME_PERCEPTION,
    MmeRow,
    box_in_answer,
    box_iou,
    exact_match,
    f1_score,
    mme_points,
    mme_scores,
    ocrbench_score,
    parse_choice,
    parse_yes_no,
    pope_scores,
)
from .samples import LETTERS, Sample


Row = Mapping[str, Any]  # a line of the file of samples
ScoredAnswer = dict[str, Any]  # `score` from 0 to 1, and what was read out of the answer


@dataclass(frozen=True)
class ImageGeometry:
    """The image that was asked about: `width` and `height` in pixels, `padded` if the model saw it in a square."""

    width: int
    height: int
    padded: bool


Scorer = Callable[[Sample, str, ImageGeometry], ScoredAnswer]


def by_answers(score: Callable[[str, Sequence[str]], float]) -> Scorer:
    """By a metric that compares a prediction with the answers."""

    def scorer(sample: Sample, prediction: str, seen: ImageGeometry) -> ScoredAnswer:
        return {"score": score(prediction, sample.answers)}

    return scorer


def by_choice(sample: Sample, prediction: str, seen: ImageGeometry) -> ScoredAnswer:
    """By the option that is chosen; by exact match where a question has no options, as some of RealWorldQA have."""
    if not sample.choices:
        return {"score": exact_match(prediction, sample.answers)}
    index = parse_choice(prediction, sample.choices)
    letter = None if index is None else LETTERS[index]
    return {"score": float(letter in sample.answers), "read": letter}


def by_yes_no(sample: Sample, prediction: str, seen: ImageGeometry) -> ScoredAnswer:
    """By yes or no; what is neither is wrong."""
    said = parse_yes_no(prediction)
    return {"score": float(said is not None and said == (sample.answers[0] == "yes")), "read": said}


def by_containment(sample: Sample, prediction: str, seen: ImageGeometry) -> ScoredAnswer:
    """By OCRBench's rule for the sample's category."""
    return {"score": ocrbench_score(prediction, sample.answers, sample.category or "")}


def by_overlap(sample: Sample, prediction: str, seen: ImageGeometry) -> ScoredAnswer:
    """By the first box of the answer: in fractions or thousandths of what the model saw, a padded square or not."""
    truth = unit_box(sample, seen)
    box = box_in_answer(prediction, seen.width, seen.height, seen.padded)
    if box is None:
        return {"score": 0.0, "read": None, "truth": truth, "overlap": 0.0}
    overlap = box_iou(box, truth)
    return {"score": float(overlap >= MIN_IOU), "read": list(box), "truth": truth, "overlap": round(overlap, 4)}


def unit_box(sample: Sample, seen: ImageGeometry) -> list[float]:
    """The box that is looked for, in fractions of the image."""
    if sample.box is None:
        raise ConvLlavaError(f"Sample {sample.id} has no box: it is no question of RefCOCO.")
    left, top, right, bottom = sample.box
    return [left / seen.width, top / seen.height, right / seen.width, bottom / seen.height]


@dataclass(frozen=True)
class Table:
    """What a score is made of, for resampling: the score is a function of sums over groups of samples.

    `sums`: (groups, quantities). `strata`: (groups,), groups are drawn within their stratum. `groups`: their names.
    """

    sums: np.ndarray
    strata: np.ndarray
    groups: list[str]


class Summary(Protocol):
    """From scored samples to a score."""

    @property
    def size(self) -> int | None:
        """Of a whole group of samples; `None` where it may be any."""
        ...

    def table(self, rows: Sequence[Row]) -> Table: ...

    def score(self, sums: np.ndarray) -> np.ndarray:
        """(..., quantities) -> (...)"""
        ...

    def details(self, rows: Sequence[Row]) -> dict[str, float]:
        """Scores of parts, and others that go with the benchmark's."""
        ...


@dataclass(frozen=True)
class Mean:
    """The mean of samples in percent; where they have groups, of these, each as right as the worst of its samples."""

    size: int | None = None
    name: str = "accuracy"

    def table(self, rows: Sequence[Row]) -> Table:
        groups: dict[str, float] = {}
        for row in rows:
            name = row.get("group") or row["id"]
            groups[name] = min(groups.get(name, 1.0), row["score"])
        sums = np.array([[score, 1.0] for score in groups.values()]).reshape(-1, 2)
        return Table(sums, np.zeros(len(groups), dtype=int), list(groups))

    def score(self, sums: np.ndarray) -> np.ndarray:
        return 100 * sums[..., 0] / sums[..., 1]

    def details(self, rows: Sequence[Row]) -> dict[str, float]:
        found = {self.name: self._of(rows)}
        if any(row.get("group") for row in rows):
            found["accuracy of single questions"] = 100 * float(np.mean([row["score"] for row in rows]))
        return found | {f"{self.name}, {part}": self._of(some) for part, some in by_category(rows).items()}

    def _of(self, rows: Sequence[Row]) -> float:
        return float(self.score(self.table(rows).sums.sum(0)))


@dataclass(frozen=True)
class F1:
    """POPE: the F1 of saying yes, in percent."""

    size: int | None = None

    def table(self, rows: Sequence[Row]) -> Table:
        sums = [[float(bool(row["read"]) and _is_yes(row)), bool(row["read"]), _is_yes(row)] for row in rows]
        return Table(np.array(sums, dtype=float).reshape(-1, 3), np.zeros(len(rows), dtype=int), _ids(rows))

    def score(self, sums: np.ndarray) -> np.ndarray:
        hits, said, true = np.moveaxis(sums, -1, 0)
        return f1_score(hits, said, true, scale=100)

    def details(self, rows: Sequence[Row]) -> dict[str, float]:
        found = self._of(rows)
        for part, some in by_category(rows).items():
            found[f"f1, {part}"] = self._of(some)["f1"]
        return found

    def _of(self, rows: Sequence[Row]) -> dict[str, float]:
        scores = pope_scores([row["read"] for row in rows], [_is_yes(row) for row in rows])
        return {name: 100 * value for name, value in scores.items()}


@dataclass(frozen=True)
class Mme:
    """MME: the sum over its perception categories; images have two questions each and are drawn by category."""

    size: int | None = 2

    def table(self, rows: Sequence[Row]) -> Table:
        images: dict[tuple[str, str], list[float]] = defaultdict(list)
        for row in rows:
            images[row["category"], row["group"]].append(row["score"])
        names = MME_PERCEPTION + MME_COGNITION
        sums = np.zeros((len(images), 2 * len(names)))
        strata = np.zeros(len(images), dtype=int)
        for number, ((category, _), scores) in enumerate(images.items()):
            strata[number] = place = names.index(category)
            sums[number, 2 * place] = mme_points(scores)
            sums[number, 2 * place + 1] = 1
        return Table(sums, strata, [f"{category} {image}" for category, image in images])

    def score(self, sums: np.ndarray) -> np.ndarray:
        points, images = sums[..., 0::2], sums[..., 1::2]
        means = points / np.maximum(images, 1)  # (..., categories)
        return means[..., : len(MME_PERCEPTION)].sum(-1)

    def details(self, rows: Sequence[Row]) -> dict[str, float]:
        return mme_scores(MmeRow(row["category"], row["group"], row["read"], _is_yes(row)) for row in rows)


def by_category(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The samples of each category, where there are several."""
    parts: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row.get("category"):
            parts[row["category"]].append(row)
    return dict(sorted(parts.items())) if len(parts) > 1 else {}


def _is_yes(row: Row) -> bool:
    return row["answers"][0] == "yes"


def _ids(rows: Sequence[Row]) -> list[str]:
    return [row["id"] for row in rows]
