"""Models of true shapes and random weights, made without reading or downloading anything."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, ConvNextConfig

from ..errors import ConvLlavaError
from ..modeling.configuration_convllava import ConvLlavaConfig
from ..modeling.modeling_convllava import ConvLlavaForConditionalGeneration


PAPER_TOWER: dict[str, Any] = {"depths": [3, 3, 27, 3, 6], "hidden_sizes": [192, 384, 768, 1536, 3072]}
_QWEN = {"model_type": "qwen2", "vocab_size": 151936, "num_key_value_heads": 2, "tie_word_embeddings": True}
TEXTS = {  # the shapes of Qwen2.5's 0.5B and 1.5B, and of Vicuna's 7B
    "0.5b": {
        **_QWEN,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
    },
    "1.5b": {
        **_QWEN,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
    },
    "7b": {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 4096},
    "tiny": {
        "model_type": "llama",
        "vocab_size": 4096,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
}
TINY_TOWER: dict[str, Any] = {"depths": [1, 1, 2, 1, 1], "hidden_sizes": [16, 32, 64, 96, 128]}
_PLACEHOLDER = 3


def tower_config(tiny: bool = False) -> ConvNextConfig:
    """The paper's ConvNeXt-L of five stages; or one small enough for tests."""
    shape = TINY_TOWER if tiny else PAPER_TOWER
    return ConvNextConfig(num_stages=5, image_size=768, layer_scale_init_value=0.1, **shape)


def text_config(name: str):
    """The configuration of a language model by its size.

    Raises:
        ConvLlavaError: there is no such size.
    """
    if name not in TEXTS:
        raise ConvLlavaError(f"Unknown size of language model {name!r}: choose one of {', '.join(TEXTS)}.")
    return AutoConfig.for_model(**TEXTS[name])


def random_model(text: str, device: torch.device, dtype: torch.dtype) -> ConvLlavaForConditionalGeneration:
    """A ConvLLaVA of the paper's tower and a language model of this size ("tiny" makes both small)."""
    config = ConvLlavaConfig(
        vision_config=tower_config(text == "tiny"), text_config=text_config(text), image_token_id=_PLACEHOLDER
    )
    return built(lambda: ConvLlavaForConditionalGeneration(config), device, dtype)


def built(make: Callable[[], nn.Module], device: torch.device, dtype: torch.dtype) -> Any:
    """The model that `make` builds, with random weights of a size at which nothing overflows or dies out.

    Weights are copies of one block of random numbers: drawing each of many million takes longer than what is measured.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device), _NothingDrawn():
            model = make()
    finally:
        torch.set_default_dtype(before)
    _fill(model)
    return model.eval()


class _NothingDrawn(TorchDispatchMode):
    """Sets to zero what would be drawn as initial weights.

    Left as it is, it would be whatever the memory holds, and torch's `trunc_normal_` draws until all values lie within
    its bounds, so it might never end.
    """

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation._opname in ("normal_", "uniform_", "erfinv_"):
            return args[0].zero_()
        return operation(*args, **(kwargs or {}))


@torch.no_grad()
def _fill(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2**20, generator=generator)
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            parameter.fill_(0.0 if name.endswith("bias") else 0.1 if "layer_scale" in name else 1.0)
            continue
        spread = 0.5 / parameter[0].numel() ** 0.5
        flat = parameter.view(-1)
        source = (noise * spread).to(parameter.device, parameter.dtype)
        for start in range(0, flat.numel(), len(source)):
            part = flat[start : start + len(source)]
            part.copy_(source[: len(part)])
