"""Files and folders that are whole at every moment, whatever ends the process that writes them."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from convllava_hf.errors import ConvLlavaError
from convllava_hf.utils import atomic
from convllava_hf.utils.atomic import (
    BusyError,
    check_destination,
    discard_folder,
    lock_next_to,
    naming,
    replacing_folder,
    temporary_folder,
    write_atomic,
)


# A child that replaces the folder OUT and is killed the moment it calls the function NAME of `os`, before or after.
_KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from convllava_hf.utils import atomic

out, point, exchange = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "exchange"
if not exchange:
    atomic._rename = lambda *args, **kwargs: False

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def after(function):
    return lambda *args, **kwargs: (function(*args, **kwargs), die())

renames = []
def nth(function, number):
    def counted(*args, **kwargs):
        renames.append(1)
        if len(renames) == number:
            die()
        return function(*args, **kwargs)
    return counted

with atomic.replacing_folder(out) as folder:
    (folder / "config.json").write_text("new")
    if point == "writing":
        die()
    if point == "exchanged":
        atomic._rename = after(atomic._rename)
    if point == "clearing":
        shutil.rmtree = die
    if point.startswith("rename"):
        Path.rename = nth(Path.rename, int(point[-1]))
"""


# The package's own __init__ takes seconds, since it imports torch; the module needs nothing of it.
_IMPORT = f"""
import sys, types
package = types.ModuleType("convllava_hf")
package.__path__ = [{str(Path(atomic.__file__).parents[1])!r}]
sys.modules["convllava_hf"] = package
"""


