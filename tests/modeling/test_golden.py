"""The original code's figures: what it saw, computed, answered and learned, against a converted checkpoint."""

import json

import numpy as np
import pytest
import torch
from helpers.paths import GOLDEN
from transformers import AutoModelForImageTextToText, AutoProcessor, get_cosine_schedule_with_warmup


CASES = json.loads((GOLDEN / "inference.json").read_text())
FIGURES = np.load(GOLDEN / "inference.npz")
LABELS = json.loads((GOLDEN / "labels.json").read_text())
SAMPLES = json.loads((GOLDEN / "conversations.json").read_text())
TRAINING = json.loads((GOLDEN / "training.json").read_text())
VOCABULARY = 640  # the original's; ours holds the placeholder and padding behind it
TOKENS = 25  # visual tokens of an image: 320 pixels at stride 64
IMAGE = -200  # the original's single id for an image


@pytest.fixture(scope="module")
def processor(converted_checkpoint):
    return AutoProcessor.from_pretrained(converted_checkpoint("stage3"))


@pytest.fixture(scope="module")
def model(converted_checkpoint):
    return AutoModelForImageTextToText.from_pretrained(converted_checkpoint("stage3")).eval()


def image_paths(case: dict) -> list[str] | None:
    return [str(GOLDEN / "images" / name) for name in case["images"]] or None


def as_messages(turns: list, paths: list[str] | None) -> list[dict]:
    """Turns of the original as a conversation of transformers: each <image> a part of its own, its line break gone."""
    roles = {"USER": "user", "ASSISTANT": "assistant"}
    images = iter(paths or [])
    messages = []
    for role, value in turns:
        if value is None:
            break
        first, *others = value.split("<image>")
        content = [{"type": "text", "text": first}]
        for text in others:
            content += [{"type": "image", "path": next(images)}, {"type": "text", "text": text.removeprefix("\n")}]
        messages.append({"role": roles[role], "content": [part for part in content if part.get("text") != ""]})
    return messages


def expand(ids: list[int], image_token_id: int) -> list[int]:
    """The original's ids with as many placeholders for an image as it has visual tokens."""
    return [token for one in ids for token in ([image_token_id] * TOKENS if one == IMAGE else [one])]


@pytest.mark.parametrize("name", CASES)
def test_token_ids_of_a_prompt(processor, name):
    case = CASES[name]
    inputs = processor(text=case["prompt"], images=image_paths(case))
    assert inputs["input_ids"] == [expand(case["input_ids"], processor.image_token_id)]


@pytest.mark.parametrize("name", CASES)
def test_token_ids_of_a_conversation(processor, name):
    case = CASES[name]
    messages = as_messages(case["turns"], image_paths(case))
    rendered = processor.apply_chat_template(messages, add_generation_prompt=True)
    # Blanks stand for the dummy prefixes that SentencePiece gives the texts between.
    assert rendered.removeprefix("<s> ").replace("<image> ", "<image>") == case["prompt"]
    inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    ids = inputs["input_ids"]
    assert (ids[0] if isinstance(ids[0], list) else ids) == expand(case["input_ids"], processor.image_token_id)


