"""Where the tests of this folder run, and by how much results may differ there."""

import os
from collections.abc import Callable

import pytest
import torch


CUDA = torch.cuda.is_available()
REHEARSAL = os.environ.get("CONVLLAVA_GPU_REHEARSAL") == "1"
DEVICE = torch.device("cuda", 0) if CUDA else torch.device("cpu")
EXACT = torch.float64  # in which the noise of narrower formats is measured

needs_cuda = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")


def moved(inputs, device: torch.device = DEVICE, dtype: torch.dtype | None = None) -> dict:
    """Tensors of a batch on a device; floating-point ones in `dtype`."""
    return {
        name: one.to(device, dtype if one.is_floating_point() else None) if torch.is_tensor(one) else one
        for name, one in inputs.items()
    }


def deviation(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference as a part of the norm of what was expected."""
    assert found.shape == expected.shape
    found, expected = (one.detach().to("cpu", EXACT) for one in (found, expected))
    assert torch.isfinite(found).all()
    return float((found - expected).norm() / expected.norm())


def assert_within_noise(
    result: Callable[[torch.device, torch.dtype], torch.Tensor], dtype: torch.dtype, factor: float
):
    """The device is at most `factor` times as far from the exact result as the CPU is in the same dtype.

    Args:
        result: computes the same on a device in a dtype.
    """
    cpu = torch.device("cpu")
    exact = result(cpu, EXACT)
    noise = deviation(result(cpu, dtype), exact)
    assert 0 < deviation(result(DEVICE, dtype), exact) < factor * noise, noise
