"""The report as a page: HTML with everything in it, nothing from elsewhere and no script."""

import base64
import math
from collections.abc import Mapping, Sequence
from html import escape as _escape
from typing import Any

from ..utils.report_style import SMALL_SCREEN, STYLE
from .report_parts import (
    COLORS,
    KIND_NOTES,
    LOSS_TICKS,
    STEP_NOTES,
    Curve,
    amount,
    boxes,
    curves,
    duration,
    loss_limits,
    missing,
    overlap,
    plain,
    share,
    versions_text,
)


_PLOT = {"left": 30, "top": 8, "right": 250, "bottom": 112, "width": 260, "height": 132}  # of a loss curve
_CURVED = ("vision tower", "language model", "stage 1", "stage 2", "stage 3")  # explained under their curves

_STYLE = f"""{STYLE}td.accuracy {{ font-weight: 700; color: var(--accuracy); font-size: 1.1rem; line-height: 1.36; }}
.track {{ position: relative; height: .8rem; margin: .5rem 0 .25rem; background: #f1f5f9; border-radius: .2rem; }}
.fill {{ height: 100%; background: var(--accuracy); border-radius: .2rem; }}
.mark {{ position: absolute; height: .65rem; width: 5px; margin-left: -2px; border-radius: 1px;
  box-shadow: 0 0 0 1.5px #ffffff; }}
.mark.chance {{ top: -.28rem; background: var(--chance); }}
.mark.blind {{ bottom: -.28rem; background: var(--blind); }}
.legend i.accuracy {{ background: var(--accuracy); width: 1.5em; height: .7em; vertical-align: 0; }}
.legend i.chance {{ background: var(--chance); }}
.legend i.blind {{ background: var(--blind); }}
.curves {{ grid-template-columns: repeat(auto-fill, minmax(16.5rem, 1fr)); }}
.curve {{ padding: .8rem .9rem .5rem; }}
.curve svg {{ display: block; width: 100%; height: auto; margin-top: .4rem; }}
.curve p {{ font-size: .85rem; line-height: 1.4; min-height: 2.6rem; margin: 0; }}
.curve h3 {{ display: flex; justify-content: space-between; gap: .5rem; }}
.curve b {{ font-size: .9rem; color: var(--accuracy); font-variant-numeric: tabular-nums; }}
.times th:first-child {{ width: auto; }}
.times td {{ white-space: nowrap; }}
.times .fill {{ background: #94a3b8; }}
{SMALL_SCREEN}"""


def report_page(results: Mapping[str, Any], images: Sequence[bytes], commands: Sequence[str]) -> str:
    """The page as HTML.

    Args:
        results: what `results.json` holds.
        images: PNG files, one for each of `results["samples"]`.
        commands: the next ones to type.
    """
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="generator" content="convllava quickstart">',
        "<title>ConvLLaVA in miniature: report of a quickstart</title>",
        f"<style>{_STYLE}</style>",
        "</head>",
        "<body>",
        "<main>",
        *_header(results),
        *_accuracies(results),
        *_samples(results["samples"], images),
        *_commands(commands),
        *_losses(results["losses"]),
        *_times(results["seconds"]),
        *_footer(results),
        "</main>",
        "</body>",
        "</html>",
    ]
    return "\n".join(parts) + "\n"


def _html(text: object) -> str:
    return _escape(plain(text))


def _header(results: Mapping[str, Any]) -> list[str]:
    model = results["model"]
    parameters = model["parameters"]
    facts = {
        "seconds": ("trained and judged in", duration(results["seconds"]["total"])),
        "machine": ("machine", results["machine"]),
        **{name: (name, f"{amount(number)} parameters") for name, number in parameters.items()},
        "image": ("an image", f"{model['resolution']} px, {model['visual_tokens']} tokens"),
        "scenes": ("judged on", f"{results['scenes']} unseen scenes"),
        "seed": ("seed", results["seed"]),
    }
    return [
        "<header>",
        "<h1>ConvLLaVA in miniature</h1>",
        '<p class="lead">A ConvNeXt of five stages and a small Llama, trained from nothing and through the three '
        f"stages of the paper, then asked about {_html(results['scenes'])} scenes that they had never seen. No "
        "weights were downloaded.</p>",
        '<dl class="facts">',
        *(f"<div><dt>{_html(name)}</dt><dd>{_html(value)}</dd></div>" for name, value in facts.values()),
        "</dl>",
        "</header>",
    ]


