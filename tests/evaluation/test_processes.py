"""Runs in processes of their own: killed at any moment, and several that share the samples."""

import json
import os
import signal
from pathlib import Path

import pytest


pytest.importorskip("datasets")
pytest.importorskip("rapidfuzz")
pytest.importorskip("scipy")

from helpers.benchmark_data import ROWS, save  # noqa: E402
from helpers.paths import HELPERS  # noqa: E402
from helpers.training_runs import Started, started_together  # noqa: E402

from convllava_hf import cli  # noqa: E402


pytestmark = pytest.mark.slow

SAMPLES = 40


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Forty samples, two of which cannot be asked."""
    rows = [ROWS["docvqa"](index) for index in range(SAMPLES)]
    rows[7]["image"] = {"bytes": b"broken", "path": "7.png"}
    rows[11]["question"] = None
    return save(rows, tmp_path_factory.mktemp("data") / "rows.parquet")


def arguments(checkpoint: Path, data: Path, output: Path) -> list[str]:
    argv = [str(checkpoint), "--benchmark", "docvqa", "--data", str(data), "--output", str(output)]
    return [*argv, "--device", "cpu", "--dtype", "float32", "--batch-size", "2"]


@pytest.fixture(scope="module")
def whole(checkpoint, data, tmp_path_factory) -> dict:
    """The rows of a run that nothing disturbs."""
    output = tmp_path_factory.mktemp("whole")
    assert cli.main(["eval", *arguments(checkpoint, data, output)]) == 0
    return rows_of(output / "docvqa")


def rows_of(folder: Path) -> dict[str, dict]:
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text("utf-8").split("\n")[:-1]]
    assert len({row["id"] for row in rows}) == len(rows) == SAMPLES
    return {row["id"]: row for row in rows}


def assert_same(rows: dict, expected: dict) -> None:
    """But for the time that it took."""
    keep = [{name: {**row, "seconds": None} for name, row in some.items()} for some in (rows, expected)]
    assert keep[0] == keep[1]


def complete_lines(folder: Path) -> list[dict]:
    lines = []
    for path in sorted(folder.glob("samples*.jsonl")):
        lines += [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    return lines


def kill_when(started: Started, folder: Path, ready) -> list[dict]:
    """Kills a process and those that it has started as soon as its rows suit, and returns them."""
    started.wait_until(lambda: ready(folder))
    os.killpg(started.process.pid, signal.SIGKILL)
    started.process.wait()
    rows = complete_lines(folder)
    assert 0 < len(rows) < SAMPLES and not (folder / "record.json").exists()
    return rows


def test_a_killed_run_is_finished_by_two_processes(checkpoint, data, whole, tmp_path):
    """What had been asked is not asked again, the rest once, and the answers are those of a run by itself."""
    output = tmp_path / "out"
    with Started(["-m", "convllava_hf", "eval", *arguments(checkpoint, data, output)], tmp_path / "alone") as alone:
        kept = kill_when(alone, output / "docvqa", lambda folder: len(complete_lines(folder)) >= 6)
    command = [HELPERS / "distributed_eval.py", tmp_path, *arguments(checkpoint, data, output)]
    with started_together(command, tmp_path / "processes", ACCELERATE_USE_CPU="true") as processes:
        printed = "".join(process.succeed() for process in processes)
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    for rank in ranks:
        assert (rank["code"], rank["processes"], rank["world"], rank["backend"]) == (0, 2, 2, "gloo")
        assert len(rank["asked"]) >= (SAMPLES - len(kept)) // 3
    asked = [row["id"] for row in kept] + [name for rank in ranks for name in rank["asked"]]
    assert sorted(asked, key=int) == [str(index) for index in range(SAMPLES)]
    rows = rows_of(output / "docvqa")
    for row in kept:  # to the time that each took
        assert rows[row["id"]] == row
    assert_same(rows, whole)
    record = json.loads((output / "docvqa" / "record.json").read_text())
    assert record["processes"] == 2 and record["samples"] == SAMPLES and record["failures"] == 2
    assert printed.count("DocVQA: ANLS") == 1
    assert "2 failed and are not in the score: 1 image, 1 missing value" in printed
    assert {path.name for path in (output / "docvqa").iterdir()} == {"record.json", "run.json", "samples.jsonl"}
