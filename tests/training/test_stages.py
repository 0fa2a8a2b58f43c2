"""From one stage to the next, and what comes out: checkpoints that everything loads, adapters that can be merged."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image


pytest.importorskip("trl")
pytest.importorskip("datasets")

from helpers.fresh_process import ANSWERS, run_fresh  # noqa: E402
from helpers.paths import GOLDEN  # noqa: E402
from helpers.tiny_models import make_processor  # noqa: E402
from helpers.training_runs import (  # noqa: E402
    ON_CPU,
    RECIPES,
    STAGES,
    Started,
    logged,
    options,
    run,
    weights_of,
    with_images_inside,
)
from transformers import AutoModelForImageTextToText, AutoProcessor  # noqa: E402

from convllava_hf.cli import main as command  # noqa: E402


pytestmark = pytest.mark.slow


FEW = {"max_steps": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "save_strategy": "no"}
IMAGE = GOLDEN / "images" / "photo.jpg"
QUESTION = "What is on the sign?"


@pytest.fixture(scope="module")
def chain(converted_checkpoint, tmp_path_factory) -> dict[int, Path]:
    """The outputs of the three stages, each from the one before."""
    folder = tmp_path_factory.mktemp("chain")
    start, outputs = converted_checkpoint("init"), {}
    for stage, recipe in STAGES.items():
        outputs[stage] = folder / recipe
        run(RECIPES / f"{recipe}.yaml", start, outputs[stage], **FEW, learning_rate=1e-2)
        start = outputs[stage]
    return outputs


def test_a_stage_starts_where_the_one_before_ended(chain, converted_checkpoint):
    """So what no stage trains is what it was, and what only one trains is what that one left."""
    start, *ends = (weights_of(folder) for folder in (converted_checkpoint("init"), *chain.values()))
    stem = "model.vision_tower.embeddings.patch_embeddings.weight"
    third = "model.vision_tower.encoder.stages.2.layers.0.dwconv.weight"
    fifth = "model.vision_tower.encoder.stages.4.layers.0.dwconv.weight"
    same = {
        name: [torch.equal(end[name], start[name]) for end in ends] for name in (stem, third, fifth, "lm_head.weight")
    }
    assert same == {
        stem: [True, True, True],
        third: [True, False, False],
        fifth: [False, False, False],
        "lm_head.weight": [True, False, False],
    }
    assert torch.equal(ends[1][fifth], ends[2][fifth]) and torch.equal(ends[1][third], ends[2][third])


def test_the_output_is_a_checkpoint_and_nothing_else(chain, converted_checkpoint):
    expected = {path.name for path in converted_checkpoint("init").iterdir()}
    for folder in chain.values():
        found = {path.name for path in folder.iterdir()}
        assert found - expected == {"loss.png", "trainer_state.json", "training_args.bin"}
        assert expected - found == set()
        assert Image.open(folder / "loss.png").size == (1040, 585)


def test_convllava_ask_answers_with_every_stage(chain, capsys):
    for folder in chain.values():
        capsys.readouterr()
        assert command(["ask", str(folder), str(IMAGE), QUESTION, "--json", "--max-new-tokens", "4"]) == 0
        answer = json.loads(capsys.readouterr().out)
        assert answer["visual_tokens"] == 25
        assert 1 <= answer["new_tokens"] <= 4


@pytest.mark.slow
def test_plain_transformers_loads_every_stage(chain, capsys):
    """In a process without the package, with the code in the checkpoint; its answers are those that are given here."""
    told = run_fresh(
        ANSWERS
        + """
