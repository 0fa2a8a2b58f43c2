"""Assembling an untrained model: towers from timm and transformers, language models with their own templates."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import IMAGE, SMALL, ask, load_fully, make_image, make_language_model, make_tower
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, ConvNextModel

from convllava_hf import ConvLlavaProcessor
from convllava_hf.convert import assemble
from convllava_hf.errors import ConvLlavaError


@pytest.fixture(scope="module")
def tower(tmp_path_factory) -> Path:
    torch.manual_seed(1)
    return make_tower(tmp_path_factory.mktemp("tower"))


@pytest.fixture(scope="module")
def language_model(tmp_path_factory) -> Path:
    torch.manual_seed(2)
    return make_language_model(tmp_path_factory.mktemp("language"))


@pytest.fixture(scope="module")
def assembled(tower, language_model, tmp_path_factory) -> Path:
    return assemble(tmp_path_factory.mktemp("assembled") / "out", vision=tower, text=language_model, **SMALL)


# --- the parts keep what they compute -------------------------------------------------------------------------------


def test_tower_and_language_model_are_unchanged(assembled, tower, language_model):
    model = load_fully(assembled)
    pixels = torch.randn(2, 3, 128, 128)
    ids = torch.randint(5, IMAGE, (2, 9))
    with torch.no_grad():
        features = model.model.vision_tower.embeddings(pixels)
        for stage in model.model.vision_tower.encoder.stages[:4]:
            features = stage(features)
        expected = ConvNextModel.from_pretrained(tower).eval()(pixels).last_hidden_state
        torch.testing.assert_close(features, expected, atol=1e-5, rtol=0)
        logits = AutoModelForCausalLM.from_pretrained(language_model).eval()(ids).logits
        torch.testing.assert_close(model(input_ids=ids).logits[..., :324], logits, atol=1e-5, rtol=0)
    assert model.config.stride == 64 and model.config.vision_config.depths == [1, 1, 2, 1, 2]
    assert model.config.text_config.vocab_size == 384 and model.config.image_token_id == IMAGE


def test_the_whole_thing_answers(assembled):
    """Batch of a text and an image through template, processor and generate; nothing suppressed is generated."""
    model, processor = load_fully(assembled), ConvLlavaProcessor.from_pretrained(assembled)
    image = make_image(90, 70)
    prompts = [ask("What is this?", image), ask("And you?")]
    inputs = processor.apply_chat_template(
        prompts, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", padding=True
    )
    assert (inputs["input_ids"] == IMAGE).sum() == 4
    new = model.generate(**inputs, max_new_tokens=12, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    assert (new < IMAGE).all()
    assert model.generation_config.suppress_tokens == list(range(IMAGE, 384))


def test_fresh_weights_are_the_models_own_and_seeded(assembled, tower, language_model, tmp_path):
    weights = load_file(assembled / "model.safetensors")
    prefix = "model.vision_tower.encoder.stages.4."
    for name in (f"{prefix}layers.0.pwconv1.weight", f"{prefix}downsampling_layer.1.weight"):
        assert weights[name].std().item() == pytest.approx(0.2, rel=0.1)  # the tower's initializer_range
    assert (weights[f"{prefix}layers.1.layer_scale_parameter"] == 0.5).all()
    assert (weights[f"{prefix}layers.0.dwconv.bias"] == 0).all()
    assert (weights[f"{prefix}downsampling_layer.0.weight"] == 1).all()
    projector = weights["model.multi_modal_projector.linear_1.weight"]
    assert projector.shape == (32, 40) and projector.std().item() == pytest.approx(0.2, rel=0.1)
    torch.rand(3)  # the seed alone decides
    for seed, same in ((0, True), (1, False)):
        again = assemble(tmp_path / str(seed), vision=tower, text=language_model, seed=seed, **SMALL)
        others = load_file(again / "model.safetensors")
        assert (
            torch.equal(others[f"{prefix}layers.0.pwconv1.weight"], weights[f"{prefix}layers.0.pwconv1.weight"])
            is same
        )
        assert torch.equal(others["model.multi_modal_projector.linear_1.weight"], projector) is same


def test_no_extra_stage(tower, language_model, tmp_path):
    arguments = {**SMALL, "extra_stage_depth": 0, "resolution": 96}
    model = load_fully(assemble(tmp_path / "out", vision=tower, text=language_model, **arguments))
    assert model.config.stride == 32 and len(model.model.vision_tower.encoder.stages) == 4
    assert model.config.vision_config.image_size == 96


def test_image_settings_come_from_the_tower(assembled):
    image_processor = ConvLlavaProcessor.from_pretrained(assembled).image_processor
    assert image_processor.image_mean == [0.1, 0.2, 0.3] and image_processor.image_std == [0.4, 0.5, 0.6]
    assert image_processor.resample == 2 and image_processor.size == {"height": 128, "width": 128}
    assert image_processor.stride == 64


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "mistral", "gpt_neox", "gemma3_text", "gpt2", "opt"])
def test_language_models(tower, tmp_path, model_type):
    """Other families, with other names for their parts; the head is the embedding matrix where it was."""
    tied = model_type in ("qwen3", "gpt2", "opt")
    folder = make_language_model(tmp_path / "language", model_type, tie_word_embeddings=tied)
    out = assemble(tmp_path / "out", vision=tower, text=folder, **SMALL)
    model = load_fully(out)
    head, embeddings = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert (head.data_ptr() == embeddings.data_ptr()) is tied
    assert ("lm_head.weight" in load_file(out / "model.safetensors")) is not tied
    ids = torch.randint(5, IMAGE, (1, 9))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits
        torch.testing.assert_close(model(input_ids=ids).logits[..., :324], expected, atol=1e-5, rtol=0)


def test_a_mixture_of_experts(tower, tmp_path):
    """Its files keep experts apart, its module in transformers 5 does not."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
    folder = make_language_model(tmp_path / "language", "qwen3_moe", head_dim=8, **experts)
    model = load_fully(assemble(tmp_path / "out", vision=tower, text=folder, **SMALL))
    ids = torch.randint(5, IMAGE, (1, 9))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits
        torch.testing.assert_close(model(input_ids=ids).logits[..., :324], expected, atol=1e-5, rtol=0)


