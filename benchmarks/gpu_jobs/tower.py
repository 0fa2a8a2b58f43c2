"""The vision tower in bfloat16: milliseconds, share of the measured matrix rate, memory, change in features.

    python benchmarks/gpu_jobs/tower.py --out tower.json --folder /tmp/somewhere

The paper's five stages, run in each of the package's ways and some of this script, at 768, 1024 and 1536 pixels square
and at the native shape of an A4 page, in batches of 1 and 16; CLIP ViT-L/14, SigLIP so400m and FastViT at their own
resolutions and the same pixels. Then where an eager block's time goes, and what padding images to a few shapes costs.
"""

import sys
from collections.abc import Iterable
from typing import Any

from buckets import RAW_IMAGES, area, bucket_of, make_buckets, padding_added
from job import Case, Context, main, milliseconds, show, table


A4 = (3508, 2480)  # at 300 dots an inch
SQUARES = {"336": 336, "384": 384, "768": 768, "1024": 1024, "1536": 1536}
TINY_SQUARES = {"336": 28, "384": 42, "768": 64, "1024": 128, "1536": 192}
OURS = ("768", "1024", "1536", "A4")
BATCH = 16
BUCKETS = 6


def native_sizes(tiny: bool):
    """How the preset "large" sees images, the area of 1536 x 1536 at most; in a rehearsal that of 192 x 192."""
    from convllava_hf.modeling.configuration_convllava import PRESETS, ImageSizing

    return ImageSizing("native", 192, 64) if tiny else ImageSizing("native", 1536, 64, max_pixels=PRESETS["large"])


def size_of(label: str, tiny: bool) -> tuple[int, int]:
    if label == "A4":
        return native_sizes(tiny).seen(*A4)
    side = (TINY_SQUARES if tiny else SQUARES)[label]
    return side, side


def cases(context: Context) -> Iterable[Case]:
    """Eager work first, then what has to be compiled, the dearest last."""
    cuda = context.device.type == "cuda"
    batch = 2 if context.tiny else BATCH
    ours = ("768", "A4") if context.tiny else OURS
    for way in ("eager", "channels-last"):
        yield from (tower_case("ours", way, label, context, 1) for label in ours)
        yield from (tower_case("ours", way, label, context, batch, 4) for label in ours)
    if cuda:  # compiling for each number of channels, and trying configurations, comes with the first
        for way in ("triton", "triton-graphs"):
            seconds = 40 if way == "triton" else 5
            yield from (
                tower_case("ours", way, label, context, 1, seconds if label == OURS[0] else 2) for label in OURS
            )
            yield from (tower_case("ours", way, label, context, batch, 4) for label in OURS)
    for kind, label, many in [
        ("CLIP ViT-L/14", "336", True),
        ("CLIP ViT-L/14", "768", True),
        ("CLIP ViT-L/14", "1536", False),
        ("SigLIP so400m", "384", True),
        ("SigLIP so400m", "768", True),
        ("SigLIP so400m", "1536", False),
        ("FastViT mci3", "768", True),
        ("FastViT mci3", "1024", False),
        ("FastViT mci3", "1536", True),
        ("FastViT mci3", "A4", False),
    ]:
        if not context.tiny or label == "768":
            yield from (tower_case(kind, "eager", label, context, count) for count in ([1, batch] if many else [1]))
    yield Case("parts of a block", parts, 3)
    for label in ("768", "1536"):
        yield tower_case("ours", "channels-last", label, context, 1, benchmark=True)
        if cuda:
            yield tower_case("ours", "channels-last", label, context, 1, graph=True)
    for label, count in [("1536", 1), ("768", batch), ("A4", 1), ("768", 1)]:
        yield tower_case("ours", "blocks compiled", label, context, count, 8)
        if cuda and count == 1:
            yield tower_case("ours", "blocks compiled", label, context, count, 3, graph=True)
    for label in ("1536", "A4", "768"):
        yield tower_case("ours", "blocks dynamic", label, context, 1, 10 if label == "1536" else 3)
    yield Case("buckets, blocks dynamic", buckets_case("blocks dynamic", in_buckets=False), 8)
    yield Case("buckets, eager", buckets_case("eager", in_buckets=False), 30)
    if cuda:  # the package's own compilations for a CPU take too long for a rehearsal
        for way in ("compiled", "cuda-graphs"):
            for label, count in [("1536", 1), ("768", batch), ("A4", 1)]:
                yield tower_case("ours", way, label, context, count, 25)
    yield Case("buckets, blocks compiled", buckets_case("blocks compiled", in_buckets=True), 30)
    yield from (tower_case("ours", "stages dynamic", label, context, 1, 40) for label in ("1536", "A4"))
    if not context.tiny:
        yield tower_case("ours", "stages autotuned", "1536", context, 1, 60)


