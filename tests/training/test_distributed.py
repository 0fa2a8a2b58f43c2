"""Two processes on this CPU over gloo: the same training as one process does with the same global batch.

Every test asserts how many processes there really were, and what the model was wrapped in: launchers fall back to one
process, and libraries to another wrapper, without a word.
"""

import importlib.util
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest


pytest.importorskip("trl")
pytest.importorskip("datasets")

from helpers.fresh_process import run_fresh  # noqa: E402
from helpers.paths import HELPERS  # noqa: E402
from helpers.training_runs import (  # noqa: E402
    RECIPES,
    STAGES,
    Started,
    arguments_of,
    assert_same_updates,
    assert_same_weights,
    logged,
    losses_of,
    run,
    some_samples,
    started_together,
)


pytestmark = pytest.mark.slow

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
# In pairs: what the first and the second process get in a step. Each of them is without images in some steps.
PAIRS = ["one-turn", "text-only", "text-only", "three-turns", "grounding", "spaces", "text-only", "text-only"]
MIXED = {
    "max_steps": 4,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-3,
    "group_by_modality_length": "false",
    "train_sampling_strategy": "sequential",
    "save_strategy": "no",
}
ALONE = {"per_device_train_batch_size": 2}  # in place of one for each of two processes
LORA = {"lora_r": 4, "lora_dropout": 0.0}  # dropout would differ by process
GROUPED = {
    "num_train_epochs": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "save_strategy": "epoch",
}
NATIVE = {
    "max_steps": 4,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-3,
    "save_strategy": "no",
    "group_by_image_shape": "true",
    "image_aspect_ratio": "native",
    "max_pixels": 14 * 64**2,
}
RUNS = {
    "stage1": (RECIPES / f"{STAGES[1]}.yaml", MIXED),
    "stage2": (RECIPES / f"{STAGES[2]}.yaml", MIXED),
    "stage3": (RECIPES / f"{STAGES[3]}.yaml", {**MIXED, "gradient_checkpointing": "false"}),
    "lora": (RECIPES / "lora.yaml", {**MIXED, **LORA}),
    "grouped": (RECIPES / f"{STAGES[2]}.yaml", GROUPED),
    "native": (RECIPES / f"{STAGES[2]}.yaml", NATIVE),
}


@pytest.fixture(scope="module")
def start(converted_checkpoint) -> Path:
    return converted_checkpoint("stage1")


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> Path:
    return some_samples(tmp_path_factory.mktemp("data"), PAIRS)


def command_of(name: str, start: Path, samples: Path, output: Path, **more) -> list[str]:
    recipe, values = RUNS[name]
    data = {} if name in ("grouped", "native") else {"dataset_name": samples}
    return arguments_of(recipe, start, output, **{**values, **data, **more})


@pytest.fixture(scope="module")
def together(start, samples, tmp_path_factory) -> tuple[Path, dict[str, list[dict]]]:
    """The outputs of all runs in two processes, and what each process told of them."""
    folder = tmp_path_factory.mktemp("together")
    runs = {name: {"arguments": command_of(name, start, samples, folder / name)} for name in RUNS}
    runs["cut"] = {"arguments": command_of("grouped", start, samples, folder / "cut")}
    runs["resumed"] = {
        "arguments": [*runs["cut"]["arguments"], "--resume_from_checkpoint", "true"],
        "remove": str(folder / "cut" / "checkpoint-4" / "trainer_state.json"),
    }
    (folder / "runs.json").write_text(json.dumps(list(runs.values())))
    command = [HELPERS / "distributed_training.py", folder / "runs.json", folder]
    with started_together(command, folder / "processes", ACCELERATE_USE_CPU="true") as processes:
        for process in processes:
            process.succeed(timeout=180)
    ranks = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    return folder, {name: [rank[index] for rank in ranks] for index, name in enumerate(runs)}


