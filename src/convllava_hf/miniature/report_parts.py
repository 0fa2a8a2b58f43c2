"""What the report's page, its figure and the findings have in common: numbers as text, curves, boxes."""

import math
from collections.abc import Iterable, Mapping

from ..evaluation.metrics import box_iou
from ..utils.atomic import write_atomic
from ..utils.report_style import duration, plain, versions_text
from .scoring import parse_box


__all__ = [
    "COLORS",
    "KIND_NOTES",
    "LOSS_TICKS",
    "STEP_NOTES",
    "Curve",
    "amount",
    "boxes",
    "curves",
    "duration",
    "loss_limits",
    "missing",
    "overlap",
    "plain",
    "share",
    "versions_text",
    "write_atomic",
]
# The colors of docs/architecture.svg.
COLORS = {
    "ink": "#0f172a",
    "soft": "#475569",
    "line": "#cbd5e1",
    "accuracy": "#c2410c",
    "chance": "#475569",
    "blind": "#6d28d9",
    "right": "#15803d",
    "wrong": "#be123c",
}
KIND_NOTES = {
    "reading": "What does the sign say?",
    "color": "What color is the square?",
    "shape": "What shape is the red object?",
    "presence": "Is there a blue ring?",
    "count": "How many circles are there?",
    "grounding": "Give the bounding box of the red square.",
}
STEP_NOTES = {
    "vision tower": "Stage 0: four stages learn to name things, to stand in for CLIP’s ConvNeXt.",
    "language model": "Stage 0: a small Llama learns to talk about scenes told in words, to stand in for Vicuna.",
    "data": "Scenes and conversations about them.",
    "assemble": "Tower and language model become one model, with a new fifth stage and projector.",
    "stage 1": "Projector initialization: the fifth stage and the projector learn.",
    "stage 2": "Pretraining: the tower from its stage 3 on, the projector and the language model learn.",
    "stage 3": "Instruction tuning: the projector and the language model learn.",
    "evaluation": "Questions about unseen scenes, answered seeing and blind.",
}
LOSS_TICKS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30)
_SMALLEST_LOSS = 1e-3
_MOST_POINTS = 240

Curve = list[tuple[float, float]]  # step and loss


def share(value: float | None) -> str:
    """An accuracy with two decimals; a dash if nothing was asked."""
    return "–" if missing(value) else f"{value:.2f}"


def missing(value: float | None) -> bool:
    return value is None or math.isnan(value)


def amount(number: float) -> str:
    """A large number with two significant figures or more, such as `0.67 M`, `51 M` and `1.2 G`."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.1 * size and number >= 1e3:
            value = number / size
            return f"{value:.0f} {unit}" if value >= 9.95 else f"{value:.{1 if value >= 0.995 else 2}f} {unit}"
    return f"{number:.0f}"


def curves(losses: Mapping[str, Iterable]) -> tuple[dict[str, Curve], dict[str, int]]:
    """The loss curves to draw, by step of the run, and how many of each one's values are no finite numbers.

    A step that was logged twice, as after an interruption, counts once, as it was last. Long curves are averaged over
    neighboring steps.
    """
    drawn, lost = {}, {}
    for name, logged in losses.items():
        last = dict((step, loss) for step, loss in logged)
        finite = sorted((step, loss) for step, loss in last.items() if not missing(loss) and math.isfinite(loss))
        lost[name] = len(last) - len(finite)
        size = math.ceil(len(finite) / _MOST_POINTS) or 1
        bins = [finite[start : start + size] for start in range(0, len(finite), size)]
        drawn[name] = [tuple(sum(column) / len(part) for column in zip(*part, strict=True)) for part in bins]
        drawn[name] = [(step, max(loss, _SMALLEST_LOSS)) for step, loss in drawn[name]]
    return drawn, lost


def loss_limits(drawn: Mapping[str, Curve]) -> tuple[float, float]:
    """Smallest and largest loss of all curves with some room, for a logarithmic axis that all share."""
    values = [loss for curve in drawn.values() for _, loss in curve] or [0.1, 10]
    return min(values) / 1.35, max(values) * 1.35


def boxes(sample: Mapping) -> list[tuple[str, tuple[float, float, float, float]]]:
    """What to draw into a sample's image: `"truth"` or `"answer"`, and left, top, width, height from 0 to 1.

    Only grounding has boxes. An answer that is no box is left out, and one that sticks out of the image is cut.
    """
    if sample["kind"] != "grounding":
        return []
    found = []
    for name in ("truth", "answer"):
        box = parse_box(sample[name])
        if box is not None:
            inside = [min(max(value, 0.0), 1.0) for value in box]
            (left, right), (top, bottom) = sorted(inside[0::2]), sorted(inside[1::2])
            found.append((name, (left, top, right - left, bottom - top)))
    return found


def overlap(sample: Mapping) -> float | None:
    """Intersection over union of a sample's two boxes; `None` if there are not two."""
    if sample["kind"] != "grounding":
        return None
    pair = [parse_box(sample[name]) for name in ("truth", "answer")]
    return None if None in pair else box_iou(*pair)
