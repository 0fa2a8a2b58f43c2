"""Runs that are killed, whose disk fills up or whose images are broken: what is left, and how they go on."""

import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch


pytest.importorskip("trl")
pytest.importorskip("datasets")

from helpers.training_runs import (  # noqa: E402
    RECIPES,
    Started,
    arguments_of,
    assert_same_weights,
    logged,
    losses_of,
    run,
    some_samples,
    weights_of,
)

from convllava_hf.cli import main as command  # noqa: E402
from convllava_hf.data.collator import TrainingImageError  # noqa: E402
from convllava_hf.errors import ConvLlavaError  # noqa: E402


pytestmark = pytest.mark.slow


STAGE_2 = RECIPES / "stage2_pretrain.yaml"
STEPS = 40  # ten times through the data
LONG = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-3,
    "save_steps": 5,
}
SHORT = {**LONG, "max_steps": 6, "save_steps": 2}
KINDS = {
    "full": (STAGE_2, {}),
    "lora": (RECIPES / "lora.yaml", {"lora_r": 4}),  # with the recipe's dropout, so random numbers count
}


@pytest.fixture(scope="module")
def start(converted_checkpoint) -> Path:
    return converted_checkpoint("stage1")


@pytest.fixture(scope="module")
def uninterrupted(start, tmp_path_factory):
    """A function: the output of a whole run of a kind, trained once."""
    folders = {}

    def train(kind: str) -> Path:
        if kind not in folders:
            recipe, more = KINDS[kind]
            folders[kind] = tmp_path_factory.mktemp(kind) / "whole"
            run(recipe, start, folders[kind], **LONG, **more)
        return folders[kind]

    return train


def killed(kind: str, start: Path, folder: Path, sent: signal.Signals, moment) -> Path:
    """The output of a run that gets the signal as soon as `moment(started, output)` holds."""
    recipe, more = KINDS[kind]
    output = folder / "out"
    command = ["-m", "convllava_hf.train", *arguments_of(recipe, start, output, **LONG, **more)]
    with Started(command, folder / "process") as started:
        started.wait_until(lambda: moment(started, output))
        started.process.send_signal(sent)
        assert started.wait() == -sent
    assert not (output / "trainer_state.json").exists()  # it has not come to its end
    return output


def while_saving(step: int):
    return lambda started, output: (output / f"checkpoint-{step}").exists()


def after_step(step: int):
    return lambda started, output: started.output.count("'loss':") >= step


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, sent, moment",
    [
        pytest.param("full", signal.SIGKILL, while_saving(15), id="full-SIGKILL-while-saving"),
        pytest.param("full", signal.SIGTERM, after_step(12), id="full-SIGTERM"),
        pytest.param("lora", signal.SIGKILL, after_step(13), id="lora-SIGKILL"),
    ],
)
def test_a_killed_run_goes_on_as_if_nothing_had_been(kind, sent, moment, start, uninterrupted, tmp_path, caplog):
    whole = uninterrupted(kind)
    output = killed(kind, start, tmp_path, sent, moment)
    recipe, more = KINDS[kind]
    resumed = run(recipe, start, output, **LONG, **more, resume_from_checkpoint="true")
    step = resumed_from(caplog.text)
    assert 5 <= step < STEPS
    assert resumed.state.global_step == STEPS
    assert losses_of(output) == losses_of(whole)
    assert_same_weights(output, whole)


def resumed_from(told: str) -> int:
    """The step that a run says it goes on from."""
    return int(re.search(r"Resuming from \S*checkpoint-(\d+)\.", told)[1])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can limit another process's files")
