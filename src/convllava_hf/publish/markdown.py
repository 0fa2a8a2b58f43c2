"""Texts of strangers in the card: what a checkpoint's record and evaluation files say is shown, and is no markup."""

import re
from typing import Any

from ..utils.report_style import plain


_LONGEST_CELL = 200  # characters


def cell(value: Any) -> str:
    """Text from outside as one cell of a Markdown table: no Markdown, HTML or link, on one line, not endless."""
    line = plain(value, _LONGEST_CELL)
    line = re.sub(r"([\\`*\[\]<>|~$!])", r"\\\1", line)
    line = re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", line)  # within a word it means nothing
    line = re.sub(r"&(?=#?\w+;)", "&amp;", line)
    # Addresses become links wherever they are.
    return line.replace("://", "&#58;//").replace("@", "&#64;").replace("www.", "www&#46;")


def code_cell(value: Any) -> str:
    """Text from outside as code in a cell of a Markdown table."""
    return f"`{plain(value, _LONGEST_CELL).replace('`', ' ').replace('|', ' ').strip() or ' '}`"
