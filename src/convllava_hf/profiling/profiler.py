"""`convllava profile` without its command line."""

import logging
import os
from collections.abc import Sequence
from typing import Any

import torch

from ..inference import load
from ..inference.loading import choose_device, choose_dtype
from ..inference.vision_backends import choose_vision_backend, optimize_vision_tower
from ..modeling.image_processing_convllava import ConvLlavaImageProcessor
from .generation import measure_answers
from .machine import copy_bandwidth, describe, in_words, matrix_rate
from .models import random_model
from .preprocessing import measure_preparing
from .tables import gib, percent, seconds, table
from .vision_tower import measure_tower


logger = logging.getLogger(__name__)


def profile_model(
    source: str | os.PathLike | None = None,
    *,
    sizes: Sequence[tuple[int, int]] = ((768, 768), (1536, 1088), (1536, 1536)),
    vision_backends: Sequence[str] | None = None,
    text: str = "0.5b",
    new_tokens: int = 16,
    repeats: int = 3,
    batch: int = 1,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    **loading: Any,
) -> dict[str, Any]:
    """Measure a checkpoint, or without one random weights of the paper's tower and a language model of size `text`.

    Args:
        sizes: (height, width) in pixels of what the tower sees, multiples of its stride.
        vision_backends: ways to run the tower (`options.VISION_BACKENDS`), compared with one
            another; answers are timed with the first. Default: what `choose_vision_backend` says.
        new_tokens: over which tokens a second are measured.
        batch: images in one call of the tower.
        device, dtype, **loading: see `convllava_hf.inference.load`.

    Returns:
        `machine`, `limits` (operations and bytes a second), and rows in `tower`, `answers` and `preparing`.

    Raises:
        ConvLlavaError: the checkpoint cannot be loaded, or a way to run the tower is not possible here.
    """
    device = choose_device(device)
    dtype = choose_dtype(device, dtype)
    ways = [choose_vision_backend(device, dtype, way) for way in (vision_backends or [None])]
    results: dict[str, Any] = {
        "machine": describe(device, dtype),
        "model": str(source) if source else f"random {text}",
    }
    if source is None:
        model, processor = random_model(text, device, dtype), ConvLlavaImageProcessor()
    else:
        assistant = load(source, device, dtype, vision_backend="eager", **loading)
        model, processor = assistant.model, assistant.processor.image_processor
    for height, width in sizes:
        model.config.num_visual_tokens(height, width)  # refuses sizes that the tower cannot take
    results["limits"] = {"operations": matrix_rate(device, dtype), "bytes": copy_bandwidth(device)}
    logger.info("the tower: %s", ", ".join(ways))
    tower: Any = model.vision_tower
    results["tower"] = measure_tower(tower, ways, sizes, repeats, batch)
    if len(ways) > 1:  # each was measured on a copy
        optimize_vision_tower(tower, ways[0])
    logger.info("answers")
    results["answers"] = measure_answers(model, sizes, new_tokens, repeats)
    logger.info("preprocessing")
    results["preparing"] = measure_preparing(processor, sorted({max(size) for size in sizes}))
    return results


def as_markdown(results: dict[str, Any]) -> str:
    """The results as tables."""

    def size(row):
        return f"{row['height']} x {row['width']}"

    limits = results["limits"]
    tower = table(
        results["tower"],
        [
            ("tower", lambda row: row["tower"]),
            ("height x width", size),
            ("visual tokens", lambda row: str(row["tokens"])),
            ("time", lambda row: seconds(row["seconds"])),
            ("operations", lambda row: f"{row['operations'] / 1e12:.2f} T"),
            ("share of matrix rate", lambda row: percent(row["share"])),
            ("activations", lambda row: gib(row["activations"])),
            ("change in features", lambda row: f"{row['change']:.1e}" if row["change"] else ""),
        ],
    )
    answers = table(
        results["answers"],
        [
            ("height x width", size),
            ("prompt", lambda row: f"{row['prompt_tokens']} tokens"),
            ("first token after", lambda row: seconds(row["first_token_seconds"])),
            ("tokens/s", lambda row: f"{row['tokens_per_second']:.1f}"),
            ("activations", lambda row: gib(row["activations"])),
        ],
    )
    preparing = table(
        results["preparing"],
        [
            ("resolution", lambda row: f"{row['side']} x {row['side']}"),
            ("from a JPEG of", lambda row: "{} x {}".format(*row["photo"])),
            ("time", lambda row: seconds(row["seconds"])),
            ("images/s", lambda row: f"{row['images_per_second']:.1f}"),
        ],
    )
    return "\n\n".join(
        [
            f"{results['model']}. {in_words(results['machine'])}",
            f"Matrix products: {limits['operations'] / 1e9:.0f} GFLOP/s. Copies: {limits['bytes'] / 1e9:.1f} GB/s.",
            f"Vision tower\n\n{tower}",
            f"Answers\n\n{answers}",
            f"Preprocessing\n\n{preparing}",
        ]
    )