def test_a_language_model_without_its_head(tower, language_model, tmp_path):
    folder = Path(shutil.copytree(language_model, tmp_path / "language"))
    AutoModelForCausalLM.from_pretrained(language_model).model.save_pretrained(folder)
    with pytest.raises(ConvLlavaError, match="lacks 1 weights: lm_head.weight"):
        assemble(tmp_path / "out", vision=tower, text=folder, **SMALL)


def test_padded_rows_are_used_before_new_ones(tower, tmp_path):
    """Qwen's matrix has more rows than its tokenizer tokens."""
    folder = make_language_model(tmp_path / "language", vocab_size=384)
    model = load_fully(assemble(tmp_path / "out", vision=tower, text=folder, dtype="bfloat16", **SMALL))
    assert model.config.text_config.vocab_size == 384 and model.config.image_token_id == IMAGE
    assert load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16


def test_rope_settings_are_kept(tower, tmp_path):
    """Under transformers 4's names, which most language models on the Hub still have."""
    folder = make_language_model(tmp_path / "language")
    config = json.loads((folder / "config.json").read_text())
    config.pop("rope_parameters", None)
    config |= {"rope_theta": 500.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    (folder / "config.json").write_text(json.dumps(config))
    out = assemble(tmp_path / "out", vision=tower, text=folder, **SMALL)
    ids = torch.randint(5, IMAGE, (1, 30))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits
        torch.testing.assert_close(load_fully(out)(input_ids=ids).logits[..., :324], expected, atol=1e-5, rtol=0)


# --- chat templates -------------------------------------------------------------------------------------------------


def test_a_template_for_strings_gets_images(assembled):
    processor = ConvLlavaProcessor.from_pretrained(assembled)
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
    system = {"role": "system", "content": "Be short."}
    text = processor.apply_chat_template([system, user], add_generation_prompt=True, tokenize=False)
    assert text == (
        "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\n<image>\nWhat?<|im_end|>\n<|im_start|>assistant\n"
    )
    bare = processor.tokenizer.apply_chat_template([system, user], add_generation_prompt=True, tokenize=False)
    assert bare == text  # servers ask the tokenizer
    for tokens in (processor.tokenizer("<image>").input_ids, processor.tokenizer.encode("<image>")):
        assert tokens == [IMAGE]
    assert processor.image_suffix == ""


def test_a_template_that_knows_images_is_kept(tower, tmp_path):
    template = (
        "{% for message in messages %}{{ message['role'] + ': ' }}{% for part in message['content'] %}"
        "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{{ eos_token }}{% endfor %}"
    )
    folder = make_language_model(tmp_path / "language", template=template)
    processor = ConvLlavaProcessor.from_pretrained(assemble(tmp_path / "out", vision=tower, text=folder, **SMALL))
    turns = [*ask("What?", make_image()), {"role": "assistant", "content": "A cat."}]
    assert processor.apply_chat_template(turns, tokenize=False) == "user: <image>What?</s>assistant: A cat.</s>"
    assert "with_images" not in processor.chat_template  # it writes images itself


def test_generation_markers_are_kept(tower, tmp_path):
    template = (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}"
        "{% endgeneration %}{% else %}{{ message['content'] + '|' }}{% endif %}{% endfor %}"
    )
    folder = make_language_model(tmp_path / "language", template=template)
    processor = ConvLlavaProcessor.from_pretrained(assemble(tmp_path / "out", vision=tower, text=folder, **SMALL))
    turns = [*ask("What?", make_image()), {"role": "assistant", "content": "A cat."}]
    told = processor.tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    answer = [i for i, mask in zip(told["input_ids"], told["assistant_masks"], strict=True) if mask]
    assert processor.decode(answer) == "A cat."


