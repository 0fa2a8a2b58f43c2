"""What reports have in common: text on a line, times, and the look of a page."""

from collections.abc import Mapping


# Rules of a page that holds everything itself. Rules of one page go after STYLE and before SMALL_SCREEN.
STYLE = """
:root { color-scheme: light; --ink: #0f172a; --soft: #475569; --line: #e2e8f0; --panel: #f8fafc;
  --accuracy: #c2410c; --chance: #475569; --blind: #6d28d9; --right: #15803d; --wrong: #be123c; }
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
SMALL_SCREEN = """
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
  .curve p { min-height: 0; }
}
@media print { .card, figure, tr { break-inside: avoid; } main { max-width: none; padding: 0; } }
"""


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
