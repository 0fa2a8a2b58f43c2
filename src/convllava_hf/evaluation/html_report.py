"""The report of evaluations: one HTML page with everything in it, nothing from elsewhere and no script."""

import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..utils.atomic import write_atomic
from ..utils.report_style import duration, facts_list, html, page, versions_text
from .evaluation_record import find_runs, images_text, read_record
from .gallery import is_right, read_gallery
from .paper import PAPER, REFCOCO, RESOLUTIONS, paper_row, refcoco_average


REPORT_FILE = "report.html"
_MOST_TEXT = 160  # characters of a question or an answer

_STYLE = """
.scores th:first-child { width: auto; }
.scores td, .scores th { white-space: nowrap; }
.scores small { display: block; white-space: normal; }
.scores td.own { font-weight: 700; color: var(--accuracy); }
.scores td.paper { color: var(--soft); }
.scores td.same { color: var(--ink); font-weight: 650; }
.scroll { overflow-x: auto; }
.parts { columns: 2 18rem; margin: .4rem 0 0; padding: 0; list-style: none; font-size: .88rem;
  font-variant-numeric: tabular-nums; }
.parts li { display: flex; justify-content: space-between; gap: 1rem; break-inside: avoid; }
details { margin: .6rem 0; }
summary { cursor: pointer; color: var(--soft); }
.image img { object-fit: contain; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.45; }
.failed { color: var(--wrong); }
"""


def write_report(output: str | os.PathLike) -> Path:
    """Writes `report.html` about all finished runs in an output folder.

    Raises:
        ConvLlavaError: there are none.
    """
    runs = find_runs(output)
    records = {name: read_record(folder) for name, folder in runs.items()}
    galleries = {name: read_gallery(folder) for name, folder in runs.items()}
    return write_atomic(Path(output) / REPORT_FILE, report_page(records, galleries).encode(errors="replace"))


def report_page(records: Mapping[str, Mapping[str, Any]], galleries: Mapping[str, Sequence[Mapping]]) -> str:
    """The page as HTML.

    Args:
        records: of runs, by name.
        galleries: samples of each run with `jpeg`, an image in base64; see `gallery.save_gallery`.
    """
    models = list(dict.fromkeys(record["model"]["name"] for record in records.values()))
    body = [*_header(models, list(records.values())), *_scores(records)]
    for name, record in records.items():
        body += _run(name, record, galleries.get(name, ()))
    return page(f"Evaluation of {', '.join(models)}", "convllava eval", _STYLE, [*body, *_footer(records)])


def _header(models: Sequence[str], records: Sequence[Mapping]) -> list[str]:
    failures = sum(record["failures"] for record in records)
    facts = {
        "benchmarks": len(records),
        "samples": f"{sum(record['samples'] for record in records):,}",
        "failed, not in the scores": f"{failures:,}",
        "asking took": duration(sum(record["seconds"] for record in records)),
        "dtype": ", ".join(dict.fromkeys(record["quantization"] or record["dtype"] for record in records)),
        "images": ", ".join(dict.fromkeys(_images(record) for record in records)),
    }
    return [
        "<header>",
        f"<h1>{html(', '.join(models))}</h1>",
        '<p class="lead">Measured by <code>convllava eval</code>. Intervals are of 95 %, by the bootstrap over '
        "samples.</p>",
        facts_list(facts),
        "</header>",
    ]


def _images(record: Mapping[str, Any]) -> str:
    tokens = record["visual_tokens"]
    counted = f"{tokens['mean']} tokens on average" if isinstance(tokens, Mapping) else f"{tokens} tokens"
    return f"{images_text(record['images'])}, {counted}"