result = {
    folder: answers(folder, ["AutoModelForImageTextToText"], trust_remote_code=True) for folder in values["folders"]
}
""",
        folders=list(map(str, chain.values())),
        image=IMAGE,
        question=QUESTION,
    )
    for folder, answer in told.items():
        assert answer["processor"].startswith("transformers_modules.")
        assert answer["AutoModelForImageTextToText"]["module"].startswith("transformers_modules.")
        model = AutoModelForImageTextToText.from_pretrained(folder).eval()
        inputs = ask(AutoProcessor.from_pretrained(folder))
        assert answer["input_ids"] == inputs["input_ids"].tolist()
        ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        assert answer["AutoModelForImageTextToText"]["ids"] == ids[0, inputs["input_ids"].shape[1] :].tolist()


def ask(processor) -> dict:
    content = [{"type": "image", "image": Image.open(IMAGE)}, {"type": "text", "text": QUESTION}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


# --- adapters


def logits_of(model, processor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**ask(processor)).logits


def merged_logits(base: Path, adapter: Path, processor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the model with the adapter beside it, and of both merged."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), adapter)
    beside = logits_of(model, processor)
    return beside, logits_of(model.merge_and_unload(), processor)


def test_an_adapter_is_merged_where_the_recipe_says_so(converted_checkpoint, tmp_path):
    start, output = converted_checkpoint("stage3"), tmp_path / "out"
    run(RECIPES / "lora.yaml", start, output, **FEW, learning_rate=1e-2, merge_adapter="true")
    assert (output / "adapter_model.safetensors").exists() and not (output / "README.md").exists()
    processor = AutoProcessor.from_pretrained(output / "merged")
    beside, _ = merged_logits(start, output, processor)
    whole = logits_of(AutoModelForImageTextToText.from_pretrained(output / "merged"), processor)
    torch.testing.assert_close(whole, beside, rtol=1e-4, atol=1e-4)
    assert (whole - logits_of(AutoModelForImageTextToText.from_pretrained(start), processor)).abs().max() > 0.1
    projector = "model.multi_modal_projector.linear_1.weight"
    assert not torch.equal(weights_of(output / "merged")[projector], weights_of(start)[projector])  # saved along
    assert weights_of(output / "merged").keys() == weights_of(start).keys()
    assert command(["ask", str(output / "merged"), str(IMAGE), QUESTION, "--max-new-tokens", "2"]) == 0


@pytest.fixture(scope="module")
def wide(wide_checkpoint, tmp_path_factory) -> Path:
    """The wide model with its processor."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    shutil.copytree(wide_checkpoint, folder)
    make_processor().save_pretrained(folder)
    return folder


def test_qlora_trains_on_four_bits(wide, tmp_path):
    """With the recipe as it is: NF4, double quantization, bfloat16."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    output = tmp_path / "out"
    as_it_is = {"bf16": "true", "dtype": "bfloat16"}
    trainer = run(RECIPES / "qlora.yaml", wide, output, **FEW, **as_it_is, learning_rate=1e-3)
    base = trainer.model.get_base_model()
    four = {name for name, one in base.named_modules() if isinstance(one, bitsandbytes.nn.Linear4bit)}
    assert len(four) == 2 * 7 and all(".language_model.layers." in name for name in four)
    losses = logged(trainer, "loss")
    assert len(losses) == 2 and torch.isfinite(torch.tensor(losses)).all()
    trained = {name for name, one in trainer.model.named_parameters() if one.requires_grad}
    assert all(".lora_" in name or ".modules_to_save." in name for name in trained)
    assert len([name for name in trained if ".modules_to_save." in name]) == 4
    adapter = weights_of(output)
    assert any(one.abs().max() > 0 for name, one in adapter.items() if "lora_B" in name)
    before = weights_of(wide)
    assert not torch.equal(
        adapter["base_model.model.model.multi_modal_projector.linear_1.weight"].float(),
        before["model.multi_modal_projector.linear_1.weight"].bfloat16().float(),
    )
    beside, merged = merged_logits(wide, output, make_processor())  # into the model in full precision
    torch.testing.assert_close(merged, beside, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_trl_s_own_command_takes_the_recipe(converted_checkpoint, tmp_path):
    """`trl sft`, where our package is not asked: the checkpoint's own code is trained."""
    start, output = converted_checkpoint("stage3"), tmp_path / "out"
    values = {
        "model_name_or_path": start,
        "dataset_name": with_images_inside(tmp_path / "data", "train"),
        "output_dir": output,
        "logging_steps": 1,
        "dataloader_num_workers": 0,
        **ON_CPU,
        **FEW,
        "learning_rate": 1e-2,
    }
    trl = Path(sys.executable).with_name("trl")
    line = ["sft", "--config", RECIPES / "lora.yaml", *options(**values, trust_remote_code="true")]
    with Started([trl, *line], tmp_path / "process", ACCELERATE_USE_CPU="true") as started:
        told = started.succeed(timeout=180)
    assert told.count("'loss':") == 2
    processor = AutoProcessor.from_pretrained(start)
    beside, merged = merged_logits(start, output, processor)
    torch.testing.assert_close(merged, beside, rtol=1e-4, atol=1e-4)
    assert (beside - logits_of(AutoModelForImageTextToText.from_pretrained(start), processor)).abs().max() > 0.1
    config = json.loads((output / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["multi_modal_projector"]
