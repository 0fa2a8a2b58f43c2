"""Where the vision tower's time goes: the kernels that take longest, and shares by kind, by torch's profiler.

    python benchmarks/gpu_jobs/profile_tower.py --out profile_tower.json --folder /tmp/somewhere

The paper's tower in bfloat16, eager, channels-last and by Triton's kernels, one image of 1536 pixels and 16 of 768.
Without a GPU, operations take the place of kernels.
"""

import re
import sys
from collections.abc import Iterable
from typing import Any

from job import Case, Context, main, show, table
from tower import BATCH, size_of


TOP = 15
CALLS = 3  # of the tower, within one profile
# The first kind whose pattern is in a kernel's name, in lower case. Depthwise convolutions come before products, whose
# words cuDNN's names have too; products before layouts, for theirs name the layout that they take.
KINDS = {
    "depthwise convolution": r"depthwise|dgrad2d_grouped|grouped_direct|dwconv|conv2d_c1_k1|mkldnn_convolution",
    "norm": r"layer_?norm|rowwise_?moments|_norm_kernel",
    "matrix products": r"gemm|nvjet|cutlass|xmma|addmm|::mm|matmul|linear|splitk|cublas|fprop",
    "copies and layouts": r"copy|nchw|nhwc|transpose|contiguous|clone|memcpy|memset|permute|cat_?array",
    "elementwise": r"elementwise|gelu|vectorized|aten::(add|mul)|triton_poi",
}
OTHER = "other"


def kind_of(name: str) -> str:
    """Which of `KINDS` a kernel is, by its name."""
    lower = name.lower()
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, lower)), OTHER)


def short_name(name: str) -> str:
    """A kernel's name without `void`, namespaces, template arguments' tails and parameters; 70 characters at most."""
    name = re.sub(r"^void ", "", name)
    for namespace in ("at::native::", "at::cuda::", "(anonymous namespace)::", "c10::"):
        name = name.replace(namespace, "")
    return name.replace("|", "/").split("(")[0][:70]


def summary(kernels: list[tuple[str, float, int]]) -> dict[str, Any]:
    """What is kept of a profile.

    Args:
        kernels: name, milliseconds in all, and number of calls of each kernel.
    """
    total = sum(ms for _, ms, _ in kernels)
    kinds: dict[str, float] = {}
    for name, ms, _ in kernels:
        kinds[kind_of(name)] = kinds.get(kind_of(name), 0.0) + ms
    longest = sorted(kernels, key=lambda kernel: -kernel[1])[:TOP]
    return {
        "total_ms": total,
        "kernel_calls": sum(calls for _, _, calls in kernels),
        "kinds": {kind: ms / total for kind, ms in sorted(kinds.items(), key=lambda item: -item[1])},
        "top": [
            {"name": short_name(name), "full": name[:400], "kind": kind_of(name), "ms": ms, "calls": calls}
            for name, ms, calls in longest
        ],
    }


def cases(context: Context) -> Iterable[Case]:
    for way in ("eager", "channels-last", *(["triton"] if context.device.type == "cuda" else [])):
        for label, batch in (("1536", 1), ("768", 2 if context.tiny else BATCH)):
            size = size_of(label, context.tiny)
            settings = {"way": way, "size": list(size), "batch": batch}
            yield Case(
                f"{way}, {label}, batch {batch}",
                lambda context, way=way, size=size, batch=batch: profile(way, size, batch, context),
                4,
                settings,
            )


def profile(way: str, size: tuple[int, int], batch: int, context: Context) -> dict[str, Any]:
    """The kernels of `CALLS` calls of the tower, per call."""
    import torch
    from torch.profiler import ProfilerActivity
    from tower_models import images, time_call, tower

    module = tower("ours", way, 0, context.tiny, context.device)
    pixels = images(size, batch, context.device)
    cuda = context.device.type == "cuda"
    with torch.inference_mode():
        ms, _, _ = time_call(lambda: module(pixels), context, most_ms=300)
        with torch.profiler.profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        ) as it:
            for _ in range(CALLS):
                module(pixels)
            if cuda:
                torch.cuda.synchronize()
    if cuda:
        events = [event for event in it.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
        kernels = [(event.key, event.self_device_time_total, event.count) for event in events]
    else:
        kernels = [(event.key, event.self_cpu_time_total, event.count) for event in it.key_averages()]
    kernels = [(name, us / 1000 / CALLS, count // CALLS) for name, us, count in kernels if us > 0]
    if not kernels:
        raise RuntimeError("The profiler saw no kernels.")
    return {"ms": ms, **summary(kernels)}


def tables(result: dict[str, Any]) -> str:
    """Markdown: shares by kind, then the longest kernels of each profile."""
    rows = result["cases"]
    kinds = [*KINDS, OTHER]
    columns = [
        ("tower", lambda row: row["way"]),
        ("height x width", lambda row: " x ".join(map(str, row["size"]))),
        ("batch", lambda row: str(row["batch"])),
        ("ms", lambda row: show(row["ms"], ".2f")),
        ("ms in kernels", lambda row: show(row["total_ms"], ".2f")),
        ("kernels", lambda row: str(row["kernel_calls"])),
    ]
    columns += [(kind, lambda row, kind=kind: show(row["kinds"].get(kind), ".1%")) for kind in kinds]
    return "\n\n".join([table(rows, columns), *(_longest(row) for row in rows if "top" in row)])


def _longest(row: dict[str, Any]) -> str:
    columns = [
        ("kernel", lambda kernel: f"`{kernel['name']}`"),
        ("kind", lambda kernel: kernel["kind"]),
        ("ms", lambda kernel: show(kernel["ms"], ".3f")),
        ("share", lambda kernel: show(kernel["ms"] / row["total_ms"], ".1%")),
        ("calls", lambda kernel: str(kernel["calls"])),
    ]
    return f"{row['name']}:\n\n" + table(row["top"], columns)


if __name__ == "__main__":
    sys.exit(main("profile_tower", cases, __doc__))