def _accuracies(results: Mapping[str, Any]) -> list[str]:
    asked = [number for number in results["questions"].values() if number]
    lines = [
        "<section>",
        "<h2>How often it is right</h2>",
        "<p>Share of questions answered rightly. A box is right if it overlaps the true one by half (intersection "
        "over union)."
        + (f" Of {min(asked)} answers, a share is known to within ±{1 / math.sqrt(min(asked)):.2f}." if asked else "")
        + "</p>",
        '<ul class="legend">',
        '<li><i class="accuracy"></i>accuracy</li>',
        '<li><i class="chance"></i>chance (upper mark): a constant answer</li>',
        '<li><i class="blind"></i>blind (lower mark): shown another scene’s image</li>',
        "</ul>",
        "<table>",
        '<thead><tr><th scope="col">question</th><th scope="col">accuracy</th><th scope="col">chance</th>'
        '<th scope="col">blind</th></tr></thead>',
        "<tbody>",
    ]
    for kind, accuracy in results["accuracy"].items():
        marks = "".join(
            f'<span class="mark {name}" style="left:{100 * results[name][kind]:.1f}%"></span>'
            for name in ("chance", "blind")
            if not missing(results[name][kind])
        )
        width = 0 if missing(accuracy) else 100 * accuracy
        note = f" <small>{_html(KIND_NOTES[kind])}</small>" if kind in KIND_NOTES else ""
        lines.append(
            f'<tr><th scope="row">{_html(kind)}{note}'
            f'<div class="track" aria-hidden="true"><div class="fill" style="width:{width:.1f}%"></div>'
            f"{marks}</div></th>"
            f'<td class="accuracy">{share(accuracy)}</td><td>{share(results["chance"][kind])}</td>'
            f"<td>{share(results['blind'][kind])}</td></tr>"
        )
    return [*lines, "</tbody>", "</table>", "</section>"]


def _samples(samples: Sequence[Mapping], images: Sequence[bytes]) -> list[str]:
    if not samples:
        return []
    lines = ["<section>", "<h2>What it saw and said</h2>"]
    if any(map(boxes, samples)):
        lines += [
            '<ul class="legend">',
            '<li><i class="box"></i>box answered</li>',
            '<li><i class="box truth"></i>true box</li>',
            "</ul>",
        ]
    cards = (_sample(sample, image) for sample, image in zip(samples, images, strict=True))
    return [*lines, '<div class="grid samples">', *cards, "</div>", "</section>"]


def _sample(sample: Mapping, image: bytes) -> str:
    verdict = "right" if sample["correct"] else "wrong"
    shared = overlap(sample)
    rows = "".join(
        f"<dt>{key}</dt><dd{style}>{_html(plain(sample[key], 120)) or '(nothing)'}</dd>"
        for key, style in (("answer", f' class="{verdict}"'), ("truth", ""), ("blind", ""))
    )
    if shared is not None:
        rows += f"<dt>overlap</dt><dd>{shared:.2f}</dd>"
    return (
        '<article class="card"><div class="image">'
        f'<img src="data:image/png;base64,{base64.b64encode(image).decode()}" width="256" height="256" '
        f'alt="The scene that is asked about: {_html(sample["question"])}">{_overlay(sample)}</div>'
        f'<div class="words"><h3><span>{_html(sample["kind"])}</span>'
        f'<span class="{verdict}">{"✓" if sample["correct"] else "✗"} {verdict}</span></h3>'
        f'<p class="question">{_html(sample["question"])}</p><dl>{rows}</dl></div></article>'
    )


def _overlay(sample: Mapping) -> str:
    """The boxes over an image: each line on a broader white one, so that it shows on every color."""
    found = boxes(sample)
    if not found:
        return ""
    lines = []
    for name, (left, top, width, height) in found:
        place = f'x="{256 * left:.1f}" y="{256 * top:.1f}" width="{256 * width:.1f}" height="{256 * height:.1f}"'
        dashes = ' stroke-dasharray="7 5"' if name == "truth" else ""
        lines.append(f'<rect {place} stroke="#ffffff" stroke-width="5"/>')
        lines.append(f'<rect class="{name}" {place} stroke="{COLORS["ink"]}" stroke-width="2.5"{dashes}/>')
    return f'<svg viewBox="0 0 256 256" fill="none" aria-hidden="true">{"".join(lines)}</svg>'


def _commands(commands: Sequence[str]) -> list[str]:
    if not commands:
        return []
    typed = "\n".join(_escape(command) for command in commands)
    return ["<section>", "<h2>Ask it yourself</h2>", f"<pre><code>{typed}</code></pre>", "</section>"]


