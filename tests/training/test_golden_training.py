"""Training through the script and the recipes, against the original's figures and against itself."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.training_runs import RECIPES, STAGES, STARTS, assert_same_weights, logged, run


pytest.importorskip("trl")
pytest.importorskip("datasets")

from convllava_hf.convert.keys import ORIGINAL_TABLE, rename_key  # noqa: E402
from convllava_hf.errors import ConvLlavaError  # noqa: E402


@pytest.fixture(scope="module")
def starts(converted_checkpoint) -> dict[int, Path]:
    """The golden checkpoint that each stage starts from, converted."""
    return {stage: converted_checkpoint(name) for stage, name in STARTS.items()}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_stage_trains_as_the_original_does(stage, starts, golden, tmp_path):
    figures = json.loads((golden / "training.json").read_text())
    expected = figures[f"stage{stage}"]
    overrides = {"trainable": ["projector", "vision_tower.stages.4", "lm_head"]} if stage == 1 else {}
    trainer = run(
        RECIPES / f"{STAGES[stage]}.yaml",
        starts[stage],
        tmp_path / "out",
        max_steps=6,
        warmup_steps=1,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
        save_strategy="no",
        **overrides,
    )
    assert trainer.args.learning_rate == figures["learning_rate"][str(stage)]
    np.testing.assert_allclose(logged(trainer, "loss"), expected["losses"], atol=1e-4)
    np.testing.assert_allclose(logged(trainer, "grad_norm"), expected["grad_norms"], rtol=1e-3)
    parameters = dict(trainer.model.named_parameters())
    trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
    assert trained == {rename_key(name, ORIGINAL_TABLE) for name in expected["trainable"]} - {None}
    for name, norm in expected["param_norms_after"].items():
        if (ours := rename_key(name, ORIGINAL_TABLE)) is not None:
            has_vocabulary = "embed_tokens" in ours or "lm_head" in ours  # with rows that the original lacks
            weight = parameters[ours].detach()[: 640 if has_vocabulary else None]
            assert weight.double().norm().item() == pytest.approx(norm, rel=1e-5), name
    assert (tmp_path / "out" / "loss.png").stat().st_size > 1000
    assert not (tmp_path / "out" / "README.md").exists()


FULL = {
    "max_steps": 8,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-3,
    "save_strategy": "steps",
    "save_steps": 2,
}


@pytest.fixture(scope="module")
def lora_recipe(tmp_path_factory) -> Path:
    """A recipe of LoRA's keys alone; what a stage trains cannot be unset on the command line."""
    path = tmp_path_factory.mktemp("recipe") / "lora.yaml"
    lines = ["assistant_only_loss: true", "max_length: 2048", "use_peft: true", "lora_dropout: 0.1"]
    lines += [r"lora_target_modules: ['.*language_model.*\.(q_proj|v_proj|down_proj)']"]
    lines += ["lora_modules_to_save: [multi_modal_projector]"]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_resumed_run_ends_as_an_uninterrupted_one(kind, starts, tmp_path, lora_recipe):
    recipe = lora_recipe if kind == "lora" else RECIPES / "stage2_pretrain.yaml"
    whole = run(recipe, starts[2], tmp_path / "whole", **FULL)
    # Interrupted after step 5: the checkpoint of step 4 is the last, the one of step 6 is half-written.
    run(recipe, starts[2], tmp_path / "cut", **FULL)
    for step in (8, 6):
        (tmp_path / "cut" / f"checkpoint-{step}" / "trainer_state.json").unlink()
    resumed = run(recipe, starts[2], tmp_path / "cut", **FULL, resume_from_checkpoint="true")
    assert logged(resumed, "loss") == logged(whole, "loss")
    assert_same_weights(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.slow
def test_the_loss_is_measured_on_other_data_where_asked(starts, golden, tmp_path):
    trainer = run(
        RECIPES / "stage3_instruct.yaml",
        starts[3],
        tmp_path / "out",
        **{**FULL, "max_steps": 2, "save_strategy": "no"},
        eval_strategy="steps",
        eval_steps=1,
        eval_dataset_name=golden / "conversations.json",
        per_device_eval_batch_size=8,
    )
    measured = logged(trainer, "eval_loss")
    assert len(measured) == 2 and measured[1] < measured[0]
    # The learning rate is still 0 in the first step, so this is the starting checkpoint's loss on all samples.
    expected = json.loads((golden / "training.json").read_text())["stage3"]["losses"][0]
    assert measured[0] == pytest.approx(expected, abs=1e-4)


def test_evaluating_without_data_is_refused(starts, tmp_path):
    with pytest.raises(ConvLlavaError, match="no split to evaluate on: name eval_dataset_name"):
        run(RECIPES / "stage3_instruct.yaml", starts[3], tmp_path / "out", eval_strategy="epoch")
