"""Clocks, peaks of memory, and counts of operations."""

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def synchronize(device: torch.device) -> None:
    """Waits until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def clocked(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds that one call takes, the device's work included."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def seconds_of(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median of `repeats` calls after one that is not counted."""
    call()
    return statistics.median(clocked(call, device) for _ in range(repeats))


def interleaved(calls: Mapping[str, Callable[[], Any]], device: torch.device, repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, `repeats` times, in turns: what else the machine does meets all of them alike."""
    for call in calls.values():
        call()  # not counted: memory is taken, kernels are chosen
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            seconds[name].append(clocked(call, device))
    return seconds


def reset_peak(device: torch.device) -> None:
    """Count the peak of memory from here on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif (clear := Path("/proc/self/clear_refs")).exists():
        clear.write_text("5")


def peak(device: torch.device) -> int | None:
    """Bytes at most since `reset_peak`: of tensors on a GPU, of the whole process on Linux; `None` elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM")


def resident(device: torch.device) -> int | None:
    """Bytes now, counted as `peak` counts them."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _status("VmRSS")


def _status(key: str) -> int | None:
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def operations(make: Callable[[], nn.Module], *shapes: tuple[int, ...]) -> int:
    """Floating-point operations of a forward pass over tensors of these shapes: two for a multiply-add.

    Counted by torch from the shapes of products and convolutions, on a module that `make` builds without storage;
    activations, norms and sums are left out.
    """
    with torch.device("meta"):
        empty = make().eval()
        inputs = [torch.empty(shape) for shape in shapes]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        empty(*inputs)
    return counter.get_total_flops()
