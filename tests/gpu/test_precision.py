"""Logits and features on a GPU are the CPU's, but for the noise that the dtype has on a CPU too."""

import importlib.util

import numpy as np
import pytest
import torch
from helpers.tiny_models import TEXT_SHAPE, ask, make_config, make_image, make_model, make_processor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig

from convllava_hf import ConvLlavaForConditionalGeneration, ConvLlavaImageProcessor
from convllava_hf.inference import prompt_inputs
from convllava_hf.options import with_image_options

from .devices import CUDA, assert_within_noise, deviation, moved, needs_cuda


pytestmark = pytest.mark.gpu

CHATS = [
    ask("What is this?", make_image(seed=1)),
    ask("Compare them in a rather long sentence, please.", make_image(seed=2), make_image(70, 250, seed=3)),
    ask("No image."),
]
NATIVE = {"image_aspect_ratio": "native", "max_pixels": 6 * 64**2}
# Between float32's own noise here, which is of the order of 1e-6, and TF32's of 1e-3.
FLOAT32 = 5e-5
# How much further from the exact result than the CPU is in the same dtype: sums in another order, of as many bits.
FACTORS = {torch.float32: 10, torch.bfloat16: 2.5, torch.float16: 2.5}


@pytest.fixture(scope="module")
def inputs(processor) -> dict:
    return dict(prompt_inputs(with_image_options(processor, NATIVE), CHATS))


@pytest.mark.parametrize("dtype", FACTORS, ids=str)
def test_logits_are_those_of_the_cpu(model_on, inputs, dtype):
    mask = inputs["attention_mask"].bool()

    def logits(device, dtype):
        with torch.no_grad():
            return model_on(device, dtype)(**moved(inputs, device, dtype)).logits[mask.to(device)]

    assert_within_noise(logits, dtype, FACTORS[dtype])


@pytest.mark.parametrize("dtype", FACTORS, ids=str)
def test_visual_tokens_are_those_of_the_cpu(model_on, inputs, dtype):
    def tokens(device, dtype):
        given = moved({name: inputs[name] for name in ("pixel_values", "image_sizes")}, device, dtype)
        with torch.no_grad():
            return torch.cat(model_on(device, dtype).get_image_features(**given).pooler_output)

    assert_within_noise(tokens, dtype, FACTORS[dtype])


def test_autocast_is_close_to_float32(model_on, inputs, device):
    """Autocast leaves norms in float32 on a GPU, and not on a CPU."""
    mask = inputs["attention_mask"].bool().to(device)
    model, given = model_on(device, torch.float32), moved(inputs, device)
    with torch.no_grad():
        exact = model(**given).logits[mask]
        narrow = model_on(device, torch.bfloat16)(**moved(inputs, device, torch.bfloat16)).logits[mask]
        with torch.autocast(device.type, torch.bfloat16):
            cast = model(**given).logits[mask]
    assert 0 < deviation(cast, exact) < 2.5 * deviation(narrow, exact)


def attentive(implementation: str, dtype: torch.dtype, device) -> ConvLlavaForConditionalGeneration:
    """A model with heads of 32 channels, without groups, which every kernel for attention takes."""
    config = make_config()
    shape = {**TEXT_SHAPE, "hidden_size": 128, "num_key_value_heads": 4, "initializer_range": 0.1}
    config = type(config)(
        vision_config=config.vision_config, text_config=AutoConfig.for_model("llama", **shape), image_token_id=3
    )
    model = make_model(config).to(device, dtype)
    model.set_attn_implementation(implementation)
    return model


