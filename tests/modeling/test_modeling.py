"""transformers' conventions for models, checked on a tiny ConvLLaVA."""

import json

import pytest
import torch
from helpers.tiny_models import ask, make_config, make_image, make_model
from transformers import AutoModel, AutoModelForCausalLM

from convllava_hf import AutoModelForVision2Seq, ConvLlavaForConditionalGeneration, ConvLlavaModel


def inputs_for(processor, *conversations, **kwargs) -> dict:
    texts = processor.apply_chat_template(list(conversations), add_generation_prompt=True)
    images = [part["image"] for chat in conversations for part in chat[0]["content"] if part["type"] == "image"]
    return dict(processor(images=images or None, text=texts, return_tensors="pt", padding=True, **kwargs))


@pytest.fixture(scope="module")
def inputs(processor):
    return inputs_for(
        processor,
        ask("What is this?", make_image(seed=1)),
        ask("Compare them in a long sentence.", make_image(seed=2), make_image(seed=3)),
        ask("No image."),
    )


def last_logits(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs, logits_to_keep=1).logits[:, 0]


def test_images_are_seen(model, processor):
    """A model that ignored its images would pass most tests below."""
    question = "What is this?"
    first, second = (last_logits(model, inputs_for(processor, ask(question, make_image(seed=s)))) for s in (1, 2))
    assert (first - second).abs().max() > 0.1


def test_a_batch_equals_one_at_a_time(model, processor, inputs):
    together = last_logits(model, inputs)
    chats = [
        ask("What is this?", make_image(seed=1)),
        ask("Compare them in a long sentence.", make_image(seed=2), make_image(seed=3)),
        ask("No image."),
    ]
    alone = torch.cat([last_logits(model, inputs_for(processor, chat)) for chat in chats])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


def test_parameters_are_all_used_and_none_is_left_over():
    model = make_model()
    model.train()
    ids = torch.tensor([[1, 3, 3, 3, 3, 9, 10]])
    model(input_ids=ids, pixel_values=torch.randn(1, 3, 128, 128), labels=ids).loss.backward()
    unused = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not unused


@pytest.mark.parametrize("tied", [False, True])
def test_saving_and_loading_changes_nothing(tied, inputs, tmp_path):
    model = make_model(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    again, report = ConvLlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    torch.testing.assert_close(last_logits(again, inputs), last_logits(model, inputs), atol=0, rtol=0)
    same = again.lm_head.weight.data_ptr() == again.get_input_embeddings().weight.data_ptr()
    assert same is tied


@pytest.mark.parametrize("text", ["gpt2", "opt", "gpt_neox", "falcon"])
def test_embeddings_are_tied_whatever_the_language_model_calls_them(text, inputs, tmp_path):
    model = make_model(text=text, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    again = ConvLlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert again.lm_head.weight.data_ptr() == again.get_input_embeddings().weight.data_ptr()
    torch.testing.assert_close(last_logits(again, inputs), last_logits(model, inputs), atol=0, rtol=0)


def test_auto_classes_build_and_load_it(checkpoint, model):
    assert type(AutoModelForVision2Seq.from_pretrained(checkpoint)) is ConvLlavaForConditionalGeneration
    base, report = AutoModel.from_pretrained(checkpoint, output_loading_info=True)
    assert type(base) is ConvLlavaModel and not report["missing_keys"]
    assert type(AutoModelForVision2Seq.from_config(model.config)) is ConvLlavaForConditionalGeneration


def test_base_model_takes_embeddings_and_returns_a_tuple(model, inputs):
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(inputs["input_ids"])
        images = {name: inputs[name] for name in ("pixel_values", "image_sizes", "attention_mask")}
        from_ids = model.model(**inputs).last_hidden_state
        output = model.model(inputs_embeds=embeddings, **images, return_dict=False)
    assert isinstance(output, tuple)
    torch.testing.assert_close(output[0], from_ids, atol=0, rtol=0)


def test_ids_and_embeddings_exclude_each_other(model):
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(input_ids=torch.tensor([[1]]), inputs_embeds=torch.zeros(1, 1, 32))


@pytest.mark.parametrize(
    "text", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "granite", "cohere", "phi3", "olmo2", "smollm3"]
)
def test_without_images_it_is_its_language_model(text):
    model = make_model(text=text)
    peer = AutoModelForCausalLM.from_config(model.config.text_config).eval()
    weights = {f"model.{name}": tensor for name, tensor in model.language_model.state_dict().items()}
    peer.load_state_dict({**weights, "lm_head.weight": model.lm_head.weight})
    ids = torch.randint(4, 300, (2, 20))
    with torch.no_grad():
        ours, theirs = model(input_ids=ids, labels=ids), peer(input_ids=ids, labels=ids)
    torch.testing.assert_close(ours.logits, theirs.logits)
    torch.testing.assert_close(ours.loss, theirs.loss)


def test_placeholders_that_do_not_match_the_images_are_refused(model):
    with pytest.raises(ValueError, match="hold 3 image placeholders.*have 4 visual tokens"):
        model(input_ids=torch.tensor([[1, 3, 3, 3, 9]]), pixel_values=torch.zeros(1, 3, 128, 128))


def test_logits_can_be_limited(model, inputs):
    with torch.no_grad():
        full = model(**inputs).logits
        torch.testing.assert_close(model(**inputs, logits_to_keep=3).logits, full[:, -3:])
        positions = torch.tensor([0, 5])
        torch.testing.assert_close(model(**inputs, logits_to_keep=positions).logits, full[:, positions])


def test_hidden_states_and_attentions_are_returned(inputs):
    model = make_model()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True, output_attentions=True)
    length = inputs["input_ids"].shape[1]
    assert len(output.hidden_states) == 3 and output.hidden_states[0].shape == (3, length, 32)
    assert len(output.attentions) == 2 and output.attentions[0].shape == (3, 4, length, length)
    assert output.image_hidden_states.shape == (12, 32)


