"""What reports have in common: colors, texts and numbers on a line, and the frame and look of a page."""

import math
from collections.abc import Mapping, Sequence
from html import escape


# The colors of docs/architecture.svg.
COLORS = {
    "ink": "#0f172a",
    "soft": "#475569",
    "line": "#e2e8f0",
    "panel": "#f8fafc",
    "accuracy": "#c2410c",
    "chance": "#475569",
    "blind": "#6d28d9",
    "right": "#15803d",
    "wrong": "#be123c",
}
_VARIABLES = " ".join(f"--{name}: {color};" for name, color in COLORS.items())

_STYLE = """
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
body { margin: 0; background: #ffffff; color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", Helvetica, Arial, sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 2.5rem 1.25rem 3rem; }
h1 { font-size: 2rem; line-height: 1.15; margin: 0 0 .6rem; letter-spacing: -.02em; }
h2 { font-size: 1.3rem; line-height: 1.25; margin: 3rem 0 .4rem; letter-spacing: -.01em; }
h3 { font-size: 1rem; margin: 0; }
p { margin: 0 0 .8rem; max-width: 46rem; }
.lead { font-size: 1.08rem; }
.soft, small, figcaption { color: var(--soft); }
small { font-size: .85rem; font-weight: 400; }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: .9rem; }
.facts { display: grid; grid-template-columns: repeat(4, 1fr); gap: 1px; margin: 1.5rem 0 0;
  background: var(--line); border: 1px solid var(--line); border-radius: .6rem; overflow: hidden; }
.facts div { background: var(--panel); padding: .7rem .9rem; }
.facts dt { font-size: .82rem; color: var(--soft); }
.facts dd { margin: 0; font-weight: 650; font-size: 1.08rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .6rem 0 .6rem .9rem; vertical-align: top; font-weight: 400; }
th:first-child { text-align: left; padding-left: 0; width: 62%; }
thead th { color: var(--soft); font-size: .85rem; padding-bottom: .3rem; white-space: nowrap; }
tbody tr { border-top: 1px solid var(--line); }
tbody th { font-weight: 650; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: 0 0 .8rem; padding: 0; list-style: none;
  font-size: .9rem; color: var(--soft); }
.legend i { display: inline-block; margin-right: .45rem; vertical-align: -.1em; height: .95em; width: 4px;
  border-radius: 1px; }
.legend i.box { background: none; width: 1.2em; height: .95em; border: 2px solid var(--ink); }
.legend i.truth { border-style: dashed; }
.grid { display: grid; gap: 1rem; margin-top: 1rem; }
.samples { grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); }
figure, .card { margin: 0; border: 1px solid var(--line); border-radius: .6rem; overflow: hidden; }
.image { position: relative; aspect-ratio: 1; background: #f1f5f9; }
.image img, .image svg { position: absolute; inset: 0; width: 100%; height: 100%; display: block; }
.words { padding: .65rem .75rem .8rem; }
.words h3 { display: flex; justify-content: space-between; gap: .5rem; font-size: .82rem; font-weight: 400;
  color: var(--soft); margin-bottom: .15rem; }
.right { color: var(--right); font-weight: 650; }
.wrong { color: var(--wrong); font-weight: 650; }
.question { font-weight: 650; line-height: 1.35; margin-bottom: .5rem; }
.words dl { display: grid; grid-template-columns: auto 1fr; gap: .05rem .5rem; margin: 0; font-size: .8rem;
  font-variant-numeric: tabular-nums; }
.words dt { color: var(--soft); }
.words dd { margin: 0; overflow-wrap: anywhere; }
pre { margin: 1rem 0; padding: .9rem 1rem; overflow-x: auto; background: var(--panel); border: 1px solid var(--line);
  border-left: .3rem solid var(--accuracy); border-radius: .4rem; line-height: 1.8; }
footer { margin-top: 3rem; padding-top: 1rem; border-top: 1px solid var(--line); font-size: .88rem;
  color: var(--soft); }
"""
_SMALL_SCREEN = """
@media (max-width: 34rem) {
  main { padding: 1.5rem 1rem 2rem; }
  h1 { font-size: 1.6rem; }
  .facts { grid-template-columns: 1fr 1fr; }
  th:first-child { width: auto; }
  th, td { padding-left: .6rem; }
  .samples { grid-template-columns: 1fr; gap: .7rem; }
  .card { display: grid; grid-template-columns: 34% 1fr; background: var(--panel); }
  .image { align-self: start; }
  .words { padding: .5rem .7rem .6rem; }
  .question { font-size: .95rem; margin-bottom: .25rem; }
  .words dl { font-size: .75rem; }
  tbody th small { display: block; }
}
@media print { .card, figure, tr { break-inside: avoid; } main { max-width: none; padding: 0; } }
"""


def page(title: str, command: str, rules: str, body: Sequence[str]) -> str:
    """An HTML page that holds everything itself, and has no script.

    Args:
        command: that made it.
        rules: CSS of this page, over that of all reports.
        body: what `main` holds.
    """
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta name="generator" content="{html(command)}">',
        f"<title>{html(title)}</title>",
        f"<style>\n:root {{ color-scheme: light; {_VARIABLES} }}{_STYLE}{rules}{_SMALL_SCREEN}</style>",
        "</head>",
        "<body>",
        "<main>",
        *body,
        "</main>",
        "</body>",
        "</html>",
    ]
    return "\n".join(parts) + "\n"


def facts_list(facts: Mapping[str, object]) -> str:
    """The panels at the top of a page: names and values."""
    panels = (f"<div><dt>{html(name)}</dt><dd>{html(value)}</dd></div>" for name, value in facts.items())
    return f'<dl class="facts">{"".join(panels)}</dl>'


def html(text: object, width: int | None = None) -> str:
    """A text on one line, as `plain` has it, as text in HTML."""
    return escape(plain(text, width))


def plain(text: object, width: int | None = None) -> str:
    """A text on one line: what cannot be printed becomes a space, and what is too long is cut.

    Args:
        width: most characters.
    """
    words = "".join(character if character.isprintable() else " " for character in str(text)).split()
    line = " ".join(words)
    return line if width is None or len(line) <= width else line[: width - 1].rstrip() + "…"


def duration(seconds: float) -> str:
    """Such as `8 min 05 s`."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def versions_text(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{plain(name)} {plain(version)}" for name, version in versions.items())


def share(value: float | None) -> str:
    """An accuracy with two decimals; a dash if nothing was asked."""
    return "–" if missing(value) else f"{value:.2f}"


def missing(value: float | None) -> bool:
    return value is None or math.isnan(value)


def amount(number: float) -> str:
    """A large number with two significant figures or more, such as `0.67 M`, `51 M` and `1.2 G`."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.1 * size and number >= 1e3:
            value = number / size
            return f"{value:.0f} {unit}" if value >= 9.95 else f"{value:.{1 if value >= 0.995 else 2}f} {unit}"
    return f"{number:.0f}"
