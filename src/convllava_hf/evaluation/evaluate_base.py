"""What our modules for the `evaluate` library have in common; they lie in `MODULES`, a folder each.

`evaluate.load` takes a folder, copies its script into a cache and makes the class that it finds there. So a script
imports this module, not the classes in it.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from ..errors import ConvLlavaError
from .metrics import parse_yes_no


TEXT = datasets.Value("string")
TEXTS = datasets.Sequence(datasets.Value("string"))
NUMBER = datasets.Value("int64")
NUMBERS = datasets.Sequence(datasets.Value("float64"))


class Module(evaluate.Metric):
    """A metric of ours over columns of predictions and what goes with them."""

    description = ""  # pyright: ignore[reportAssignmentType]  (a property of the base class, which ours replace)
    columns: dict[str, Any] = {}

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.description,
            citation="",
            inputs_description=f"Columns: {', '.join(self.columns)}.",
            features=datasets.Features(self.columns),
        )

    @abstractmethod
    def _compute(self, **columns: Sequence[Any]) -> dict[str, float]: ...


class Mean(Module):
    """The mean of every sample's score, under the module's name."""

    columns = {"predictions": TEXT, "references": TEXTS}

    @abstractmethod
    def score(self, prediction: str, reference: Any, *others: Any) -> float: ...

    def _compute(self, **columns: Sequence[Any]) -> dict[str, float]:
        rows = zip(*(columns[name] for name in self.columns), strict=True)
        scores = [self.score(*row) for row in rows]
        return {self.name: sum(scores) / len(scores)}


def yes_or_no(references: Sequence[str]) -> list[bool]:
    """The right answers of yes-or-no questions.

    Raises:
        ConvLlavaError: one is neither.
    """
    answers = []
    for reference in references:
        if (answer := parse_yes_no(reference)) is None:
            raise ConvLlavaError(f"A reference is {reference!r}, and yes or no is expected.")
        answers.append(answer)
    return answers
