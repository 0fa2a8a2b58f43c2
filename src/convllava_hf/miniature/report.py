"""The report of a quickstart: a table for the terminal, and one HTML page and one PNG with the same figures."""

import base64
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..errors import ConvLlavaError
from ..utils.atomic import write_atomic
from ..utils.report_style import amount, duration, facts_list, html, page, plain, share, versions_text
from .figures import accuracies_svg, boxes, losses_svg, report_png, sample_svg


_COLUMNS = ("accuracy", "chance", "blind")
_KIND_NOTES = {
    "reading": "What does the sign say?",
    "color": "What color is the square?",
    "shape": "What shape is the red object?",
    "presence": "Is there a blue ring?",
    "count": "How many circles are there?",
    "grounding": "Give the bounding box of the red square.",
}
_STEP_NOTES = {
    "vision tower": "Stage 0: four stages learn to name things, to stand in for CLIP’s ConvNeXt.",
    "language model": "Stage 0: a small Llama learns to talk about scenes told in words, to stand in for Vicuna.",
    "data": "Scenes and conversations about them.",
    "assemble": "Tower and language model become one model, with a new fifth stage and projector.",
    "stage 1": "Projector initialization: the fifth stage and the projector learn.",
    "stage 2": "Pretraining: the tower from its stage 3 on, the projector and the language model learn.",
    "stage 3": "Instruction tuning: the projector and the language model learn.",
    "evaluation": "Questions about unseen scenes, answered seeing and blind.",
}
_STYLE = """
td.accuracy { font-weight: 700; color: var(--accuracy); }
th small { display: block; }
.times td { white-space: nowrap; }
.wide { overflow-x: auto; }
.wide img { min-width: 34rem; }
.wide img, .grid img { display: block; width: 100%; height: auto; }
.curves { grid-template-columns: repeat(auto-fill, minmax(16.5rem, 1fr)); }
.answers { grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); }
.grid figure { padding: .7rem; }
"""


def format_table(results: Mapping[str, Any]) -> str:
    """Accuracy, chance and blind accuracy of every kind of question, as lines of plain text."""
    width = max(len("question"), *map(len, results["accuracy"]))
    lines = [f"{'question':<{width}}" + "".join(f"  {name:>8}" for name in _COLUMNS)]
    lines.append("-" * len(lines[0]))
    for kind in results["accuracy"]:
        lines.append(f"{kind:<{width}}" + "".join(f"  {share(results[name][kind]):>8}" for name in _COLUMNS))
    return "\n".join(lines)


def write_report(results: Mapping[str, Any], folder: Path, commands: Sequence[str] = ()) -> Path:
    """Writes `report.html`, which needs no other file, and `report.png`.

    Args:
        results: what `results.json` holds.
        folder: where the images of `results["samples"]` are; the report is written there, too.
        commands: the next ones to type, one a line.

    Returns:
        The page.

    Raises:
        ConvLlavaError: a sample's image is not there, or matplotlib is not installed.
    """
    folder = Path(folder)
    images = [_read(folder / sample["image"]) for sample in results["samples"]]
    path = write_atomic(folder / "report.html", report_page(results, images, commands).encode())
    write_atomic(folder / "report.png", report_png(results, images))
    return path


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConvLlavaError(
            f"The sample image {path} cannot be read ({error.strerror}); the report shows every image of "
            "results['samples'] from the folder that it is written to. Pass the folder of the quickstart that made it."
        ) from error


def report_page(results: Mapping[str, Any], images: Sequence[bytes], commands: Sequence[str] = ()) -> str:
    """The page as HTML.

    Args:
        images: PNG files, one for each of `results["samples"]`.
    """
    body = [
        *_header(results),
        *_accuracies(results),
        *_samples(results["samples"], images),
        *_commands(commands),
        *_losses(results["losses"]),
        *_times(results["seconds"]),
        f"<footer><p>Made by <code>convllava quickstart --seed {html(results['seed'])}</code> with "
        f"{html(versions_text(results['versions']))}, on {html(results['machine'])}. The same figures are in "
        "<code>results.json</code> next to this page.</p></footer>",
    ]
    return page("ConvLLaVA in miniature: report of a quickstart", "convllava quickstart", _STYLE, body)


