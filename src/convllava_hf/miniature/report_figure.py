"""The report as an image: accuracies, loss curves and samples in one figure."""

import contextlib
import io
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from PIL import Image

from ..errors import ConvLlavaError
from .report_parts import (
    COLORS,
    LOSS_TICKS,
    Curve,
    amount,
    boxes,
    curves,
    duration,
    loss_limits,
    missing,
    plain,
    share,
)


_WIDTH = 13.0  # inches, as all figures here
_COLUMNS = 6  # of sample images
_MOST_SAMPLES = 18
_GAP = 0.032  # between the loss curves, as a share of the width; half as much between images
_LINE = 0.135  # inches of a line of text
_ROW, _HEADING = 2.72, 0.32  # inches of a row of samples, and of the heading above the first
_DPI = 130


@contextlib.contextmanager
def figure_style() -> Iterator[type]:
    """matplotlib's `Figure` under a style of ours, whatever the user's settings are; no window and no backend.

    Raises:
        ConvLlavaError: matplotlib is not installed.
    """
    try:
        import matplotlib.style
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConvLlavaError(
            "The report's figures are drawn by matplotlib, which is missing: pip install 'convllava-hf[quickstart]'"
        ) from error
    ours = {
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "text.color": COLORS["ink"],
        "axes.edgecolor": COLORS["line"],
        "axes.labelcolor": COLORS["soft"],
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "grid.color": "#e2e8f0",
        "xtick.color": COLORS["soft"],
        "ytick.color": COLORS["soft"],
        "legend.frameon": False,
    }
    with matplotlib.style.context(["default", ours]):
        yield Figure


def png(figure) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # an untrained model writes anything
        figure.savefig(file, format="png", dpi=_DPI)
    return file.getvalue()