def _losses(losses: Mapping[str, Any]) -> list[str]:
    drawn, lost = curves(losses)
    low, high = loss_limits(drawn)
    lines = [
        "<section>",
        "<h2>How it learned</h2>",
        "<p>Loss over steps of training: of names and edges for the vision tower, cross-entropy of the words of "
        "answers everywhere else. The axes are logarithmic and alike.</p>",
        '<div class="grid curves">',
    ]
    for name, curve in drawn.items():
        last = f"<b>{curve[-1][1]:.3g}</b>" if curve else ""
        note = _html(STEP_NOTES.get(name, ""))
        if lost[name]:
            note += f" <b>{lost[name]} of its losses were not finite.</b>"
        chart = _chart(name, curve, low, high) if curve else '<p class="soft">No loss was recorded.</p>'
        lines.append(
            f'<figure class="curve"><h3>{_html(name)}{last}</h3>{chart}<figcaption><p>{note}</p></figcaption></figure>'
        )
    return [*lines, "</div>", "</section>"]


def _chart(name: str, curve: Curve, low: float, high: float) -> str:
    plot = _PLOT
    last = max(step for step, _ in curve) or 1

    def place(step: float, loss: float) -> tuple[float, float]:
        height = (math.log(high) - math.log(loss)) / (math.log(high) - math.log(low))
        x = plot["left"] + step / last * (plot["right"] - plot["left"])
        return round(x, 1), round(plot["top"] + height * (plot["bottom"] - plot["top"]), 1)

    shapes = []
    for tick in LOSS_TICKS:
        if low <= tick <= high:
            y = place(0, tick)[1]
            shapes.append(
                f'<path d="M{plot["left"]} {y}H{plot["right"]}" stroke="{COLORS["line"]}" stroke-width="0.7"/>'
            )
            shapes.append(f'<text x="{plot["left"] - 5}" y="{y + 3.2}" text-anchor="end">{tick:g}</text>')
    below = plot["bottom"] + 14
    shapes.append(f'<text x="{plot["left"]}" y="{below}">0</text>')
    shapes.append(f'<text x="{plot["right"]}" y="{below}" text-anchor="end">{last:.0f} steps</text>')
    points = [place(step, loss) for step, loss in curve]
    path = " ".join(f"{x},{y}" for x, y in points)
    color = COLORS["accuracy"]
    shapes.append(
        f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.6" stroke-linejoin="round"/>'
    )
    shapes.append(f'<circle cx="{points[-1][0]}" cy="{points[-1][1]}" r="2.8" fill="{color}"/>')
    label = f"Loss of {name}: {curve[0][1]:.3g} at first, {curve[-1][1]:.3g} at last"
    return (
        f'<svg viewBox="0 0 {plot["width"]} {plot["height"]}" role="img" aria-label="{_html(label)}" '
        f'font-size="9.5" fill="{COLORS["soft"]}">{"".join(shapes)}</svg>'
    )


def _times(seconds: Mapping[str, float]) -> list[str]:
    steps = {name: value for name, value in seconds.items() if name != "total"}
    longest = max(steps.values(), default=0) or 1
    lines = [
        "<section>",
        "<h2>Where the time went</h2>",
        '<table class="times">',
        '<thead><tr><th scope="col">step</th><th scope="col">time</th></tr></thead>',
        "<tbody>",
    ]
    for name, value in steps.items():
        note = f" <small>{_html(STEP_NOTES[name])}</small>" if name in STEP_NOTES and name not in _CURVED else ""
        lines.append(
            f'<tr><th scope="row">{_html(name)}{note}<div class="track" aria-hidden="true">'
            f'<div class="fill" style="width:{100 * value / longest:.1f}%"></div></div></th>'
            f"<td>{duration(value)}</td></tr>"
        )
    note = ""
    if sum(steps.values()) > 1.02 * seconds["total"]:
        note = " <small>Some steps ran side by side.</small>"
    lines.append(f'<tr><th scope="row">total{note}</th><td><b>{duration(seconds["total"])}</b></td></tr>')
    return [*lines, "</tbody>", "</table>", "</section>"]


def _footer(results: Mapping[str, Any]) -> list[str]:
    return [
        "<footer>",
        f"<p>Made by <code>convllava quickstart --seed {_html(results['seed'])}</code> with "
        f"{_html(versions_text(results['versions']))}, on {_html(results['machine'])}. The same figures lie beside "
        "this page in <code>results.json</code>.</p>",
        "</footer>",
    ]
