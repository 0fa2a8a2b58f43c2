"""What `assemble` makes of a language model of any family, the recipes train with their own settings."""

import json
import math

import pytest
import torch
import transformers
from helpers.tiny_models import TEXT_SHAPE, make_image, make_tower


pytest.importorskip("trl")
pytest.importorskip("datasets")
if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 18):
    pytest.skip("training needs transformers >= 5.18", allow_module_level=True)

from helpers.chat_families import FAMILIES, NO_TEMPLATE, family_tokenizer  # noqa: E402
from helpers.training_runs import RECIPES, logged, run  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

from convllava_hf.convert import assemble  # noqa: E402


STAGE1 = RECIPES.parent / "convllava-1.5b" / "stage1_projector.yaml"
# What each family writes after an answer, and Vicuna's before it.
ENDS = {
    **dict.fromkeys(("qwen3", "qwen3_instruct_2507"), "<|im_end|>\n"),
    "qwen2_5": "<|im_end|>\n",
    **dict.fromkeys(("llama3", "llama3_1", "llama3_2"), "<|eot_id|>"),
    **dict.fromkeys(("gemma", "gemma3"), "<end_of_turn>\n"),
    **dict.fromkeys(("phi3", "phi3_5"), "<|end|>\n<|endoftext|>"),
    **dict.fromkeys(("mistral", NO_TEMPLATE), "</s>"),
}
# The empty thought is what Qwen3 answers with; Qwen2.5's line break comes with the answer in TRL's variant as well.
BEGINNINGS = {"qwen2_5": "\n", "qwen3": "<think>\n\n</think>\n\n", NO_TEMPLATE: " "}
ANSWERS = ["A sign.", "A bus, red all over.", "Hi.", "Yes."]


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    torch.manual_seed(1)
    return make_tower(tmp_path_factory.mktemp("tower"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four short conversations, two of them with an image."""
    folder = tmp_path_factory.mktemp("data")
    make_image(90, 140).save(folder / "a.png")
    samples = [
        {
            **({"image": "a.png"} if number < 2 else {}),
            "conversations": [
                {"from": "human", "value": "<image>\nWhat is it?" if number < 2 else "Hello?"},
                {"from": "gpt", "value": answer},
            ],
        }
        for number, answer in enumerate(ANSWERS)
    ]
    (folder / "data.json").write_text(json.dumps(samples))
    return folder


def assembled(folder, name, tower):
    tokenizer = family_tokenizer(name)
    torch.manual_seed(2)
    shape = {
        **TEXT_SHAPE,
        **{f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")},
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 2048,
    }
    AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **shape)).save_pretrained(folder / "text")
    tokenizer.save_pretrained(folder / "text")
    small = {"resolution": 128, "extra_stage_depth": 1, "extra_stage_width": 32, "progress": False}
    return assemble(folder / "model", vision=tower, text=folder / "text", dtype="float32", **small)


def train(recipe, model, data, output):
    return run(
        recipe,
        model,
        output,
        dataset_name=data / "data.json",
        image_folder=data,
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=1,
        save_strategy="no",
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FAMILIES, NO_TEMPLATE])
def test_every_family_trains(name, tower, data, tmp_path):
    model = assembled(tmp_path, name, tower)
    trainer = train(STAGE1, model, data, tmp_path / "out")
    losses = logged(trainer, "loss")
    assert len(losses) == 2 and all(math.isfinite(loss) and loss > 0 for loss in losses)
    tokenizer = trainer.processing_class.tokenizer
    rows = [row[row != -100] for batch in trainer.get_train_dataloader() for row in batch["labels"].cpu()]
    begin, end = BEGINNINGS.get(name, ""), ENDS[name]
    assert sorted(tokenizer.decode(row) for row in rows) == sorted(f"{begin}{answer}{end}" for answer in ANSWERS)
    expected = tokenizer([f"{begin}{answer}{end}" for answer in ANSWERS], add_special_tokens=False).input_ids
    assert sorted(map(len, rows)) == sorted(map(len, expected))


@pytest.mark.slow
def test_the_stages_follow_one_another(tower, data, tmp_path):
    """Each loads what the one before saved, its chat template included."""
    model = assembled(tmp_path, "qwen2_5", tower)
    template = (model / "chat_template.jinja").read_text()
    for stage in ("stage1_projector", "stage2_pretrain", "stage3_instruct"):
        # Those of the 7B model, whose optimizer needs no compiler.
        trainer = train(RECIPES / f"{stage}.yaml", model, data, tmp_path / stage)
        losses = logged(trainer, "loss")
        assert len(losses) == 2 and all(map(math.isfinite, losses))
        model = tmp_path / stage
        assert (model / "chat_template.jinja").read_text() == template