def tower_case(
    kind: str,
    way: str,
    label: str,
    context: Context,
    batch: int,
    seconds: float = 2,
    graph: bool = False,
    benchmark: bool = False,
) -> Case:
    """A row of the first table; `benchmark`: with `torch.backends.cudnn.benchmark`."""
    size = size_of(label, context.tiny)

    def measure_it(context: Context) -> dict[str, Any]:
        import torch
        from tower_models import measure

        torch.backends.cudnn.benchmark = benchmark
        try:
            return measure(kind, way, size, batch, context, graph)
        finally:
            torch.backends.cudnn.benchmark = False

    way_in_words = way + (", one graph" if graph else "") + (", cudnn.benchmark" if benchmark else "")
    settings = {"kind": kind, "way": way_in_words, "size": list(size), "label": label, "batch": batch}
    return Case(f"{kind}, {way_in_words}, {label}, batch {batch}", measure_it, seconds, settings)


def parts(context: Context) -> dict[str, Any]:
    """What each operation of a block takes in every stage at 1536 pixels, in both layouts."""
    import torch
    from tower_models import DTYPE

    from convllava_hf.profiling.models import tower_config

    side, rows = size_of("1536", context.tiny)[0] // 4, []
    with torch.inference_mode():
        for index, channels in enumerate(tower_config(context.tiny).hidden_sizes):
            contiguous = torch.randn(1, channels, side >> index, side >> index, device=context.device, dtype=DTYPE)
            rows.append(
                {"stage": index + 1, "channels": channels, "side": side >> index, **_block(contiguous, context)}
            )
    return {"parts": rows}


def _block(contiguous, context: Context) -> dict[str, float]:
    """Milliseconds of a block's operations on features (1, C, H, W)."""
    import torch
    from torch.nn import functional

    def like(*shape):
        return torch.randn(*shape, device=contiguous.device, dtype=contiguous.dtype) * 0.02

    channels = contiguous.shape[1]
    kernel, bias, scale = like(channels, 1, 7, 7), like(channels), like(channels)
    first, second, first_bias = like(4 * channels, channels), like(channels, 4 * channels), like(4 * channels)
    last = contiguous.contiguous(memory_format=torch.channels_last)
    rows = last.permute(0, 2, 3, 1)  # (N, H, W, C), contiguous
    wide = functional.linear(rows, first)

    def convolution(features):
        weight = kernel if features is contiguous else kernel.contiguous(memory_format=torch.channels_last)
        return lambda: functional.conv2d(features, weight, bias, padding=3, groups=channels)

    def norm(features):
        return lambda: functional.layer_norm(features.permute(0, 2, 3, 1), (channels,), scale, bias)

    def end(features):
        return lambda: features + (scale * rows).permute(0, 3, 1, 2)

    calls = {
        "convolution, contiguous": convolution(contiguous),
        "convolution, channels-last": convolution(last),
        "norm, contiguous": norm(contiguous),
        "norm, channels-last": norm(last),
        "first product": lambda: functional.linear(rows, first, first_bias),
        "GELU": lambda: functional.gelu(wide),
        "second product": lambda: functional.linear(wide, second, bias),
        "scale and residual, contiguous": end(contiguous),
        "scale and residual, channels-last": end(last),
    }
    if contiguous.is_cuda:
        calls |= _triton_calls(rows, wide, kernel, bias, scale)
    figures = {name: milliseconds(call, context, repeats=10) for name, call in calls.items()}
    torch.backends.cudnn.benchmark = True
    try:
        for name in ("convolution, contiguous", "convolution, channels-last"):
            figures[f"{name}, cudnn.benchmark"] = milliseconds(calls[name], context, repeats=10)
    finally:
        torch.backends.cudnn.benchmark = False
    return figures


def _triton_calls(rows, wide, kernel, bias, scale) -> dict[str, Any]:
    """The operations of the tower "triton", on features (N, H, W, C) and the first product's (N, H, W, 4*C)."""
    import torch
    from torch import nn

    from convllava_hf.inference.triton_convnext import depthwise, gelu_, layer_norm, layer_norm_patches

    count, height, width, channels = rows.shape
    sizes = torch.tensor([[height, width]] * count, dtype=torch.int32, device=rows.device)
    taps = kernel.float().flatten(1).t().contiguous()
    norm = nn.LayerNorm(channels, device=rows.device, dtype=rows.dtype)
    # What works in place gets a copy: others read these features, too.
    normed, activated = rows.clone(), wide.clone()
    second = torch.randn(channels, 4 * channels, device=rows.device, dtype=rows.dtype).mul_(0.02).t()
    residual, factors = rows.reshape(-1, channels).clone(), wide.reshape(-1, 4 * channels)
    return {
        "convolution and bias of the residual, triton": lambda: depthwise(rows, taps, bias, scale, sizes, 1),
        "norm, triton": lambda: layer_norm(normed, norm),
        "norm to patches of 2 x 2, triton": lambda: layer_norm_patches(rows, norm),
        "GELU, triton": lambda: gelu_(activated),
        "second product onto the residual": lambda: residual.addmm_(factors, second),
    }


