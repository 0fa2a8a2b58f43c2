"""Reads LLaVA's JSON and JSONL files sample by sample, so that a file of millions never lies in memory whole."""

import json
import os
import re
from collections.abc import Iterator
from json.decoder import JSONDecodeError
from typing import Any, TextIO

from .conversations import DataError


CHUNK = 2**20  # characters
LARGEST_SAMPLE = 2**26  # characters; more is a file whose quotes or brackets do not close
_BLANKS = re.compile(r"[ \t\n\r]*")
# Where a text ends within a number, a literal or an escape, `json` complains about the beginning of that.
_LONGEST_LITERAL = 16


class BrokenFileError(DataError):
    """A file that is not what its format says, at a known place."""


class SampleFile:
    """The samples of a JSON file (an array of objects) or a JSONL file (an object a line), whatever its name.

    Iterating gives the parsed samples. `position` is how far reading has come, in bytes of `size`.

    Raises:
        FileNotFoundError, IsADirectoryError, PermissionError: it cannot be opened (from the constructor).
        BrokenFileError: naming line and column; after the samples that stand before the place.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        with open(self.path, "rb") as file:
            self.size = os.fstat(file.fileno()).st_size
        self.position = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.position = 0
        with open(self.path, encoding="utf-8-sig", newline="\n") as file:
            try:
                buffer = _Buffer(file, self)
                first = buffer.peek()
                if first == "":
                    raise buffer.error("The file is empty")
                if first not in "[{":
                    raise buffer.error("Expected an array of samples, or one object a line")
                yield from buffer.array() if first == "[" else buffer.lines()
            except UnicodeDecodeError as error:
                raise BrokenFileError(
                    f"{self.path} is not UTF-8 after line {buffer.line}: {error.reason}. Convert it to UTF-8."
                ) from error
            except RecursionError as error:
                raise buffer.error("Arrays or objects are nested too deep") from error
        self.position = self.size


class _Buffer:
    """A window on the text of a file that knows its line numbers."""

    def __init__(self, file: TextIO, owner: SampleFile):
        self.file, self.owner = file, owner
        self.text = ""
        self.index = 0  # of the next character in the text
        self.line, self.column = 1, 1  # of the text's beginning
        self.new_line = False  # whether blanks that were skipped held a line break
        self.decode = json.JSONDecoder().raw_decode

    def peek(self) -> str:
        """The next character that is not blank, without taking it; "" at the end of the file."""
        while True:
            end = _BLANKS.match(self.text, self.index).end()
            self.new_line = self.new_line or "\n" in self.text[self.index : end]
            self.index = end
            if end < len(self.text):
                return self.text[end]
            if not self._read(CHUNK):
                return ""

    def array(self) -> Iterator[dict]:
        self._take("[")
        if self.peek() == "]":
            self._take("]")
        else:
            while True:
                yield self._object()
                if self.peek() == "]":
                    self._take("]")
                    break
                self._take(",")
        if self.peek():
            raise self.error("Expected the end of the file after the array")

    def lines(self) -> Iterator[dict]:
        while self.peek():
            yield self._object()
            self.new_line = False
            if self.peek() and not self.new_line:
                raise self.error("Expected one object a line")

    def _object(self) -> dict:
        if self.peek() != "{":
            raise self.error("Expected an object, a sample")
        while True:
            try:
                sample, end = self.decode(self.text, self.index)
            except JSONDecodeError as error:
                unfinished = error.pos >= len(self.text) - _LONGEST_LITERAL or error.msg.startswith("Unterminated")
                waiting = len(self.text) - self.index
                if waiting > LARGEST_SAMPLE:
                    raise self.error(f"A sample is longer than {LARGEST_SAMPLE} characters") from error
                # Reading as much again keeps parsing linear in the length of a sample.
                if not unfinished or not self._read(max(CHUNK, waiting)):
                    self.index = error.pos
                    raise self.error(error.msg) from error
            else:
                self.index = end
                return sample

    def _take(self, character: str) -> None:
        if self.peek() != character:
            raise self.error(f"Expected {character!r}")
        self.index += 1

    def _read(self, characters: int) -> bool:
        """Drops what was taken and reads on; `False` at the end of the file."""
        new = self.file.read(characters)
        if not new:
            return False
        taken = self.text[: self.index]
        self.line, self.column = self._place(taken)
        self.text, self.index = self.text[self.index :] + new, 0
        self.owner.position = self.file.buffer.tell()
        return True

    def _place(self, taken: str) -> tuple[int, int]:
        lines = taken.count("\n")
        column = len(taken) - taken.rfind("\n") if lines else self.column + len(taken)
        return self.line + lines, column

    def error(self, what: str) -> BrokenFileError:
        line, column = self._place(self.text[: self.index])
        what = what.removesuffix(":").rstrip()
        return BrokenFileError(f"{self.owner.path}, line {line}, column {column}: {what}.")
