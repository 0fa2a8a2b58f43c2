"""A full disk while training: one line that says how much is missing, exit code 1, the last checkpoint whole."""

import errno
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers.fresh_process import run_fresh


pytest.importorskip("trl")
pytest.importorskip("datasets")

from helpers.training_runs import RECIPES, arguments_of, run  # noqa: E402

from convllava_hf import cli  # noqa: E402
from convllava_hf.training import disk  # noqa: E402
from convllava_hf.training.checkpoints import checkpoint_error  # noqa: E402


pytestmark = pytest.mark.slow


STAGE_1 = RECIPES / "stage1_projector.yaml"
SHORT = {
    "max_steps": 3,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 5,
    "gradient_accumulation_steps": 1,
}
PER_DEVICE = {"per_device_train_batch_size": 1}


@pytest.fixture(scope="module")
def start(converted_checkpoint) -> Path:
    return converted_checkpoint("stage3")


@pytest.fixture
def small_disk(tmp_path):
    """A function: a file system of so many kilobytes."""
    mounted = []

    def mount(kilobytes: int) -> Path:
        folder = tmp_path / "disk"
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    yield mount
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_a_full_disk_ends_in_one_line_and_the_last_checkpoint_is_whole(start, tmp_path, small_disk, capsys, caplog):
    run(STAGE_1, start, tmp_path / "elsewhere", **{**SHORT, "max_steps": 1}, **PER_DEVICE)
    folder = small_disk(int(2.5 * size_of(tmp_path / "elsewhere" / "checkpoint-1")) // 1024)
    output = folder / "out"
    code = cli.main(["train", *arguments_of(STAGE_1, start, output, **SHORT, **PER_DEVICE)])
    assert code == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"convllava: error: There is no space left for {output / 'checkpoint-3'}")
    assert "are missing" in error and f"The last complete checkpoint is {output / 'checkpoint-2'}" in error
    assert checkpoint_error(output / "checkpoint-2") is None
    assert checkpoint_error(output / "checkpoint-3") is not None


def test_a_disk_without_room_for_one_checkpoint_is_warned_of_before_the_first_step(start, small_disk, capsys, caplog):
    folder = small_disk((start / "model.safetensors").stat().st_size // 2048)
    code = cli.main(["train", *arguments_of(STAGE_1, start, folder / "out", **SHORT, **PER_DEVICE)])
    assert code == 1
    assert "There is no complete checkpoint yet" in capsys.readouterr().err
    assert "saving will fail unless space is freed" in caplog.text


def test_the_last_save_too_ends_in_one_line(start, small_disk, capsys):
    folder = small_disk((start / "model.safetensors").stat().st_size // 2048)
    without = {**SHORT, "save_strategy": "no", "max_steps": 1}
    assert cli.main(["train", *arguments_of(STAGE_1, start, folder / "out", **without, **PER_DEVICE)]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"There is no space left for {folder / 'out'}" in error and "are missing" in error


def full(path) -> OSError:
    return OSError(errno.ENOSPC, "No space left on device", str(path))


@pytest.mark.parametrize("name", ["optimizer.pt", "trainer_state.json", "loss.png", "training_record.json"])
def test_any_file_may_be_the_one(name, start, tmp_path, monkeypatch, capsys):
    """Without a file system of its own: the function that writes this file finds no room."""
    output = tmp_path / "out"

    def no_room(*args, **kwargs):
        raise full(output / name)

    where = {
        "optimizer.pt": "transformers.Trainer._save_optimizer_and_scheduler",
        "trainer_state.json": "transformers.trainer_callback.TrainerState.save_to_json",
        "loss.png": "convllava_hf.train.save_loss_curve",
        "training_record.json": "convllava_hf.train.save_training_record",
    }[name]
    monkeypatch.setattr(where, no_room)
    assert cli.main(["train", *arguments_of(STAGE_1, start, output, **SHORT, **PER_DEVICE)]) == 1
    assert f"There is no space left for {output / name}" in capsys.readouterr().err.strip().splitlines()[-1]


def test_the_size_of_a_checkpoint_is_about_what_is_written(start, tmp_path):
    trainer = run(STAGE_1, start, tmp_path / "out", **{**SHORT, "max_steps": 1}, **PER_DEVICE)
    written = size_of(tmp_path / "out" / "checkpoint-1")
    assert abs(trainer._checkpoint_bytes() - written) < 0.2 * written
    adapted = run(RECIPES / "lora.yaml", start, tmp_path / "lora", **{**SHORT, "max_steps": 1}, **PER_DEVICE)
    written = sum(
        (tmp_path / "lora" / "checkpoint-1" / name).stat().st_size
        for name in ("adapter_model.safetensors", "optimizer.pt")
    )
    assert abs(adapted._checkpoint_bytes() - written) < 0.2 * written


def test_what_writers_say_of_a_full_disk_is_understood(tmp_path):
    """With a limit on the size of files, which their writers run into as into a full disk; in a fresh process."""
    found = run_fresh(
        """
import resource, torch
from pathlib import Path
from safetensors.torch import save_file
from convllava_hf.training.disk import is_full_disk
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
file, tensor = Path(values["file"]), torch.zeros(1_000_000)
writers = {
    "safetensors": lambda: save_file({"a": tensor}, file),
    "torch": lambda: torch.save({"a": tensor}, file),
    "python": lambda: file.write_bytes(bytes(4_000_000)),
}
result = {}
for name, write in writers.items():
    try:
        write()
    except Exception as error:
        result[name] = is_full_disk(error)
""",
        package=True,
        file=tmp_path / "file",
    )
    assert found == {"safetensors": True, "torch": True, "python": True}


def test_other_errors_stay_as_they_are(tmp_path):
    with pytest.raises(RuntimeError, match="something else"), disk.reporting_full_disk(tmp_path):
        raise RuntimeError("something else")
    assert not disk.is_full_disk(PermissionError(errno.EACCES, "no", "file"))