def _header(results: Mapping[str, Any]) -> list[str]:
    model = results["model"]
    facts = {
        "trained and evaluated in": duration(results["seconds"]["total"]),
        "machine": results["machine"],
        **{name: f"{amount(number)} parameters" for name, number in model["parameters"].items()},
        "an image": f"{model['resolution']} px, {model['visual_tokens']} tokens",
        "evaluated on": f"{results['scenes']} unseen scenes",
        "seed": results["seed"],
    }
    return [
        "<header>",
        "<h1>ConvLLaVA in miniature</h1>",
        '<p class="lead">A ConvNeXt of five stages and a small Llama, trained from nothing and through the three '
        f"stages of the paper, then asked about {html(results['scenes'])} scenes that they had never seen. No "
        "weights were downloaded.</p>",
        facts_list(facts),
        "</header>",
    ]


def _accuracies(results: Mapping[str, Any]) -> list[str]:
    asked = [number for number in results["questions"].values() if number]
    error = f" Of {min(asked)} answers, a share is known to within ±{1 / math.sqrt(min(asked)):.2f}." if asked else ""
    rows = [
        f'<tr><th scope="row">{html(kind)} <small>{html(_KIND_NOTES.get(kind, ""))}</small></th>'
        + "".join(f'<td class="{name}">{share(results[name][kind])}</td>' for name in _COLUMNS)
        + "</tr>"
        for kind in results["accuracy"]
    ]
    return [
        "<section>",
        "<h2>How often it is right</h2>",
        f"<p>Share of right answers about {html(results['scenes'])} unseen scenes. Chance is a constant answer; blind "
        "is an answer to another scene’s image. A box is right if it overlaps the true one by half (intersection over "
        f"union).{error}</p>",
        f'<div class="wide">{_image(accuracies_svg(results), "Bars of the accuracies in the table below")}</div>',
        "<table>",
        _head("question", *_COLUMNS),
        *("<tbody>", *rows, "</tbody>"),
        *("</table>", "</section>"),
    ]


def _samples(samples: Sequence[Mapping[str, Any]], images: Sequence[bytes]) -> list[str]:
    if not samples:
        return []
    lines = ["<section>", "<h2>What it saw and said</h2>"]
    if any(map(boxes, samples)):
        lines.append("<p>Solid lines are boxes that were answered, dashed ones the true boxes.</p>")
    lines.append('<div class="grid answers">')
    for sample, image in zip(samples, images, strict=True):
        verdict = "right" if sample["correct"] else "wrong"
        said = [f"{name}: {plain(sample[name], 120) or '(nothing)'}" for name in ("answer", "truth", "blind")]
        description = f"{plain(sample['question'])} {verdict}; {'; '.join(said)}"
        lines.append(f"<figure>{_image(sample_svg(sample, image), description)}</figure>")
    return [*lines, "</div>", "</section>"]


def _commands(commands: Sequence[str]) -> list[str]:
    if not commands:
        return []
    typed = "\n".join(escape(command) for command in commands)
    return ["<section>", "<h2>Ask it yourself</h2>", f"<pre><code>{typed}</code></pre>", "</section>"]


def _losses(losses: Mapping[str, Any]) -> list[str]:
    curves = (f"<figure>{_image(svg, f'Loss of {name}')}</figure>" for name, svg in losses_svg(losses).items())
    return [
        "<section>",
        "<h2>How it learned</h2>",
        "<p>Loss over steps of training: of names and edges for the vision tower, cross-entropy of the words of "
        "answers everywhere else. The axes are logarithmic and alike.</p>",
        *('<div class="grid curves">', *curves, "</div>"),
        "</section>",
    ]


def _times(seconds: Mapping[str, float]) -> list[str]:
    steps = {name: value for name, value in seconds.items() if name != "total"}
    notes = {**_STEP_NOTES, "total": ""}
    if sum(steps.values()) > 1.02 * seconds["total"]:
        notes["total"] = "Some steps ran side by side."
    rows = [
        f'<tr><th scope="row">{html(name)} <small>{html(notes.get(name, ""))}</small></th>'
        f"<td>{duration(value)}</td></tr>"
        for name, value in {**steps, "total": seconds["total"]}.items()
    ]
    return [
        "<section>",
        "<h2>Where the time went</h2>",
        '<table class="times">',
        _head("step", "time"),
        *("<tbody>", *rows, "</tbody>"),
        *("</table>", "</section>"),
    ]


def _head(*names: str) -> str:
    cells = "".join(f'<th scope="col">{name}</th>' for name in names)
    return f"<thead><tr>{cells}</tr></thead>"


def _image(svg: bytes, description: str) -> str:
    return f'<img src="data:image/svg+xml;base64,{base64.b64encode(svg).decode()}" alt="{html(description)}">'
