"""Adapters on the language model, the projector trained beside them, and both on a model of four bits."""

import pytest
import torch
from helpers.tiny_models import make_image
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig


peft = pytest.importorskip("peft")

LANGUAGE_MODEL = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"


def make_adapter(**kwargs):
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules=LANGUAGE_MODEL, task_type="CAUSAL_LM", **kwargs)


@pytest.fixture
def batch(processor) -> dict:
    """Two samples, one of them without an image, with a loss on their last tokens."""
    inputs = processor(
        text=["<s>USER: <image>\nWhat is it? ASSISTANT: A sign.</s>", "<s>USER: Hello. ASSISTANT: Good day.</s>"],
        images=[[make_image()], []],
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, :20] = -100
    return {**inputs, "labels": labels}


def train(model, batch, steps: int = 3) -> list[float]:
    """Losses of a few steps on one batch."""
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def changed(before: dict, model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not torch.equal(before[name], parameter)}


def snapshot(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_a_pattern_on_the_language_model_hits_it_alone(checkpoint):
    model = peft.get_peft_model(AutoModelForImageTextToText.from_pretrained(checkpoint), make_adapter())
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trainable) == 28  # seven layers in each of two blocks, two matrices each
    assert all(".language_model.layers." in name and ".lora_" in name for name in trainable)


def test_training_changes_the_adapter_alone(checkpoint, batch):
    model = peft.get_peft_model(AutoModelForImageTextToText.from_pretrained(checkpoint), make_adapter()).train()
    before = snapshot(model)
    losses = train(model, batch)
    assert losses[-1] < losses[0]
    assert changed(before, model) == {name for name in before if ".lora_" in name}


def test_the_projector_can_be_trained_and_saved_with_the_adapter(checkpoint, batch, tmp_path):
    base = AutoModelForImageTextToText.from_pretrained(checkpoint)
    model = peft.get_peft_model(base, make_adapter(modules_to_save=["multi_modal_projector"])).train()
    before = snapshot(model)
    train(model, batch)
    moved = changed(before, model)
    assert {name for name in moved if "lora_" not in name} == {
        f"base_model.model.model.multi_modal_projector.modules_to_save.default.linear_{layer}.{kind}"
        for layer in (1, 2)
        for kind in ("weight", "bias")
    }
    model.eval()
    with torch.no_grad():
        expected = model(**batch).logits
    model.save_pretrained(tmp_path)

    again = peft.PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(checkpoint), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, expected)
        merged = again.merge_and_unload()
        torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(whole(**batch).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_folder_with_an_adapter_loads_through_the_auto_class(checkpoint, batch, tmp_path):
    model = peft.get_peft_model(AutoModelForImageTextToText.from_pretrained(checkpoint), make_adapter()).train()
    train(model, batch)
    model.eval().save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_an_adapter_trains_on_four_bits(wide_checkpoint, batch, gradient_checkpointing):
    pytest.importorskip("bitsandbytes")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    base = AutoModelForImageTextToText.from_pretrained(
        wide_checkpoint, quantization_config=config, device_map={"": "cpu"}
    )
    base = peft.prepare_model_for_kbit_training(base, use_gradient_checkpointing=gradient_checkpointing)
    model = peft.get_peft_model(base, make_adapter(modules_to_save=["multi_modal_projector"])).train()
    before = snapshot(model)
    losses = train(model, batch, steps=4)
    assert losses[-1] < losses[0]
    moved = changed(before, model)
    assert {name for name in moved if "lora_" in name} == {name for name in before if "lora_" in name}
    assert all("lora_" in name or "modules_to_save" in name for name in moved)
    assert any("multi_modal_projector.modules_to_save" in name for name in moved)