@pytest.mark.parametrize("name", CASES)
def test_token_ids_as_vllm_makes_them(processor, name):
    """It takes the ids of the rendered prompt, and replaces placeholders as it saw the processor do it elsewhere."""
    case = CASES[name]
    messages = as_messages(case["turns"], image_paths(case))
    rendered = processor.apply_chat_template(messages, add_generation_prompt=True)
    image = np.zeros((320, 320, 3), np.uint8)
    learned = processor(text="<image><image>", images=[image] * 2, add_special_tokens=False)["input_ids"][0]
    assert len(learned) % 2 == 0
    found = []
    for token in processor.tokenizer(rendered, add_special_tokens=False).input_ids:
        found += learned[: len(learned) // 2] if token == processor.image_token_id else [token]
    assert found == expand(case["input_ids"], processor.image_token_id)


@pytest.mark.parametrize("name", CASES)
def test_token_ids_in_two_steps(processor, name):
    """The chat template first, the processor second."""
    case = CASES[name]
    rendered = processor.apply_chat_template(as_messages(case["turns"], image_paths(case)), add_generation_prompt=True)
    inputs = processor(text=rendered, images=image_paths(case))
    assert inputs["input_ids"] == [expand(case["input_ids"], processor.image_token_id)]


@pytest.mark.parametrize("name", [key.removesuffix(".pixel_values") for key in FIGURES if "pixel" in key])
def test_pixel_values(processor, name):
    seen = processor.image_processor(image_paths(CASES[name]), return_tensors="np")
    np.testing.assert_allclose(seen["pixel_values"], FIGURES[f"{name}.pixel_values"], rtol=0, atol=1e-6)
    assert seen["image_sizes"].tolist() == [[320, 320]] * len(CASES[name]["images"])


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name]["images"]])
@torch.no_grad()
def test_features(processor, model, name):
    images = processor.image_processor(image_paths(CASES[name]), return_tensors="pt")
    outputs = model.get_image_features(**images)
    features = outputs.last_hidden_state.flatten(2).transpose(1, 2)  # (N, C, h, w) -> (N, tokens, C)
    np.testing.assert_allclose(features, FIGURES[f"{name}.vision_features"], rtol=0, atol=1e-4)
    projected = torch.stack(outputs.pooler_output)
    np.testing.assert_allclose(projected, FIGURES[f"{name}.projected"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_logits(processor, model, name):
    case = CASES[name]
    inputs = processor(text=case["prompt"], images=image_paths(case), return_tensors="pt")
    logits = model(**inputs).logits[0, :, :VOCABULARY]
    np.testing.assert_allclose(logits, FIGURES[f"{name}.logits"].reshape(logits.shape), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_greedy_answers(processor, model, name):
    case = CASES[name]
    inputs = processor(text=case["prompt"], images=image_paths(case), return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert ids.tolist() == case["generated"]
    assert processor.decode(ids, skip_special_tokens=True).strip() == case["text"].strip()


def test_greedy_answers_of_all_cases_in_one_batch(processor, model):
    paths = [path for case in CASES.values() for path in image_paths(case) or []]
    prompts = [case["prompt"] for case in CASES.values()]
    inputs = processor(text=prompts, images=paths, padding=True, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    for row, case in zip(ids.tolist(), CASES.values(), strict=True):
        assert row[: len(case["generated"])] == case["generated"]


def our_name(original: str) -> str:
    """Written apart from the converter's table, which it checks."""
    for old, new in {
        "model.vision_tower.vision_tower.": "model.vision_tower.",
        "model.mm_projector.0.": "model.multi_modal_projector.linear_1.",
        "model.mm_projector.2.": "model.multi_modal_projector.linear_2.",
        "lm_head.": "lm_head.",
        "model.": "model.language_model.",
    }.items():
        if original.startswith(old):
            return new + original.removeprefix(old)
    raise KeyError(original)


@pytest.fixture(scope="module")
def training_batch(processor) -> tuple[dict, torch.Tensor]:
    """All samples in file order, padded right, as the original trained on them; and their labels."""
    rows = [LABELS[sample["id"]] for sample in SAMPLES]
    ids = [torch.tensor(expand(row["input_ids"], processor.image_token_id)) for row in rows]
    labels = []
    for row in rows:
        places = zip(row["input_ids"], row["labels"], strict=True)
        labels.append(
            torch.tensor([one for token, label in places for one in [label] * (TOKENS if token == IMAGE else 1)])
        )
    paths = [str(GOLDEN / "images" / sample["image"]) for sample in SAMPLES if "image" in sample]
    inputs = {
        "input_ids": torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=0),
        "attention_mask": torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        **processor.image_processor(paths, return_tensors="pt"),
    }
    return inputs, torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_training_goes_the_originals_way(converted_checkpoint, training_batch, stage):
    """Six steps of each stage: every loss, every gradient's norm and every parameter's norm afterwards.

    The vocabulary's rows that the original lacks are left out of the loss.
    """
    figures = TRAINING[f"stage{stage}"]
    start = "init" if stage == 1 else f"stage{stage - 1}"
    model = AutoModelForImageTextToText.from_pretrained(converted_checkpoint(start)).train()
    trainable = {our_name(name) for name in figures["trainable"]}
    parameters = dict(model.named_parameters())
    assert trainable <= set(parameters)
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in trainable)
    parameters_to_train = [parameters[name] for name in sorted(trainable)]
    optimizer = torch.optim.AdamW(parameters_to_train, lr=TRAINING["learning_rate"][str(stage)], weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=1, num_training_steps=6)
    inputs, labels = training_batch
    losses, norms = [], []
    for _ in range(6):
        logits = model(**inputs).logits[:, :-1, :VOCABULARY]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters_to_train, 1.0).item())
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == pytest.approx(figures["losses"], rel=1e-5)
    assert norms == pytest.approx(figures["grad_norms"], rel=1e-4)
    # The original keeps ConvNextModel's layer norm for pooling, which nothing runs.
    expected = {
        our_name(name): norm
        for name, norm in figures["param_norms_after"].items()
        if not name.startswith("model.vision_tower.vision_tower.layernorm.")
    }
    assert set(expected) == set(parameters)
    found = {name: _of_the_original(name, parameters[name]).norm().item() for name in expected}
    assert found == pytest.approx(expected, rel=1e-6)
    after = AutoModelForImageTextToText.from_pretrained(converted_checkpoint(f"stage{stage}"))
    for name, parameter in after.named_parameters():
        found, expected = _of_the_original(name, parameters[name]), _of_the_original(name, parameter)
        # Adam divides each gradient by its size. Where one is close to zero, its rounding, which differs between
        # processors, becomes a visible part of a step.
        far = ~torch.isclose(found, expected, rtol=1e-4, atol=1e-6)
        assert far.sum() <= found.numel() / 1000, name
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=TRAINING["learning_rate"][str(stage)])


def _of_the_original(name: str, parameter: torch.Tensor) -> torch.Tensor:
    """Without the rows of the vocabulary that the original lacks."""
    grown = name in ("lm_head.weight", "model.language_model.embed_tokens.weight")
    return (parameter[:VOCABULARY] if grown else parameter).detach()
