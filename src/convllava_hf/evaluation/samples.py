"""One question of a benchmark, and how its parts are read from a row of a data set."""

import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ConvLlavaError


LETTERS = string.ascii_uppercase


class MissingValueError(ConvLlavaError):
    """A row lacks what a question is made of: it cannot be asked, and counts as a failure."""


@dataclass(frozen=True)
class Sample:
    """A question, and what answers it.

    `id`: of the sample within its benchmark: the row's number, with the number of the expression where a row has
    several. `row`: its number in the data set, from 0. `prompt`: what is said to the model. `answers`: those that
    are right; of a question with options, the letter. `choices`: the options, in the order of their letters. `stem`:
    what is said where each option's likelihood decides: the question without options. `box`: left, top, right and
    bottom of the object that is looked for, in pixels. `group`: questions that count together, such as the two about
    an image of MME. `image`: the key into a table of images, where the row holds none itself.
    """

    id: str
    row: int
    prompt: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()
    stem: str = ""
    category: str | None = None
    group: str | None = None
    box: tuple[float, float, float, float] | None = None
    image: str | None = None


@dataclass(frozen=True)
class Question:
    """What a row asks, before it is put into a benchmark's prompt. `part`: number of the expression within the row."""

    question: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()
    stem: str | None = None
    category: str | None = None
    group: str | None = None
    box: tuple[float, float, float, float] | None = None
    image: str | None = None
    part: int | None = None


def text_of(row: Mapping[str, Any], column: str) -> str:
    """A text that must be there.

    Raises:
        MissingValueError: it is not, or is empty.
    """
    value = row.get(column)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise MissingValueError(f"`{column}` is {value!r:.80}; expected a text.")
    return value.strip()


def optional_text(row: Mapping[str, Any], column: str) -> str:
    """A text or, where there is none, an empty one. Data sets made by pandas write `nan` for nothing."""
    value = row.get(column)
    text = value.strip() if isinstance(value, str) else str(value) if isinstance(value, int) else ""
    return "" if text.lower() == "nan" else text


def texts_of(row: Mapping[str, Any], column: str) -> tuple[str, ...]:
    """Texts of which there must be one at least; a single one counts as a list of one.

    Raises:
        MissingValueError: there is none that says anything, or something else among them.
    """
    value = row.get(column)
    texts = [value] if isinstance(value, str) else value
    if (
        not isinstance(texts, list | tuple)
        or not all(isinstance(text, str) for text in texts)
        or not any(text.strip() for text in texts)
    ):
        raise MissingValueError(f"`{column}` is {value!r:.80}; expected a text or a list of texts.")
    return tuple(texts)


def letter_at(index: Any, choices: tuple[str, ...], column: str) -> str:
    """The letter of the option with a number from 0 (a number or its digits).

    Raises:
        MissingValueError: there is no such option.
    """
    digits = str(index).strip() if isinstance(index, int | str) and not isinstance(index, bool) else ""
    if not digits.isdecimal() or int(digits) >= len(choices):
        raise MissingValueError(f"`{column}` is {index!r:.80}; expected the number of one of {len(choices)} options.")
    return LETTERS[int(digits)]


def letter_of(row: Mapping[str, Any], column: str, choices: tuple[str, ...]) -> str:
    """The letter of the right option.

    Raises:
        MissingValueError: there is no such option.
    """
    letter = text_of(row, column).upper()
    if len(letter) != 1 or letter not in LETTERS[: len(choices)]:
        raise MissingValueError(f"`{column}` is {letter!r:.80}; expected one of {', '.join(LETTERS[: len(choices)])}.")
    return letter


def options_text(choices: tuple[str, ...]) -> str:
    """Options as LLaVA-1.5 writes them: a line each, with letter, full stop and text."""
    return "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
