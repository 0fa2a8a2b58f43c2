"""Quantized loading: the language model's layers alone by default, and what the caller says otherwise."""

import copy

import pytest
import torch
from helpers.quantizing import KEPT, QUANTIZERS, TOLERANCES, linear_layers, nf4, quantized_modules
from helpers.tiny_models import make_image
from transformers import AutoModel, AutoModelForImageTextToText

from convllava_hf.modeling.modeling_convllava import _with_skip_list


@pytest.fixture(scope="module")
def inputs(processor):
    text = "<s>USER: <image>\nWhat is on the sign? ASSISTANT:"
    return processor(text=text, images=make_image(), return_tensors="pt")


@pytest.fixture(scope="module")
def exact(wide_checkpoint, inputs) -> torch.Tensor:
    """Logits of the model as it was saved."""
    model = AutoModelForImageTextToText.from_pretrained(wide_checkpoint)
    with torch.no_grad():
        return model(**inputs).logits


def error_of(model, inputs, exact) -> float:
    """Root mean square error of the logits, as a part of their spread."""
    with torch.no_grad():
        logits = model(**inputs).logits.float()
    return ((logits - exact).pow(2).mean().sqrt() / exact.std()).item()


@pytest.fixture(scope="module", params=QUANTIZERS)
def quantized(request, wide_checkpoint):
    """Each quantizer's name, its model, its configuration as passed and a copy of that from before."""
    config = QUANTIZERS[request.param]()
    before = copy.deepcopy(config)
    model = AutoModelForImageTextToText.from_pretrained(
        wide_checkpoint, quantization_config=config, device_map={"": "cpu"}
    )
    return request.param, model, config, before


def test_the_language_models_layers_are_quantized_and_nothing_else(quantized):
    _, model, _, _ = quantized
    expected = linear_layers(model, "model.language_model.layers.")
    assert len(expected) == 14
    assert quantized_modules(model) == expected
    kept = linear_layers(model, KEPT)
    assert len(kept) == 10 + 2 + 1
    for name, parameter in model.named_parameters():
        if name.startswith(KEPT):
            assert parameter.dtype == torch.float32, name


def test_tower_and_projector_give_exactly_the_same(quantized, wide_checkpoint, inputs, processor):
    model = quantized[1]
    plain = AutoModelForImageTextToText.from_pretrained(wide_checkpoint)
    square = {"pixel_values": inputs["pixel_values"], "image_sizes": inputs["image_sizes"]}
    images = [make_image(200, 60), make_image(70, 250)]
    native = processor.image_processor(images, image_aspect_ratio="native", return_tensors="pt")
    for seen in (square, native):
        with torch.no_grad():
            found = model.get_image_features(**seen).pooler_output
            expected = plain.get_image_features(**seen).pooler_output
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_native_images_of_a_batch_are_answered_as_each_alone(quantized, processor):
    """bitsandbytes multiplies by another kernel for another number of tokens; torchao does not."""
    name, model, _, _ = quantized
    texts = ["<s>USER: <image>\nWhat? ASSISTANT:", "<s>USER: Is <image> like <image>? ASSISTANT:"]
    images = [[make_image(200, 60)], [make_image(70, 250), make_image(30, 30)]]
    options = {"image_aspect_ratio": "native", "max_pixels": 6 * 64**2, "padding": True, "return_tensors": "pt"}
    together = processor(text=texts, images=images, **options)
    with torch.no_grad():
        logits = model(**together).logits
        for row, mask, text, own in zip(logits, together["attention_mask"].bool(), texts, images, strict=True):
            expected = model(**processor(text=text, images=own, **options)).logits[0]
            error = (row[mask] - expected).pow(2).mean().sqrt() / expected.std()
            assert error < (1e-5 if name == "torchao int8" else 1e-2)


def test_answers_stay_close(quantized, inputs, exact):
    name, model, _, _ = quantized
    assert 1e-5 < error_of(model, inputs, exact) < TOLERANCES[name]


def test_the_configuration_that_was_passed_is_left_as_it_was(quantized):
    _, _, config, before = quantized
    assert config.to_dict() == before.to_dict()


