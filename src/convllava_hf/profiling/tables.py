"""Tables in Markdown, and files."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConvLlavaError
from ..utils.atomic import check_destination, write_atomic
from ..utils.json_files import rows_json


Column = tuple[str, Callable[[Mapping[str, Any]], str]]


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> str:
    """A Markdown table; the first column is text, the others are figures."""
    lines = [
        "| " + " | ".join(name for name, _ in columns) + " |",
        "|---" + "|---:" * (len(columns) - 1) + "|",
    ]
    lines += ["| " + " | ".join(show(row) for _, show in columns) + " |" for row in rows]
    return "\n".join(lines)


def seconds(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.0f} ms" if value >= 0.01 else f"{value * 1000:.1f} ms"


def gib(value: float | None) -> str:
    return "" if value is None else f"{value / 2**30:.2f} GiB"


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def write(path: str | os.PathLike, text: str) -> None:
    """The whole file or none of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text.encode())


def write_json(path: str | os.PathLike, results: Any) -> None:
    write(path, rows_json(results) + "\n")


def check_output_file(path: str | os.PathLike) -> None:
    """Refuses a place for the figures where something else lies, before anything is measured.

    Raises:
        ConvLlavaError: it is a folder, a device, a file without a JSON object, or in a folder of the system.
    """
    place = check_destination(path, "--output")
    if place.is_dir():
        raise ConvLlavaError(f"--output is {str(place)!r}, which is a folder: name a file.")
    if not place.exists():
        return
    try:
        is_ours = isinstance(json.loads(place.read_text(encoding="utf-8")), dict)
    except ValueError:
        is_ours = False
    if not is_ours:
        raise ConvLlavaError(
            f"--output is {str(place)!r}, which is not from an earlier run, so it is not replaced: name another "
            "file, or remove it yourself."
        )
