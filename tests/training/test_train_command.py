"""`convllava train`: its help, and recipes that cannot work, each refused in one line before anything is loaded."""

from pathlib import Path

import pytest


pytest.importorskip("trl")
pytest.importorskip("datasets")

from convllava_hf import cli  # noqa: E402
from convllava_hf.training.arguments import make_parser  # noqa: E402


def test_help_shows_the_keys_of_recipes(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["train", "--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: convllava train --config RECIPE")
    for key in ("trainable", "image_folder", "learning_rate", "lora_r", "on_bad_image", "resume_from_checkpoint"):
        assert f"--{key} " in text


@pytest.mark.parametrize(
    "lines, words",
    [
        ("trainable: [projector]\ndataset_name: x\nwarmup_ratio: 0.03\nuse_cpu: true", "warmup_ratio"),
        ("trainable: [projector", "cannot be used"),
        ("- a list", "mapping"),
        ("dataset_name: x\nmodel_name_or_path: m\nuse_cpu: true\nbf16: false", "trainable"),
        ("dataset_name: x\ntrainable: [projector]\nuse_cpu: true\nbf16: false", "model_name_or_path is missing"),
        ("trainable: [projector]\nmodel_name_or_path: m\nuse_cpu: true\nbf16: false", "No data"),
        ("model_name_or_path: m\ndataset_name: x\nuse_peft: true\ntrainable: [projector]\nuse_cpu: true", "Both"),
        ("model_name_or_path: m\ndataset_name: x\ntrainable: [projector]\ndtype: float16\nuse_cpu: true", "fp16"),
        ("model_name_or_path: m\ndataset_name: x\ntrainable: [projector]\nfp16: true\nuse_cpu: true", "fp16"),
        ("model_name_or_path: m\ndataset_name: x\ntrainable: projector\npacking: true\nuse_cpu: true", "packing"),
        ("model_name_or_path: m\ndataset_name: x\ntrainable: [x]\non_bad_image: ignore\nuse_cpu: true", "skip"),
        ("model_name_or_path: m\ndataset_name: x\ntrainable: [x]\nmerge_adapter: true\nuse_cpu: true", "use_peft"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused_in_one_line(lines, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(lines)
    assert cli.main(["train", "--config", "recipe.yaml"]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("convllava: error: ")
    assert words in message


@pytest.mark.parametrize(
    "arguments, words",
    [([], "--config RECIPE"), (["--config"], "needs a value"), (["--config", "none.yaml"], "none.yaml")],
)
def test_a_recipe_that_is_not_there_is_refused_in_one_line(arguments, words, capsys):
    assert cli.main(["train", *arguments]) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_a_single_name_is_a_list_of_one(tmp_path):
    (tmp_path / "recipe.yaml").write_text("dataset_name: x\ntrainable: projector\nuse_cpu: true\n")
    _, training, _ = make_parser().parse_args_and_config(["--config", str(tmp_path / "recipe.yaml")])
    assert training.trainable == ["projector"]


def test_without_what_training_needs_the_command_says_so(monkeypatch, capsys):
    monkeypatch.setattr("convllava_hf.cli.common.find_spec", lambda name: None if name == "trl" else object())
    assert cli.main(["train", "--config", "x"]) == 2
    message = capsys.readouterr().err
    assert "trl" in message and "convllava-hf[train]" in message
