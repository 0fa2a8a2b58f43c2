"""What trains: from a recipe's patterns to parameters, against what the names of the parameters say themselves."""

import json
import re

import pytest
import torch
from helpers.tiny_models import make_config, make_model

from convllava_hf import ConvLlavaConfig, ConvLlavaForConditionalGeneration
from convllava_hf.convert.keys import ORIGINAL_TABLE, rename_key
from convllava_hf.errors import ConvLlavaError
from convllava_hf.training.trainable import (
    format_table,
    full_pattern,
    is_projector,
    is_vision_tower,
    resolve_trainable,
    set_trainable,
    trainable_table,
)


# What each short name stands for, restated as regular expressions over the model's own names.
MEANING = {
    "projector": r"model\.multi_modal_projector\..*",
    "vision_tower": r"model\.vision_tower\..*",
    "vision_tower.embeddings": r"model\.vision_tower\.embeddings\..*",
    "vision_tower.stages": r"model\.vision_tower\.encoder\.stages\..*",
    "vision_tower.stages.4": r"model\.vision_tower\.encoder\.stages\.4\..*",
    "vision_tower.stages.[2-4]": r"model\.vision_tower\.encoder\.stages\.[234]\..*",
    "vision_tower.stages.[!01]": r"model\.vision_tower\.encoder\.stages\.[234]\..*",
    "vision_tower.stages.?": r"model\.vision_tower\.encoder\.stages\.\d\..*",
    "vision_tower.stages.4.layers.0": r"model\.vision_tower\.encoder\.stages\.4\.layers\.0\..*",
    "language_model": r"model\.language_model\..*",
    "language_model.layers.1": r"model\.language_model\.layers\.1\..*",
    "language_model.layers.*.self_attn": r"model\.language_model\.layers\.\d+\.self_attn\..*",
    "lm_head": r"lm_head\.weight",
    "*.bias": r".*\.bias",
    "*layernorm*": r".*layernorm.*",
    "model.multi_modal_projector.linear_1.weight": r"model\.multi_modal_projector\.linear_1\.weight",
    "*": r".*",
}


@pytest.fixture
def own_model():
    return make_model()


