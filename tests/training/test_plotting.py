"""Plots of losses: the points that are drawn are those that were logged."""

import io
import math

import numpy as np
import pytest
from PIL import Image


pytest.importorskip("matplotlib")

from convllava_hf.training import plotting  # noqa: E402


def test_curves_count_what_is_not_finite_and_keep_the_last_of_a_step():
    logged = [[10, 9.0], [20, 2.0], [10, 1.0], [30, math.nan], [40, math.inf], [50, None], [60, 0.0]]
    curve, lost = plotting.curve_of(logged)
    assert lost == 3
    assert curve == [(10, 1.0), (20, 2.0), (60, 0.001)]  # nothing is zero on a logarithmic axis


def test_long_curves_are_averaged():
    curve, lost = plotting.curve_of([[step, 1.0 + step % 2] for step in range(1, 1801)])
    assert lost == 0 and 100 < len(curve) <= 240
    assert {loss for _, loss in curve} == {1.5}
    assert np.mean([step for step, _ in curve]) == pytest.approx(900.5)


def test_the_loss_of_a_run_is_plotted(tmp_path, monkeypatch):
    history = [{"step": step, "loss": 3 / step, "learning_rate": step / 1e4} for step in (10, 20, 30)]
    history += [{"step": 20, "eval_loss": 0.4}, {"step": 30, "train_loss": 0.2}]
    drawn, write = [], plotting.file_of
    monkeypatch.setattr(plotting, "file_of", lambda figure: drawn.append(figure) or write(figure))
    path = plotting.save_loss_curve(history, tmp_path / "loss.png", "stage 1")
    with Image.open(path) as image:
        assert image.format == "PNG" and image.size == (1040, 585)
    lines = {line.get_label(): line.get_xydata().tolist() for axis in drawn[0].axes for line in axis.lines}
    assert lines == {
        "loss": [[10, 0.3], [20, 0.15], [30, 0.1]],
        "eval loss": [[20, 0.4]],
        "learning rate": [[10, 0.001], [20, 0.002], [30, 0.003]],
    }
    assert plotting.save_loss_curve([{"step": 30, "train_loss": 0.2}], tmp_path / "none.png") is None
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]


def test_figures_leave_matplotlib_as_it_was():
    import matplotlib

    with matplotlib.rc_context({"text.usetex": True, "figure.facecolor": "black", "axes.titlesize": 3}):
        before = dict(matplotlib.rcParams)
        with plotting.figure_style() as new_figure:
            figure = new_figure()
            plotting.draw_curve(figure.add_subplot(title="not by LaTeX_"), [(1, 0.5)], (0.1, 1))
            content = plotting.file_of(figure)
        assert dict(matplotlib.rcParams) == before
    assert Image.open(io.BytesIO(content)).convert("RGB").getpixel((2, 2)) == (255, 255, 255)
