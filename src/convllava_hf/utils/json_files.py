"""JSON files: objects that must be there, and files that are there whole or as they were before."""

import json
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
