"""Tables in Markdown, and files."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


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
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: str | os.PathLike, results: Any) -> None:
    write(path, json.dumps(results, indent=2, ensure_ascii=False) + "\n")
