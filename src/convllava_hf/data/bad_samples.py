"""What happens to samples that cannot be used: the first ends the run, or they are left out and counted."""

import logging
import os
from typing import Any

from ..errors import ConvLlavaError
from .conversations import SampleError


logger = logging.getLogger(__name__)

POLICIES = ("error", "skip")
_EXAMPLES = 3  # samples named in the warning and the record
_LOGGED = 20  # samples of a stream named one by one; then only every hundredth


class BadSamples:
    """The policy for samples that cannot be used, and the samples that it has left out.

    Args:
        policy: `"error"`: the first such sample ends the run, by name. `"skip"`: they are left out.
        bound: how many may be left out of all data sets together; one more is an error.

    Attributes:
        counts (`dict[str, int]`): left out so far, by kind. Of a stream, those that this process has come upon.
        examples (`list[str]`): the first few, each with file, index and id, and what is wrong.
    """

    def __init__(self, policy: str = "error", bound: int = 100):
        if policy not in POLICIES:
            raise ConvLlavaError(f"on_bad_sample is {policy!r}; expected {' or '.join(POLICIES)}.")
        if isinstance(bound, bool) or not isinstance(bound, int) or bound < 0:
            raise ConvLlavaError(f"max_bad_samples is {bound!r}; expected a number from 0 up.")
        self.policy = policy
        self.bound = bound
        self.counts: dict[str, int] = {}
        self.examples: list[str] = []
        self._seen: set[str] = set()

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def note(self, kind: str, detail: str) -> bool:
        """Counts a sample that is left out; `False` where it was counted before, as in each epoch of a stream.

        Args:
            detail: what is wrong, after the sample's file and index.
        """
        if detail in self._seen:
            return False
        self._seen.add(detail)
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append(detail)
        return True

    def note_streamed(self, kind: str, detail: str) -> None:
        """The same while training.

        Raises:
            SampleError: there are more than the bound.
        """
        if self.note(kind, detail):
            if self.total <= _LOGGED or self.total % 100 == 0:
                logger.warning("%s It is left out; %d so far in this process.", detail, self.total)
            self.check_bound()

    def check_bound(self) -> None:
        """
        Raises:
            SampleError: more samples than allowed were left out.
        """
        if self.total > self.bound:
            raise SampleError(
                "too many bad samples",
                f"{self.total} samples cannot be used, and max_bad_samples allows {self.bound}: {self._kinds()}. "
                f"`convllava data check` lists them. The first: {self.examples[0]}",
            )

    def warn(self, of: int) -> None:
        """Says once what was left out of so many samples, only in the first process of a run."""
        if self.counts and os.environ.get("RANK", "0") == "0":
            logger.warning(
                "%d of %d samples cannot be used and are left out: %s. The first: %s",
                self.total,
                of,
                self._kinds(),
                " ".join(self.examples),
            )

    def as_dict(self) -> dict[str, Any]:
        """For the training record, where paths of this machine do not belong."""
        return {"count": self.total, "kinds": dict(sorted(self.counts.items()))}

    def _kinds(self) -> str:
        ordered = sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))
        return ", ".join(f"{count} {kind}" for kind, count in ordered)


def with_remedy(error: SampleError) -> SampleError:
    """The error with what can be done about it."""
    return SampleError(
        error.kind,
        f"{error} `convllava data check` finds all such samples; with on_bad_sample: skip in the recipe they are left "
        "out.",
    )
