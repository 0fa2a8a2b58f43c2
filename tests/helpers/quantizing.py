"""Quantizers, what they may change, and which layers of a model they have changed."""

import pytest
import torch
from transformers import BitsAndBytesConfig


KEPT = ("model.vision_tower.", "model.multi_modal_projector.", "lm_head")


def nf4() -> BitsAndBytesConfig:
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


def int8() -> BitsAndBytesConfig:
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_8bit=True)


def torchao_int8():
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


QUANTIZERS = {"nf4": nf4, "int8": int8, "torchao int8": torchao_int8}
# Of the logits' own spread: four bits, eight bits, eight bits for the weights alone.
TOLERANCES = {"nf4": 0.35, "int8": 0.05, "torchao int8": 0.05}


def quantized_modules(model) -> set[str]:
    """The linear layers whose weights are no longer plain tensors of floats."""
    found = set()
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        plain = type(module.weight) is torch.nn.Parameter and module.weight.is_floating_point()
        if not plain or type(module.weight.data) is not torch.Tensor:
            found.add(name)
    return found


def linear_layers(model, prefix: str) -> set[str]:
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith(prefix)
    }
