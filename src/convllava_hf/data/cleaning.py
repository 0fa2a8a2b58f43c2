"""Writes the good samples of a JSON or JSONL file to a new one."""

import contextlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import ConvLlavaError
from ..utils.texts import shown
from .check_report import Report
from .dataset_files import JSON_SUFFIXES, open_records
from .json_reader import BrokenFileError, SampleFile


class CleanFile:
    """The new file for what is good in another one. Nothing is written before `write`.

    Args:
        source: the file that is checked: JSON, JSONL, or a folder with one of them.
        target: the new file: `.jsonl` gets one sample a line, `.json` the form of the source.

    Raises:
        ConvLlavaError: the source is of another form, or the target is there already or has no such suffix.
    """

    def __init__(self, source: str | os.PathLike, target: str | os.PathLike):
        records, _ = open_records(source)
        if not isinstance(records, SampleFile):
            raise ConvLlavaError(
                f"{os.fspath(source)!r} is a table, and --write-clean writes JSON and JSONL only. To leave its bad "
                "samples out of training, set on_bad_sample: skip in the recipe."
            )
        self.records = records
        self.target = Path(target)
        if self.target.suffix.lower() not in JSON_SUFFIXES:
            raise ConvLlavaError(f"--write-clean is {str(target)!r}; expected a name that ends in .json or .jsonl.")
        if os.path.lexists(self.target):
            raise ConvLlavaError(f"{str(target)!r} already exists: choose another name for --write-clean.")
        if not self.target.parent.is_dir() or not os.access(self.target.parent, os.W_OK):
            raise ConvLlavaError(f"--write-clean is in {str(self.target.parent)!r}: no folder that can be written to.")
        self._temporary = self.target.with_name(f".{self.target.name}.{uuid.uuid4().hex[:8]}.partial")
        try:
            open(self._temporary, "x").close()  # not only when all has been checked is it said that this cannot be
        except (OSError, ValueError) as error:
            raise ConvLlavaError(f"Cannot write {shown(str(target))} for --write-clean: {error}.") from error
        self._temporary.unlink()
        self._before = _state(records.path)

    def write(self, report: Report) -> int:
        """Writes the samples in which the report finds nothing wrong, in their order, and returns how many they are.

        The file is there whole or not at all.

        Raises:
            ConvLlavaError: the source has changed since, or somebody else has written the target.
        """
        if _state(self.records.path) != self._before:
            raise ConvLlavaError(f"{self.records.path} changed while it was being checked: check it again.")
        bad, written = set(report.bad), 0
        temporary = self._temporary
        try:
            with open(temporary, "x", encoding="utf-8", newline="\n") as file:
                good = (record for index, record in enumerate(self._readable()) if index not in bad)
                for written, record in enumerate(good, start=1):
                    file.write(("[\n" if written == 1 else ",\n") if self._in_array else "")
                    file.write(_as_json(record) + ("" if self._in_array else "\n"))
                if self._in_array:
                    file.write("\n]\n" if written else "[]\n")
            try:
                os.link(temporary, self.target)  # unlike a renaming, never over another file
            except FileExistsError as error:
                raise ConvLlavaError(
                    f"{str(self.target)!r} was written by somebody else in the meantime, so it is left unchanged."
                ) from error
            except OSError:  # a file system without hard links
                os.rename(temporary, self.target)
        finally:
            temporary.unlink(missing_ok=True)
        return written

    @property
    def _in_array(self) -> bool:
        return bool(self.records.is_array) and self.target.suffix.lower() == ".json"

    def _readable(self) -> Iterator[Any]:
        """The records up to where the file breaks off, which the report says already."""
        with contextlib.suppress(BrokenFileError):
            yield from self.records


def _state(path: str) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns


def _as_json(record: Any) -> str:
    text = json.dumps(record, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # in something that training does not read
        text = json.dumps(record)
    return text
