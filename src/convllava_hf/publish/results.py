"""Evaluation files: what was measured, for the model card's table and its `model-index`.

A file is JSON: one result, a list of results, or an object with a list `results`. A result is an object:

| key | | |
|---|---|---|
| `benchmark` | required | its name, such as `"TextVQA"` |
| `metric` | required | such as `"accuracy"` |
| `score` | required | a finite number, in the metric's own unit |
| `dataset` | required | the data set's id on the Hub, or the name it goes by |
| `split`, `config` | optional | which part of the data set |
| `interval` | optional | `[low, high]`, 95 % |
| `samples`, `failures` | optional | how many were asked, and how many of them got no answer |
| `setting` | optional | what else decides the score: `"1536 px, without OCR tokens"` |
| `source_name`, `source_url` | optional | who measured it, if it was not the model's publisher; both or neither |

Other keys are ignored, so a benchmark's own record can be given as it is.
"""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from ..errors import ConvLlavaError
from ..evaluation.paper import PAPER, REFCOCO
from ..evaluation.validating import is_count, is_number
from .markdown import cell


# The card lists all of the paper's benchmarks, measured or not.
_PAPER_BENCHMARKS = tuple("RefCOCO" if name == REFCOCO else name for name in PAPER)
_URL = re.compile(r"https?://[\w.~:/?#@!$&*+,;=%-]+")
_LONGEST_TEXT = 500  # characters
_TEXTS = ("benchmark", "metric", "dataset", "split", "config", "setting", "source_name", "source_url")
TASK = "image-text-to-text"


@dataclass(frozen=True)
class Result:
    """One measured score; the module's docstring says what the fields mean."""

    benchmark: str
    metric: str
    score: float
    dataset: str
    split: str | None = None
    config: str | None = None
    interval: tuple[float, float] | None = None
    samples: int | None = None
    failures: int | None = None
    setting: str | None = None
    source_name: str | None = None
    source_url: str | None = None


def read_results(*files: str | os.PathLike) -> list[Result]:
    """The results in evaluation files, in their order.

    Raises:
        ConvLlavaError: a file cannot be read, or what it holds is no result; the message names file, entry and key.
    """
    results = []
    for file in files:
        entries = _entries(Path(file))
        results += [_result(entry, f"{file}, result {number}") for number, entry in enumerate(entries, 1)]
    seen: set[tuple] = set()
    for result in results:
        key = (result.benchmark, result.metric, result.dataset, result.split, result.config, result.setting)
        if key in seen:
            raise ConvLlavaError(
                f"Two of the results are of {result.benchmark} ({result.metric}) on the same data in the same "
                "setting: leave one out, or tell them apart by `setting`."
            )
        seen.add(key)
    return results


def table_rows(results: list[Result]) -> list[dict[str, str]]:
    """The card's table: the paper's benchmarks, those without a result left empty, then the others."""
    measured = {name: [result for result in results if _same(result.benchmark, name)] for name in _PAPER_BENCHMARKS}
    others = [result for result in results if not any(_same(result.benchmark, name) for name in _PAPER_BENCHMARKS)]
    rows = []
    for name, found in measured.items():
        rows += [_row(result) for result in found] or [{"benchmark": name, "metric": "", "score": "", "details": ""}]
    return rows + [_row(result) for result in others]


def to_eval_results(results: list[Result]) -> list[EvalResult]:
    """As `model-index` in the card's metadata has them."""
    return [
        EvalResult(
            task_type=TASK,
            dataset_type=result.dataset,
            dataset_name=result.benchmark,
            dataset_config=result.config,
            dataset_split=result.split,
            metric_type=result.metric,
            metric_value=result.score,
            metric_name=f"{result.metric} ({result.setting})" if result.setting else None,
            source_name=result.source_name,
            source_url=result.source_url,
        )
        for result in results
    ]


def _entries(path: Path) -> list[Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConvLlavaError(f"The results {str(path)!r} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise ConvLlavaError(f"The results {str(path)!r} are not valid JSON: {error}") from error
    if isinstance(content, dict):
        content = content.get("results", content)
    entries = content if isinstance(content, list) else [content]
    if not entries:
        raise ConvLlavaError(f"The results {str(path)!r} hold no result: leave out the file.")
    return entries


def _result(entry: Any, where: str) -> Result:
    if not isinstance(entry, dict):
        raise ConvLlavaError(f"{where}: expected an object with benchmark, metric, score and dataset, not {entry!r}.")
    for key in ("benchmark", "metric", "dataset"):
        if not isinstance(entry.get(key), str) or not entry[key].strip():
            raise ConvLlavaError(f"{where}: {key} is {entry.get(key)!r}; expected a text.")
    if long := [key for key, value in entry.items() if key in _TEXTS and len(str(value)) > _LONGEST_TEXT]:
        raise ConvLlavaError(f"{where}: {long[0]} has more than {_LONGEST_TEXT} characters, too many for a table.")
    if not is_number(entry.get("score")):
        raise ConvLlavaError(f"{where}: score is {entry.get('score')!r:.60}; expected a finite number.")
    for key in ("split", "config", "setting", "source_name", "source_url"):
        if entry.get(key) is not None and not isinstance(entry[key], str):
            raise ConvLlavaError(f"{where}: {key} is {entry[key]!r}; expected a text.")
    for key in ("samples", "failures"):
        if entry.get(key) is not None and not is_count(entry[key]):
            raise ConvLlavaError(f"{where}: {key} is {entry[key]!r}; expected a number of samples.")
    interval = entry.get("interval")
    if interval is not None:
        if not (isinstance(interval, list) and len(interval) == 2 and all(map(is_number, interval))):
            raise ConvLlavaError(f"{where}: interval is {interval!r}; expected [low, high].")
        interval = (interval[0], interval[1])
    if bool(entry.get("source_name")) != bool(entry.get("source_url")):
        raise ConvLlavaError(f"{where}: source_name and source_url go together; give both or neither.")
    if entry.get("source_url") and not _URL.fullmatch(entry["source_url"]):
        raise ConvLlavaError(f"{where}: source_url is {entry['source_url']!r:.80}; expected an address with https://.")
    fields = {name: entry.get(name) for name in Result.__dataclass_fields__}
    return Result(**{**fields, "interval": interval})


def _same(benchmark: str, name: str) -> bool:
    return benchmark.casefold() == name.casefold()


def _row(result: Result) -> dict[str, str]:
    details = [cell(result.setting or ""), cell(" ".join(filter(None, (result.dataset, result.config, result.split))))]
    if result.samples is not None:
        details.append(f"{result.samples} samples")
    if result.failures:
        details.append(f"{result.failures} without an answer")
    if result.source_name:
        details.append(f"[{cell(result.source_name)}]({result.source_url})")
    score = f"{result.score:g}" if abs(result.score) < 1e5 else f"{result.score:.1f}"
    if result.interval:
        score += f" ({result.interval[0]:g} to {result.interval[1]:g})"
    return {
        "benchmark": cell(result.benchmark),
        "metric": cell(result.metric),
        "score": score,
        "details": ", ".join(filter(None, details)),
    }
