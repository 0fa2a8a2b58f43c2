"""The whole model: seconds until the first token, tokens a second after it."""

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from .measuring import peak, reset_peak, resident, synchronize


QUESTION_TOKENS = 48  # of text around an image, as in a short question with the template's system message


def prompt(config, tokens: int, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """A prompt with one image of a given number of visual tokens; the ids come from no tokenizer."""
    text = torch.arange(QUESTION_TOKENS) % 100 + 10
    ids = torch.cat([text[:8], torch.full((tokens,), config.image_token_id), text[8:]])[None]
    size = torch.tensor([pixels.shape[-2:]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "image_sizes": size}
    return {name: tensor.to(pixels.device) for name, tensor in inputs.items()} | {"pixel_values": pixels}


def answer(model: Any, inputs: Mapping[str, torch.Tensor], tokens: int) -> tuple[float, float | None]:
    """Generates an exact number of tokens.

    Returns:
        Seconds to the first token, and tokens a second after it (`None` for a single token).
    """
    clock = _Clock(inputs["input_ids"].device)
    with torch.inference_mode():
        start = clock.now()
        model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
    first, last = clock.times[0], clock.times[-1]
    return first - start, (tokens - 1) / (last - first) if tokens > 1 else None


class _Clock(StoppingCriteria):
    """Notes when each token is there, and stops nothing."""

    def __init__(self, device: torch.device):
        self.device = device
        self.times: list[float] = []

    def now(self) -> float:
        synchronize(self.device)
        return time.perf_counter()

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        self.times.append(self.now())
        return cast(torch.BoolTensor, torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device))


def time_answer(model: Any, inputs: Mapping[str, torch.Tensor], new_tokens: int, repeats: int) -> dict[str, Any]:
    """Medians: `first_token_seconds`, the tower's work in them, and `tokens_per_second` after the first."""
    device = inputs["input_ids"].device
    answer(model, inputs, 1)
    before = resident(device)
    reset_peak(device)
    taken = [answer(model, inputs, 1 + new_tokens) for _ in range(repeats)]
    most = peak(device)
    return {
        "first_token_seconds": statistics.median(first for first, _ in taken),
        "tokens_per_second": statistics.median(rate for _, rate in taken if rate is not None),
        "activations": None if most is None or before is None else most - before,
    }


def measure_answers(
    model: Any, sizes: Sequence[tuple[int, int]], new_tokens: int, repeats: int
) -> list[dict[str, Any]]:
    """One row for each size of image, (height, width) in pixels."""
    rows = []
    for height, width in sizes:
        tokens = model.config.num_visual_tokens(height, width)
        pixels = torch.randn(1, 3, height, width).to(model.device, model.dtype)
        inputs = prompt(model.config, tokens, pixels)
        row = {"height": height, "width": width, "tokens": tokens, "prompt_tokens": inputs["input_ids"].shape[1]}
        rows.append({**row, **time_answer(model, inputs, new_tokens, repeats)})
    return rows
