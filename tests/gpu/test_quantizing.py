"""Language models in 4 and 8 bits on a GPU: what is quantized, and how near the answers stay."""

import pytest
import torch
from helpers.quantizing import KEPT, QUANTIZERS, TOLERANCES, linear_layers, quantized_modules
from helpers.tiny_models import make_image
from transformers import AutoModelForImageTextToText

from convllava_hf.inference import load, user_turn

from .devices import DEVICE, moved, needs_cuda


pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def inputs(processor) -> dict:
    text = "<s>USER: <image>\nWhat is on the sign? ASSISTANT:"
    return dict(processor(text=text, images=make_image(), return_tensors="pt"))


@pytest.fixture(scope="module")
def exact(wide, inputs) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForImageTextToText.from_pretrained(wide, dtype=torch.float32)(**inputs).logits


def error_of(model, inputs, exact) -> float:
    """Root mean square error of the logits, as a part of their spread."""
    with torch.no_grad():
        logits = model(**moved(inputs, model.device, model.dtype)).logits.float().cpu()
    assert torch.isfinite(logits).all()
    return ((logits - exact).pow(2).mean().sqrt() / exact.std()).item()


def assert_the_language_model_s_layers_are_quantized(model, dtype: torch.dtype) -> None:
    assert quantized_modules(model) == linear_layers(model, "model.language_model.layers.")
    kept = [(name, one) for name, one in model.named_parameters() if name.startswith(KEPT)]
    assert kept and {one.dtype for _, one in kept} == {dtype}
    assert {one.device.type for one in model.parameters()} == {DEVICE.type}


@pytest.mark.parametrize("name", QUANTIZERS)
def test_logits_stay_near(name, wide, inputs, exact):
    config = QUANTIZERS[name]()
    model = AutoModelForImageTextToText.from_pretrained(
        wide, quantization_config=config, device_map={"": DEVICE}, dtype=torch.float32
    )
    assert_the_language_model_s_layers_are_quantized(model, torch.float32)
    assert 1e-5 < error_of(model, inputs, exact) < TOLERANCES[name]


@pytest.mark.parametrize(("quantization", "name"), [("4bit", "nf4"), ("8bit", "int8")])
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=needs_cuda)])
def test_the_way_of_the_command_line(quantization, name, dtype, wide, inputs, exact):
    """With the noise of a narrower dtype around the integers."""
    pytest.importorskip("bitsandbytes")
    assistant = load(wide, device=DEVICE, dtype=dtype, quantization=quantization)
    narrow = load(wide, device=DEVICE, dtype=dtype)
    assert_the_language_model_s_layers_are_quantized(assistant.model, getattr(torch, dtype))
    noise = error_of(narrow.model, inputs, exact)
    assert error_of(assistant.model, inputs, exact) < TOLERANCES[name] + 2.5 * noise
    messages = [user_turn("What?", [make_image()])]
    reply = assistant.answer(messages, max_new_tokens=6)
    assert len(reply.token_ids) > 0 and reply.visual_tokens == 4
