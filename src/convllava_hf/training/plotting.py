"""The loss of a run as an image."""

from io import BytesIO
from pathlib import Path

from ..utils.atomic import write_atomic


def save_loss_curve(log_history: list[dict], path: str | Path, title: str = "") -> Path | None:
    """Draws loss and learning rate over steps, from the Trainer's log.

    Args:
        log_history: `trainer.state.log_history`.
        path: the PNG to write.
        title: above the curve.

    Returns:
        The file, or `None` if nothing was logged.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in log_history if "loss" in row and "step" in row]
    if not rows:
        return None
    steps = [row["step"] for row in rows]
    figure, axis = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    axis.plot(
        steps, [row["loss"] for row in rows], color="#3b6fb6", label="loss", marker="o" if len(rows) < 40 else None
    )
    evaluated = [row for row in log_history if "eval_loss" in row]
    if evaluated:
        axis.plot(
            [row["step"] for row in evaluated],
            [row["eval_loss"] for row in evaluated],
            "s--",
            color="#b3413b",
            label="eval loss",
        )
    axis.set(xlabel="step", ylabel="loss", title=title)
    axis.grid(alpha=0.3)
    rates = axis.twinx()
    rates.plot(steps, [row.get("learning_rate") for row in rows], color="#c08a3e", alpha=0.6, label="learning rate")
    rates.set_ylabel("learning rate")
    lines = [*axis.get_lines(), *rates.get_lines()]
    axis.legend(lines, [line.get_label() for line in lines], loc="upper right")
    figure.tight_layout()
    content = BytesIO()
    figure.savefig(content, format="png")
    pyplot.close(figure)
    return write_atomic(Path(path), content.getvalue())
