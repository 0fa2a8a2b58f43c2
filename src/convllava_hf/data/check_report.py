"""The result of checking a data set."""

from dataclasses import asdict, dataclass, field
from typing import Any

from .box_frames import BoxCounts


@dataclass
class Problem:
    """One thing that is wrong. `sample`: index in its file, `None` for the file itself; `id` as the sample has it."""

    kind: str
    detail: str
    sample: int | None = None
    id: str | None = None


@dataclass
class Tokens:
    """Tokens of all samples, before any are cut off.

    `visual` are those of images, `supervised` those that a loss is taken on, `longest` the most of one sample.
    `samples`: those that could be counted: with a conversation as it should be, and images whose sizes are known.
    """

    samples: int = 0
    total: int = 0
    visual: int = 0
    supervised: int = 0
    longest: int = 0

    def add(self, other: "Tokens") -> None:
        self.samples += other.samples
        self.total += other.total
        self.visual += other.visual
        self.supervised += other.supervised
        self.longest = max(self.longest, other.longest)


@dataclass
class Report:
    """Counts of a data set and what is wrong with it.

    `turns` are messages of user and assistant, `images` the mentions of images, `text_only` samples without any;
    all of them in samples that could be read, and so are `boxes`. `bad`: the indices of samples with something wrong.
    `problems`: by kind their number and the first few.
    """

    examples: int = 3
    samples: int = 0
    text_only: int = 0
    turns: int = 0
    images: int = 0
    tokens: Tokens | None = None
    boxes: BoxCounts = field(default_factory=BoxCounts)
    bad: list[int] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    problems: dict[str, list[Problem]] = field(default_factory=dict)

    @property
    def bad_samples(self) -> int:
        return len(self.bad)

    @property
    def clean(self) -> bool:
        return not self.counts

    def add_problem(self, problem: Problem) -> None:
        self.counts[problem.kind] = self.counts.get(problem.kind, 0) + 1
        shown = self.problems.setdefault(problem.kind, [])
        if len(shown) < self.examples:
            shown.append(problem)

    def add(self, other: "Report") -> None:
        """Adds what was found in samples after these."""
        for name in ("samples", "text_only", "turns", "images"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.boxes.add(other.boxes)
        self.bad += other.bad
        if other.tokens is not None:
            self.tokens = self.tokens or Tokens()
            self.tokens.add(other.tokens)
        for kind, problems in other.problems.items():
            for problem in problems:
                self.add_problem(problem)
            self.counts[kind] += other.counts[kind] - len(problems)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "ok": self.clean,
            "samples": self.samples,
            "bad_samples": self.bad_samples,
            "text_only": self.text_only,
            "turns": self.turns,
            "images": self.images,
            "tokens": asdict(self.tokens) if self.tokens else None,
            "boxes": self.boxes.as_dict(),
            "problems": [
                {"kind": kind, "count": count, "examples": [_without_kind(problem) for problem in self.problems[kind]]}
                for kind, count in sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))
            ],
        }


def _without_kind(problem: Problem) -> dict[str, Any]:
    return {"sample": problem.sample, "id": problem.id, "detail": problem.detail}
