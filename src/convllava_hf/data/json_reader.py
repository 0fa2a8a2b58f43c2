"""Reads LLaVA's JSON and JSONL files sample by sample, so that a file of millions is never in memory as a whole."""

import json
import os
import re
import stat
from collections.abc import Iterator
from json.decoder import JSONDecodeError
from typing import Any, TextIO

from .conversations import DataError, UnreadableRecord, identity_of


CHUNK = 2**20  # characters
LARGEST_SAMPLE = 2**26  # characters; more is a file whose quotes or brackets do not close
DEEPEST = 100  # arrays and objects within each other; far fewer are of use, and Python stumbles over far more
_BLANKS = re.compile(r"[ \t\n\r]*")
# Where a text ends within a number, a literal or an escape, `json` complains about the beginning of that.
_LONGEST_LITERAL = 16
# Strings whole, brackets outside of them, and the quote of a string whose end has not been read yet.
_NESTING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}"]', re.DOTALL)
_STEP = {"[": 1, "{": 1, "]": -1, "}": -1}


class BrokenFileError(DataError):
    """A file that is not what its format says, at a known place."""


class SampleFile:
    """The samples of a JSON file (an array of objects) or a JSONL file (an object per line), with any file name.

    Iterating gives the parsed samples. In place of one that Python cannot hold (nested too deep, or with an integer of
    thousands of digits) comes an `UnreadableRecord`. `position` is how far reading has come, in bytes of `size`;
    `is_array` whether the file is one array, `None` before the first sample.

    Raises:
        FileNotFoundError, IsADirectoryError, PermissionError: it cannot be opened (from the constructor).
        BrokenFileError: it is a FIFO, a socket or a device (from the constructor).
        BrokenFileError: naming line and column; after the samples before that place.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        self.is_array: bool | None = None
        if not stat.S_ISREG(mode := os.stat(self.path).st_mode) and not stat.S_ISDIR(mode):
            raise BrokenFileError(f"{self.path} is a FIFO, a socket or a device; expected a file with samples.")
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
                self.is_array = first == "["
                yield from buffer.array() if self.is_array else buffer.lines()
            except UnicodeDecodeError as error:
                raise BrokenFileError(
                    f"{self.path} is not UTF-8 after line {buffer.line}: {error.reason}. Convert it to UTF-8."
                ) from error
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

    def _object(self) -> dict | UnreadableRecord:
        if self.peek() != "{":
            raise self.error("Expected an object, a sample")
        while True:
            try:
                sample, end = self.decode(self.text, self.index)
            except RecursionError:
                return self._unreadable("is nested too deep")
            except JSONDecodeError as error:
                unfinished = error.pos >= len(self.text) - _LONGEST_LITERAL or error.msg.startswith("Unterminated")
                # Reading as much again keeps parsing linear in the length of a sample.
                if not unfinished or not self._read_more():
                    self.index = error.pos
                    raise self.error(error.msg) from error
            except ValueError:  # the limit of Python's integers
                return self._unreadable("has an integer of thousands of digits")
            else:
                brackets = sum(self.text.count(bracket, self.index, end) for bracket in "[{")
                if brackets > DEEPEST and self._depth(end) > DEEPEST:
                    return self._unreadable("is nested too deep", sample)
                self.index = end
                return sample

    def _unreadable(self, what: str, sample: Any = None) -> UnreadableRecord:
        """Takes the sample that begins here by matching brackets."""
        while (end := self._end_by_brackets()) is None:
            if not self._read_more():
                raise self.error(f"A sample {what}, and its end is not found")
        self.index = end
        return UnreadableRecord("malformed", f"It {what}.", identity_of(sample))

    def _end_by_brackets(self) -> int | None:
        """Where the sample that begins here ends; `None` where that has not been read yet."""
        depth = 0
        for found in _NESTING.finditer(self.text, self.index):
            depth += _STEP.get(found[0], 0)
            if found[0] == '"':
                return None
            if not depth:
                return found.end()
        return None

    def _depth(self, end: int) -> int:
        depth = deepest = 0
        for found in _NESTING.finditer(self.text, self.index, end):
            depth += _STEP.get(found[0], 0)
            deepest = max(deepest, depth)
        return deepest

    def _read_more(self) -> bool:
        """Reads as much again as waits; `False` at the end of the file."""
        waiting = len(self.text) - self.index
        if waiting > LARGEST_SAMPLE:
            raise self.error(f"A sample is longer than {LARGEST_SAMPLE} characters")
        return self._read(max(CHUNK, waiting))

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