def attention_gap(implementation: str, dtype: torch.dtype, device, given: dict, **kernel) -> tuple[float, float]:
    """Relative change against eager attention in the same dtype, and of that against float32."""
    mask = given["attention_mask"].bool()
    with torch.no_grad():
        exact = attentive("eager", torch.float32, "cpu")(**given).logits[mask]
        eager = attentive("eager", dtype, device)(**moved(given, device, dtype)).logits[mask.to(device)]
        model = attentive(implementation, dtype, device)
        if kernel:
            with sdpa_kernel(**kernel):
                found = model(**moved(given, device, dtype)).logits[mask.to(device)]
        else:
            found = model(**moved(given, device, dtype)).logits[mask.to(device)]
    return deviation(found, eager), deviation(eager, exact)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_in_float32(implementation, inputs, device):
    change, noise = attention_gap(implementation, torch.float32, device, inputs)
    assert change < FLOAT32 and noise < FLOAT32


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="flash-attn is not installed")
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_flash_attention(dtype, inputs, device):
    change, noise = attention_gap("flash_attention_2", dtype, device, inputs)
    assert change < 2.5 * noise


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "kernel",
    [
        pytest.param("FLASH_ATTENTION"),
        pytest.param("EFFICIENT_ATTENTION", marks=needs_cuda),
        pytest.param("MATH"),
    ],
)
def test_kernels_of_torch_s_own_attention(kernel, dtype, processor, inputs, device):
    """Flash attention takes no mask, so it gets a prompt without padding; the others get one with."""
    given = dict(prompt_inputs(processor, CHATS[:1])) if kernel == "FLASH_ATTENTION" else inputs
    change, noise = attention_gap("sdpa", dtype, device, given, backends=[getattr(SDPBackend, kernel)])
    assert change < 2.5 * noise


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_images_of_mixed_sizes_in_one_batch_are_seen_as_each_by_itself(model_on, device, dtype):
    images = [make_image(200, 60), make_image(70, 250, seed=1), make_image(64, 64, seed=2)]
    processor = make_processor(**NATIVE).image_processor
    model = model_on(device, dtype)

    def tokens(images, model=model, dtype=dtype) -> list[torch.Tensor]:
        with torch.no_grad():
            given = moved(processor(images, return_tensors="pt"), model.device, dtype)
            return model.get_image_features(**given).pooler_output

    together, single = tokens(images), [tokens([image])[0] for image in images]
    exact = tokens(images, model_on(torch.device("cpu"), torch.float64), torch.float64)
    for ours, theirs, truth in zip(together, single, exact, strict=True):
        assert deviation(ours, theirs) < 2.5 * max(deviation(theirs, truth), 4e-6)


def test_logits_of_a_padded_batch_are_those_of_each_by_itself(model_on, processor, inputs, device):
    model, together = model_on(device, torch.float32), moved(inputs)
    with torch.no_grad():
        logits = model(**together).logits
        for row, mask, chat in zip(logits, together["attention_mask"].bool(), CHATS, strict=True):
            single = model(**moved(prompt_inputs(with_image_options(processor, NATIVE), [chat]))).logits[0]
            assert deviation(row[mask], single) < FLOAT32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
def test_a_tensor_on_the_device_is_an_image(dtype, device):
    colors = torch.tensor(np.asarray(make_image(64, 128))).permute(2, 0, 1)
    values = colors if dtype == torch.uint8 else (colors / 255).to(dtype)
    processor = ConvLlavaImageProcessor(size=128)
    on_device, on_cpu = (processor(one, return_tensors="pt")["pixel_values"] for one in (values.to(device), values))
    assert on_device.device.type == "cpu"
    torch.testing.assert_close(on_device, on_cpu, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_from_pretrained_onto_the_device(checkpoint, model, inputs, device, dtype):
    loaded = ConvLlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=dtype, device_map="auto")
    assert loaded.device.type == device.type or not CUDA
    assert {one.dtype for one in loaded.parameters()} == {dtype}
    mask = inputs["attention_mask"].bool()
    with torch.no_grad():
        found = loaded(**moved(inputs, loaded.device, dtype)).logits[mask.to(loaded.device)]
        exact = model(**inputs).logits[mask]
        noise = deviation(
            model.__class__.from_pretrained(checkpoint, dtype=dtype)(**moved(inputs, "cpu", dtype)).logits[mask], exact
        )
    assert deviation(found, exact) < 2.5 * noise
