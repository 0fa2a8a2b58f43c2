"""Scores over many yes-or-no questions: POPE and MME. A prediction that is neither is `None`, and wrong."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from ...errors import ConvLlavaError


MME_PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
MME_COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


class MmeRow(NamedTuple):
    """One of MME's questions; each image has two, one to be answered by yes and one by no."""

    category: str
    image_id: str
    prediction: bool | None
    answer: bool


def f1_score(hits: Any, said_yes: Any, are_yes: Any, scale: float = 1.0) -> Any:
    """The F1 of saying yes, from counts or arrays of counts; 0 without a hit.

    Args:
        hits: answers of yes that are right.
        said_yes, are_yes: answers of yes, and questions whose answer is yes.
        scale: the score of answers that are all right.
    """
    return 2 * scale * hits / (said_yes + are_yes + (hits == 0))  # without a hit the denominator may be 0


def mme_points(right: Sequence[float]) -> float:
    """What an image of MME adds to its category's mean: the percentage of right answers, and 100 if all are.

    Args:
        right: 1 or 0 for each of its questions.
    """
    return 100 * sum(right) / len(right) + 100 * all(right)


def pope_scores(predictions: Sequence[bool | None], answers: Sequence[bool]) -> dict[str, float]:
    """POPE's `accuracy`, and `precision`, `recall` and `f1` of saying yes, and the `yes_ratio`: the share of yes.

    Li et al., "Evaluating Object Hallucination in Large Vision-Language Models" (arXiv 2305.10355). A
    prediction of `None` is wrong and is no yes: it lowers accuracy, and recall where yes was right. A quotient without
    anything in its denominator is 0.

    Raises:
        ConvLlavaError: the two are of different length, or empty.
    """
    if len(predictions) != len(answers) or not len(answers):
        raise ConvLlavaError(
            f"There are {len(predictions)} predictions and {len(answers)} answers, and as many of both, more than "
            "none, are expected."
        )
    right = sum(prediction == answer for prediction, answer in zip(predictions, answers, strict=True))
    hits = sum(bool(prediction and answer) for prediction, answer in zip(predictions, answers, strict=True))
    said_yes, are_yes = sum(map(bool, predictions)), sum(map(bool, answers))
    return {
        "accuracy": right / len(answers),
        "precision": hits / said_yes if said_yes else 0.0,
        "recall": hits / are_yes if are_yes else 0.0,
        "f1": float(f1_score(hits, said_yes, are_yes)),
        "yes_ratio": said_yes / len(answers),
    }


def mme_scores(rows: Iterable[MmeRow]) -> dict[str, float]:
    """MME's scores: each category that occurs, up to 200, and the sums `perception`, up to 2000, and `cognition`, 800.

    Fu et al., "MME" (arXiv 2306.13394): a category's score is its accuracy in percent, and the percentage
    of images of which both questions were answered rightly. A sum is in the result only if one of its
    categories occurs.

    Raises:
        ConvLlavaError: no rows, a category that MME does not have, or an image with other than two questions.
    """
    images: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for category, image_id, prediction, answer in rows:
        if category not in MME_PERCEPTION + MME_COGNITION:
            raise ConvLlavaError(
                f"MME has no category {category!r}: it has {', '.join(MME_PERCEPTION + MME_COGNITION)}."
            )
        images[category][image_id].append(prediction is not None and prediction == answer)
    if not images:
        raise ConvLlavaError("There are no rows to score.")
    scores = {category: _mme_category(category, images[category]) for category in images}
    sums = {}
    for name, group in (("perception", MME_PERCEPTION), ("cognition", MME_COGNITION)):
        if of_group := [scores[category] for category in group if category in scores]:
            sums[name] = sum(of_group)
    return sums | scores


def _mme_category(category: str, images: dict[str, list[bool]]) -> float:
    for image_id, right in images.items():
        if len(right) != 2:
            raise ConvLlavaError(
                f"The image {image_id!r} of MME's {category} has {len(right)} answers, and two are expected. "
                "Leave out images whose other question failed or was not asked."
            )
    return sum(map(mme_points, images.values())) / len(images)
