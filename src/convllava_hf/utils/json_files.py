"""JSON files: objects that must be there, and files that are there whole or as they were before."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConvLlavaError
from .atomic import write_atomic


def read_json_object(path: Path, what: str) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        what: what the file belongs to, at the beginning of messages.

    Raises:
        ConvLlavaError: the file is missing, is not JSON, or holds something other than an object.
    """
    if not path.is_file():
        raise ConvLlavaError(f"{what}: {path} is {'not an ordinary file' if path.exists() else 'missing'}.")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConvLlavaError(f"{what}: {path} is not valid JSON ({error}).") from error
    if not isinstance(value, dict):
        raise ConvLlavaError(f"{what}: {path} does not hold a JSON object.")
    return value


def write_json(path: Path, value: Any) -> Path:
    """Writes a JSON file; it is there whole or as it was before."""
    return write_atomic(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def write_json_rows(path: Path, value: Any) -> Path:
    """Writes a JSON file for people to compare, in which a row, a curve or a group of figures takes a line."""
    return write_atomic(path, (rows_json(value) + "\n").encode())


def rows_json(value: Any, indent: int = 0) -> str:
    """A value as JSON text: objects that hold others take several lines, everything else, such as a row, takes one."""
    space = "\n" + " " * (indent + 1)
    if isinstance(value, Mapping) and any(isinstance(item, (Mapping, list, tuple)) for item in value.values()):
        items = [f"{_line(str(key))}: {rows_json(item, indent + 1)}" for key, item in value.items()]
        opening, closing = "{}"
    elif isinstance(value, (list, tuple)) and any(isinstance(item, Mapping) for item in value):
        items = [_line(item) for item in value]
        opening, closing = "[]"
    else:
        return _line(value)
    return f"{opening}{space}{f',{space}'.join(items)}{space[:-1]}{closing}"


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
