"""What vLLM's and SGLang's Transformers backends ask of a model and its processor, with plain transformers on a CPU.

vLLM 0.33 (transformers 5.16 to 5.20) and SGLang build the base model from `auto_map`, run the vision tower through
`get_image_features`, merge the embeddings themselves and run the language model with an attention of their own.
"""

import inspect
import json
import shutil

import pytest
import torch
import transformers
from helpers.tiny_models import make_config, make_image, make_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoProcessor, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import MultiModalData, ProcessorMixin

from convllava_hf import ConvLlavaForConditionalGeneration
from convllava_hf.modeling import modeling_convllava


IMAGES = [make_image(100, 60, seed=1), make_image(40, 90, seed=2)]


@pytest.fixture(scope="module")
def base(checkpoint):
    return AutoModel.from_pretrained(checkpoint).eval()


@pytest.fixture(scope="module")
def inputs(processor):
    return processor(text="<s>USER: <image>\n<image>\nWhat? ASSISTANT:", images=IMAGES, return_tensors="pt")


# 1. The base model


def test_auto_model_is_the_base_model_without_a_head(base, checkpoint):
    config = AutoConfig.from_pretrained(checkpoint)
    reference = config.auto_map["AutoModel"]
    assert type(base).__name__ == "ConvLlavaModel"
    assert get_class_from_dynamic_module(reference, str(checkpoint)).__name__ == "ConvLlavaModel"
    assert not any("lm_head" in name for name, _ in base.named_parameters())
    assert base.get_output_embeddings() is None


