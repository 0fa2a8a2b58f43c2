"""One line for each step of a run: a bar with loss and time left on a terminal, and what it came to in the end."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import TracebackType

from tqdm import tqdm

from ..utils.logging_utils import disable_progress_bars


OnStep = Callable[..., None]  # steps done, all steps and, now and then, the loss

_WIDTH = 28
_SMOOTHING = 0.95  # of the loss that is shown


class Line:
    """A step's line. On a terminal a bar moves; elsewhere a line is written when the step has ended.

    Args:
        title: of the step.
        position: lines below the first, for steps that run at the same time.
        unit: what the step counts.

    Attributes:
        seconds: that it took, once closed.
    """

    def __init__(self, title: str, position: int = 0, unit: str = "step"):
        self.title = title
        self.position = position
        self.unit = unit
        self.started = time.perf_counter()
        self.done = 0
        self.loss: float | None = None
        watched = sys.stderr.isatty()
        self.bar = tqdm(
            desc=f"{title:<{_WIDTH}}",
            position=position,
            unit=unit,
            leave=False,
            disable=not watched,
            dynamic_ncols=True,
        )

    def update(self, done: int, total: int, loss: float | None = None) -> None:
        """Shows `done` of `total`, and a loss that changes slowly."""
        if loss is not None:
            self.loss = loss if self.loss is None else _SMOOTHING * self.loss + (1 - _SMOOTHING) * loss
            self.bar.set_postfix_str(f"loss {self.loss:.3f}", refresh=False)
        self.bar.total = total
        self.bar.update(done - self.done)
        self.done = done

    def close(self, ended_well: bool = True) -> None:
        """Takes the bar away, and writes what the step came to if it ended well."""
        self.bar.close()
        self.seconds = time.perf_counter() - self.started
        if ended_well:
            count = f"{self.done:,} {self.unit}s" if self.done else ""
            loss = f"loss {self.loss:.3f}" if self.loss is not None else ""
            tqdm.write(f"{self.title:<{_WIDTH}}{count:>18}  {loss:<11} {self.seconds:6.1f} s", file=sys.stderr)

    def __enter__(self) -> "Line":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(ended_well=kind is None)


@contextmanager
def logs_to(path: Path) -> Iterator[None]:
    """Sends what libraries print, log and warn of into a file: the one who looks on did not write their code."""
    import datasets
    from transformers.utils import logging as transformers_logging

    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    root, library = logging.getLogger(), logging.getLogger("transformers")
    kept = library.propagate, list(library.handlers)
    bars = transformers_logging.is_progress_bar_enabled(), datasets.are_progress_bars_disabled()
    root.addHandler(handler)
    library.propagate, library.handlers = True, []
    logging.captureWarnings(True)
    disable_progress_bars(with_datasets=True)
    try:
        with redirect_stdout(handler.stream):  # where the Trainer prints its losses
            yield
    finally:
        logging.captureWarnings(False)
        library.propagate, library.handlers = kept
        root.removeHandler(handler)
        handler.close()
        if bars[0]:
            transformers_logging.enable_progress_bar()
        if not bars[1]:
            datasets.enable_progress_bars()
