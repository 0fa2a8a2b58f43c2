"""The report's figures: accuracies, losses and samples, each drawn by one function for the page and for the PNG."""

import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image

from ..training.plotting import Curve, axes_at, curve_of, draw_curve, figure_style, file_of, loss_limits
from ..utils.report_style import COLORS, amount, duration, missing, plain, share
from .scoring import parse_box


# Inches.
_WIDTH, _MARGIN = 13.0, 0.52
_TITLE, _ACCURACIES, _LOSSES = 0.95, 2.9, 2.5  # heights, with the space around
_CURVE_GAP, _SAMPLE_GAP = 0.42, 0.21
_COLUMNS, _MOST_SAMPLES = 6, 18
_SIDE = (_WIDTH - 2 * _MARGIN - (_COLUMNS - 1) * _SAMPLE_GAP) / _COLUMNS  # of a sample's image
_SAMPLE = _SIDE + 0.88  # with the words below it
_HEADING = 0.32
_LINE = 9.75  # points from a line of words to the next


def report_png(results: Mapping[str, Any], images: Sequence[bytes]) -> bytes:
    """All of it in one figure as a PNG file, 1690 pixels wide.

    Args:
        results: what `results.json` holds.
        images: PNG files, one for each of `results["samples"]`; the first eighteen are shown.
    """
    shown = list(zip(results["samples"], images, strict=True))[:_MOST_SAMPLES]
    rows = -(-len(shown) // _COLUMNS)
    top, inner = _TITLE + _ACCURACIES, _WIDTH - 2 * _MARGIN
    height = top + _LOSSES + (_HEADING + rows * _SAMPLE if rows else 0)
    with figure_style() as new_figure:
        figure = new_figure(figsize=(_WIDTH, height))
        _draw_title(axes_at(figure, _MARGIN, 0, inner, _TITLE), results)
        _write(figure, _TITLE + 0.24, f"Share of right answers about {results['scenes']} unseen scenes")
        draw_accuracies(axes_at(figure, _MARGIN, _TITLE + 0.49, inner, 2.03), results)
        if results["losses"]:
            _write(figure, top + 0.18, "Loss over steps of training")
        pitch = (inner + _CURVE_GAP) / max(1, len(results["losses"]))
        for index, (name, (curve, lost, limits)) in enumerate(_curves(results["losses"]).items()):
            place = _MARGIN + index * pitch, top + 0.65, pitch - _CURVE_GAP, 1.35
            draw_losses(axes_at(figure, *place), name, curve, lost, limits)
        top += _LOSSES
        if rows:
            _write(figure, top + 0.1, "What it saw and said")
        if any(boxes(sample) for sample, _ in shown):
            note = {"fontsize": 9, "fontweight": "normal", "color": COLORS["soft"], "ha": "right"}
            _write(figure, top + 0.1, "solid: box answered, dashed: true box", _WIDTH - _MARGIN, **note)
        for index, (sample, image) in enumerate(shown):
            row, column = divmod(index, _COLUMNS)
            left = _MARGIN + column * (_SIDE + _SAMPLE_GAP)
            draw_sample(axes_at(figure, left, top + _HEADING + row * _SAMPLE, _SIDE, _SIDE), sample, image)
        return file_of(figure)


def accuracies_svg(results: Mapping[str, Any]) -> bytes:
    return _svg((9.0, 2.6), (0.4, 0.3, 8.5, 2.0), draw_accuracies, results)


def losses_svg(losses: Mapping[str, Any]) -> dict[str, bytes]:
    """A figure for each step of a run that has losses, all with the same axis."""
    return {
        name: _svg((2.6, 1.9), (0.38, 0.3, 2.1, 1.3), draw_losses, name, *drawn)
        for name, drawn in _curves(losses).items()
    }


def sample_svg(sample: Mapping[str, Any], image: bytes) -> bytes:
    return _svg((_SIDE, _SAMPLE), (0, 0, _SIDE, _SIDE), draw_sample, sample, image)


def _svg(size: tuple[float, float], place: tuple[float, float, float, float], draw: Callable, *what: Any) -> bytes:
    with figure_style() as new_figure:
        figure = new_figure(figsize=size)
        draw(axes_at(figure, *place), *what)
        return file_of(figure, "svg")


def _write(figure: Any, top: float, text: str, left: float = _MARGIN, **style: Any) -> None:
    width, height = figure.get_size_inches()
    figure.text(
        left / width, 1 - top / height, text, **{"fontsize": 11, "fontweight": "bold", "va": "center", **style}
    )


def _draw_title(axis: Any, results: Mapping[str, Any]) -> None:
    model = results["model"]
    sizes = ", ".join(f"{name} {amount(number)}" for name, number in model["parameters"].items())
    facts = [
        f"trained from nothing in {duration(results['seconds']['total'])} on {results['machine']}",
        f"parameters: {sizes}",
        f"{model['resolution']} px, {model['visual_tokens']} visual tokens",
        f"seed {results['seed']}",
    ]
    axis.set_axis_off()
    axis.text(0, 0.66, "ConvLLaVA in miniature", fontsize=20, fontweight="bold", va="center")
    axis.text(0, 0.24, plain("  ·  ".join(facts)), color=COLORS["soft"], fontsize=9.5, va="center")


def draw_accuracies(axis: Any, results: Mapping[str, Any]) -> None:
    """Bars of accuracy, chance and blind accuracy for every kind of question."""
    kinds = list(results["accuracy"])
    labels = {"accuracy": "accuracy", "chance": "chance: a constant answer", "blind": "blind: another image"}
    for index, (name, label) in enumerate(labels.items()):
        heights = [0 if missing(results[name][kind]) else results[name][kind] for kind in kinds]
        places = [place + (index - 1) * 0.25 for place in range(len(kinds))]
        axis.bar(places, heights, 0.23, color=COLORS[name], label=label, alpha=1 if index == 0 else 0.75)
        for place, height, kind in zip(places, heights, kinds, strict=True):
            weight = "bold" if index == 0 else "normal"
            text = share(results[name][kind])
            axis.text(place, height + 0.02, text, ha="center", color=COLORS[name], fontsize=8.5, fontweight=weight)
    axis.set_xticks(range(len(kinds)), kinds, fontsize=10.5, color=COLORS["ink"])
    axis.set(ylim=(0, 1.08), yticks=[0, 0.25, 0.5, 0.75, 1], xlim=(-0.55, len(kinds) - 0.45))
    axis.tick_params(length=0)
    axis.grid(axis="y")
    axis.legend(ncols=3, loc="lower right", bbox_to_anchor=(1, 1.0), borderaxespad=0.2, fontsize=9)


def _curves(losses: Mapping[str, Any]) -> dict[str, tuple[Curve, int, tuple[float, float]]]:
    """By step of the run: its curve, how many of its losses are not finite, and the limits that all share."""
    found = {name: curve_of(logged) for name, logged in losses.items()}
    limits = loss_limits(curve for curve, _ in found.values())
    return {name: (curve, lost, limits) for name, (curve, lost) in found.items()}


def draw_losses(axis: Any, name: str, curve: Curve, lost: int, limits: tuple[float, float]) -> None:
    """The losses of a step, with its name and the last of them."""
    draw_curve(axis, curve, limits)
    axis.set_title(plain(name), fontsize=9.5)
    if curve:
        axis.set_title(f"{curve[-1][1]:.3g}", loc="right", fontsize=9.5, color=COLORS["accuracy"])
    if lost or not curve:
        text = f"{lost} losses not finite" if lost else "no loss was recorded"
        axis.text(0.5, 0.9, text, transform=axis.transAxes, ha="center", color=COLORS["wrong"], fontsize=8.5)


def draw_sample(axis: Any, sample: Mapping[str, Any], image: bytes) -> None:
    """A sample's image with its boxes; below it the question, the answer, the truth and the blind answer."""
    from matplotlib.patches import Rectangle

    with Image.open(io.BytesIO(image)) as opened:
        axis.imshow(opened.convert("RGB"), extent=(0, 1, 1, 0), aspect="auto")
    axis.set_axis_off()
    for name, (left, top, width, height) in boxes(sample):
        style = "--" if name == "truth" else "-"
        for color, line, dashes in (("white", 3.2, "-"), (COLORS["ink"], 1.5, style)):
            axis.add_patch(Rectangle((left, top), width, height, fill=False, color=color, lw=line, ls=dashes))
    mark, color = ("✓", COLORS["right"]) if sample["correct"] else ("✗", COLORS["wrong"])
    lines = [(text, COLORS["ink"], "bold") for text in textwrap.wrap(plain(sample["question"], 56), 29)]
    lines.append((f"{mark} {plain(sample['answer'], 30) or '(nothing)'}", color, "bold"))
    lines.append((f"truth: {plain(sample['truth'], 28)}", COLORS["soft"], "normal"))
    lines.append((f"blind: {plain(sample['blind'], 28) or '(nothing)'}", COLORS["soft"], "normal"))
    for index, (text, shade, weight) in enumerate(lines):
        below = {"xycoords": "axes fraction", "textcoords": "offset points", "xytext": (0, -5 - index * _LINE)}
        axis.annotate(text, (0, 0), **below, va="top", color=shade, weight=weight, fontsize=7.6)


def boxes(sample: Mapping[str, Any]) -> list[tuple[str, tuple[float, float, float, float]]]:
    """What to draw into a sample's image: `"truth"` or `"answer"`, and left, top, width, height from 0 to 1.

    Only grounding has boxes. An answer that is no box is left out, and one that sticks out of the image is cut.
    """
    if sample["kind"] != "grounding":
        return []
    found = []
    for name in ("truth", "answer"):
        box = parse_box(sample[name])
        if box is not None:
            inside = [min(max(value, 0.0), 1.0) for value in box]
            (left, right), (top, bottom) = sorted(inside[0::2]), sorted(inside[1::2])
            found.append((name, (left, top, right - left, bottom - top)))
    return found
