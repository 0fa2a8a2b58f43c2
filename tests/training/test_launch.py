"""`convllava train --accelerate_config` starts the processes itself."""

import json
from pathlib import Path

import pytest


pytest.importorskip("trl")
pytest.importorskip("datasets")

from helpers.training_runs import (  # noqa: E402
    RECIPES,
    STAGES,
    Started,
    arguments_of,
    assert_same_updates,
    run,
    some_samples,
)

from convllava_hf.cli import main as command  # noqa: E402
from convllava_hf.errors import ConvLlavaError  # noqa: E402
from convllava_hf.training.launch import launch_arguments  # noqa: E402


STAGE_2 = RECIPES / f"{STAGES[2]}.yaml"
RECIPE = ["--config", str(STAGE_2)]
VALUES = {
    "max_steps": 3,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-3,
    "train_sampling_strategy": "sequential",
    "group_by_modality_length": "false",
    "save_strategy": "no",
}
# What the first and the second process get in a step, in pairs.
PAIRS = ["one-turn", "text-only", "text-only", "three-turns", "grounding", "spaces"]


# --- which options go where


@pytest.mark.parametrize("given", [["--accelerate_config", "multi_gpu"], ["--accelerate_config=multi_gpu"]])
def test_options_of_accelerate_go_to_it_and_the_rest_to_the_processes(given):
    options = [
        "--max_steps",
        "2",
        *given,
        "--trainable",
        "projector",
        "lm_head",
        "--num_processes",
        "2",
        "--seed",
        "2",
    ]
    launched = launch_arguments([*RECIPE, *options])
    assert (launched.training_script, launched.module) == ("convllava_hf.train", True)
    expected = [*RECIPE, "--max_steps", "2", "--trainable", "projector", "lm_head", "--seed", "2"]
    assert launched.training_script_args == expected
    assert launched.num_processes == 2
    assert Path(launched.config_file).name == "multi_gpu.yaml"


def test_a_config_may_be_a_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("compute_environment: LOCAL_MACHINE\n")
    assert launch_arguments([*RECIPE, "--accelerate_config", str(file)]).config_file == str(file)


@pytest.mark.parametrize(
    "options, message",
    [
        (["nothing"], r"--accelerate_config is 'nothing'; expected a file .*fsdp2.*multi_gpu.*zero3"),
        ([""], r"--accelerate_config is ''; expected a file"),
        ([], "--accelerate_config needs a value"),
        (["fsdp2", "--num_proceses", "2"], "'num_proceses', which does not exist. Did you mean num_processes"),
        (["fsdp2", "--num_processes", "two"], "invalid int value: 'two'"),
        (["fsdp2", "more"], "'more' is not an option"),
    ],
)
def test_what_cannot_be_launched_is_refused(options, message):
    with pytest.raises(ConvLlavaError, match=message):
        launch_arguments([*RECIPE, "--accelerate_config", *options])


def test_accelerate_s_own_refusals_are_one_line(capsys):
    code = command(["train", *RECIPE, "--accelerate_config", "multi_gpu", "--multi_gpu", "--cpu"])
    assert code == 2
    assert "accelerate cannot start the processes: You can only use one of" in capsys.readouterr().err


# --- two processes


def launched(folder: Path, arguments: list[str], *more: str) -> Started:
    line = ["-m", "convllava_hf", "train", *arguments, "--accelerate_config", "multi_gpu", "--num_processes", "2"]
    line += ["--mixed_precision", "no"]  # which TRL's file sets to bf16, whatever the recipe says
    return Started([*line, *more], folder / "process", ACCELERATE_USE_CPU="true")


@pytest.mark.slow
def test_two_processes_train_as_one_does(converted_checkpoint, tmp_path):
    start, samples = converted_checkpoint("stage1"), some_samples(tmp_path, PAIRS)
    values = {**VALUES, "dataset_name": samples}
    arguments = arguments_of(STAGE_2, start, tmp_path / "two", **values, per_device_train_batch_size=1)
    with launched(tmp_path, arguments) as started:
        started.succeed(timeout=180)
    (stage,) = [
        one
        for one in json.loads((tmp_path / "two" / "training_record.json").read_text())["stages"]
        if one["name"] == "two"
    ]
    assert (stage["devices"], stage["global_batch_size"], stage["steps"]) == (2, 2, 3)
    run(STAGE_2, start, tmp_path / "one", **values, per_device_train_batch_size=2)
    assert_same_updates(tmp_path / "two", tmp_path / "one", start, 1e-2)


@pytest.mark.slow
def test_the_exit_code_is_that_of_the_processes(converted_checkpoint, tmp_path):
    arguments = arguments_of(STAGE_2, converted_checkpoint("stage1"), tmp_path / "out", **VALUES)
    with launched(tmp_path, arguments, "--weight_decay", "-1") as started:
        assert started.wait(timeout=120) == 2
        assert "convllava: error: weight_decay is -1.0; expected a number from 0 up" in started.output
