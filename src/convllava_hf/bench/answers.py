"""The whole model: seconds until the first token, tokens a second after it."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .measuring import clocked, peak, reset_peak, resident


QUESTION_TOKENS = 48  # of text around a picture, as in a short question with the template's system message


def prompt(config, tokens: int, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """A prompt with one picture of so many visual tokens, of ids that no tokenizer made."""
    text = torch.arange(QUESTION_TOKENS) % 100 + 10
    ids = torch.cat([text[:8], torch.full((tokens,), config.image_token_id), text[8:]])[None]
    size = torch.tensor([pixels.shape[-2:]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "image_sizes": size}
    return {name: tensor.to(pixels.device) for name, tensor in inputs.items()} | {"pixel_values": pixels}


def answer(model: nn.Module, inputs: Mapping[str, torch.Tensor], tokens: int) -> None:
    """Generate exactly so many tokens."""
    with torch.inference_mode():
        model.generate(**inputs, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=0)


def time_answer(model: nn.Module, inputs: Mapping[str, torch.Tensor], new_tokens: int, repeats: int) -> dict[str, Any]:
    """Medians: `first_token_seconds`, the tower's work in them, and `tokens_per_second` after the first."""
    device = inputs["input_ids"].device
    answer(model, inputs, 1)
    first, whole = [], []
    before = resident(device)
    reset_peak(device)
    for _ in range(repeats):
        first.append(clocked(lambda: answer(model, inputs, 1), device))
        whole.append(clocked(lambda: answer(model, inputs, 1 + new_tokens), device))
    most = peak(device)
    later = statistics.median(whole) - statistics.median(first)
    return {
        "first_token_seconds": statistics.median(first),
        "tokens_per_second": new_tokens / later if later > 0 else None,
        "activations": None if most is None else most - before,
    }


def measure_answers(
    model: nn.Module, sizes: Sequence[tuple[int, int]], new_tokens: int, repeats: int
) -> list[dict[str, Any]]:
    """One row for each size of picture, (height, width) in pixels."""
    rows = []
    for height, width in sizes:
        tokens = model.config.num_visual_tokens(height, width)
        pixels = torch.randn(1, 3, height, width).to(model.device, model.dtype)
        inputs = prompt(model.config, tokens, pixels)
        row = {"height": height, "width": width, "tokens": tokens, "prompt_tokens": inputs["input_ids"].shape[1]}
        rows.append({**row, **time_answer(model, inputs, new_tokens, repeats)})
    return rows
