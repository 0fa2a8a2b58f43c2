"""The vision tower by itself: time, operations, share of the matrix rate, memory."""

import statistics
from collections.abc import Sequence
from typing import Any

import torch

from ..inference.vision_backends import optimize_vision_tower
from ..modeling.modeling_convllava import ConvLlavaVisionTower
from .machine import product
from .measuring import interleaved, operations, peak, reset_peak, resident, synchronize


def measure_tower(
    tower: ConvLlavaVisionTower, ways: Sequence[str], sizes: Sequence[tuple[int, int]], repeats: int, batch: int = 1
) -> list[dict[str, Any]]:
    """One row for each way to run the tower and each size of image, (height, width) in pixels.

    The matrix rate that a row is judged by was measured between its own repeats. `change` is how far features are
    from the first way's: the norm of the difference by the norm.
    """
    weight = tower.embeddings.patch_embeddings.weight
    device, dtype = weight.device, weight.dtype
    counted = {size: operations(lambda: ConvLlavaVisionTower(tower.config), (batch, 3, *size)) for size in sizes}
    rows, features = [], {}
    for way in ways:
        runner = copy_of(tower) if len(ways) > 1 else tower
        optimize_vision_tower(runner, way)
        for size in sizes:
            row, now = _measure_one(runner, image(size, batch, device, dtype), counted[size], repeats)
            first = features.setdefault(size, now)
            rows.append({"tower": way, **row, "change": float((now - first).norm() / first.norm())})
    return rows


@torch.inference_mode()
def _measure_one(
    tower: torch.nn.Module, pixels: torch.Tensor, counted: int, repeats: int
) -> tuple[dict[str, Any], torch.Tensor]:
    """A row without the change, and the features in float32."""
    device = pixels.device
    matrices, of_matrices = product(device, pixels.dtype)
    seconds = interleaved({"tower": lambda: tower(pixels), "rate": matrices}, device, repeats)
    before = resident(device)
    reset_peak(device)
    features = tower(pixels).last_hidden_state
    synchronize(device)
    most = peak(device)
    took = statistics.median(seconds["tower"])
    rate = of_matrices / statistics.median(seconds["rate"])
    row = {
        "height": pixels.shape[-2],
        "width": pixels.shape[-1],
        "batch": len(pixels),
        "tokens": features.shape[-2] * features.shape[-1],
        "seconds": took,
        "operations": counted,
        "rate": rate,
        "share": counted / took / rate,
        "activations": None if most is None or before is None else most - before,
    }
    return row, features.float()


def image(size: tuple[int, int], batch: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Normalized pixels of noise, (batch, 3, height, width)."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, *size, generator=generator).to(device, dtype)


def copy_of(tower: ConvLlavaVisionTower) -> ConvLlavaVisionTower:
    """Another tower of the same weights, which may be replaced there without changing these."""
    with torch.device("meta"):
        other = ConvLlavaVisionTower(tower.config)
    other.load_state_dict(tower.state_dict(), assign=True)
    return other.eval()
