"""Two runs side by side, on the samples that both of them have answered."""

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import ConvLlavaError
from ..utils.report_style import plain
from .benchmarks import Benchmark, find_benchmark
from .evaluation_record import find_runs, read_record
from .prediction_log import SAMPLES_FILE, read_rows
from .scorers import Row
from .statistics import PairedTest, paired_test
from .validating import check_row


_WIDTH = 60  # characters of a text that is shown


@dataclass(frozen=True)
class Changed:
    """A sample whose score is another in the second run; `predictions` and `scores` of the first and the second."""

    id: str
    question: str
    answers: list[str]
    predictions: tuple[str, str]
    scores: tuple[float, float]


@dataclass(frozen=True)
class Comparison:
    """Two runs of a benchmark. `records`: as they are; `scores`: on the samples of both, `samples` in number.

    `changed`: those that became better first, each kind by how much.
    """

    name: str
    records: tuple[Mapping[str, Any], Mapping[str, Any]]
    samples: int
    scores: tuple[float, float]
    test: PairedTest
    changed: list[Changed]

    @property
    def better(self) -> list[Changed]:
        return [one for one in self.changed if one.scores[1] > one.scores[0]]

    @property
    def worse(self) -> list[Changed]:
        return [one for one in self.changed if one.scores[1] < one.scores[0]]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def compare(one: str | os.PathLike, other: str | os.PathLike) -> list[Comparison]:
    """Compares two runs, or the runs of two output folders that have the same names.

    Raises:
        ConvLlavaError: there are no finished runs, none in common, or two are not about the same samples.
    """
    first, second = find_runs(one), find_runs(other)
    if len(first) == len(second) == 1:
        pairs = [(name, path, other_path) for name, path in first.items() for other_path in second.values()]
    else:
        pairs = [(name, first[name], second[name]) for name in first if name in second]
    if not pairs:
        raise ConvLlavaError(
            f"{os.fspath(one)!r} has the runs {', '.join(first)}, and {os.fspath(other)!r} has {', '.join(second)}: "
            "none in common. Name two folders of single runs."
        )
    return [_compare(*pair) for pair in pairs]


def _compare(name: str, first: Path, second: Path) -> Comparison:
    records = read_record(first), read_record(second)
    names = [record["benchmark_name"] for record in records]
    if names[0] != names[1]:
        raise ConvLlavaError(f"{str(first)!r} is a run of {names[0]}, and {str(second)!r} of {names[1]}.")
    benchmark = find_benchmark(names[0])
    read = [read_rows(folder) for folder in (first, second)]
    for folder, rows in zip((first, second), read, strict=True):
        for row in rows.values():
            check_row(row, folder / SAMPLES_FILE, benchmark)
    ones, others = _in_both(*read)
    if not ones:
        raise ConvLlavaError(f"{str(first)!r} and {str(second)!r} have no scored sample in common.")
    for row, other in zip(ones, others, strict=True):
        if row["answers"] != other["answers"]:
            raise ConvLlavaError(
                f"Sample {row['id']} has the answers {row['answers']!r} in {str(first)!r} and {other['answers']!r} in "
                f"{str(second)!r}: the runs are of other data."
            )
    return _compared(name, benchmark, records, ones, others)


def _compared(name: str, benchmark: Benchmark, records: tuple, ones: list[Row], others: list[Row]) -> Comparison:
    summary = benchmark.summary
    tables = summary.table(ones), summary.table(others)
    score_a, score_b = (float(summary.score(table.sums.sum(0))) for table in tables)
    changed = [
        Changed(
            row["id"],
            row["question"],
            row["answers"],
            (row["prediction"], other["prediction"]),
            (row["score"], other["score"]),
        )
        for row, other in zip(ones, others, strict=True)
        if row["score"] != other["score"]
    ]
    changed.sort(key=lambda one: one.scores[0] - one.scores[1])
    return Comparison(name, records, len(ones), (score_a, score_b), paired_test(*tables, summary.score), changed)


def _in_both(first: Mapping[str, Row], second: Mapping[str, Row]) -> tuple[list[Row], list[Row]]:
    """The scored rows of both runs in the same order; groups only if the same samples of them are in both."""
    kept = [{name: row for name, row in rows.items() if is_scored(row)} for rows in (first, second)]
    members = []
    for rows in kept:
        groups: dict[str, set[str]] = defaultdict(set)
        for name, row in rows.items():
            if row.get("group"):
                groups[row["group"]].add(name)
        members.append(groups)
    common = [
        name
        for name, row in kept[0].items()
        if name in kept[1] and (not row.get("group") or members[0][row["group"]] == members[1].get(row["group"]))
    ]
    return [kept[0][name] for name in common], [kept[1][name] for name in common]


def is_scored(row: Row) -> bool:
    """Whether a row is one that its run's score is made of."""
    return "failure" not in row and not row.get("left_out")


def comparison_lines(compared: Sequence[Comparison], show: int) -> list[str]:
    """For a terminal.

    Args:
        show: samples of each kind at most, those that became better and those that became worse.
    """
    lines: list[str] = []
    for one in compared:
        metric = one.records[0]["metric"]
        lines += [*([""] if lines else []), f"{one.records[0]['benchmark']}: {metric}, {one.samples} samples in both"]
        labels = [
            f"{letter}  {plain(record['model']['name'], 40)}" for letter, record in zip("AB", one.records, strict=True)
        ]
        width = max(map(len, labels))
        for label, record, score in zip(labels, one.records, one.scores, strict=True):
            low, high = record["interval"]
            whole = f"{record['score']:.2f} ({low:.2f} to {high:.2f}) on all samples, {record['failures']} failed"
            lines.append(f"  {label:<{width}}  {score:8.2f}   {whole}, {record['setting']}")
        low, high = one.test.interval
        lines.append(
            f"  B less A: {one.test.difference:+.2f} ({low:+.2f} to {high:+.2f}), p = {one.test.p_value:.2g} "
            f"({one.test.test})"
        )
        for kind, samples in (("better", one.better), ("worse", one.worse)):
            lines.append(f"  {len(samples)} became {kind}{':' if samples and show > 0 else ''}")
            lines += [_changed_line(sample) for sample in samples[: max(0, show)]]
            if 0 < show < len(samples):
                lines.append(f"    and {len(samples) - show} more")
    return lines


def _changed_line(sample: Changed) -> str:
    before, after = (plain(text, _WIDTH) or "(nothing)" for text in sample.predictions)
    question = plain(sample.question.partition("\n")[0], _WIDTH)
    right = plain(", ".join(dict.fromkeys(sample.answers)), _WIDTH)
    return f"    {sample.id}: {question} [{right}]  A: {before}  B: {after}"
