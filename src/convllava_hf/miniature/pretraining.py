"""Stage 0: small stand-ins for CLIP's ConvNeXt and for Vicuna, trained from nothing on the miniature world."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import ConvNextConfig, ConvNextModel, LlamaConfig, LlamaForCausalLM

from ..convert.writing import new_checkpoint_folder
from .labeled_images import NAMES, SIDE, SIZES, labeled_image
from .language import EDGES
from .progress import OnStep
from .text_images import text_batches, weighted_loss
from .tokenizer import make_tokenizer
from .world import World


_TOWER_BATCH = 16
# Of Muon, for the matrices of each. At 0.02 some seeds of the language model never learn to look up colors.
_TOWER_RATE, _LANGUAGE_RATE = 0.02, 0.01
# Deviation of embeddings at first. A projector's output is about as long. If words were much shorter, what attention
# adds at the place of a word, as which row and column it stands in, would be lost on the long visual tokens.
_EMBEDDING = 1.0


def train_tower(
    folder: Path,
    on_step: OnStep | None = None,
    *,
    steps: int,
    seed: int,
    sizes: tuple[int, int] | None = None,
    device: str = "cpu",
) -> Path:
    """Trains a four-stage ConvNeXt to say what is at every place of images of 128 x 128 pixels, and saves it.

    Of each place it learns the name of what is there and how far that reaches. Places are asked about one by one,
    since they are what a language model gets to see: features that only their average has to name say little at any
    of them.

    Args:
        folder: a transformers folder to make.
        sizes: of what is in the images, in pixels, smallest and largest; default: `labeled_images.SIZES`.
        device: that computes, `cpu` or `cuda`.
    """
    torch.manual_seed(seed)
    config = ConvNextConfig(
        depths=[1, 1, 2, 1],
        hidden_sizes=[16, 32, 64, 128],
        image_size=SIDE,
        initializer_range=0.1,
        layer_scale_init_value=1.0,
    )
    tower = ConvNextModel(config).to(device, memory_format=torch.channels_last)
    head = nn.Sequential(nn.LayerNorm(config.hidden_sizes[-1]), nn.Linear(config.hidden_sizes[-1], len(NAMES) + 4))
    head.to(device)
    rng = np.random.default_rng([seed, 100])
    weights = torch.ones(len(NAMES))
    weights[NAMES.index("ground")] = 0.1  # most places are
    weights = weights.to(device)

    def loss() -> torch.Tensor:
        batch = [labeled_image(rng, sizes or SIZES) for _ in range(_TOWER_BATCH)]
        images, names, edges = (torch.from_numpy(np.stack(arrays)).to(device) for arrays in zip(*batch, strict=True))
        pixels = images.permute(0, 3, 1, 2).float() / 127.5 - 1
        features = tower(pixels.contiguous(memory_format=torch.channels_last)).last_hidden_state
        said = head(features.float().permute(0, 2, 3, 1)).flatten(0, 2)  # (N, C, H, W) -> (N*H*W, names and 4 edges)
        targets = names.flatten()
        there = targets != NAMES.index("ground")
        reach = F.smooth_l1_loss(said[there, len(NAMES) :], edges.flatten(0, 2)[there])
        return F.cross_entropy(said[:, : len(NAMES)], targets, weight=weights) + reach

    _fit(nn.ModuleList([tower, head]), loss, steps, (_TOWER_RATE, 5e-3), on_step, device)
    with new_checkpoint_folder(folder, overwrite=True) as new:
        tower.save_pretrained(new)
    return folder


def train_language_model(
    folder: Path,
    on_step: OnStep | None = None,
    *,
    steps: int,
    seed: int,
    world: World | None = None,
    boxes: bool = True,
    device: str = "cpu",
) -> Path:
    """Trains a small Llama to talk about scenes that it is told of in words, and saves it with its tokenizer.

    The words of a cell are said at once: their embeddings are added. Where a thing is exactly is no word; it is told
    as `language.edges_of_cells`, added by a linear layer that is needed here only. The projector will have the same to
    say in the same place.

    Args:
        folder: a transformers folder to make.
        boxes: whether it is told and asked where things are.
        device: that computes, `cpu` or `cuda`.
    """
    torch.manual_seed(seed)
    world = world or World()
    tokenizer = make_tokenizer(world)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=336,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        initializer_range=0.05,
        tie_word_embeddings=False,
        attn_implementation="eager",  # SDPA backward is slow on a CPU
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    edge_layer = nn.Linear(EDGES, config.hidden_size, bias=False)
    nn.init.normal_(model.get_input_embeddings().weight, std=_EMBEDDING)
    nn.init.normal_(edge_layer.weight, std=_EMBEDDING / math.sqrt(EDGES / 2))  # as long as embeddings are
    model.to(device)
    edge_layer.to(device)
    batches = text_batches(tokenizer, world, seed, boxes=boxes)

    def loss() -> torch.Tensor:
        batch = {name: values.to(device) for name, values in next(batches).items()}
        return weighted_loss(model, edge_layer, batch)

    _fit(nn.ModuleList([model, edge_layer]), loss, steps, (_LANGUAGE_RATE, 2e-3), on_step, device)
    with new_checkpoint_folder(folder, overwrite=True) as new:
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
    return folder


def _fit(
    model: nn.Module,
    loss_of_step: Callable,
    steps: int,
    rates: tuple[float, float],
    on_step: OnStep | None,
    device: str,
) -> None:
    """Trains with warm-up and cosine decay, in bfloat16 where it saves time.

    Args:
        rates: of the layers' matrices and of everything else.
    """
    optimizers = _optimizers(model, *rates)
    warmup = max(5, steps // 20)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: min((step + 1) / warmup, 1) * (0.05 + 0.475 * (1 + math.cos(math.pi * min(1, step / steps)))),
        )
        for optimizer in optimizers
    ]
    for step in range(1, steps + 1):
        with torch.autocast(device, torch.bfloat16):
            loss = loss_of_step()
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in (*optimizers, *schedules):
            stepper.step()
        if on_step:
            on_step(step, steps, loss.item())


def _optimizers(model: nn.Module, matrix_rate: float, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for everything else.

    With AdamW alone, a language model of this size stays for thousands of steps where it answers from what is in the
    image somewhere, before it learns to look up what belongs together.
    """
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and ".layers." in name else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=matrix_rate, momentum=0.95, weight_decay=0.0),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]
