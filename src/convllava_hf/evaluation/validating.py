"""Whether what is read back from the files of a run is what this version writes: other versions and people differ.

Each key has a test and the words for what it should be; an error names the file, the key and the value.
"""

import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import ConvLlavaError
from ..options import IMAGE_MODES
from .benchmarks import BENCHMARKS, Benchmark
from .metrics import MME_COGNITION, MME_PERCEPTION
from .scorers import F1, Mme


Test = Callable[[Any], bool]
Kinds = Mapping[str, tuple[Test, str]]

_MISSING = object()
_BASE64 = re.compile(r"[A-Za-z0-9+/]*={0,2}")


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300  # no NaN either


def _or_none(test: Test) -> Test:
    return lambda value: value is None or test(value)


def _list_of(test: Test, length: int | None = None) -> Test:
    return lambda value: (
        isinstance(value, list) and all(map(test, value)) and (len(value) == length if length else bool(value))
    )


def _table_of(test: Test) -> Test:
    return lambda value: isinstance(value, dict) and all(map(test, value.values()))


def _is_failed(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(one, dict) and is_text(one.get("id")) and is_text(one.get("message")) for one in value
    )


def _is_visual_tokens(value: Any) -> bool:
    return value is None or is_count(value) or (isinstance(value, dict) and is_number(value.get("mean")))


_TEXT = (is_text, "a text")
_TEXT_OR_NULL = (_or_none(is_text), "a text or null")
_COUNT = (is_count, "a number of samples")
_NUMBER = (is_number, "a finite number")
_RECORD: Kinds = {
    "benchmark": _TEXT,
    "benchmark_name": (lambda value: value in BENCHMARKS, f"one of {', '.join(BENCHMARKS)}"),
    "metric": _TEXT,
    "score": _NUMBER,
    "interval": (_list_of(is_number, 2), "[low, high]"),
    "split": _TEXT_OR_NULL,
    "setting": _TEXT,
    "samples": _COUNT,
    "failures": _COUNT,
    "scores": (_table_of(is_number), "an object of numbers"),
    "counts": (lambda value: isinstance(value, dict), "an object"),
    "counts.left_out": _COUNT,
    "counts.failures": (_table_of(is_count), "an object of numbers of samples"),
    "failed": (_is_failed, "a list of objects with id and message"),
    "example_prompt": _TEXT_OR_NULL,
    "prompt": _TEXT,
    "choice": _TEXT_OR_NULL,
    "ocr_tokens": (lambda value: isinstance(value, bool), "true or false"),
    "limit": (_or_none(is_count), "a number of samples or null"),
    "model": (lambda value: isinstance(value, dict), "an object"),
    "model.name": _TEXT,
    "dtype": _TEXT,
    "quantization": _TEXT_OR_NULL,
    "images": (lambda value: isinstance(value, dict), "an object"),
    "images.mode": (lambda value: value in IMAGE_MODES, f"one of {', '.join(IMAGE_MODES)}"),
    "images.size": (_or_none(is_count), "a number of pixels or null"),
    "images.max_pixels": (_or_none(is_count), "a number of pixels or null"),
    "visual_tokens": (_is_visual_tokens, "a number, or an object with a mean"),
    "seconds": (lambda value: is_number(value) and value >= 0, "a number of seconds"),
    "versions": (_table_of(is_text), "an object of texts"),
    "commit": _TEXT_OR_NULL,
    "date": _TEXT,
}
_SCORED: Kinds = {
    "question": _TEXT,
    "prediction": _TEXT,
    "answers": (_list_of(is_text), "a list of texts"),
    "score": (lambda value: is_number(value) and 0 <= value <= 1, "a number from 0 to 1"),
}
_SOMETIMES: Kinds = {  # left out where there is nothing to say
    "group": _TEXT,
    "category": _TEXT,
    "seconds": _NUMBER,
    "visual_tokens": _COUNT,
}
_FAILURE: Kinds = {
    "failure": (lambda value: isinstance(value, dict), "an object"),
    "failure.kind": _TEXT,
    "failure.message": _TEXT,
}
_READ_YES_NO: Kinds = {"read": (lambda value: value is None or isinstance(value, bool), "true, false or null")}
_MME: Kinds = {
    "group": _TEXT,
    "category": (lambda value: value in MME_PERCEPTION + MME_COGNITION, "a category of MME"),
}
_BOX = _list_of(is_number, 4)
_SHOWN: Kinds = {
    "id": _TEXT,
    "jpeg": (lambda value: is_text(value) and _BASE64.fullmatch(value) is not None, "a JPEG in base64"),
}
_SHOWN_BOX: Kinds = {
    "truth": (_BOX, "[left, top, right, bottom]"),
    "overlap": _NUMBER,
    "read": (_or_none(_BOX), "[left, top, right, bottom] or null"),
    "image": (
        lambda value: _list_of(is_count, 2)(value) and min(value) > 0,
        "[width, height] in pixels",
    ),
}
_SHOWN_READ: Kinds = {"read": (lambda value: value is None or isinstance(value, bool | str), "a text, true or false")}


def check_record(record: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Refuses a record that a report or a comparison cannot be made of.

    Raises:
        ConvLlavaError: names the file and the key.
    """
    _check(record, _RECORD, f"{os.fspath(path)!r}")


def check_row(row: Mapping[str, Any], path: str | os.PathLike, benchmark: Benchmark) -> None:
    """Refuses a line of the file of samples from which the benchmark's score cannot be computed.

    Raises:
        ConvLlavaError: names the file, the sample and the key.
    """
    where = f"{os.fspath(path)!r}, sample {row.get('id')!r:.40}"
    if "failure" in row:
        _check(row, _FAILURE, where)
        return
    _check(row, _SCORED, where)
    _check(row, {key: kind for key, kind in _SOMETIMES.items() if key in row}, where)
    if isinstance(benchmark.summary, F1 | Mme):
        _check(row, _READ_YES_NO, where)
    if isinstance(benchmark.summary, Mme):
        _check(row, _MME, where)


def check_gallery(shown: Any, path: str | os.PathLike) -> None:
    """Refuses samples that cannot be shown in a report.

    Raises:
        ConvLlavaError: names the file, the sample and the key.
    """
    if not isinstance(shown, list) or not all(isinstance(row, dict) for row in shown):
        raise ConvLlavaError(f"{os.fspath(path)!r} holds no list of samples: run the evaluation with --report again.")
    for number, row in enumerate(shown, 1):
        where = f"{os.fspath(path)!r}, sample {number}"
        _check(row, {**_SHOWN, **_SCORED, **(_SHOWN_BOX if "truth" in row else {})}, where)
        optional = {**_SOMETIMES, **({} if "truth" in row else _SHOWN_READ)}
        _check(row, {key: kind for key, kind in optional.items() if row.get(key) is not None}, where)


def _check(values: Mapping[str, Any], kinds: Kinds, where: str) -> None:
    for key, (test, expected) in kinds.items():
        value: Any = values
        for part in key.split("."):
            value = value.get(part, _MISSING) if isinstance(value, Mapping) else _MISSING
        if value is _MISSING or not _passes(test, value):
            found = "missing" if value is _MISSING else f"{value!r:.60}"
            raise ConvLlavaError(
                f"{where}: {key} is {found}; expected {expected}. The file is of another version of convllava eval or "
                "was edited: restore it, or run the evaluation again with --overwrite."
            )


def _passes(test: Test, value: Any) -> bool:
    try:
        return test(value)
    except (TypeError, OverflowError):  # a list where a name is looked up, an integer of a thousand digits
        return False