@pytest.mark.parametrize("name", ["stage1", "stage2", "stage3", "lora"])
def test_two_processes_train_as_one_does(name, together, start, samples, tmp_path):
    """Whichever of them has images: losses, gradients and weights are those of one process with both's samples."""
    folder, told = together
    for rank in told[name]:
        assert (rank["processes"], rank["world"], rank["backend"]) == (2, 2, "gloo")
        assert rank["wrapper"] == "DistributedDataParallel"
    images = [[count for ((_, count),) in rank["batches"][:4]] for rank in told[name]]
    assert images == [[1, 0, 1, 0], [0, 1, 1, 0]]

    from convllava_hf.train import main

    alone = main(command_of(name, start, samples, tmp_path / name, **ALONE))
    assert alone.accelerator.num_processes == 1
    for rank in told[name]:
        np.testing.assert_allclose(rank["losses"], logged(alone, "loss"), rtol=1e-5)
        np.testing.assert_allclose(rank["gradient_norms"], logged(alone, "grad_norm"), rtol=1e-4)
    assert_same_updates(folder / name, tmp_path / name, start, 1e-2)


def test_native_images_by_shape_are_ordered_and_trained_as_by_one_process(together, start, samples, tmp_path):
    """Each process pads to its own images, and one with both pads to both's."""
    folder, told = together
    for rank in told["native"]:
        assert (rank["world"], rank["wrapper"]) == (2, "DistributedDataParallel")

    from convllava_hf.train import main

    alone = main(command_of("native", start, samples, tmp_path / "native", **ALONE))
    assert alone.processing_class.image_processor.image_aspect_ratio == "native"
    order = [sample for step in zip(*(rank["batches"] for rank in told["native"]), strict=True)
             for ((sample, _),) in step]  # fmt: skip
    sampler = alone._get_train_sampler()
    assert order[:8] == [alone.train_dataset[index]["sample"] for index in sampler]
    for rank in told["native"]:
        np.testing.assert_allclose(rank["losses"], logged(alone, "loss"), rtol=1e-5)
        np.testing.assert_allclose(rank["gradient_norms"], logged(alone, "grad_norm"), rtol=1e-4)
    assert_same_updates(folder / "native", tmp_path / "native", start, 1e-2)


def test_every_sample_is_seen_once_an_epoch(together):
    _, told = together
    seen = [[sample for batch in rank["batches"] for sample, _ in batch] for rank in told["grouped"]]
    first, second = seen
    assert len(first) == len(second) == 8
    for epoch in range(2):
        epochs = Counter(first[4 * epoch : 4 * epoch + 4] + second[4 * epoch : 4 * epoch + 4])
        assert epochs == Counter(range(8))


def test_a_run_of_two_processes_is_resumed(together):
    """From the middle, since its last checkpoint is not whole; it ends as a run without a break."""
    folder, told = together
    resumed = told["resumed"][0]
    assert resumed["processes"] == 2
    assert [len(rank["batches"]) for rank in told["resumed"]] == [2, 2]  # of two more steps
    assert resumed["losses"] == told["grouped"][0]["losses"]
    assert losses_of(folder / "cut") == losses_of(folder / "grouped")
    assert_same_weights(folder / "cut", folder / "grouped")


