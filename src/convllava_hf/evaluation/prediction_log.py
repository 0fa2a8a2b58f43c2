"""The file of samples: one JSON line each, written as they are answered, so that a run that was killed goes on.

While a run is on, each process appends to a file of its own; at its beginning and its end they become one.
"""

import json
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import ConvLlavaError
from ..utils.atomic import naming, write_atomic


SAMPLES_FILE = "samples.jsonl"
_PART = "samples.{:05d}.part.jsonl"
_PARTS = "samples.*.part.jsonl"


class PredictionLog:
    """What one process appends to.

    Args:
        folder: of the run.
        process: number of the process, from 0.
    """

    def __init__(self, folder: Path, process: int):
        self.path = folder / _PART.format(process)
        self.file = open(self.path, "ab", buffering=0)

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes rows in one call: even if the process is killed, the file holds whole rows but for the last."""
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        content = memoryview(text.encode("utf-8", errors="surrogatepass"))
        with naming(self.path):
            while content:
                content = content[self.file.write(content) :]

    def __enter__(self) -> "PredictionLog":
        return self

    def __exit__(self, *exception) -> None:
        self.file.close()


def read_rows(folder: str | os.PathLike, parts: bool = True) -> dict[str, dict[str, Any]]:
    """All rows of a run by id; of a last line that was not finished, nothing.

    Args:
        parts: those of the processes' own files, too.

    Raises:
        ConvLlavaError: another line is no row.
    """
    folder = Path(folder)
    rows: dict[str, dict[str, Any]] = {}
    for path in [folder / SAMPLES_FILE, *(sorted(folder.glob(_PARTS)) if parts else ())]:
        if not path.exists():
            continue
        lines = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines[:-1], 1):  # what follows the last line break was not finished
            try:
                row = json.loads(line)
                if not isinstance(row["id"], str):
                    raise TypeError(f"id is {row['id']!r}")
                rows.setdefault(row["id"], row)
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise ConvLlavaError(
                    f"{path}, line {number}, is no row of samples. Remove the line, or the folder to start over."
                ) from error
    return rows


def merge_shards(folder: Path, order: Iterable[str] = (), left_out: Collection[str] = ()) -> dict[str, dict[str, Any]]:
    """Makes one file of those of all processes, and returns its rows.

    Args:
        order: ids, of those that come first.
        left_out: ids of rows to be marked, for they have an answer and are not in the score.
    """
    rows = read_rows(folder)
    parts = list(folder.glob(_PARTS))
    ordered = {name: rows[name] for name in order if name in rows} | rows
    for name in left_out:
        ordered[name] = {**ordered[name], "left_out": True}
    if parts or list(ordered) != list(rows) or left_out:
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in ordered.values())
        write_atomic(folder / SAMPLES_FILE, "".join(lines).encode("utf-8", errors="surrogatepass"))
        for part in parts:  # afterwards: a row that is in both is read once
            part.unlink()
    return ordered