def buckets_case(way: str, in_buckets: bool):
    """Milliseconds that an image of the mix takes: in its own shape, and padded to the smallest bucket that holds it.

    Args:
        in_buckets: only the buckets' shapes, for a way that must compile each one.
    """

    def measure_them(context: Context) -> dict[str, Any]:
        import torch
        from tower_models import images, time_call, tower

        counts = native_counts(context.tiny)
        buckets = make_buckets(counts, 2 if context.tiny else BUCKETS)
        module = tower("ours", way, 0, context.tiny, context.device)
        first_calls = 0.0

        def ms_of(size, covered):
            """Covered: height and width of the image within `size`; what is less gets a mask."""
            nonlocal first_calls
            pixels = images(size, 1, context.device)
            ms, first, _ = time_call(lambda: module(pixels, image_sizes=[covered]), context, most_ms=150)
            first_calls += first
            return ms

        with torch.inference_mode():
            padded = {bucket: ms_of(bucket, (bucket[0] - 64, bucket[1])) for bucket in buckets}
            own = {} if in_buckets else {size: ms_of(size, size) for size in counts}
        return {
            "way": way,
            "buckets": [list(bucket) for bucket in buckets],
            "padding_added": {
                str(number): padding_added(counts, make_buckets(counts, number)) for number in (1, 2, 4, 6, 8, 12)
            },
            "shapes": len(counts),
            "ms_own_shape": mean(counts, own) if own else None,
            "ms_in_buckets": mean(counts, {size: padded[bucket_of(size, buckets)] for size in counts}),
            "first_calls_s": first_calls,
            "ms_of_buckets": [padded[bucket] for bucket in buckets],
        }

    return measure_them


def native_counts(tiny: bool) -> dict[tuple[int, int], int]:
    """How often the tower sees each shape in the mix of images."""
    sizes, counts = native_sizes(tiny), {}
    for raw, count in list(RAW_IMAGES.items())[: 4 if tiny else None]:
        seen = sizes.seen(*raw)
        counts[seen] = counts.get(seen, 0) + count
    return dict(sorted(counts.items(), key=lambda item: area(item[0])))


def mean(counts: dict, values: dict) -> float:
    """Of the values by size, weighted by how often each size comes."""
    return sum(counts[size] * values[size] for size in counts) / sum(counts.values())


def tables(result: dict[str, Any]) -> str:
    """Markdown: towers, the parts of a block, buckets."""
    rows = result["cases"]
    towers = [row for row in rows if "kind" in row]
    blocks = [row for row in rows if row["name"].startswith("parts")]
    padded = [row for row in rows if row["name"].startswith("buckets")]
    texts = []
    if towers:
        texts.append(table(towers, TOWER_COLUMNS))
    for row in blocks:
        texts.append("Milliseconds of a block's operations, eager, one image of 1536 pixels:\n\n" + _parts_table(row))
    if padded:
        texts.append(
            "Milliseconds of an image, on the mean over a mix of shapes: each in its own, and each padded to the "
            "smallest bucket that holds it, with the mask that this takes.\n\n" + table(padded, BUCKET_COLUMNS)
        )
        texts += [_padding(row) for row in padded if "padding_added" in row][:1]
    return "\n\n".join(texts)


def _gib(value: float | None) -> str:
    return show(value and value / 2**30, ".2f", " GiB")


TOWER_COLUMNS = [
    ("tower", lambda row: f"{row['kind']}, {row['way']}"),
    ("height x width", lambda row: " x ".join(map(str, row["size"]))),
    ("batch", lambda row: str(row["batch"])),
    ("ms", lambda row: show(row["ms"], ".2f")),
    ("images/s", lambda row: show(row["images_per_s"], ".1f")),
    ("TFLOP", lambda row: show(row["tflop"], ".2f")),
    ("share of matrix rate", lambda row: show(row["share"], ".1%")),
    ("weights", lambda row: _gib(row["weights"])),
    ("activations at peak", lambda row: _gib(row["activations"])),
    ("change to float32", lambda row: show(row.get("change"), ".1e")),
    ("first call", lambda row: show(row["first_call_s"], ".1f", " s")),
]
BUCKET_COLUMNS = [
    ("way", lambda row: row["way"]),
    ("shapes", lambda row: str(row["shapes"])),
    ("ms, own shape", lambda row: show(row["ms_own_shape"], ".2f")),
    ("buckets", lambda row: str(len(row["buckets"]))),
    ("ms, in buckets", lambda row: show(row["ms_in_buckets"], ".2f")),
    ("first calls of all shapes", lambda row: show(row["first_calls_s"], ".1f", " s")),
]


def _parts_table(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"failed: {row['failed']}"
    stages = row["parts"]
    names = [name for name in stages[0] if name not in ("stage", "channels", "side")]
    titles = [f"{stage['channels']} x {stage['side']} x {stage['side']}" for stage in stages]
    lines = [{"name": name, "ms": [stage[name] for stage in stages]} for name in names]
    columns = [("operation", lambda line: line["name"])]
    columns += [
        (title, lambda line, index=index: show(line["ms"][index], ".3f")) for index, title in enumerate(titles)
    ]
    return table(lines, columns)


def _padding(row: dict[str, Any]) -> str:
    shares = ", ".join(f"{number}: {share:.0%}" for number, share in row["padding_added"].items())
    return f"Pixels that padding adds, by the number of buckets: {shares}."


if __name__ == "__main__":
    sys.exit(main("tower", cases, __doc__))
