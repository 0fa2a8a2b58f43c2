"""Texts from users and files: what UTF-8 cannot hold is refused where it comes in; values of any kind in messages."""

import re
import reprlib
from typing import Any

from ..errors import ConvLlavaError


_SURROGATE = re.compile("[\ud800-\udfff]")


class _Shortened(reprlib.Repr):
    """`repr` with limits on depth and number of entries, so that no value makes it fail or take long."""

    def __init__(self):
        super().__init__()
        self.maxlevel, self.maxdict, self.maxlist, self.maxtuple = 5, 6, 6, 6
        self.maxstring = self.maxother = 200


_SHORTENED = _Shortened()


def text_error(text: str) -> str | None:
    """What is wrong with a text that UTF-8 cannot hold, `None` for every other text.

    JSON can write half of a surrogate pair (`\\ud83d`, an emoji that was cut in two), and Python gives bytes of the
    command line that are not UTF-8 as such halves. Tokenizers, tables and files take neither.
    """
    found = _SURROGATE.search(text)
    if found is None:
        return None
    return (
        f"half a surrogate pair (\\u{ord(found[0]):04x}) at character {found.start()}, which UTF-8 cannot hold: a "
        "character was cut in two, or the text is not UTF-8"
    )


def check_text(text: str, what: str) -> str:
    """The text as it is.

    Args:
        what: how the message names the text, such as `--system`.

    Raises:
        ConvLlavaError: UTF-8 cannot hold it.
    """
    if (error := text_error(text)) is not None:
        raise ConvLlavaError(f"{what} has {error}. Take it out.")
    return text


def storable(text: str) -> str:
    r"""The text with `\udxxx` written out where UTF-8 cannot hold it, for messages and files."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def shown(value: Any, limit: int = 120) -> str:
    """A value of any kind for a message: short, on one line, and as UTF-8 can hold it."""
    try:
        text = repr(value) if isinstance(value, (str, bytes)) else _SHORTENED.repr(value)
    except (RecursionError, ValueError):  # ValueError: an integer of more digits than Python writes
        text = f"a {type(value).__name__}"
    return text if len(text) <= limit else f"{text[:limit]}..."
