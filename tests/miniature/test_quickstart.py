"""The quickstart as a whole, with hardly any training: what it writes, and runs that may be interrupted anywhere."""

import functools
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file


pytest.importorskip("trl")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from helpers.miniature_jobs import jobs_in_this_process  # noqa: E402

from convllava_hf.miniature import quickstart as module  # noqa: E402
from convllava_hf.miniature.language import KINDS  # noqa: E402
from convllava_hf.miniature.quickstart import Plan, open_run, quickstart  # noqa: E402
from convllava_hf.miniature.report import write_report  # noqa: E402


TINY = Plan(tower_steps=4, language_steps=4, stage1_scenes=64, stage2_scenes=176, stage3_scenes=32, test_scenes=8)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The folder of a run that was not interrupted, and its results."""
    folder = tmp_path_factory.mktemp("tiny") / "run"
    with jobs_in_this_process():
        yield folder, quickstart(open_run(folder, seed=1, plan=TINY))


@pytest.mark.slow
def test_what_is_written(tiny):
    folder, results = tiny
    assert json.loads((folder / "results.json").read_text()) == results
    for name in ("accuracy", "chance", "blind"):
        assert tuple(results[name]) == KINDS
        assert all(0 <= value <= 1 for value in results[name].values())
    stages = {"vision tower", "language model", "data", "assemble", "stage 1", "stage 2", "stage 3"}
    assert set(results["seconds"]) == stages | {"evaluation", "total"}
    assert results["seed"] == 1 and results["model"]["visual_tokens"] == 16
    assert [step for step, _ in results["losses"]["stage 2"]] == [10]
    assert not list(folder.rglob("checkpoint-*")) and not list(folder.glob(".*"))
    page = write_report(results, folder, ["convllava ask model image"])
    assert results["samples"][0]["question"] in page.read_text()


@pytest.mark.slow
def test_an_interrupted_run_ends_as_if_it_had_not_been(tiny, tmp_path, monkeypatch):
    """It is interrupted in its first step, and each time that it goes on in a later one.

    In stage 2 that is after a checkpoint, from which it goes on.
    """
    whole, results = tiny
    update, told = module.Line.update, []
    train = functools.partial(module.train_by_recipe, options=["--save_steps", "4"])
    monkeypatch.setattr(module, "train_by_recipe", train)
    for stop in ("vision tower", "stage 1", "stage 2", "evaluation"):

        def interrupt(line, done, *args, stop=stop):
            update(line, done, *args)
            told.append((line.title, done))
            if line.title == module.TITLES[stop] and done > 6 * (stop == "stage 2"):
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(module.Line, "update", interrupt)
            with pytest.raises(KeyboardInterrupt):
                quickstart(open_run(tmp_path / "run", seed=1, plan=TINY))
        assert not open_run(tmp_path / "run", seed=1, plan=TINY).is_done(stop)
    steps = [done for title, done in told if title == module.TITLES["stage 2"]]
    assert steps[:9] == [1, 2, 3, 4, 5, 6, 7, 4, 5]
    resumed = quickstart(open_run(tmp_path / "run", seed=1, plan=TINY))
    for name in ("accuracy", "chance", "blind", "questions"):
        assert resumed[name] == results[name]
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (tmp_path / "run", whole))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.slow
def test_nothing_is_done_twice(tiny, monkeypatch):
    folder, results = tiny
    times = {path: path.stat().st_mtime_ns for path in (folder / "model").iterdir()}
    monkeypatch.setattr(module, "run_jobs", lambda jobs, *_, **__: pytest.fail("again") if jobs else None)
    again = quickstart(open_run(folder, seed=1, plan=TINY))
    assert {**again, "seconds": None} == {**results, "seconds": None}
    assert {path: path.stat().st_mtime_ns for path in (folder / "model").iterdir()} == times


ASSEMBLES = """
import sys
from pathlib import Path

sys.argv = ["convllava", *sys.argv[1:]]
from convllava_hf.miniature.quickstart import assemble_model

assemble_model(Path(sys.argv[1]), stage0=Path(sys.argv[2]), seed=1)
"""


@pytest.mark.slow
def test_the_command_assembles_a_checkpoint_with_its_code(tiny, tmp_path):
    """Though it has not registered the model before."""
    folder, _ = tiny
    command = [sys.executable, "-c", ASSEMBLES, tmp_path / "model", folder / "stage0"]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    names, expected = ({path.name for path in place.iterdir()} for place in (tmp_path / "model", folder / "assembled"))
    assert names == expected and "processing_convllava.py" in names