@pytest.mark.parametrize("bos", ["<s>", None])
def test_no_template_means_vicunas(tower, tmp_path, bos):
    folder = make_language_model(tmp_path / "language", template=None)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": bos}))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    processor = ConvLlavaProcessor.from_pretrained(assemble(tmp_path / "out", vision=tower, text=folder, **SMALL))
    text = processor.apply_chat_template(ask("What?", make_image()), add_generation_prompt=True, tokenize=False)
    assert text.startswith(f"{bos or ''}A chat between") and text.endswith("USER: <image>\nWhat? ASSISTANT:")


def test_slow_tokenizer_only(tower, golden, tmp_path):
    """Vicuna's files: a SentencePiece model and nothing else."""
    folder = make_language_model(tmp_path / "language", vocab_size=640)
    for path in (*folder.glob("tokenizer*"), *folder.glob("special*"), *folder.glob("chat_template*")):
        path.unlink()
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(golden / "checkpoint-stage3" / name, folder)
    processor = ConvLlavaProcessor.from_pretrained(assemble(tmp_path / "out", vision=tower, text=folder, **SMALL))
    assert processor.image_suffix == " " and processor.image_token_id == 640
    assert processor.chat_template.startswith('{%- set after_bos = " " -%}')


def test_logits_are_capped_where_the_language_model_caps_them(tower, tmp_path):
    folder = make_language_model(tmp_path / "capped", "gemma2", head_dim=8, final_logit_softcapping=3.0)
    out = assemble(tmp_path / "out", vision=tower, text=folder, **SMALL)
    ids = torch.randint(5, IMAGE, (1, 30))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits
        torch.testing.assert_close(load_fully(out)(input_ids=ids).logits[..., :324], expected, atol=1e-5, rtol=0)


# --- what is refused ------------------------------------------------------------------------------------------------


def test_refusals(tower, language_model, tmp_path):
    swin = tmp_path / "swin"
    swin.mkdir()
    (swin / "config.json").write_text('{"model_type": "swin"}')
    encoder = tmp_path / "encoder"
    encoder.mkdir()
    (encoder / "config.json").write_text('{"model_type": "vit"}')
    scaled = make_language_model(tmp_path / "scaled", "falcon_h1", lm_head_multiplier=0.5)
    for arguments, message in (
        ({"resolution": 700}, "not a multiple of the tower's stride of 64 pixels .*nearest possible are 640 and 704"),
        ({"resolution": 10}, "nearest possible are 64 and 128"),
        ({"extra_stage_depth": -1}, "An extra stage of -1 blocks"),
        ({"vision": swin}, "holds a 'swin', but ConvLLaVA's vision tower is a ConvNeXt"),
        ({"vision": tmp_path / "nowhere"}, "there is no folder"),
        ({"vision": "nobody/nothing"}, "'nobody/nothing'"),
        ({"text": "nobody/nothing"}, "'nobody/nothing'"),
        ({"text": encoder}, "does not hold a causal language model"),
        ({"text": scaled}, "lm_head_multiplier=0.5"),
        ({"dtype": "float8"}, "expected float32, float16 or bfloat16"),
        ({"output": tower}, "exists already"),
    ):
        with pytest.raises(ConvLlavaError, match=message):
            assemble(**{"output": tmp_path / "out", "vision": tower, "text": language_model, **SMALL, **arguments})
    assert not (tmp_path / "out").exists()


def test_broken_towers(tower, language_model, tmp_path):
    broken = Path(shutil.copytree(tower, tmp_path / "tower"))
    weights = load_file(broken / "model.safetensors")
    save_file({**weights, "decoder.weight": torch.ones(1)}, broken / "model.safetensors")
    with pytest.raises(ConvLlavaError, match="1 weights left over .*decoder.weight"):
        assemble(tmp_path / "out", vision=broken, text=language_model, **SMALL)
    weights.pop("encoder.stages.0.layers.0.dwconv.bias")
    save_file(weights, broken / "model.safetensors")
    with pytest.raises(
        ConvLlavaError, match="1 weights missing: model.vision_tower.encoder.stages.0.layers.0.dwconv.bias"
    ):
        assemble(tmp_path / "out", vision=broken, text=language_model, **SMALL)


def test_a_classifiers_head_is_not_used(language_model, tmp_path, caplog):
    folder = make_tower(tmp_path / "tower", classifier=True)
    with caplog.at_level("INFO", logger="convllava_hf"):
        load_fully(assemble(tmp_path / "out", vision=folder, text=language_model, **SMALL))
    assert "classifier.weight" in caplog.text and "convnext.layernorm.weight" in caplog.text