def test_attention_implementations_agree(inputs, checkpoint):
    logits = []
    for implementation in ("eager", "sdpa"):
        model = ConvLlavaForConditionalGeneration.from_pretrained(checkpoint, attn_implementation=implementation)
        assert model.language_model.config._attn_implementation == implementation
        logits.append(last_logits(model, inputs))
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


def test_loss_is_that_of_shifted_labels(model, inputs):
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels = labels.masked_fill(labels == 3, -100)
    with torch.no_grad():
        output = model(**inputs, labels=labels)
        per_token = torch.nn.functional.cross_entropy(
            output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
        )
        counted = (labels[:, 1:] != -100).sum()
        torch.testing.assert_close(output.loss, per_token / counted)
        # What the Trainer passes when gradients accumulate over several batches.
        torch.testing.assert_close(model(**inputs, labels=labels, num_items_in_batch=10).loss, per_token / 10)


@pytest.mark.parametrize("frozen_tower", [False, True])
def test_gradient_checkpointing_changes_no_gradient(inputs, frozen_tower):
    def gradients(checkpointing):
        model = make_model()
        model.train()
        model.vision_tower.requires_grad_(not frozen_tower)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=name)


def test_a_training_batch_without_images_runs_the_tower_once_on_one_small_image(monkeypatch):
    model = make_model()
    seen = []
    forward = model.vision_tower.embeddings.forward
    monkeypatch.setattr(model.vision_tower.embeddings, "forward", lambda x: seen.append(tuple(x.shape)) or forward(x))
    ids = torch.tensor([[1, 9, 10, 11]])
    with torch.no_grad():
        expected = model(input_ids=ids, labels=ids).loss
    assert not seen
    model.train()
    loss = model(input_ids=ids, labels=ids).loss
    assert seen == [(1, 3, 64, 64)]
    torch.testing.assert_close(loss, expected)
    loss.backward()
    gradients = [parameter.grad for parameter in model.vision_tower.parameters()]
    gradients += [parameter.grad for parameter in model.multi_modal_projector.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("tied", [False, True])
def test_vocabulary_can_grow(tied, inputs, tmp_path):
    model = make_model(tie_word_embeddings=tied)
    before = last_logits(model, inputs)
    model.resize_token_embeddings(400, mean_resizing=False)
    assert model.config.text_config.vocab_size == 400 and model.lm_head.weight.shape == (400, 32)
    after = last_logits(model, inputs)
    torch.testing.assert_close(after[:, :384], before)
    labels = torch.full_like(inputs["input_ids"], 399)
    assert model(**inputs, labels=labels).loss.isfinite()
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(last_logits(type(model).from_pretrained(tmp_path), inputs), after)


def test_half_precision_loads_and_answers_alike(checkpoint, model, inputs):
    half = ConvLlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    logits = last_logits(half, inputs)  # float32 pixels are cast by the model
    assert torch.nn.functional.cosine_similarity(logits.float(), last_logits(model, inputs)).min() > 0.99


def test_weights_are_initialized_as_the_parts_say():
    config = make_config()
    config.vision_config.layer_scale_init_value = 1e-6
    torch.manual_seed(0)
    model = ConvLlavaForConditionalGeneration(config)
    block = model.vision_tower.encoder.stages[4].layers[0]
    torch.testing.assert_close(block.layer_scale_parameter.data, torch.full((32,), 1e-6))
    assert 0.15 < block.pwconv1.weight.std() < 0.25 and not block.pwconv1.bias.any()
    assert 0.15 < model.language_model.layers[0].mlp.up_proj.weight.std() < 0.25


@pytest.mark.parametrize(
    "elsewhere", ["model.vision_tower", "model.vision_tower.encoder.stages.3", "model.language_model", "lm_head"]
)
def test_parts_can_be_offloaded(elsewhere, checkpoint, model, inputs, tmp_path):
    """A device map may put any part elsewhere; on a machine without a GPU, "elsewhere" is the disk."""
    parts = ["lm_head", "model.multi_modal_projector", "model.language_model", "model.vision_tower.embeddings"]
    parts += [f"model.vision_tower.encoder.stages.{index}" for index in range(5)]
    device_map = {part: "disk" if part.startswith(elsewhere) else "cpu" for part in parts}
    loaded = ConvLlavaForConditionalGeneration.from_pretrained(
        checkpoint, device_map=device_map, offload_folder=tmp_path
    )
    assert any(parameter.is_meta for parameter in loaded.parameters())
    torch.testing.assert_close(last_logits(loaded, inputs), last_logits(model, inputs))


def test_auto_device_map_keeps_blocks_whole(checkpoint, model, inputs):
    from accelerate import infer_auto_device_map

    with torch.device("meta"):
        empty = ConvLlavaForConditionalGeneration(model.config)
    empty.tie_weights()
    whole = set(empty._no_split_modules or []) | {"ConvNextLayer", "LlamaDecoderLayer"}
    half = sum(parameter.nbytes for parameter in empty.parameters()) // 2
    parts = infer_auto_device_map(empty, {"cpu": half, "disk": 10**9}, no_split_module_classes=list(whole))
    assert set(parts.values()) == {"cpu", "disk"}
    inside = [name for name in parts if ".layers." in name and name.rsplit(".layers.", 1)[1].count(".") > 0]
    assert not inside