def trainable_names(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("pattern", MEANING)
def test_a_pattern_names_what_it_says(pattern, own_model):
    set_trainable(own_model, [pattern])
    expected = {name for name, _ in own_model.named_parameters() if re.fullmatch(MEANING[pattern], name)}
    assert expected
    assert trainable_names(own_model) == expected


def test_patterns_add_up_and_the_last_call_decides(own_model):
    set_trainable(own_model, ["*"])
    set_trainable(own_model, ["projector", "vision_tower.stages.4", "projector"])
    expected = f"{MEANING['projector']}|{MEANING['vision_tower.stages.4']}"
    assert trainable_names(own_model) == {n for n, _ in own_model.named_parameters() if re.fullmatch(expected, n)}


@pytest.mark.parametrize("stages", [4, 5, 12])
def test_numbers_of_stages_and_layers_are_whole_words(stages):
    names = [f"model.vision_tower.encoder.stages.{index}.layers.0.dwconv.weight" for index in range(stages)]
    assert resolve_trainable(names, ["vision_tower.stages.1"]) == [names[1]]
    assert resolve_trainable(names, ["vision_tower.stages.[0-3]"]) == names[:4]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_stages_train_what_the_original_trains(stage, converted_checkpoint, golden):
    patterns = {
        1: ["projector", "vision_tower.stages.4", "lm_head"],  # it leaves lm_head trainable by an oversight
        2: ["projector", "vision_tower.stages.[2-4]", "language_model", "lm_head"],
        3: ["projector", "language_model", "lm_head"],
    }[stage]
    with torch.device("meta"):
        model = ConvLlavaForConditionalGeneration(ConvLlavaConfig.from_pretrained(converted_checkpoint("init")))
    set_trainable(model, patterns)
    original = json.loads((golden / "training.json").read_text())[f"stage{stage}"]["trainable"]
    assert trainable_names(model) == {rename_key(name, ORIGINAL_TABLE) for name in original}


@pytest.mark.parametrize("pattern", ["projector", "vision_tower.stages", "vision_tower", "language_model"])
def test_short_names_are_spelled_out_once(pattern):
    assert full_pattern(full_pattern(pattern)) == full_pattern(pattern)
    assert full_pattern(f"my_{pattern}") == f"my_{pattern}"
    assert full_pattern(f"{pattern}.rest") == f"{full_pattern(pattern)}.rest"


# --- heads that are the embedding matrix


@pytest.mark.parametrize("pattern", ["lm_head", "language_model", "language_model.embed_tokens"])
def test_either_name_of_a_tied_head_trains_it(pattern):
    model = make_model(make_config(tie_word_embeddings=True))
    parts = set_trainable(model, [pattern])
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.lm_head.weight.requires_grad
    assert "lm_head" not in {part.name for part in parts}
    assert sum(part.total for part in parts) == sum(parameter.numel() for parameter in model.parameters())


def test_a_tied_head_stays_frozen_with_the_rest():
    model = make_model(make_config(tie_word_embeddings=True))
    set_trainable(model, ["projector", "vision_tower.stages.4"])
    assert not model.lm_head.weight.requires_grad


# --- the table


@pytest.mark.parametrize("patterns", [["projector"], ["*"], ["vision_tower.stages.[2-4]", "lm_head"]])
def test_the_table_counts_every_weight_once(patterns, own_model):
    parts = set_trainable(own_model, patterns)
    assert len({part.name for part in parts}) == len(parts)
    assert sum(part.total for part in parts) == sum(one.numel() for one in own_model.parameters())
    trainable = sum(one.numel() for one in own_model.parameters() if one.requires_grad)
    assert sum(part.trainable for part in parts) == trainable
    last = format_table(parts).splitlines()[-1].split()
    assert last == ["all", f"{trainable:,}", f"{sum(part.total for part in parts):,}"]


def test_the_table_of_the_paper_s_model():
    with torch.device("meta"):
        model = ConvLlavaForConditionalGeneration(ConvLlavaConfig())
    parts = {part.name: part for part in set_trainable(model, ["projector", "vision_tower.stages.4"])}
    assert round(parts["vision_tower.stages.4"].total / 1e6) == 473
    assert round(parts["projector"].total / 1e6) == 29
    assert round(sum(part.total for name, part in parts.items() if name.startswith("vision_tower")) / 1e6) == 669
    assert [name for name, part in parts.items() if part.trainable] == ["vision_tower.stages.4", "projector"]


def test_adapters_have_rows_of_their_own(own_model):
    peft = pytest.importorskip("peft")
    total = sum(parameter.numel() for parameter in own_model.parameters())
    wrapped = peft.get_peft_model(
        own_model,
        peft.LoraConfig(r=2, target_modules=r".*language_model.*\.q_proj", modules_to_save=["multi_modal_projector"]),
    )
    parts = {part.name: part for part in trainable_table(wrapped)}
    assert {name for name, part in parts.items() if part.trainable} == {"projector", "language_model (adapter)"}
    assert parts["projector"].trainable == parts["projector"].total
    adapter = parts["language_model (adapter)"]
    assert adapter.trainable == adapter.total
    assert sum(part.total for part in parts.values()) - adapter.total == total  # PEFT's spare copy is not counted


def test_parts_are_told_by_whole_names(own_model):
    for name, _ in own_model.named_parameters():
        for wrapper in ("", "module.", "_orig_mod.", "base_model.model."):
            assert is_projector(wrapper + name) == name.startswith("model.multi_modal_projector.")
            assert is_vision_tower(wrapper + name) == name.startswith("model.vision_tower.")
    assert not is_vision_tower("model.language_model.not_vision_tower.weight")


# --- refusals


@pytest.mark.parametrize(
    "pattern",
    ["vision_tower.stages.5", "Projector", "mm_projector", "vision_tower.stage.4", "lm_head.bias", "", "stages.4"],
)
def test_a_pattern_that_matches_nothing_is_named(pattern, own_model):
    before = trainable_names(own_model)
    with pytest.raises(ConvLlavaError, match=re.escape(repr(pattern))) as refused:
        set_trainable(own_model, ["projector", pattern])
    assert "vision_tower.stages.0 to .4" in str(refused.value)
    assert "'projector'" not in str(refused.value)
    assert trainable_names(own_model) == before


def test_nothing_to_train_is_refused(own_model):
    with pytest.raises(ConvLlavaError, match="nothing would train"):
        set_trainable(own_model, [])
    with pytest.raises(ConvLlavaError, match="Nothing in the model trains"):
        trainable_table(own_model.requires_grad_(False))


def test_float16_is_refused_where_it_would_train(own_model):
    own_model.multi_modal_projector.to(torch.float16)
    with pytest.raises(ConvLlavaError, match="multi_modal_projector.*float16.*float32 or bfloat16"):
        set_trainable(own_model, ["language_model", "projector"])
    set_trainable(own_model, ["language_model"])
