"""What the pages say: their code blocks, and the commands in them."""

import re
import shlex
from pathlib import Path

from helpers.paths import ROOT


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "recipes" / "README.md", *sorted(ROOT.glob("docs/*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text("utf-8"), flags=re.M | re.S)


def command_lines() -> list[list[str]]:
    texts = [block.replace("\\\n", " ") for page in PAGES for block in blocks(page, "bash")]
    lines = [shlex.split(line, comments=True) for text in texts for line in text.splitlines()]
    return [line for line in lines if line]


def commands(program: str) -> list[list[str]]:
    return [list(line) for line in dict.fromkeys(map(tuple, command_lines())) if line[0] == program]