def test_base_model_can_be_built_from_its_config_on_no_device(checkpoint):
    """Servers build it on the meta device and load the weights themselves."""
    config = AutoConfig.from_pretrained(checkpoint)
    with torch.device("meta"):
        model = AutoModel.from_config(config, dtype=torch.bfloat16)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_weights_of_the_checkpoint_are_the_base_models_with_the_prefix(base, checkpoint):
    from safetensors import safe_open

    assert ConvLlavaForConditionalGeneration.base_model_prefix == "model"
    with safe_open(checkpoint / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == {f"model.{name}" for name in base.state_dict()} | {"lm_head.weight"}


def test_no_class_declares_weights_that_servers_would_leave_out(base, model):
    """vLLM leaves out what a class or a part of it declares here, in the whole model too: its head would be noise."""
    ours = [*vars(modeling_convllava).values(), ConvLlavaForConditionalGeneration]
    models = [one for one in ours if isinstance(one, type) and issubclass(one, PreTrainedModel)]
    assert len(models) > 5
    for one in [*models, *base.modules(), *model.modules()]:
        assert not getattr(one, "_keys_to_ignore_on_load_unexpected", None), one


def test_the_base_model_loads_from_a_whole_checkpoint_without_a_report(checkpoint, caplog):
    transformers.logging.enable_propagation()
    try:
        with caplog.at_level("WARNING"):
            _, found = AutoModel.from_pretrained(checkpoint, output_loading_info=True)
    finally:
        transformers.logging.disable_propagation()
    assert not caplog.records
    assert not any(found[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_other_weights_that_the_base_model_lacks_are_reported(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    weights = load_file(checkpoint / "model.safetensors")
    save_file({**weights, "model.other_head.weight": torch.ones(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    _, found = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert len(found["unexpected_keys"]) == 1


def test_parts_are_found_where_servers_look(base, model):
    for one in (base, model):
        assert one.get_decoder() is one.language_model
        assert one.get_encoder("image") is one.vision_tower
        assert one.get_decoder().config.model_type == "llama"
    assert isinstance(base._modules["language_model"], torch.nn.Module)
    assert isinstance(base._modules["vision_tower"], torch.nn.Module)


# 2. Attention of the server's own


def test_config_names_the_language_models_own(base):
    assert base.config.get_text_config() is base.config.text_config
    for name in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "vocab_size"):
        assert isinstance(getattr(base.config.get_text_config(), name), int)


def test_an_attention_of_the_servers_own_gets_its_arguments(inputs, model):
    """Registered by name, chosen through the config, and told what only the caller of the base model knows."""
    calls = []

    def attention(module, query, key, value, attention_mask, **kwargs):
        calls.append((module.layer_idx, kwargs["attention_instances"]))
        sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return sdpa(module, query, key, value, attention_mask, **kwargs)

    assert ConvLlavaForConditionalGeneration._supports_attention_backend is True
    assert type(model.model)._supports_attention_backend is True
    mine = make_model()
    ALL_ATTENTION_FUNCTIONS.register("convllava_test", attention)
    mine.config.text_config._attn_implementation = "convllava_test"
    mine.language_model.config._attn_implementation = "convllava_test"
    marker = object()
    with torch.no_grad():
        found = mine.model(**inputs, attention_instances=marker).last_hidden_state
        expected = model.model(**inputs).last_hidden_state
    assert calls == [(0, marker), (1, marker)]
    assert found.shape == expected.shape


def test_attention_is_chosen_when_the_model_is_built(checkpoint):
    config = AutoConfig.from_pretrained(checkpoint)
    for name in ("eager", "sdpa"):
        model = AutoModel.from_config(config, attn_implementation=name)
        assert model.language_model.config._attn_implementation == name


# 3. Embeddings in, a tuple out


def test_base_model_takes_merged_embeddings_and_gives_a_tuple(base, inputs):
    with torch.no_grad():
        expected = base(**inputs).last_hidden_state
        embeddings = base.get_input_embeddings()(inputs["input_ids"])
        features = torch.cat(base.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).pooler_output)
        embeddings[inputs["input_ids"] == base.config.image_token_id] = features
        positions = torch.arange(embeddings.shape[1]).unsqueeze(0)
        outputs = base(
            input_ids=None, inputs_embeds=embeddings, position_ids=positions, use_cache=False, return_dict=False
        )
    assert isinstance(outputs, tuple)
    torch.testing.assert_close(outputs[0], expected)


# 4. Images


@pytest.mark.parametrize("extra", [{}, {"num_image_patches": torch.tensor([1, 1])}])
def test_image_features_are_one_tensor_an_image(base, inputs, extra):
    """Called with every key of the processor's output that belongs to images, and what the server adds."""
    with torch.no_grad():
        outputs = base.get_image_features(
            inputs["pixel_values"], image_sizes=inputs["image_sizes"], return_dict=True, **extra
        )
    assert isinstance(outputs.pooler_output, list)
    hidden = base.config.text_config.hidden_size
    assert [image.shape for image in outputs.pooler_output] == [(4, hidden), (4, hidden)]
    assert next(iter(inspect.signature(base.get_image_features).parameters)) == "pixel_values"
    for index, image in enumerate(outputs.pooler_output):
        with torch.no_grad():
            alone = base.get_image_features(inputs["pixel_values"][index : index + 1], return_dict=True).pooler_output
        torch.testing.assert_close(image, alone[0], rtol=0, atol=1e-5)


# 5. The processor


def test_processor_names_its_placeholder(checkpoint):
    processor = AutoProcessor.from_pretrained(checkpoint)
    assert processor.image_token == "<image>"
    assert processor.image_token_id == processor.tokenizer.convert_tokens_to_ids("<image>")
    assert processor.image_token_ids == [processor.image_token_id]
    assert AutoConfig.from_pretrained(checkpoint).image_token_id == processor.image_token_id


@pytest.mark.parametrize("sizes", [[(100, 60)], [(1, 5000), (64, 64), (333, 777)], []])
def test_tokens_are_counted_before_an_image_is_seen(processor, sizes):
    counted = processor._get_num_multimodal_tokens(image_sizes=sizes)
    assert isinstance(counted, MultiModalData)
    assert counted["num_image_tokens"] == [4] * len(sizes)
    assert counted["num_image_patches"] == [1] * len(sizes)
    for (height, width), tokens in zip(sizes, counted.num_image_tokens, strict=True):
        ids = processor(text="<image>", images=make_image(height, width)).input_ids[0]
        assert ids.count(processor.image_token_id) == tokens


def test_tokens_are_counted_with_the_servers_arguments(processor):
    """mm_processor_kwargs reach the count and the call alike."""
    counted = processor._get_num_multimodal_tokens(image_sizes=[(100, 60)], size={"height": 192, "width": 192})
    assert counted.num_image_tokens == [9]
    ids = processor(text="<image>", images=IMAGES[0], size={"height": 192, "width": 192}).input_ids[0]
    assert ids.count(processor.image_token_id) == 9


def test_processor_tells_each_tokens_modality_and_has_a_row_of_pixels_for_each_image(processor, base):
    """As vLLM calls it, for all the images of one prompt."""
    outputs = processor(
        text="a <image> b <image> c", images=IMAGES, return_mm_token_type_ids=True, return_tensors="pt"
    )
    placeholders = outputs["input_ids"] == base.config.image_token_id
    assert outputs["mm_token_type_ids"].bool().equal(placeholders)
    assert placeholders.sum() == 8
    assert len(outputs["pixel_values"]) == len(outputs["image_sizes"]) == 2
    assert set(outputs) == {*processor.model_input_names, "mm_token_type_ids"}


def test_image_processor_says_what_it_makes_and_at_what_size(processor):
    images = processor.image_processor
    assert dict(images.size) == {"height": 128, "width": 128}
    made = images(IMAGES, return_tensors="pt")
    assert list(made) == images.model_input_names == ["pixel_values", "image_sizes"]
    assert set(processor.model_input_names) == {"input_ids", "attention_mask", *made} | (
        {"token_type_ids"} & set(processor.tokenizer.model_input_names)
    )


def test_processor_tells_what_each_placeholder_became(processor):
    text = "a <image> b <image> c"
    outputs = processor(text=[text], images=IMAGES, return_text_replacement_offsets=True)
    (spans,) = outputs["text_replacement_offsets"]
    expanded, (again,) = processor.get_text_with_replacements([text], ["<image>" * 4] * 2)
    assert spans == again
    assert expanded == [text.replace("<image>", "<image>" * 4)]
    for span in spans:
        assert span["type"] == "image"
        assert text[slice(*span["span"])] == span["text"] == "<image>"
        assert expanded[0][slice(*span["new_span"])] == span["replacement"] == "<image>" * 4
    made = processor.image_processor(IMAGES)
    assert processor.replace_image_token(made, 1) == "<image>" * 4


def test_replacements_are_those_that_transformers_itself_would_report(processor):
    theirs = getattr(ProcessorMixin, "get_text_with_replacements", None)
    if theirs is None:
        pytest.skip("this transformers has no text replacements; the processor brings them itself")
    texts = ["a <image> b <image>", "none", "<image>"]
    replacements = ["<image>" * tokens for tokens in (4, 9, 1)]
    assert processor.get_text_with_replacements(list(texts), replacements) == theirs(
        processor, list(texts), replacements
    )


def test_transformers_own_count_of_a_dummy_image_agrees(processor):
    """vLLM profiles memory with the largest image; its number of tokens must be that of the call."""
    size = processor.image_processor.size
    counted = processor._get_num_multimodal_tokens(image_sizes=[(size["height"], size["width"])])
    config = make_config()
    assert counted.num_image_tokens == [config.num_visual_tokens(size["height"], size["width"])]


# 6. Every entry of auto_map (its loading in a process of its own is in test_remote_code.py)


def test_no_entry_of_auto_map_names_a_class_that_is_missing(checkpoint):
    for file in ("config.json", "processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        for reference in json.loads((checkpoint / file).read_text()).get("auto_map", {}).values():
            module, _, name = reference.rpartition(".")
            assert f"class {name}(" in (checkpoint / f"{module}.py").read_text()
