"""Half-written checkpoints are found: a real run's, cut at every moment and in every file that resuming reads."""

import logging
import shutil
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import make_model

from convllava_hf.training.checkpoints import checkpoint_error, get_last_complete_checkpoint


pytest.importorskip("accelerate")
from transformers import Trainer, TrainingArguments  # noqa: E402


# What resuming reads, or what tells that the rest is there. The model's code and its chat template are not read.
READ = (".safetensors", ".json", ".pt", ".pth", ".bin")
NEEDED = ("trainer_state.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, processor) -> Path:
    """The output of a run of two steps, a checkpoint after each."""
    folder = tmp_path_factory.mktemp("run")
    ids = processor(text="<s>USER: Hi. ASSISTANT: Yes.</s>")["input_ids"][0]
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=2, save_steps=1, per_device_train_batch_size=1, use_cpu=True,
        report_to="none", disable_tqdm=True,
    )  # fmt: skip
    samples = [{"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)} for _ in range(2)]
    Trainer(make_model(), arguments, train_dataset=samples, processing_class=processor).train()
    return folder


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """The same, to be spoiled."""
    return shutil.copytree(finished, tmp_path / "run")


def names_of(finished: Path) -> list[Path]:
    """Files of the last checkpoint, in the order in which they were written, as far as the clock tells them apart."""
    folder = finished / "checkpoint-2"
    files = sorted(folder.rglob("*"), key=lambda file: (file.stat().st_mtime_ns, file.name == "trainer_state.json"))
    return [file.relative_to(folder) for file in files if file.is_file()]


def cut(file: Path, size: int) -> None:
    with open(file, "r+b") as stream:
        stream.truncate(size)


def test_the_newest_whole_checkpoint_is_taken(finished, caplog):
    assert get_last_complete_checkpoint(finished) == finished / "checkpoint-2"
    assert checkpoint_error(finished / "checkpoint-1") is None
    assert not caplog.records


@pytest.mark.slow
def test_a_file_that_resuming_reads_is_found_cut_off_at_any_length(finished, run):
    files = [name for name in names_of(finished) if name.suffix in READ]
    assert {name.suffix for name in files} == set(READ)
    for name in files:
        file = run / "checkpoint-2" / name
        whole = file.read_bytes()
        size = len(whole.rstrip())  # a JSON file without its last line's end is whole
        for length in sorted(
            {0, 1, 7, 8, 9, size // 10, size // 2, size - 100, size - 2, size - 1} & set(range(size))
        ):
            cut(file, length)
            assert checkpoint_error(file.parent), f"{name} of {size} bytes, cut off after {length}"
            assert get_last_complete_checkpoint(run) == run / "checkpoint-1"
            file.write_bytes(whole)
    assert get_last_complete_checkpoint(run) == run / "checkpoint-2"


def test_a_run_killed_while_it_writes_is_found_at_any_moment(finished, run):
    """As many files as were written by then, the last of them in part."""
    files = names_of(finished)
    assert files[-1] == Path("trainer_state.json")
    for name in reversed(files):
        file = run / "checkpoint-2" / name
        if file.stat().st_size > 1:
            cut(file, file.stat().st_size // 2)
            assert get_last_complete_checkpoint(run) == run / "checkpoint-1", name
        file.unlink()
        assert get_last_complete_checkpoint(run) == run / "checkpoint-1", name


@pytest.mark.parametrize("name", NEEDED)
def test_what_is_missing_is_named(name, run, caplog):
    (run / "checkpoint-2" / name).unlink()
    with caplog.at_level(logging.WARNING):
        assert get_last_complete_checkpoint(run) == run / "checkpoint-1"
    (record,) = caplog.records
    expected = "no weights" if name == "model.safetensors" else f"{name} is missing"
    assert expected in record.getMessage()
    assert "checkpoint-2" in record.getMessage()


@pytest.mark.parametrize("name", [name for name in NEEDED if name.endswith((".pt", ".pth"))])
def test_a_block_of_zeros_is_found(name, run):
    """What a power failure leaves of a file whose length was written before its contents."""
    file = run / "checkpoint-2" / name
    data = bytearray(file.read_bytes())
    middle = data.index(b"data.pkl") + 100
    data[middle : middle + 64] = bytes(64)
    file.write_bytes(data)
    assert get_last_complete_checkpoint(run) == run / "checkpoint-1"


def test_checkpoints_count_by_their_number(run):
    shutil.copytree(run / "checkpoint-2", run / "checkpoint-10")
    (run / "checkpoint-best").mkdir()
    (run / "checkpoint-11").mkdir()
    (run / "checkpoint-12").write_text("no folder")
    assert get_last_complete_checkpoint(run) == run / "checkpoint-10"


def test_there_may_be_no_whole_checkpoint(run, tmp_path):
    for step in (1, 2):
        (run / f"checkpoint-{step}" / "optimizer.pt").unlink()
    assert get_last_complete_checkpoint(run) is None
    assert get_last_complete_checkpoint(tmp_path / "nowhere") is None


def test_every_shard_of_the_weights_must_be_there(run):
    folder = run / "checkpoint-2"
    make_model().save_pretrained(folder, max_shard_size="100KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert checkpoint_error(folder) is None
    whole = shards[1].read_bytes()
    cut(shards[1], len(whole) - 1)
    assert shards[1].name in checkpoint_error(folder)
    shards[1].unlink()
    assert f"{shards[1].name} of model.safetensors.index.json is missing" == checkpoint_error(folder)
    shards[1].write_bytes(whole)
    cut(folder / "model.safetensors.index.json", 50)
    assert checkpoint_error(folder) == "model.safetensors.index.json is cut off"


# --- wrappers that keep their states under other names, as accelerate and DeepSpeed write them


def as_fsdp_whole(folder: Path) -> list[str]:
    (folder / "optimizer.pt").rename(folder / "optimizer.bin")
    torch.save({}, folder / "pytorch_model_fsdp.bin")
    return ["optimizer.bin", "pytorch_model_fsdp.bin", "scheduler.pt", "model.safetensors"]


def as_fsdp_sharded(folder: Path) -> list[str]:
    (folder / "optimizer.pt").unlink()
    (folder / "model.safetensors").unlink()
    for name in ("pytorch_model_fsdp_0", "optimizer_0"):
        (folder / name).mkdir()
        (folder / name / "__0_0.distcp").write_bytes(b"shard")
        (folder / name / ".metadata").write_bytes(b"written last")
    return ["pytorch_model_fsdp_0/.metadata", "optimizer_0/.metadata", "scheduler.pt"]


def as_deepspeed(folder: Path) -> list[str]:
    states = folder / "global_step2"
    states.mkdir()
    (folder / "optimizer.pt").rename(states / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    torch.save({}, states / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    (folder / "model.safetensors").unlink()
    (folder / "latest").write_text("global_step2")
    return ["latest"]


@pytest.mark.parametrize("layout", [as_fsdp_whole, as_fsdp_sharded, as_deepspeed])
def test_sharded_runs_have_whole_checkpoints_too(layout, run):
    folder = run / "checkpoint-2"
    needed = layout(folder)
    (folder / "rng_state.pth").rename(folder / "rng_state_0.pth")
    assert checkpoint_error(folder) is None
    for name in needed:
        if name == "pytorch_model_fsdp.bin":
            continue  # beside the weights for transformers; without it the layout is another
        kept = (folder / name).read_bytes()
        (folder / name).unlink()
        assert checkpoint_error(folder), name
        (folder / name).write_bytes(kept)
    for file in [*folder.rglob("*.pt"), *folder.rglob("*.bin")]:
        kept = file.read_bytes()
        cut(file, len(kept) // 2)
        assert checkpoint_error(folder) == f"{file.relative_to(folder)} is cut off"
        file.write_bytes(kept)
    assert checkpoint_error(folder) is None


def test_deepspeed_s_last_states_must_be_those_it_names(run):
    folder = run / "checkpoint-2"
    as_deepspeed(folder)
    (folder / "latest").write_text("global_step")
    assert checkpoint_error(folder) == "latest is missing or cut off"
