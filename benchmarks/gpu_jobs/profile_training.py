"""Where a training step's time goes: the longest kernels, shares by kind, and how long the device has nothing to do.

Two steps of stage 3 with the 1.5B model at 768 pixels, in bfloat16 with bitsandbytes' 8-bit AdamW, after two that
warm up, under torch's profiler; its own cost to the host makes gaps a little longer than they are without it. Time is
counted from the first kernel to the end of the last. Without a GPU the operations of the CPU stand in for kernels, so
that the job can be tried.
"""

import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).parents[1]))

from job import Case, Context, main, table  # noqa: E402
from training_steps import WARM_UP, make_data, make_trainer  # noqa: E402


TOP = 15
PROFILED = 2  # steps
KINDS = (  # the first whose pattern is found in a kernel's name
    ("attention", r"flash|fmha|attention|cudnn_generated.*sdpa"),
    ("loss", r"^_forward_kernel|^_backward_kernel"),
    ("optimizer", r"kOptimizer|multi_tensor_apply|FusedAdam|adam|FusedOptimizer"),
    ("convolutions", r"conv|dgrad|wgrad|fprop|implicit"),
    ("matrix products", r"gemm|nvjet|cutlass|xmma|cublas|splitKreduce|(^|:)(addmm|mm|bmm|linear)"),
    ("norms", r"layer_norm|LayerNorm|rms_norm|GammaBeta"),
    ("copies", r"memcpy|memset|copy|CatArray"),
    ("reductions", r"reduce|softmax|sum|norm"),
    ("element-wise", r"elementwise|vectorized|gelu|silu|index|scatter|mul|add|fill"),
)


def cases(context: Context) -> list[Case]:
    settings = {
        "folder": str(context.folder),
        "model": "tiny" if context.tiny else "1.5b",
        "side": 128 if context.tiny else 768,
        "stage": "3",
        "batch": 4 if context.tiny else 32,
        "steps": PROFILED,
        "workers": 0 if context.tiny else 4,
        "checkpointing": True,
        "options": {"dtype": "bfloat16", "optim": "adamw_bnb_8bit"},
    }
    make_data(context.folder, (150, 210))
    shown = {key: settings[key] for key in ("model", "side", "stage", "batch", "options")}
    return [Case("stage 3", lambda context: _profile(settings), 20, shown)]


def _profile(settings: dict[str, Any]) -> dict[str, Any]:
    import torch
    from transformers import TrainerCallback

    cuda = torch.cuda.is_available()
    activity = torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU
    profiler = torch.profiler.profile(activities=[activity])

    class Profiling(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == WARM_UP:
                _synchronize(cuda)
                profiler.start()

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == WARM_UP + PROFILED:
                _synchronize(cuda)
                profiler.stop()

    make_trainer(settings, [Profiling()]).train()
    wanted = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    return summary(
        (event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == wanted and not getattr(event, "is_user_annotation", False)
    )


def _synchronize(cuda: bool) -> None:
    import torch

    if cuda:
        torch.cuda.synchronize()


def summary(kernels: Iterable[tuple[str, float, float]]) -> dict[str, Any]:
    """What there is to say of kernels: names, starts and ends in microseconds, of `PROFILED` steps.

    Returns:
        `wall` and `busy` milliseconds a step, `launches` a step, the longest `gap` in milliseconds, shares of the
        kernels' time by kind, and the `TOP` kernels by time.

    Raises:
        RuntimeError: there are none.
    """
    kernels = sorted(kernels, key=lambda kernel: kernel[1])
    if not kernels:
        raise RuntimeError("The profiler saw no kernels.")
    seconds: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    kinds: dict[str, float] = defaultdict(float)
    busy, longest, reached = 0.0, 0.0, kernels[0][1]
    for name, start, end in kernels:
        seconds[name] += end - start
        counts[name] += 1
        kinds[kind_of(name)] += end - start
        longest = max(longest, start - reached)
        busy += max(0.0, end - max(start, reached))  # kernels of two streams overlap
        reached = max(reached, end)
    total = sum(seconds.values()) or 1.0
    wall = reached - kernels[0][1]
    top = sorted(seconds, key=seconds.__getitem__, reverse=True)[:TOP]
    return {
        "wall": wall / 1000 / PROFILED,
        "busy": busy / 1000 / PROFILED,
        "busy share": busy / wall if wall else 0.0,
        "gap": longest / 1000,
        "launches": len(kernels) / PROFILED,
        "kinds": {kind: kinds[kind] / total for kind in sorted(kinds, key=kinds.__getitem__, reverse=True)},
        "kernels": [
            {
                "name": name[:160],
                "milliseconds": seconds[name] / 1000 / PROFILED,
                "share": seconds[name] / total,
                "calls": counts[name] / PROFILED,
                "kind": kind_of(name),
            }
            for name in top
        ],
    }


def kind_of(name: str) -> str:
    """What a kernel does, by its name."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, name, flags=re.I)), "other")


def tables(result: dict[str, Any]) -> str:
    """How busy the device is, shares by kind, and the longest kernels."""
    parts = []
    for row in result["cases"]:
        if "failed" in row:
            parts.append(f"{row['name']}: failed: {row['failed'].splitlines()[0][:100]}")
            continue
        kinds = ", ".join(f"{kind} {share:.0%}" for kind, share in row["kinds"].items())
        parts.append(
            f"{row['name']}, {row['model']}, {row['side']} pixels, batch {row['batch']}: {row['wall']:.0f} ms a step, "
            f"of which the device is busy {row['busy share']:.0%}; longest gap {row['gap']:.1f} ms; "
            f"{row['launches']:.0f} kernels. By kind: {kinds}."
        )
        columns = [
            ("kernel", lambda kernel: f"`{kernel['name'][:80].replace('|', ' ')}`"),
            ("kind", lambda kernel: kernel["kind"]),
            ("ms a step", lambda kernel: f"{kernel['milliseconds']:.2f}"),
            ("share", lambda kernel: f"{kernel['share']:.1%}"),
            ("calls", lambda kernel: f"{kernel['calls']:.0f}"),
        ]
        parts.append(table(row["kernels"], columns))
    return "\n\n".join(parts)


if __name__ == "__main__":
    sys.exit(main("profile_training", cases, __doc__))
