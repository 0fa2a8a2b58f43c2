"""Runs in steps: each done once, whatever happens in between."""

import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from convllava_hf.errors import ConvLlavaError
from convllava_hf.miniature.steps import JobError, Run, run_jobs


@pytest.fixture(autouse=True)
def _as_from_the_command(monkeypatch):
    """As in `convllava quickstart`, jobs' processes import what the job needs, and nothing for the package's sake."""
    monkeypatch.setattr(sys, "argv", ["convllava", "quickstart"])


def test_a_run_remembers_what_is_done(tmp_path):
    run = Run(tmp_path / "run", {"seed": 3})
    with run.step("one"):
        time.sleep(0.11)
    run.set_losses("one", [[1, 0.5]])
    with pytest.raises(KeyboardInterrupt), run.step("two"):
        time.sleep(0.11)
        raise KeyboardInterrupt
    again = Run(tmp_path / "run", {"seed": 3})
    assert again.is_done("one") and not again.is_done("two")
    assert again.record["losses"] == {"one": [[1, 0.5]]}
    interrupted = again.record["seconds"]["two"]
    assert interrupted >= 0.1
    with again.step("two"):
        time.sleep(0.11)
    assert again.is_done("two") and again.record["seconds"]["two"] >= interrupted + 0.1


def test_another_run_and_other_folders_are_refused(tmp_path):
    Run(tmp_path / "run", {"seed": 3})
    with pytest.raises(ConvLlavaError, match=r"'seed': 3.*asked for was.*'seed': 4"):
        Run(tmp_path / "run", {"seed": 4})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("")
    with pytest.raises(ConvLlavaError, match="is not empty"):
        Run(tmp_path / "mine", {"seed": 3})


def test_a_record_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    run = Run(tmp_path / "run", {"seed": 3})
    before = (tmp_path / "run" / "run.json").read_text()
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk"):
        run.finish("one")
    assert (tmp_path / "run" / "run.json").read_text() == before
    assert json.loads(before)["done"] == []


def fail(*_):
    raise OSError("disk full")


def test_jobs_run_side_by_side_and_tell(tmp_path):
    events = []
    jobs = {name: functools.partial(wait_for_each_other, tmp_path, name) for name in ("one", "two")}
    run_jobs(jobs, lambda name, value: events.append((name, value)), at_once=2)
    for name in ("one", "two"):
        assert [value for other, value in events if other == name] == [("waiting",), ("met",), None]


def test_one_at_a_time(tmp_path):
    events = []
    jobs = {name: functools.partial(emit_twice, name) for name in ("one", "two", "three")}
    run_jobs(jobs, lambda name, value: events.append((name, value)), at_once=1)
    assert events == [(name, value) for name in jobs for value in ((name, 1), (name, 2), None)]


@pytest.mark.parametrize("job", ["raises", "dies"])
def test_a_job_that_fails_ends_the_others(tmp_path, job):
    jobs = {
        "bad": {"raises": raises, "dies": dies}[job],
        "slow": functools.partial(sleep_and_write, tmp_path / "late"),
    }
    started = time.monotonic()
    with pytest.raises(JobError, match="the disk is full" if job == "raises" else "ended with 9"):
        run_jobs(jobs, lambda *_: None, at_once=2)
    assert time.monotonic() - started < 60
    assert not (tmp_path / "late").exists()


ORPHAN = """
import functools, os, sys, time
from pathlib import Path
sys.argv[0] = "convllava"
from convllava_hf.miniature.steps import run_jobs

def tell_and_sleep(path, emit):
    Path(path + ".new").write_text(str(os.getpid()))
    os.replace(path + ".new", path)
    time.sleep(300)

if __name__ == "__main__":
    run_jobs({"one": functools.partial(tell_and_sleep, sys.argv[1])}, print, at_once=1)
"""


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks at processes in /proc")
def test_a_job_ends_with_a_parent_that_is_killed(tmp_path):
    (tmp_path / "orphan.py").write_text(ORPHAN)
    parent = subprocess.Popen([sys.executable, tmp_path / "orphan.py", tmp_path / "pid"])
    wait_until((tmp_path / "pid").exists)
    child = int((tmp_path / "pid").read_text())
    parent.kill()
    parent.wait()
    wait_until(lambda: not Path(f"/proc/{child}").exists() or "\nState:\tZ" in status_of(child))


def wait_until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def status_of(process: int) -> str:
    try:
        return Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return "\nState:\tZ"


def wait_for_each_other(folder, name, emit):
    emit("waiting")
    (folder / name).write_text("")
    end = time.monotonic() + 60
    while len(list(folder.iterdir())) < 2:
        if time.monotonic() > end:
            raise TimeoutError("the other job never ran")
        time.sleep(0.01)
    emit("met")


def emit_twice(name, emit):
    emit(name, 1)
    emit(name, 2)


def raises(emit):
    raise OSError("the disk is full")


def dies(emit):
    os._exit(9)


def sleep_and_write(path, emit):
    time.sleep(120)
    path.write_text("")
