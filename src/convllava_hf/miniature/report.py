"""The report of a quickstart: a table for the terminal, and one page and one image of all that happened."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConvLlavaError
from .report_figure import report_figure
from .report_findings import write_findings
from .report_page import report_page
from .report_parts import share, write_atomic


__all__ = ["format_table", "write_findings", "write_report"]


def format_table(results: Mapping[str, Any]) -> str:
    """Accuracy, chance and blind accuracy of every kind of question, as lines of plain text."""
    columns = ("accuracy", "chance", "blind")
    width = max(len("question"), *map(len, results["accuracy"]))
    lines = [f"{'question':<{width}}" + "".join(f"  {name:>8}" for name in columns)]
    lines.append("-" * len(lines[0]))
    for kind in results["accuracy"]:
        lines.append(f"{kind:<{width}}" + "".join(f"  {share(results[name][kind]):>8}" for name in columns))
    return "\n".join(lines)


def write_report(results: Mapping[str, Any], folder: Path, commands: Sequence[str] = ()) -> Path:
    """Writes `report.html`, which needs no other file, and `report.png`.

    Args:
        results: what `results.json` holds.
        folder: where the images of `results["samples"]` are, and the report comes to be.
        commands: the next ones to type, one a line.

    Returns:
        The page.

    Raises:
        ConvLlavaError: a sample's image is not there, or matplotlib is not installed; the page is written even then.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    images = [_read(folder / sample["image"]) for sample in results["samples"]]
    page = write_atomic(folder / "report.html", report_page(results, images, commands).encode())
    write_atomic(folder / "report.png", report_figure(results, images))
    return page


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConvLlavaError(
            f"The sample image {path} cannot be read ({error.strerror}); the report shows every image of "
            "results['samples'] from the folder that it is written to. Pass the folder of the quickstart that made it."
        ) from error
