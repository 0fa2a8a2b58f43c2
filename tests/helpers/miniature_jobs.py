"""Jobs of the miniature in the test's own process: processes of their own would spend their time importing."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from convllava_hf.miniature import quickstart


@contextmanager
def jobs_in_this_process() -> Iterator[None]:
    """The quickstart and the findings run their jobs here, one after the other, in what follows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quickstart, "run_jobs", _run_jobs)
        yield


def _run_jobs(jobs, on_event, at_once) -> None:
    for name, job in jobs.items():
        pickle.loads(pickle.dumps(job))(lambda *event, name=name: on_event(name, event))
        on_event(name, None)
