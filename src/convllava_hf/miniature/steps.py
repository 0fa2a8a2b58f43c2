"""A run in steps, each done once: what was interrupted goes on where it was."""

import json
import logging
import multiprocessing
import os
import pickle
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from queue import Empty
from typing import Any

from ..errors import ConvLlavaError
from ..utils.json_files import write_json_rows
from ..utils.logging_utils import quiet_imports


_RECORD = "run.json"


class Run:
    """A folder, and the record of what has been done in it.

    Args:
        folder: made if it is not there.
        settings: what the run is to be; a folder with a run of other settings is refused.

    Attributes:
        record: `settings`; `done`, the names of finished steps; `seconds`, `losses` and
            `results` by step.

    Raises:
        ConvLlavaError: the folder holds another run, or something else.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        self.folder = Path(folder)
        self._path = self.folder / _RECORD
        if self._path.is_file():
            self.record = json.loads(self._path.read_text(encoding="utf-8"))
            if self.record["settings"] != dict(settings):
                raise ConvLlavaError(
                    f"{self.folder} holds a run with {self.record['settings']}; asked for was {dict(settings)}. "
                    "Choose another folder by --output, or remove this one."
                )
        elif self.folder.exists() and any(self.folder.iterdir()):
            raise ConvLlavaError(f"{self.folder} is not empty, and holds no run of the quickstart: choose another.")
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.record = {"settings": dict(settings), "done": [], "seconds": {}, "losses": {}, "results": {}}
            self._save()

    def is_done(self, name: str) -> bool:
        return name in self.record["done"]

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Times a step, and marks it as done if it ends well."""
        with self.clock(name):
            yield
        self.finish(name)

    @contextmanager
    def clock(self, name: str) -> Iterator[None]:
        """Adds the time within to that of a step, also if it is interrupted."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add_seconds(name, time.perf_counter() - started)

    def add_seconds(self, name: str, seconds: float) -> None:
        self.record["seconds"][name] = round(self.record["seconds"].get(name, 0) + seconds, 1)
        self._save()

    def keep(self, name: str, value: Any) -> None:
        """Keeps what a step came to."""
        self.record["results"][name] = value
        self._save()

    def finish(self, name: str) -> None:
        self.record["done"].append(name)
        self._save()

    def set_losses(self, name: str, losses: list[list[float]]) -> None:
        """Keeps `[step, loss]` of a step."""
        self.record["losses"][name] = losses
        self._save()

    def _save(self) -> None:
        write_json_rows(self._path, self.record)


class JobError(RuntimeError):
    """A job failed; the message is its traceback."""


def run_jobs(jobs: Mapping[str, Callable], on_event: Callable[[str, Any], None], at_once: int) -> None:
    """Runs functions in processes of their own, so many at once.

    Args:
        jobs: by name, functions that can be pickled; each is called with a function that sends its arguments to
            `on_event`.
        on_event: called here with a job's name and those arguments, and with `None` when the job has ended well.

    Raises:
        JobError: a job failed. The others are ended, as they are if this is interrupted.
    """
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    waiting, running = dict(jobs), {}
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                name = next(iter(waiting))
                process = context.Process(
                    target=_work, args=(name, pickle.dumps(waiting.pop(name)), queue), daemon=True
                )
                process.start()
                running[name] = process
            try:
                name, what, value = queue.get(timeout=0.5)
            except Empty:
                for name, process in running.items():
                    if process.exitcode not in (None, 0):
                        raise JobError(f"The process of {name!r} ended with {process.exitcode}.") from None
                continue
            if what == "failed":
                raise JobError(f"{name!r} failed:\n{value}")
            if what == "ended":
                running.pop(name).join()
                value = None
            on_event(name, value)
    finally:
        for process in running.values():
            process.terminate()
            process.join()


def _work(name: str, job: bytes, queue) -> None:
    import signal
    import threading
    import traceback

    quiet_imports()  # a job brings them as soon as it is unpickled
    logging.disable(logging.WARNING)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its jobs
    threading.Thread(target=_end_with_parent, daemon=True).start()  # also where it is killed
    try:
        pickle.loads(job)(lambda *event: queue.put((name, "emitted", event)))
    except Exception:
        queue.put((name, "failed", traceback.format_exc()))
    else:
        queue.put((name, "ended", None))


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
