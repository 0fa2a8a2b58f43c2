"""The machine and its limits, to compare measurements with: multiplying matrices and moving memory."""

import os
import platform
from collections.abc import Callable
from typing import Any

import torch

from ..utils.environment import cpu_name, versions_of
from .measuring import seconds_of


_PACKAGES = ("torch", "transformers", "convllava-hf", "timm", "torchao", "bitsandbytes", "pillow")
# (rows, in, out) of a product whose shape is that of the tower's fourth stage at 1536 pixels. A GPU takes a larger one
# to show what it can do.
_PRODUCT = {"cpu": (2304, 1536, 6144), "cuda": (8192, 8192, 8192)}
_COPIED = {"cpu": 256 * 2**20, "cuda": 2**30}  # bytes, beyond what caches hold


def describe(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What a table must say about where it was measured."""
    versions = versions_of(_PACKAGES)
    return {
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
        "system": platform.platform(terse=True),
        "python": versions.pop("python"),
        "dtype": str(dtype).removeprefix("torch."),
        "versions": versions,
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
    }


def in_words(machine: dict[str, Any]) -> str:
    """The same in one line, for under a table."""
    versions = ", ".join(f"{name} {found}" for name, found in machine["versions"].items())
    load = "" if machine["load"] is None else f" Load average before: {machine['load']}."
    return (
        f"{machine['device']}, {machine['threads']} threads, {machine['system']}, Python {machine['python']}, "
        f"{versions}; {machine['dtype']}.{load}"
    )


def product(device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], Any], float]:
    """A large matrix product to time, and its floating-point operations."""
    rows, inner, outer = _PRODUCT["cpu" if device.type == "cpu" else "cuda"]
    left = torch.randn(rows, inner, device=device).to(dtype)
    right = torch.randn(outer, inner, device=device).to(dtype)
    return lambda: torch.nn.functional.linear(left, right), 2.0 * rows * inner * outer


def copying(device: torch.device) -> tuple[Callable[[], Any], float]:
    """A copy to time, and the bytes that it reads and writes."""
    size = _COPIED["cpu" if device.type == "cpu" else "cuda"]
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2.0 * size


def matrix_rate(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> float:
    """Floating-point operations a second of a large matrix product: the median of `repeats`."""
    call, operations = product(device, dtype)
    return operations / seconds_of(call, device, repeats)


def copy_bandwidth(device: torch.device, repeats: int = 5) -> float:
    """Bytes a second, read and written, of a copy within the device's memory: the median of `repeats`."""
    call, moved = copying(device)
    return moved / seconds_of(call, device, repeats)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