def report_figure(results: Mapping[str, Any], images: Sequence[bytes]) -> bytes:
    """The figure as a PNG file, 1690 pixels wide.

    Args:
        results: what `results.json` holds.
        images: PNG files, one for each of `results["samples"]`; the first eighteen are shown.
    """
    shown = list(zip(results["samples"], images, strict=True))[:_MOST_SAMPLES]
    rows = -(-len(shown) // _COLUMNS)
    heights = [0.95, 2.9, 2.5]  # title, accuracies, losses; inches
    heights += [_ROW + _HEADING * (row == 0) for row in range(rows)]
    with figure_style() as figure_class:
        figure = figure_class(figsize=(_WIDTH, sum(heights)))
        parts = figure.subfigures(len(heights), 1, height_ratios=heights, hspace=0)
        _draw_title(parts[0], results)
        _draw_accuracies(parts[1], results)
        _draw_losses(parts[2], results["losses"])
        for row in range(rows):
            _draw_samples(parts[3 + row], shown[row * _COLUMNS : (row + 1) * _COLUMNS], first=row == 0)
        if rows:
            _head_samples(parts[3], any(boxes(sample) for sample, _ in shown))
        return png(figure)


def _draw_title(part, results: Mapping[str, Any]) -> None:
    model = results["model"]
    sizes = ", ".join(f"{name} {amount(number)}" for name, number in model["parameters"].items())
    facts = [
        f"trained from nothing in {duration(results['seconds']['total'])} on {results['machine']}",
        f"parameters: {sizes}",
        f"{model['resolution']} px, {model['visual_tokens']} visual tokens",
        f"seed {results['seed']}",
    ]
    part.text(0.04, 0.66, "ConvLLaVA in miniature", fontsize=20, fontweight="bold", va="center")
    part.text(
        0.04, 0.24, plain("  ·  ".join(facts)), color=COLORS["soft"], fontsize=9.5, va="center", parse_math=False
    )


def _draw_accuracies(part, results: Mapping[str, Any]) -> None:
    axis = part.add_axes((0.04, 0.13, 0.93, 0.70))
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
    axis.set_title(f"Share of right answers about {results['scenes']} unseen scenes", pad=14)
    axis.legend(ncols=3, loc="lower right", bbox_to_anchor=(1, 1.0), borderaxespad=0.2, fontsize=9)


def _draw_losses(part, losses: Mapping[str, Any]) -> None:
    drawn, lost = curves(losses)
    if not drawn:
        return
    limits = loss_limits(drawn)
    pitch = (0.93 + _GAP) / len(drawn)
    for index, (name, curve) in enumerate(drawn.items()):
        axis = part.add_axes((0.04 + index * pitch, 0.2, pitch - _GAP, 0.54))
        _draw_curve(axis, curve, limits)
        axis.set_title(plain(name), fontsize=9.5, parse_math=False)
        if curve:
            axis.set_title(f"{curve[-1][1]:.3g}", loc="right", fontsize=9.5, color=COLORS["accuracy"])
        if lost[name] or not curve:
            text = f"{lost[name]} losses not finite" if lost[name] else "no loss was recorded"
            axis.text(0.5, 0.9, text, transform=axis.transAxes, ha="center", color=COLORS["wrong"], fontsize=8.5)
    part.text(0.04, 0.93, "Loss over steps of training", fontsize=11, fontweight="bold", va="center")


def _draw_curve(axis, curve: Curve, limits: tuple[float, float]) -> None:
    axis.set_yscale("log")
    axis.set_ylim(*limits)
    ticks = [tick for tick in LOSS_TICKS if limits[0] <= tick <= limits[1]]
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.grid(axis="y")
    axis.tick_params(labelsize=8, length=2)
    if not curve:
        axis.set_xticks([])
        return
    steps, values = zip(*curve, strict=True)
    axis.plot(steps, values, color=COLORS["accuracy"], linewidth=1.4, marker="o" if len(curve) == 1 else None)
    axis.plot(steps[-1:], values[-1:], "o", color=COLORS["accuracy"], markersize=4)
    axis.set_xlim(0, max(steps) * 1.03 or 1)
    axis.locator_params(axis="x", nbins=4, integer=True)


def _head_samples(part, with_boxes: bool) -> None:
    part.text(0.04, 0.96, "What it saw and said", fontsize=11, fontweight="bold", va="center")
    if with_boxes:
        note = "solid: box answered, dashed: true box"
        part.text(0.97, 0.96, note, fontsize=9, color=COLORS["soft"], va="center", ha="right")


def _draw_samples(part, shown: Sequence[tuple[Mapping, bytes]], first: bool) -> None:
    part_height = _ROW + _HEADING * first
    pitch = (0.93 + _GAP / 2) / _COLUMNS
    side = pitch - _GAP / 2
    height = side * _WIDTH / part_height
    bottom = 1 - height - _HEADING * first / part_height
    for index, (sample, png_bytes) in enumerate(shown):
        axis = part.add_axes((0.04 + index * pitch, bottom, side, height))
        with Image.open(io.BytesIO(png_bytes)) as image:
            axis.imshow(image.convert("RGB"), extent=(0, 1, 1, 0), aspect="auto")
        axis.set_axis_off()
        _draw_boxes(axis, sample)
        _draw_words(axis, sample, _LINE / (height * part_height))


def _draw_boxes(axis, sample: Mapping) -> None:
    from matplotlib.patches import Rectangle

    for name, (left, top, width, height) in boxes(sample):
        style = "--" if name == "truth" else "-"
        for color, line, dashes in (("white", 3.2, "-"), (COLORS["ink"], 1.5, style)):
            axis.add_patch(Rectangle((left, top), width, height, fill=False, color=color, lw=line, ls=dashes))


def _draw_words(axis, sample: Mapping, line: float) -> None:
    """Question, answer, truth and blind answer under an image; `line` is a line's height as a share of the axis."""
    mark, color = ("✓", COLORS["right"]) if sample["correct"] else ("✗", COLORS["wrong"])
    question = textwrap.wrap(plain(sample["question"], 60), 29)
    lines = [(text, COLORS["ink"], "bold") for text in question]
    lines.append((f"{mark} {plain(sample['answer'], 30) or '(nothing)'}", color, "bold"))
    lines.append((f"truth: {plain(sample['truth'], 28)}", COLORS["soft"], "normal"))
    lines.append((f"blind: {plain(sample['blind'], 28) or '(nothing)'}", COLORS["soft"], "normal"))
    for index, (text, shade, weight) in enumerate(lines):
        place = -0.04 - index * line
        axis.text(
            0,
            place,
            text,
            transform=axis.transAxes,
            va="top",
            color=shade,
            weight=weight,
            fontsize=7.6,
            parse_math=False,
        )
