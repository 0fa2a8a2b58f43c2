"""Floating-point operations of a training step, from the weights of a model and which of them train.

Model FLOPs, as the model FLOPs utilization takes them (PaLM, arXiv 2204.02311, appendix B): what forward and
backward pass must compute, whether or not checkpointing computes some of it twice. A weight matrix or kernel `w` that
is applied at `p` positions costs, for a sample,

    2 |w| p (1 + trains + passes)

1 is the forward pass; `trains` is 1 where `w` trains (gradients of the weight), and `passes` is 1 where something
before it does (gradients of its input). A frozen tower before everything that trains costs its forward pass, and a
frozen language model behind a projector that trains costs two passes. Attention costs 4 n^2 d (1 + 2 passes) in each
layer, for n tokens and heads of d numbers together: all of the n x n products, as is common, though a causal mask
leaves half of them out. Positions are the cells of a stage's grid in the tower, visual tokens in the projector, tokens
that are no padding in the language model, and in its head those that the loss is taken on: TRL computes no others on a
GPU. Norms, activations, sums, embeddings and the optimizer are left out.
"""

import re
from dataclasses import dataclass
from typing import Any


@dataclass
class Samples:
    """What a batch, or all batches of a run, held.

    Args:
        images: each of `side` x `side` pixels.
        visual_tokens: of all images.
        tokens: of the language model without padding, visual ones included.
        squares: sum of the squares of the samples' tokens.
        scored: tokens that the loss is taken on.
    """

    images: float
    visual_tokens: float
    tokens: float
    squares: float
    scored: float


def training_flops(model: Any, samples: Samples, side: int) -> float:
    """Operations that training on `samples` takes, by the formula above.

    Args:
        model: a ConvLLaVA whose parameters say by `requires_grad` what trains, with or without an adapter of PEFT.
    """
    total, passes = 0.0, False
    for name, weight, multiplies in _in_order(model):
        if multiplies:
            total += 2.0 * weight.numel() * _positions(name, samples, side) * (1 + weight.requires_grad + passes)
        passes = passes or weight.requires_grad
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    # The projector, which is before the language model, trains in every stage and with an adapter.
    return total + 4.0 * samples.squares * width * config.num_hidden_layers * (1 + 2 * passes)


def _in_order(model: Any) -> list[tuple[str, Any, bool]]:
    """Names and weights of modules in the order of the forward pass, and whether they are products or convolutions.

    Norms and embeddings are not, but what follows them passes gradients on to them.
    """
    import torch

    found = [
        (name, module.weight, isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)))
        for name, module in model.named_modules()
        if isinstance(getattr(module, "weight", None), torch.nn.Parameter) and ".original_module" not in name
    ]
    parts = (".vision_tower.", ".multi_modal_projector", ".language_model.", "lm_head")
    return sorted(found, key=lambda item: next(index for index, part in enumerate(parts) if part in item[0]))


def _positions(name: str, samples: Samples, side: int) -> float:
    if stage := re.search(r"vision_tower\.encoder\.stages\.(\d+)\.", name):
        return samples.images * (side // (4 * 2 ** int(stage[1]))) ** 2
    if ".vision_tower." in name:
        return samples.images * (side // 4) ** 2
    if ".multi_modal_projector" in name:
        return samples.visual_tokens
    return samples.scored if name.endswith("lm_head") else samples.tokens