def test_broken_images_on_one_process_alone(start, golden, tmp_path):
    """With `skip` both go on, as one process does that has both's samples; with `error` both end, naming it."""
    data = (golden / "images" / "square.png").read_bytes()
    images = shutil.copytree(golden / "images", tmp_path / "images")
    (images / "cut.png").write_bytes(data[: len(data) // 2])
    names = ["text-only", "grounding", "one-turn", "three-turns", "text-only", "spaces", "text-only", "one-turn"]
    broken = {"dataset_name": some_samples(tmp_path, names, grounding="cut.png"), "image_folder": images}
    skipping = {**MIXED, **broken, "on_bad_image": "skip"}
    recipe = RECIPES / f"{STAGES[2]}.yaml"
    alone = run(recipe, start, tmp_path / "alone", **{**skipping, **ALONE})
    assert alone.data_collator.skipped == 1

    runs = [
        {"arguments": arguments_of(recipe, start, tmp_path / "skip", **skipping)},
        {"arguments": arguments_of(recipe, start, tmp_path / "error", **{**skipping, "on_bad_image": "error"})},
    ]
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    command = [*TORCHRUN, HELPERS / "distributed_training.py", tmp_path / "runs.json", tmp_path]
    with Started(command, tmp_path / "process", ACCELERATE_USE_CPU="true") as started:
        assert started.wait(timeout=120) != 0
    assert "Sample 1 has an image that cannot be read" in started.output
    assert str(images / "cut.png") in started.output
    assert not (tmp_path / "error" / "model.safetensors").exists()
    assert_same_updates(tmp_path / "skip", tmp_path / "alone", start, 1e-2)


# --- sharded weights


def sharded(kind: str, folder: Path, **environment: str) -> dict:
    command = [HELPERS / "distributed_step.py", kind, folder]
    with started_together(command, folder / "processes", **environment) as processes:
        for process in processes:
            process.succeed(timeout=180)
    told = json.loads((folder / "told.json").read_text())
    assert (told["world"], told["backend"]) == (2, "gloo")
    assert len(told["ranks"]) == 2
    return told


def assert_same_steps(told: dict) -> None:
    """Losses, gradients and weights of both steps, and losses in evaluation, are those without sharding."""
    for rank, variants in enumerate(told["ranks"]):
        for variant in variants:
            assert [step["image"] for step in variant["steps"]] == [rank == 0, rank == 1]
            for step in variant["steps"]:
                assert step["loss"][0] == pytest.approx(step["loss"][1], rel=1e-5)
                assert step["gradients"] < 1e-4
                assert step["weights"] < 1e-4
            assert variant["evaluated"][0] == pytest.approx(variant["evaluated"][1], rel=1e-4)


def assert_loads(folder: Path) -> None:
    """Through transformers alone, with the code that is in the folder."""
    found = run_fresh(
        """
        processor = transformers.AutoProcessor.from_pretrained(values["folder"], trust_remote_code=True)
        model, info = transformers.AutoModelForImageTextToText.from_pretrained(
            values["folder"], trust_remote_code=True, output_loading_info=True
        )
        inputs = processor(text="<s>USER: Hello. ASSISTANT:", return_tensors="pt")
        answer = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        new = answer.shape[1] - inputs["input_ids"].shape[1]
        result = {"info": [len(names) for names in info.values()], "new": new}
        """,
        folder=folder,
    )
    assert not any(found["info"])
    assert found["new"] > 0


def test_fsdp2_makes_the_same_steps_and_saves_a_checkpoint(tmp_path):
    """With and without gradient checkpointing, with the model's own loss and with TRL's."""
    told = sharded("fsdp2", tmp_path)
    for variants in told["ranks"]:
        assert len(variants) == 4
        for variant in variants:
            assert variant["wrapper"] == "FSDPModule"
            assert variant["layers"] == 6 + 2  # blocks of the tower, layers of the language model
            assert variant["sharded"]
    assert_same_steps(told)
    assert_loads(tmp_path / "model")


@pytest.mark.parametrize("stage, optimizer", [(2, "DeepSpeedZeroOptimizer"), (3, "DeepSpeedZeroOptimizer_Stage3")])
def test_deepspeed_makes_the_same_steps_and_saves_a_checkpoint(stage, optimizer, tmp_path):
    """DeepSpeed builds an extension for gloo when it is first used, which takes a compiler and about a minute."""
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    told = sharded(f"zero{stage}", tmp_path, DS_ACCELERATOR="cpu")
    for variants in told["ranks"]:
        assert len(variants) == 2
        for variant in variants:
            assert (variant["wrapper"], variant["stage"]) == ("DeepSpeedEngine", stage)
            assert variant["optimizer"] == optimizer
            assert variant["sharded"] == (stage == 3)
    assert_same_steps(told)
    assert_loads(tmp_path / "model")
