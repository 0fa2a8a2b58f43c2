"""Parameter groups: what trains, at which rate, and with which decay."""

import pytest
import torch
from helpers.tiny_models import make_config, make_model

from convllava_hf.training.optimizer import parameter_groups
from convllava_hf.training.trainable import set_trainable


EVERYTHING = ["projector", "vision_tower", "language_model", "lm_head"]
STAGE_1 = ["projector", "vision_tower.stages.4"]
STAGE_2 = ["projector", "vision_tower.stages.[2-4]", "language_model", "lm_head"]


def make_groups(model, decay=None, weight_decay=0.1, **rates):
    if decay is None:
        decay = {name for name, parameter in model.named_parameters() if parameter.ndim > 1}
    return parameter_groups(model.named_parameters(), decay, weight_decay, **rates)


def settings(model, groups) -> dict[str, dict]:
    """The group of every parameter that is in one, by the parameter's name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)]: group for group in groups for parameter in group["params"]}


@pytest.mark.parametrize("patterns", [EVERYTHING, STAGE_1, STAGE_2, ["lm_head"]])
@pytest.mark.parametrize("rates", [{}, {"projector_learning_rate": 1e-3, "vision_tower_learning_rate": 1e-5}])
@pytest.mark.parametrize("tied", [False, True])
def test_groups_hold_what_trains_and_that_once(patterns, rates, tied):
    model = make_model(make_config(tie_word_embeddings=tied))
    set_trainable(model, patterns)
    groups = make_groups(model, **rates)
    held = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert all(group["params"] for group in groups)


@pytest.mark.parametrize("projector, tower", [(None, None), (1e-3, None), (None, 1e-5), (1e-3, 1e-5), (0.0, 1e-3)])
def test_each_part_has_its_rate_and_decay(projector, tower):
    model = make_model()
    set_trainable(model, EVERYTHING)
    groups = make_groups(model, projector_learning_rate=projector, vision_tower_learning_rate=tower)
    optimizer = torch.optim.AdamW(groups, lr=2e-5)
    for name, group in settings(model, optimizer.param_groups).items():
        own = projector if "multi_modal_projector" in name else tower if "vision_tower" in name else None
        assert group["lr"] == (2e-5 if own is None else own), name
        assert group["weight_decay"] == (0.1 if model.get_parameter(name).ndim > 1 else 0.0), name


def test_without_rates_or_decay_there_is_one_group():
    model = make_model()
    set_trainable(model, EVERYTHING)
    (group,) = make_groups(model, decay=set(), weight_decay=0.1)
    assert group["weight_decay"] == 0
    assert "lr" not in group


def test_a_schedule_keeps_the_rates_apart():
    model = make_model()
    set_trainable(model, EVERYTHING)
    groups = make_groups(model, projector_learning_rate=1e-3, vision_tower_learning_rate=1e-5)
    optimizer = torch.optim.AdamW(groups, lr=2e-5)
    before = [group["lr"] for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    optimizer.step()
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([rate / 2 for rate in before])


def test_frozen_parameters_cost_no_state_and_do_not_move(processor):
    model = make_model().train()
    set_trainable(model, STAGE_1)
    optimizer = torch.optim.AdamW(make_groups(model), lr=1e-2)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    inputs = processor(text="<s>USER: Hi. ASSISTANT: Yes.</s>", return_tensors="pt")
    model(**inputs, labels=inputs["input_ids"], pixel_values=None)
    pixels = torch.randn(1, 3, 64, 64)
    model.get_image_features(pixels).pooler_output[0].pow(2).sum().backward()
    optimizer.step()
    trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert {id(parameter) for parameter in optimizer.state} == trainable
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(before[name], parameter)}
    assert moved == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_parts_are_found_in_wrapped_models():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        make_model(),
        peft.LoraConfig(r=2, target_modules=r".*language_model.*\.q_proj", modules_to_save=["multi_modal_projector"]),
    )
    groups = make_groups(model, projector_learning_rate=1e-3, vision_tower_learning_rate=1e-5)
    found = settings(model, torch.optim.AdamW(groups, lr=2e-5).param_groups)
    assert {group["lr"] for name, group in found.items() if "projector" in name} == {1e-3}
    assert {group["lr"] for name, group in found.items() if "lora_" in name} == {2e-5}
    assert len(found) == len([one for one in model.parameters() if one.requires_grad])
