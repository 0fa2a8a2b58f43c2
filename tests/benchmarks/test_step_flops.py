"""benchmarks/step_flops.py against what torch counts in a forward and a backward pass."""

import importlib.util

import pytest
import torch
from helpers.paths import BENCHMARKS
from torch.utils.flop_counter import FlopCounterMode

from convllava_hf.profiling.models import random_model
from convllava_hf.training.trainable import set_trainable


SIDE, TEXT, BATCH = 128, 7, 2
STAGES = {
    "1": ["projector", "vision_tower.stages.4"],
    "2": ["projector", "vision_tower.stages.[2-4]", "language_model", "lm_head"],
    "3": ["projector", "language_model", "lm_head"],
    "everything": ["projector", "vision_tower", "language_model", "lm_head"],
}


@pytest.fixture(scope="module")
def module():
    spec = importlib.util.spec_from_file_location("step_flops", BENCHMARKS / "step_flops.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def prepared(patterns: list[str]):
    """A tiny model with plain attention, whose products torch counts on any device, and without depthwise
    convolutions, whose backward pass torch counts as if they were dense."""
    model = random_model("tiny", torch.device("cpu"), torch.float32).train()
    model.set_attn_implementation("eager")
    for stage in model.vision_tower.encoder.stages:
        for layer in stage.layers:
            layer.dwconv = torch.nn.Identity()
    set_trainable(model, patterns)
    return model


def counted(model) -> int:
    tokens = model.config.num_visual_tokens(SIDE, SIDE)
    ids = torch.full((BATCH, tokens + TEXT), 5)
    ids[:, :tokens] = model.config.image_token_id
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, pixel_values=torch.randn(BATCH, 3, SIDE, SIDE), labels=ids).loss.backward()
    return counter.get_total_flops()


def samples(module, model):
    tokens = model.config.num_visual_tokens(SIDE, SIDE)
    length = tokens + TEXT
    # The model's own forward computes logits at every position.
    return module.Samples(BATCH, BATCH * tokens, BATCH * length, BATCH * length**2, BATCH * length)


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_costs_what_torch_counts(module, stage):
    model = prepared(STAGES[stage])
    assert module.training_flops(model, samples(module, model), SIDE) == counted(model)


def test_an_adapter_costs_what_torch_counts(module):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, target_modules=r".*language_model.*\.(q_proj|down_proj)", modules_to_save=["multi_modal_projector"]
    )
    model = peft.get_peft_model(prepared(STAGES["3"]), config)
    assert module.training_flops(model, samples(module, model), SIDE) == counted(model)


def test_a_depthwise_convolution_costs_a_product_for_each_weight_and_place(module):
    model = random_model("tiny", torch.device("cpu"), torch.float32)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.vision_tower(torch.randn(1, 3, SIDE, SIDE))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    nothing_but_an_image = module.Samples(1, 0, 0, 0, 0)
    assert module.training_flops(model, nothing_but_an_image, SIDE) == counter.get_total_flops()


def test_padding_and_prompts_are_not_paid_for_in_the_head(module):
    model = prepared(STAGES["3"])
    all_of_it, head = samples(module, model), model.lm_head.weight.numel()
    fewer = module.Samples(**{**vars(all_of_it), "scored": all_of_it.scored - 5})
    saved = module.training_flops(model, all_of_it, SIDE) - module.training_flops(model, fewer, SIDE)
    assert saved == 5 * 2 * head * 3