def test_a_full_disk_ends_the_run_and_the_last_whole_checkpoint_is_used(start, uninterrupted, tmp_path):
    """From some moment on, no file can grow beyond 100 kB: the weights are cut off, as on a disk without room.

    The run goes on in a process of its own.
    """
    import resource

    output = tmp_path / "out"
    with Started(["-m", "convllava_hf.train", *arguments_of(STAGE_2, start, output, **LONG)], tmp_path / "a") as full:
        full.wait_until(lambda: (output / "checkpoint-5" / "trainer_state.json").exists())
        resource.prlimit(full.process.pid, resource.RLIMIT_FSIZE, (100_000, 100_000))
        assert full.wait() not in (0, None)
    newest = max(output.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    assert not (newest / "trainer_state.json").exists()
    with Started(
        ["-m", "convllava_hf.train", *arguments_of(STAGE_2, start, output, **LONG, resume_from_checkpoint="true")],
        tmp_path / "b",
    ) as resumed:
        told = resumed.succeed()
    assert f"{newest} is incomplete" in told
    assert told.count("'loss':") == STEPS - resumed_from(told)  # no step is trained again
    assert losses_of(output) == losses_of(uninterrupted("full"))
    assert_same_weights(output, uninterrupted("full"))


@pytest.fixture(scope="module")
def short(start, tmp_path_factory) -> Path:
    """The output of a run of six steps, with checkpoints after each two of them."""
    output = tmp_path_factory.mktemp("short") / "out"
    run(STAGE_2, start, output, **SHORT, save_total_limit=5)
    return output


@pytest.mark.parametrize("names", [["model.safetensors"], ["optimizer.pt", "rng_state.pth"], ["trainer_state.json"]])
def test_cut_off_checkpoints_are_passed_over(names, start, short, tmp_path, caplog):
    """One checkpoint for each name, from the last one back, has this file cut in half."""
    output = tmp_path / "out"
    shutil.copytree(short, output)
    for step, name in zip((6, 4), names, strict=False):
        file = output / f"checkpoint-{step}" / name
        with open(file, "r+b") as stream:
            stream.truncate(file.stat().st_size // 2)
    resumed = run(STAGE_2, start, output, **SHORT, save_total_limit=5, resume_from_checkpoint="true")
    said = [record.getMessage() for record in caplog.records if "checkpoint-" in record.getMessage()]
    for step, name in zip((6, 4), names, strict=False):
        assert any(f"checkpoint-{step} is incomplete ({name} is cut off)" in line for line in said)
    assert any(line.endswith(f"checkpoint-{6 - 2 * len(names)}.") and "Resuming from" in line for line in said)
    assert {row["step"]: row["loss"] for row in resumed.state.log_history if "loss" in row} == losses_of(short)
    assert_same_weights(output, short)
    assert_same_weights(output / "checkpoint-6", short)  # what was cut off has been written anew


def test_without_a_whole_checkpoint_the_run_starts_anew(start, short, tmp_path, caplog):
    output = tmp_path / "out"
    (output / "checkpoint-2").mkdir(parents=True)
    run(STAGE_2, start, output, **SHORT, resume_from_checkpoint="true")
    said = [record.getMessage() for record in caplog.records]
    assert any("checkpoint-2 is incomplete" in line for line in said)
    assert any("starting from the beginning" in line for line in said)
    assert_same_weights(output, short)


def test_a_fresh_run_does_not_mix_with_another_s_checkpoints(start, short, tmp_path, capsys):
    output = tmp_path / "out"
    shutil.copytree(short / "checkpoint-2", output / "checkpoint-2")
    with pytest.raises(ConvLlavaError, match="--resume_from_checkpoint true.*another --output_dir"):
        run(STAGE_2, start, output, **SHORT)
    assert command(["train", *arguments_of(STAGE_2, start, output, **SHORT)]) == 2
    assert "holds checkpoints of an earlier run" in capsys.readouterr().err


def test_a_checkpoint_may_be_named(start, short, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(short, output)
    run(STAGE_2, start, output, **SHORT, resume_from_checkpoint=output / "checkpoint-2")
    assert_same_weights(output, short)


def test_a_checkpoint_that_is_not_there_is_refused(start, tmp_path):
    with pytest.raises(ConvLlavaError, match="checkpoint-7"):
        run(STAGE_2, start, tmp_path / "out", **SHORT, resume_from_checkpoint=tmp_path / "out" / "checkpoint-7")


# --- broken images


@pytest.fixture
def broken(golden, tmp_path) -> dict:
    """Eight samples; the image of the one with index 2 is a PNG cut off in the middle."""
    images = tmp_path / "images"
    shutil.copytree(golden / "images", images)
    data = (images / "photo.jpg").read_bytes()
    (images / "cut.jpg").write_bytes(data[: len(data) // 3])
    names = ["one-turn", "image-last", "three-turns", "grounding", "unicode", "text-only", "spaces", "one-turn"]
    return {"dataset_name": some_samples(tmp_path, names, three_turns="cut.jpg"), "image_folder": images}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_ends_the_run_and_is_named(workers, start, broken, tmp_path, capfd):
    arguments = {**SHORT, **broken, "on_bad_image": "error", "dataloader_num_workers": workers}
    assert command(["train", *arguments_of(STAGE_2, start, tmp_path / "out", **arguments)]) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("convllava: error:")]
    assert "Sample 2 " in line
    assert str(broken["image_folder"] / "cut.jpg") in line
    assert "on_bad_image: skip" in line
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_skipping_is_the_same_in_every_run(start, broken, tmp_path, caplog):
    """Twice the same, once with workers, and once resumed in the middle."""
    first = run(STAGE_2, start, tmp_path / "first", **SHORT, **broken, on_bad_image="skip")
    assert first.data_collator.skipped == 2  # six steps of two samples are one and a half epochs
    assert sum("cut.jpg" in record.getMessage() for record in caplog.records) == 2
    assert all(torch.isfinite(torch.tensor(logged(first, "loss"))))
    for name, more in {"again": {}, "workers": {"dataloader_num_workers": 2}}.items():
        again = run(STAGE_2, start, tmp_path / name, **SHORT, **broken, on_bad_image="skip", **more)
        assert logged(again, "loss") == logged(first, "loss")
        assert_same_weights(tmp_path / name, tmp_path / "first")
    cut = {**SHORT, "save_total_limit": 5, "on_bad_image": "skip", **broken}
    run(STAGE_2, start, tmp_path / "cut", **cut)
    for step in (6, 4):
        (tmp_path / "cut" / f"checkpoint-{step}" / "trainer_state.json").unlink()
    resumed = run(STAGE_2, start, tmp_path / "cut", **cut, resume_from_checkpoint="true")
    assert logged(resumed, "loss") == logged(first, "loss")
    assert_same_weights(tmp_path / "cut", tmp_path / "first")


def test_too_many_broken_images_end_the_run(start, broken, tmp_path):
    with pytest.raises(TrainingImageError, match="allows 1 for a process .max_bad_images.*cut.jpg"):
        run(STAGE_2, start, tmp_path / "out", **SHORT, **broken, on_bad_image="skip", max_bad_images=1)
    assert weights_of(tmp_path / "out" / "checkpoint-2")
