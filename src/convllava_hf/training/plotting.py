"""Figures as files, drawn by matplotlib without a window, and curves of losses: of training, and of the miniature."""

import contextlib
import io
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConvLlavaError
from ..utils.atomic import write_atomic
from ..utils.report_style import COLORS


_DPI = 130
_LOSS_TICKS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30)
_SMALLEST_LOSS = 1e-3
_MOST_POINTS = 240

Curve = list[tuple[float, float]]  # step and loss


@contextlib.contextmanager
def figure_style() -> Iterator[type]:
    """matplotlib's `Figure` in the style of the reports, whatever the user's settings are; no window and no backend.

    Raises:
        ConvLlavaError: matplotlib is not installed.
    """
    try:
        import matplotlib.style
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConvLlavaError(
            "Figures are drawn by matplotlib, which is not installed: pip install 'convllava-hf[train]'"
        ) from error
    ours = {
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "text.color": COLORS["ink"],
        "text.parse_math": False,  # a model may answer with dollar signs
        "axes.edgecolor": "#cbd5e1",
        "axes.labelcolor": COLORS["soft"],
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "grid.color": COLORS["line"],
        "xtick.color": COLORS["soft"],
        "ytick.color": COLORS["soft"],
        "legend.frameon": False,
        "svg.hashsalt": "convllava",  # the same figure is the same file
    }
    with matplotlib.style.context(["default", ours]):
        yield Figure


def axes_at(figure: Any, left: float, top: float, width: float, height: float) -> Any:
    """Axes at a place of a figure, all in inches from its upper left corner."""
    whole_width, whole_height = figure.get_size_inches()
    bottom = whole_height - top - height
    return figure.add_axes((left / whole_width, bottom / whole_height, width / whole_width, height / whole_height))


def file_of(figure: Any, form: str = "png") -> bytes:
    """A figure as the content of a file.

    Args:
        form: `png` or `svg`.
    """
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # an untrained model writes anything
        figure.savefig(file, format=form, dpi=_DPI, metadata={"Date": None} if form == "svg" else None)
    return file.getvalue()


def curve_of(logged: Iterable[Sequence]) -> tuple[Curve, int]:
    """The curve to draw of `[step, loss]`, and how many of its losses are no finite numbers.

    A step that was logged twice, as after an interruption, counts once, as it was last. Long curves are averaged over
    neighboring steps.
    """
    last = {step: math.nan if loss is None else loss for step, loss in logged}
    finite = sorted((step, loss) for step, loss in last.items() if math.isfinite(loss))
    size = math.ceil(len(finite) / _MOST_POINTS) or 1
    bins = [finite[start : start + size] for start in range(0, len(finite), size)]
    means = [[sum(column) / len(part) for column in zip(*part, strict=True)] for part in bins]
    return [(step, max(loss, _SMALLEST_LOSS)) for step, loss in means], len(last) - len(finite)


def loss_limits(curves: Iterable[Curve]) -> tuple[float, float]:
    """Smallest and largest loss of all curves with some room, for a logarithmic axis that they share."""
    values = [loss for curve in curves for _, loss in curve] or [0.1, 10]
    return min(values) / 1.35, max(values) * 1.35


def draw_curve(axis: Any, curve: Curve, limits: tuple[float, float]) -> None:
    """Draws a curve of losses with logarithmic losses."""
    axis.set_yscale("log")
    axis.set_ylim(*limits)
    ticks = [tick for tick in _LOSS_TICKS if limits[0] <= tick <= limits[1]]
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.grid(axis="y")
    axis.tick_params(labelsize=8, length=2)
    if not curve:
        axis.set_xticks([])
        return
    steps, values = zip(*curve, strict=True)
    axis.plot(steps, values, color=COLORS["accuracy"], linewidth=1.4)
    axis.plot(steps[-1:], values[-1:], "o", color=COLORS["accuracy"], markersize=4)
    axis.set_xlim(0, max(steps) * 1.03 or 1)
    axis.locator_params(axis="x", nbins=4, integer=True)


def save_loss_curve(log_history: Sequence[Mapping[str, Any]], path: str | Path, title: str = "") -> Path | None:
    """Draws loss and learning rate over steps, from the Trainer's log.

    Args:
        log_history: `trainer.state.log_history`.
        path: the PNG to write.
        title: above the curve.

    Returns:
        The file, or `None` if nothing was logged.
    """
    rows = [row for row in log_history if "loss" in row and "step" in row]
    if not rows:
        return None
    evaluated = [row for row in log_history if "eval_loss" in row]
    with figure_style() as new_figure:
        figure = new_figure(figsize=(8, 4.5), layout="tight")
        axis = figure.add_subplot(xlabel="step", ylabel="loss", title=title)
        axis.grid()
        rates = axis.twinx()
        rates.set_ylabel("learning rate")
        few = "o" if len(rows) < 40 else None
        lines = []
        for place, points, name, style in (
            (axis, rows, "loss", {"color": COLORS["accuracy"], "marker": few}),
            (axis, evaluated, "eval_loss", {"color": COLORS["blind"], "marker": "s", "linestyle": "--"}),
            (rates, rows, "learning_rate", {"color": COLORS["soft"], "alpha": 0.6}),
        ):
            if points:
                steps, values = [row["step"] for row in points], [row.get(name) for row in points]
                lines += place.plot(steps, values, label=name.replace("_", " "), **style)
        axis.legend(handles=lines, loc="upper right")
        return write_atomic(Path(path), file_of(figure))