def _scores(records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    head = "".join(f'<th scope="col">paper, {side} px</th>' for side in RESOLUTIONS)
    lines = [
        "<section>",
        "<h2>Scores</h2>",
        "<p>The paper’s are of arXiv 2405.15738, table 5, measured by its authors with VLMEvalKit; bold is the one at "
        "this run’s resolution. Where it has none, or the question was put in another way, there is a dash.</p>",
        '<div class="scroll"><table class="scores">',
        f'<thead><tr><th scope="col">benchmark</th><th scope="col">score</th><th scope="col">95 %</th>{head}'
        '<th scope="col">samples</th></tr></thead>',
        "<tbody>",
    ]
    for name, record in records.items():
        low, high = record["interval"]
        failed = f' <span class="failed">{record["failures"]} failed</span>' if record["failures"] else ""
        lines.append(
            f'<tr><th scope="row"><a href="#{html(name)}">{html(record["benchmark"])}</a> '
            f"<small>{html(record['metric'])}, {html(record['split'])}, {html(record['setting'])}</small></th>"
            f'<td class="own">{_number(record["score"])}</td><td>{_number(low)} to {_number(high)}</td>'
            f"{_paper_cells(paper_row(record), record)}<td>{record['samples']:,}{failed}</td></tr>"
        )
    average = refcoco_average(list(records.values()))
    if average is not None:
        any_record = next(record for record in records.values() if record["benchmark_name"] == "refcoco")
        lines.append(
            f'<tr><th scope="row">{REFCOCO} <small>over eight splits</small></th>'
            f'<td class="own">{_number(average)}</td><td>–</td>'
            f"{_paper_cells(PAPER[REFCOCO], any_record)}<td></td></tr>"
        )
    return [*lines, "</tbody>", "</table></div>", "</section>"]


def _paper_cells(row: Sequence[float] | None, record: Mapping[str, Any]) -> str:
    images = record["images"]
    cells = []
    for side, score in zip(RESOLUTIONS, row or [None] * len(RESOLUTIONS), strict=True):
        same = images["mode"] == "pad" and images["size"] == side
        shown = "–" if score is None else f"{score:g}"
        cells.append(f'<td class="paper{" same" if same else ""}">{shown}</td>')
    return "".join(cells)


def _number(value: float) -> str:
    return f"{value:.1f}" if abs(value) < 1000 else f"{value:.0f}"


def _run(name: str, record: Mapping[str, Any], gallery: Sequence[Mapping]) -> list[str]:
    lines = [f'<section id="{html(name)}">', f"<h2>{html(record['benchmark'])}</h2>"]
    parts = {part: value for part, value in record["scores"].items() if round(value, 4) != record["score"]}
    if parts:
        items = "".join(f"<li><span>{html(part)}</span><b>{_number(value)}</b></li>" for part, value in parts.items())
        lines.append(f'<ul class="parts">{items}</ul>')
    left_out = record["counts"]["left_out"]
    if record["failures"] or left_out:
        kinds = ", ".join(f"{count} {kind}" for kind, count in record["counts"]["failures"].items())
        more = f"; {left_out} more are left out since others of their group failed" if left_out else ""
        failed = "".join(f"<li>{html(one['id'])}: {html(one['message'])}</li>" for one in record["failed"])
        lines.append(
            f'<p class="failed">{record["failures"]} samples got no answer ({html(kinds)}){more}. They are not in '
            f"the score.</p><details><summary>The first of them</summary><ul>{failed}</ul></details>"
        )
    prompt = escape(record["example_prompt"] or record["prompt"])
    lines.append(f"<details><summary>A prompt, as the model reads it</summary><pre>{prompt}</pre></details>")
    if gallery:
        right = sum(map(is_right, gallery))
        lines.append(f"<p>{right} right and {len(gallery) - right} wrong samples, spread over the run.</p>")
        if any("truth" in row for row in gallery):
            lines.append(
                '<ul class="legend"><li><i class="box"></i>box answered</li>'
                '<li><i class="box truth"></i>true box</li></ul>'
            )
        lines += ['<div class="grid samples">', *map(_card, gallery), "</div>"]
    return [*lines, "</section>"]


def _card(row: Mapping[str, Any]) -> str:
    verdict = "right" if is_right(row) else "wrong"
    score = "" if row["score"] in (0, 1) else f" {row['score']:.2f}"
    facts = {"answer": row["prediction"] or "(nothing)", "truth": ", ".join(dict.fromkeys(row["answers"]))}
    if "truth" in row:  # a box
        facts["truth"] = "[" + ", ".join(f"{number:.2f}" for number in row["truth"]) + "]"
        facts["overlap"] = f"{row['overlap']:.2f}"
    elif row.get("read") is not None:
        facts["read as"] = {True: "yes", False: "no"}.get(row["read"], row["read"])
    shown = "".join(
        f"<dt>{key}</dt><dd{f' class={verdict!r}' if key == 'answer' else ''}>{html(value, _MOST_TEXT)}</dd>"
        for key, value in facts.items()
    )
    question = "<br>".join(html(line, _MOST_TEXT) for line in row["question"].splitlines() if line.strip())
    return (
        '<article class="card"><div class="image">'
        f'<img src="data:image/jpeg;base64,{html(row["jpeg"])}" alt="The image of sample {html(row["id"])}">'
        f'{_overlay(row)}</div><div class="words"><h3><span>{html(row["id"])} '
        f'{html(row.get("category") or "")}</span><span class="{verdict}">{"✓" if verdict == "right" else "✗"} '
        f'{verdict}{score}</span></h3><p class="question">{question}</p><dl>{shown}</dl></div></article>'
    )


def _overlay(row: Mapping[str, Any]) -> str:
    """True box and answered one over an image, which is centered in a square, as the lines are."""
    if "truth" not in row:
        return ""
    width, height = row["image"]
    line = max(width, height) / 90
    shapes = []
    for box, color, dashes in ((row["truth"], "#15803d", f"{3 * line} {2 * line}"), (row["read"], "#c2410c", "none")):
        if box is None:
            continue
        (left, right), (top, bottom) = (sorted(min(max(one, 0.0), 1.0) for one in box[side::2]) for side in (0, 1))
        place = (
            f'x="{left * width:.1f}" y="{top * height:.1f}" width="{(right - left) * width:.1f}" '
            f'height="{(bottom - top) * height:.1f}" fill="none"'
        )
        shapes.append(f'<rect {place} stroke="#ffffff" stroke-width="{2 * line:.1f}"/>')
        shapes.append(
            f'<rect {place} stroke="{color}" stroke-width="{line:.1f}" stroke-dasharray="{dashes}" '
            f'class="{"truth" if dashes != "none" else "answer"}"/>'
        )
    return f'<svg viewBox="0 0 {width} {height}" aria-hidden="true">{"".join(shapes)}</svg>'


def _footer(records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    last = max(records.values(), key=lambda record: record["date"])
    commit = f", commit {html(last['commit'])}" if last["commit"] else ""
    return [
        "<footer>",
        f"<p>{html(versions_text(last['versions']))}{commit}, {html(last['date'])}. The figures lie in each run’s "
        "<code>record.json</code>, every sample in its <code>samples.jsonl</code>.</p>",
        "</footer>",
    ]
