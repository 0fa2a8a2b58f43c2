"""The record of an evaluation: one JSON object that says what was measured, how, and with what.

Its first keys are those that `convllava push --results` reads (`publish/results.py`); the others let somebody else
repeat the measurement. Nothing in it says where a file lay on the machine.
"""

import json
import os
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from ..errors import ConvLlavaError
from ..options import IMAGE_MODES
from ..utils.environment import versions_of
from ..utils.json_files import write_json
from .benchmarks import Benchmark
from .scorers import Row
from .sources import Plan
from .statistics import bootstrap_interval
from .validating import check_record


RECORD_FILE = "record.json"
_FORMAT = 1
_PACKAGES = ("convllava-hf", "torch", "transformers", "tokenizers", "accelerate", "datasets", "pillow", "numpy")
_SHOWN_FAILURES = 10


def make_record(
    benchmark: Benchmark,
    plan: Plan,
    rows: Sequence[Row],
    run: Mapping[str, Any],
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """The record of a run.

    Args:
        rows: of all samples, those that failed too.
        run: what decides the answers; see `run_settings.describe_run`.
        about: further keys, such as an example of a whole prompt.

    Raises:
        ConvLlavaError: no sample could be scored.
    """
    scored, left_out = scorable(benchmark, plan, rows)
    failures = [row for row in rows if "failure" in row]
    if not scored:
        first = f": {failures[0]['failure']['message']}" if failures else ""
        raise ConvLlavaError(
            f"None of the {len(rows)} samples of {benchmark.title} could be scored; {len(failures)} failed{first}"
        )
    table = benchmark.summary.table(scored)
    low, high = bootstrap_interval(table, benchmark.summary.score)
    seconds = sum(row.get("seconds", 0.0) for row in rows)
    asked = len(rows) - len(failures)
    return {
        "format": _FORMAT,
        "benchmark": benchmark.title,
        "metric": benchmark.metric,
        "score": round(float(benchmark.summary.score(table.sums.sum(0))), 4),
        "interval": [round(low, 4), round(high, 4)],
        "dataset": run["dataset"],
        "config": run["config"],
        "split": run["split"],
        "samples": len(rows),
        "failures": len(failures),
        "setting": setting_text(benchmark, run),
        "scores": {name: round(value, 4) for name, value in benchmark.summary.details(scored).items()},
        "counts": {
            "answered": asked,
            "scored": len(scored),
            "scored_groups": len(table.groups),
            "left_out": left_out,
            "failures": dict(Counter(row["failure"]["kind"] for row in failures)),
        },
        "failed": [{"id": row["id"], **row["failure"]} for row in failures[:_SHOWN_FAILURES]],
        **about,
        **{key: value for key, value in run.items() if key not in ("dataset", "config", "split", "format")},
        "visual_tokens": _common([row["visual_tokens"] for row in rows if "visual_tokens" in row]),
        "seconds": round(seconds, 2),
        "samples_per_second": round(asked / seconds, 3) if seconds else None,
        "versions": versions_of(_PACKAGES),
        "commit": own_commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def scorable(benchmark: Benchmark, plan: Plan, rows: Sequence[Row]) -> tuple[list[Row], int]:
    """The rows that a score is made of, and how many have an answer and are left out all the same.

    Those are of groups that are not whole, since a sample of theirs failed or the data set lacks it: half a pair of
    MME's questions says nothing.
    """
    answered = [row for row in rows if "failure" not in row]
    expected = Counter(sample.group for sample in plan.samples.values())
    there = Counter(row.get("group") for row in answered)

    def whole(group: str | None) -> bool:
        if group is None:
            return True
        size = benchmark.summary.size or expected[group]
        return there[group] == expected[group] == size

    scored = [row for row in answered if whole(row.get("group"))]
    return scored, len(answered) - len(scored)


def ids_left_out(benchmark: Benchmark, plan: Plan, rows: Mapping[str, Row]) -> set[str]:
    """The samples that have an answer and are left out of the score."""
    scored = {row["id"] for row in scorable(benchmark, plan, [rows[name] for name in plan.ids])[0]}
    return {name for name in plan.ids if name not in scored and "failure" not in rows[name]}


def setting_text(benchmark: Benchmark, run: Mapping[str, Any]) -> str:
    """What decides the score besides model and data, in a line."""
    parts = [images_text(run["images"])]
    if benchmark.words_column:
        parts.append("with OCR tokens" if run["ocr_tokens"] else "without OCR tokens")
    if benchmark.has_choices:
        parts.append("by the options' likelihoods" if run["choice"] == "likelihood" else "by letter")
    if benchmark.note:
        parts.append(benchmark.note)
    if run["quantization"]:
        parts.append(run["quantization"])
    if run["limit"] is not None:
        parts.append(f"the first {run['limit']} samples")
    return ", ".join(parts)


def images_text(images: Mapping[str, Any]) -> str:
    """How large images were seen, in a few words."""
    return IMAGE_MODES[images["mode"]].record_text.format(**images)


def write_record(folder: Path, record: Mapping[str, Any]) -> Path:
    """Writes a record; it is there whole or not at all."""
    return write_json(folder / RECORD_FILE, record)


def read_record(folder: str | os.PathLike) -> dict[str, Any]:
    """The record of a finished run.

    Raises:
        ConvLlavaError: there is none, or it is not a record: the message names the key that is not as expected.
    """
    path = Path(folder) / RECORD_FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConvLlavaError(
            f"{os.fspath(folder)!r} holds no {RECORD_FILE}: name the folder of a finished run, as `convllava eval "
            "--output` left it."
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConvLlavaError(f"{str(path)!r} is not valid JSON: {error}") from error
    if not isinstance(record, dict) or record.get("format") != _FORMAT or "benchmark_name" not in record:
        raise ConvLlavaError(f"{str(path)!r} is no record of this version of convllava eval.")
    check_record(record, path)
    return record


def find_runs(folder: str | os.PathLike) -> dict[str, Path]:
    """The finished runs in an output folder by their names, or the one run that the folder is itself."""
    folder = Path(folder)
    if (folder / RECORD_FILE).is_file():
        return {folder.name: folder}
    runs = {path.parent.name: path.parent for path in sorted(folder.glob(f"*/{RECORD_FILE}"))}
    if not runs:
        raise ConvLlavaError(f"{os.fspath(folder)!r} holds no finished run of convllava eval (no {RECORD_FILE}).")
    return runs


def own_commit() -> str | None:
    """The commit of this package's code, with `-dirty` where files differ from it; `None` if it is not known."""
    here = Path(__file__)
    if _git(here.parent, "ls-files", "--error-unmatch", here.name) is not None:
        commit = _git(here.parent, "rev-parse", "HEAD")
        changed = _git(here.parent, "status", "--porcelain", "--untracked-files=no")
        return f"{commit}-dirty" if commit and changed else commit
    try:
        origin = json.loads(distribution("convllava-hf").read_text("direct_url.json") or "{}")
    except (PackageNotFoundError, ValueError):
        return None
    return origin.get("vcs_info", {}).get("commit_id")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _common(counts: Sequence[int]) -> int | dict[str, int] | None:
    """One number, or the least, the most and the mean of several."""
    if not counts or min(counts) == max(counts):
        return counts[0] if counts else None
    return {"least": min(counts), "most": max(counts), "mean": round(sum(counts) / len(counts))}