def test_a_quantized_model_survives_saving(quantized, inputs, tmp_path):
    _, model, _, _ = quantized
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path, device_map={"": "cpu"})
    assert quantized_modules(again) == quantized_modules(model)
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("name", ["nf4"])
def test_a_quantized_checkpoint_loads_as_the_base_model(name, wide_checkpoint, inputs, tmp_path):
    """Whose names lack the prefix that the saved skip list has."""
    model = AutoModelForImageTextToText.from_pretrained(
        wide_checkpoint, quantization_config=QUANTIZERS[name](), device_map={"": "cpu"}
    )
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path, device_map={"": "cpu"})
    assert {f"model.{layer}" for layer in quantized_modules(base)} == quantized_modules(model)
    with torch.no_grad():
        torch.testing.assert_close(base(**inputs).last_hidden_state, model.model(**inputs).last_hidden_state)


def test_the_base_model_leaves_its_tower_alone_too(wide_checkpoint):
    model = AutoModel.from_pretrained(wide_checkpoint, quantization_config=nf4(), device_map={"": "cpu"})
    assert quantized_modules(model) == linear_layers(model, "language_model.layers.")


def test_the_callers_own_skip_list_goes_before_ours(wide_checkpoint):
    config = nf4()
    config.llm_int8_skip_modules = ["lm_head", "model.language_model.layers.0"]
    model = AutoModelForImageTextToText.from_pretrained(
        wide_checkpoint, quantization_config=config, device_map={"": "cpu"}
    )
    found = quantized_modules(model)
    assert not any(name.startswith("model.language_model.layers.0.") for name in found)
    assert found >= linear_layers(model, "model.vision_tower.") | linear_layers(model, "model.multi_modal_projector.")
    assert "lm_head" not in found


@pytest.mark.parametrize(
    "config",
    [
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
    ],
    ids=["nf4", "int8"],
)
def test_a_configuration_may_be_a_dict(wide_checkpoint, config):
    pytest.importorskip("bitsandbytes")
    before = dict(config)
    model = AutoModelForImageTextToText.from_pretrained(
        wide_checkpoint, quantization_config=config, device_map={"": "cpu"}
    )
    assert quantized_modules(model) == linear_layers(model, "model.language_model.layers.")
    assert config == before


def test_a_dict_may_have_a_skip_list_of_its_own(wide_checkpoint):
    pytest.importorskip("bitsandbytes")
    model = AutoModelForImageTextToText.from_pretrained(
        wide_checkpoint,
        quantization_config={"load_in_4bit": True, "llm_int8_skip_modules": ["model.language_model", "lm_head"]},
        device_map={"": "cpu"},
    )
    assert quantized_modules(model) == linear_layers(model, ("model.vision_tower.", "model.multi_modal_projector."))


def test_a_configuration_without_a_method_is_refused(wide_checkpoint):
    with pytest.raises(ValueError, match="quant_method"):
        AutoModelForImageTextToText.from_pretrained(wide_checkpoint, quantization_config={"bits": 4})


def test_a_list_that_is_the_quantizers_default_is_not_the_callers():
    """As HQQ has one, which runs on GPUs only."""

    class Config:
        def __init__(self, skip_modules=["lm_head"]):  # noqa: B006 (as in transformers)
            self.skip_modules = skip_modules

    keep = ("model.vision_tower", "lm_head")
    assert _with_skip_list(Config(), keep).skip_modules == list(keep)
    assert _with_skip_list(Config(["model.vision_tower"]), keep).skip_modules == ["model.vision_tower"]
    assert _with_skip_list(Config([]), keep).skip_modules == []
    assert Config().skip_modules == ["lm_head"]


@pytest.mark.parametrize("argument", ["load_in_4bit", "load_in_8bit"])
def test_the_short_way_of_transformers_4_leaves_the_same_alone(wide_checkpoint, argument):
    pytest.importorskip("bitsandbytes")
    model = AutoModelForImageTextToText.from_pretrained(wide_checkpoint, **{argument: True})
    modules = quantized_modules(model)
    assert modules and all(name.startswith("model.language_model.") for name in modules)