def killed(*argv: str, code: str = _KILLED) -> None:
    argv = [sys.executable, "-c", _IMPORT + code, *map(str, argv)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr


def old_folder(path: Path) -> Path:
    path.mkdir()
    (path / "config.json").write_text("old")
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def places(tmp_path):
    """A folder on a file system that can exchange names, else the test is of no use."""
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    if not atomic._rename(one, other, exchange=True):
        pytest.skip("this system cannot exchange two names")
    one.rmdir()
    other.rmdir()
    return tmp_path


@pytest.mark.parametrize("point", ["writing", "exchanged", "clearing"])
def test_a_kill_leaves_the_old_folder_or_the_new_one(places, point):
    out = old_folder(places / "out")
    killed(out, point, "exchange")
    assert (out / "config.json").read_text() == ("old" if point == "writing" else "new")
    with replacing_folder(out) as folder:
        (folder / "config.json").write_text("newer")
    assert (out / "config.json").read_text() == "newer"
    assert names(places) == ["out"]


@pytest.mark.parametrize(
    ("point", "there"), [("writing", "old"), ("rename1", "old"), ("rename2", None), ("clearing", "new")]
)
def test_without_an_exchange_the_next_run_puts_the_old_folder_back(tmp_path, point, there):
    out = old_folder(tmp_path / "out")
    killed(out, point, "two renames")
    assert (out.exists() and (out / "config.json").read_text()) == (there or False)
    with lock_next_to(out):  # whatever comes next, even if it only looks
        assert (out / "config.json").read_text() == (there or "old")
    assert names(tmp_path) == ["out"]


def test_what_only_looks_like_a_leftover_is_left_alone(tmp_path):
    out = old_folder(tmp_path / "out")
    kept = [".out.txt", ".out.0123abcd.partial.txt", ".out2.0123abcd.partial", "out.0123abcd.partial", ".out.partial"]
    for name in kept:
        (tmp_path / name).mkdir()
    (tmp_path / ".out.0123abcd.partial").mkdir()
    with lock_next_to(out):
        pass
    assert names(tmp_path) == sorted([*kept, "out"])


def test_one_at_a_time(tmp_path):
    out = tmp_path / "out"
    with replacing_folder(out) as folder:
        for attempt in (replacing_folder, lock_next_to):
            with pytest.raises(BusyError, match="out is being written by another process"), attempt(out):
                pass
        (folder / "mine").touch()
    assert names(out) == ["mine"]
    assert names(tmp_path) == ["out"]


def test_a_lock_is_free_again_when_its_holder_was_killed(tmp_path):
    killed(tmp_path / "out", "writing", "exchange")
    assert [name for name in names(tmp_path) if name.endswith(".lock")], "the test needs a lock that was left"
    with lock_next_to(tmp_path / "out"):
        pass
    assert names(tmp_path) == []


def test_a_child_that_lives_on_does_not_hold_the_lock(tmp_path):
    with lock_next_to(tmp_path / "out"):
        reads, writes = os.pipe()
        child = os.fork()
        if child == 0:  # waits until the test ends
            os.close(writes)
            os.read(reads, 1)
            os._exit(0)
    try:
        descriptor = atomic._take(tmp_path / ".out.lock", "out")
        atomic._release(descriptor)
    finally:
        os.close(writes)
        os.close(reads)
        os.waitpid(child, 0)


def test_many_at_once_never_lose_the_folder(places):
    """One of them writes at a time; a reader always finds a folder."""
    out = old_folder(places / "out")
    (out / "other.json").write_text("old")
    written, failures, over = [], [], threading.Event()

    def write(number: int) -> None:
        for turn in range(20):
            with contextlib.suppress(BusyError), replacing_folder(out) as folder:
                for name in ("config.json", "other.json"):
                    (folder / name).write_text(f"{number}-{turn}")
                written.append((number, turn))

    def read() -> None:
        while not over.is_set():
            if not out.is_dir():
                failures.append("missing")

    reader = threading.Thread(target=read)
    reader.start()
    writers = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in writers:
        thread.start()
    for thread in writers:
        thread.join()
    over.set()
    reader.join()
    assert written and not failures
    assert (out / "config.json").read_text() == (out / "other.json").read_text()
    assert names(places) == ["out"]


def test_a_folder_that_appears_meanwhile_is_not_replaced(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ConvLlavaError, match="Another program has created"), replacing_folder(out) as folder:
        (folder / "config.json").write_text("new")
        old_folder(out)
    assert (out / "config.json").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_long_names_have_room_for_what_is_added(tmp_path):
    out = tmp_path / ("x" * 250)
    with replacing_folder(out) as folder:
        (folder / "a").touch()
    write_atomic(out / ("y" * 250), b"1")
    assert names(out) == ["a", "y" * 250]


def test_discarding_is_one_step(tmp_path):
    out = old_folder(tmp_path / "out")
    code = (
        "import os, shutil, signal, sys; from pathlib import Path; from convllava_hf.utils import atomic\n"
        "shutil.rmtree = lambda *args: os.kill(os.getpid(), signal.SIGKILL)\n"
        "atomic.discard_folder(Path(sys.argv[1]))"
    )
    killed(out, code=code)
    assert not out.exists() and len(names(tmp_path)) == 1
    with lock_next_to(out):
        assert names(tmp_path) == [".out.lock"]
    old_folder(out)
    discard_folder(out)
    assert names(tmp_path) == []


def test_a_file_is_whole_and_leftovers_of_the_dead_are_cleared(tmp_path):
    path = write_atomic(tmp_path / "record.json", b"old")
    code = (
        "import os, signal, sys; from pathlib import Path; from convllava_hf.utils import atomic\n"
        "os.replace = lambda *args: os.kill(os.getpid(), signal.SIGKILL)\n"
        "atomic.write_atomic(Path(sys.argv[1]), b'new')"
    )
    killed(path, code=code)
    assert path.read_bytes() == b"old" and len(names(tmp_path)) == 2
    write_atomic(path, b"newer")
    assert path.read_bytes() == b"newer" and names(tmp_path) == ["record.json"]


def test_writing_a_file_keeps_links_and_refuses_what_is_no_file(tmp_path):
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    write_atomic(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_bytes() == b"new"
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(FileExistsError):
        write_atomic(tmp_path / "fifo", b"new")
    assert (tmp_path / "fifo").is_fifo()


def test_temporary_folders_of_the_dead_are_cleared_and_those_of_the_living_stay(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code = (
        "import os, signal, sys, tempfile; from convllava_hf.utils import atomic; tempfile.tempdir = sys.argv[1]\n"
        "with atomic.temporary_folder('convllava-test-') as folder: os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed(tmp_path, code=code)
    assert len(names(tmp_path)) == 1
    (tmp_path / "convllava-test-of-somebody").mkdir()  # not made by this function
    with temporary_folder("convllava-test-") as first, temporary_folder("convllava-test-") as second:
        assert first != second and first.is_dir() and second.is_dir()
        assert len(names(tmp_path)) == 3
        assert first.parent.stat().st_mode & 0o077 == 0
    assert names(tmp_path) == ["convllava-test-of-somebody"]


def test_an_error_of_the_disk_names_the_file_that_was_written(tmp_path):
    with pytest.raises(OSError) as caught, naming(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device", "source", None, "target")
    assert str(caught.value) == f"[Errno {errno.ENOSPC}] No space left on device: {str(tmp_path / 'out')!r}"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full device here")
def test_a_full_disk_names_the_file_of_samples(tmp_path):
    from convllava_hf.evaluation.prediction_log import PredictionLog

    (tmp_path / "samples.00000.part.jsonl").symlink_to("/dev/full")
    with (
        pytest.raises(OSError, match="samples.00000.part.jsonl") as caught,
        PredictionLog(tmp_path, 0) as prediction_log,
    ):
        prediction_log.append([{"id": "1"}])
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize(
    "place", ["/", "/dev/null", "/dev/sda", "/etc/convllava", "/proc/self/x", "/usr/share/../lib/x"]
)
def test_places_of_the_operating_system_are_refused(place, tmp_path):
    (tmp_path / "link").symlink_to(place)
    for path in (place, tmp_path / "link"):
        with pytest.raises(ConvLlavaError, match="--output is .*: name another place"):
            check_destination(path, "--output")


def test_a_persons_places_are_taken(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ConvLlavaError, match="FIFO"):
        check_destination(tmp_path / "fifo", "--output")
    for place in (tmp_path / "new", tmp_path, "/dev/shm/runs", "relative/runs", "/opt/runs", json.dumps("x")):
        assert check_destination(place, "--output") == Path(place)
