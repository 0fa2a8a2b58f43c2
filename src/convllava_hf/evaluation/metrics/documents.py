"""Metrics of reading: documents (ANLS), charts (relaxed accuracy), OCRBench."""

import math
from collections.abc import Sequence

from ...errors import ConvLlavaError
from .answers import check_answers


# As the data set names the kind of question, and the source of its images.
_FORMULAS = ("Handwritten Mathematical Expression Recognition", "HME100k")


def anls(prediction: str, answers: Sequence[str], threshold: float = 0.5) -> float:
    """Average normalized Levenshtein similarity of one sample: the best over its answers, 0 if below the threshold.

    Biten et al., "Scene Text Visual Question Answering" (arXiv 1905.13648), in the reading of the official
    script of DocVQA and InfographicVQA (rrc.cvc.uab.es): texts in lower case, blanks run together, the edit distance
    over the longer text's length, that length taken before; a similarity of exactly the threshold counts.

    Raises:
        ConvLlavaError: no answers, or rapidfuzz is not installed.
    """
    check_answers(answers)
    distance = _edit_distance()
    folded = _fold(prediction)
    errors = []
    for answer in answers:
        length = max(len(answer.upper()), len(prediction.upper()))
        errors.append(distance(_fold(answer), folded) / length if length else 0.0)
    similarity = 1 - min(errors)
    return similarity if similarity >= threshold else 0.0


def relaxed_accuracy(prediction: str, answers: Sequence[str], tolerance: float = 0.05) -> float:
    """1.0 if a prediction is within 5 % of a number among the answers, or is an answer but for its case; else 0.0.

    Masry et al., "ChartQA" (arXiv 2203.10244), section 5.1, in the reading of Pix2Struct's code, which everybody uses:
    `12%` is 0.12, and a number is what Python's `float` reads, so one with a unit is text, and so is a zero among the
    answers. Blanks around a text do not count; `nan` and `inf` are words.
    """
    check_answers(answers)
    return float(any(_relaxed_match(prediction.strip(), answer.strip(), tolerance) for answer in answers))


def ocrbench_score(prediction: str, answers: Sequence[str], category: str) -> float:
    """1.0 if a prediction contains one of the answers, else 0.0, as in OCRBench (arXiv 2305.07895) and its code.

    Case and line breaks do not matter; in handwritten formulas case does, and blanks do not.

    Args:
        category: the sample's kind of question, or the data set that its image is from; both names of handwritten
            formulas are known (`"Handwritten Mathematical Expression Recognition"`, `"HME100k"`).

    Raises:
        ConvLlavaError: no answers, or an empty one, which every prediction contains.
    """
    check_answers(answers)
    fold = _fold_formula if category in _FORMULAS else _fold_line
    for answer in answers:
        if not answer.strip():
            raise ConvLlavaError(f"Among the answers {list(answers)!r} one is empty, and every text contains it.")
    return float(any(fold(answer) in fold(prediction) for answer in answers))


def _edit_distance():
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError as error:
        raise ConvLlavaError("ANLS needs rapidfuzz: pip install 'convllava-hf[eval]'") from error
    return Levenshtein.distance


def _fold(text: str) -> str:
    return " ".join(text.lower().split())


def _fold_line(text: str) -> str:
    return text.lower().strip().replace("\n", " ")


def _fold_formula(text: str) -> str:
    return text.strip().replace("\n", "").replace(" ", "")


def _relaxed_match(prediction: str, answer: str, tolerance: float) -> bool:
    number, true_number = _number(prediction), _number(answer)
    if number is None or not true_number:
        return prediction.lower() == answer.lower()
    return abs(number - true_number) / abs(true_number) <= tolerance


def _number(text: str) -> float | None:
    try:
        number = float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
