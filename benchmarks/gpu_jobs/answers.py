"""Whole models in bfloat16: seconds to the first token, what they are made of, and tokens a second after it.

    python benchmarks/gpu_jobs/answers.py --out answers.json --folder /tmp/somewhere

Ours at 768 and 1536 pixels square and at the native shape of an A4 page, and transformers' classes of LLaVA-1.5,
LLaVA-NeXT, FastVLM and Qwen2.5-VL, each with language models of the same two shapes, Qwen2.5-0.5B's and Vicuna-7B's. A
prompt has one image and 48 tokens of text. Nothing is read; SDPA attention, dynamic cache unless a row says static.
"""

import functools
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from job import Case, Context, main, show, table


TEXTS = ("0.5b", "7b")
NEW_TOKENS = 24
PAGE = (1792, 1280)  # an A4 page as the preset "large" sees it
# Kind of `speed_contenders`, name, and sizes; LLaVA-1.5 and LLaVA-NeXT have one size each, which the kind knows.
CONTENDERS = [
    ("ours", "ours", [(768, 768), (1536, 1536), PAGE]),
    ("llava", "LLaVA-1.5", [(336, 336)]),
    ("llava_next", "LLaVA-NeXT", [(672, 672)]),
    ("fast_vlm", "FastVLM", [(768, 768), (1024, 1024), (1536, 1536)]),
    ("qwen2_5_vl", "Qwen2.5-VL", [(768, 768), (1536, 1536)]),
]
# The parts of a prefill, by their names in the models; Qwen2.5-VL's projector is within its tower.
PARTS = {
    "tower": ("model.vision_tower", "model.visual"),
    "projector": ("model.multi_modal_projector", "model.visual.merger"),
    "language_model": ("model.language_model",),
}


def cases(context: Context) -> Iterable[Case]:
    """Dynamic caches first, for both language models; the compiled steps last."""
    texts = ("tiny",) if context.tiny else TEXTS
    for text in texts:
        build = 6 if text == "7b" else 3  # of the first size; the others find the model built
        for kind, name, sizes in CONTENDERS:
            for index, size in enumerate(sizes[:1] if context.tiny else sizes):
                yield answer_case(kind, name, text, size, context, seconds=3 + (0 if index else build))
        for size in ((768, 768),) if context.tiny else ((768, 768), (1536, 1536)):
            yield answer_case("ours", "ours", text, size, context, batch=8, seconds=4 + build)
    for text in texts:
        yield answer_case("ours", "ours", text, (768, 768), context, static=True, seconds=45)


def answer_case(
    kind: str,
    name: str,
    text: str,
    size: tuple[int, int],
    context: Context,
    batch: int = 1,
    static: bool = False,
    seconds: float = 5,
) -> Case:
    if context.tiny:
        batch, size = min(batch, 2), size if name.startswith("LLaVA") else (128, 128)
    label = f"{name}, {text}, {size[0]} x {size[1]}" + (f", batch {batch}" if batch > 1 else "")
    settings = {"model": name, "text": text, "size": list(size), "batch": batch, "cache": "dynamic"}
    if static:
        label, settings["cache"] = f"{label}, static cache", "static, compiled" if not context.tiny else "static"
    return Case(
        label,
        lambda context: measure(contender(kind, text, context.tiny, context.device), size, batch, static, context),
        seconds,
        settings,
    )


@functools.lru_cache(maxsize=1)  # the last one: the cases of one model follow one another
def contender(kind: str, text: str, tiny: bool, device):
    """A model of `speed_contenders` with random weights in bfloat16, made on the device: (model, prepare, seconds)."""
    sys.path.insert(0, str(Path(__file__).parent.parent))
    import torch
    from speed_contenders import KINDS

    started = time.perf_counter()
    built = KINDS[kind]({"text": text, "tiny": tiny, "new_tokens": NEW_TOKENS}, device, torch.bfloat16)
    _synchronize(device)
    return built.model, built.prepare, time.perf_counter() - started


def measure(built, size: tuple[int, int], batch: int, static: bool, context: Context) -> dict[str, Any]:
    """One row; all times are medians, by the clock, after the device is done."""
    import torch
    from speed_contenders import IMAGE

    from convllava_hf.profiling.generation import answer

    model, prepare, seconds = built
    new_tokens, repeats = (3, 1) if context.tiny else (NEW_TOKENS, 3)
    inputs = prepare({"size": size})
    visual = int((inputs["input_ids"] == IMAGE).sum())
    if batch > 1:
        inputs = {name: tensor.repeat(batch, *[1] * (tensor.ndim - 1)) for name, tensor in inputs.items()}
    cuda = context.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    how = {**inputs, "cache_implementation": "static"} if static else inputs
    started = time.perf_counter()
    for _ in range(2 if static else 1):  # a compiled step is recorded in its second run
        answer(model, how, 1 + new_tokens)
    warm_up = time.perf_counter() - started
    firsts = [answer(model, how, 1)[0] for _ in range(repeats)] if not static else []
    taken = [answer(model, how, 1 + new_tokens) for _ in range(repeats)]
    most = torch.cuda.max_memory_allocated() if cuda else None
    return {
        "visual_tokens": visual,
        "prompt_tokens": inputs["input_ids"].shape[1],
        "first_token_s": statistics.median([*firsts, *(first for first, _ in taken)]),
        "tokens_per_s": batch * statistics.median(rate for _, rate in taken),
        **prefill_parts(model, inputs, repeats),
        "weights": sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()),
        "peak": most,
        "build_s": seconds,
        "warm_up_s": warm_up,
    }


def prefill_parts(model, inputs, repeats: int) -> dict[str, float]:
    """Milliseconds of a forward pass over the prompt, and of its tower, projector and language model.

    Raises:
        RuntimeError: logits are not finite, or a part is missing.
    """
    import torch

    device = inputs["input_ids"].device
    clocks, handles = {}, []
    modules = dict(model.named_modules())
    for part, names in PARTS.items():
        found = next((modules[name] for name in names if name in modules), None)
        if found is None:
            raise RuntimeError(f"{type(model).__name__} has none of {', '.join(names)}, which would be its {part}.")
        clocks[part] = []
        handles.append(found.register_forward_pre_hook(lambda *_, part=part: clocks[part].append(_mark(device))))
        handles.append(found.register_forward_hook(lambda *_, part=part: clocks[part].append(_mark(device))))
    rows = []
    try:
        with torch.inference_mode():
            for _ in range(1 + repeats):
                for marks in clocks.values():
                    marks.clear()
                begin = _mark(device)
                logits = model(**inputs, logits_to_keep=1).logits
                end = _mark(device)
                _synchronize(device)
                rows.append({"prefill_ms": _between(begin, end)})
                rows[-1].update({f"{part}_ms": _between(*marks) for part, marks in clocks.items()})
                if "model.visual" in modules:
                    rows[-1]["tower_ms"] -= rows[-1]["projector_ms"]
    finally:
        for handle in handles:
            handle.remove()
    if not torch.isfinite(logits).all():
        raise RuntimeError(f"The logits of {type(model).__name__} are not finite.")
    return {name: statistics.median(row[name] for row in rows[1:]) for name in rows[0]}


def _mark(device):
    """A point in the device's work on a GPU, a time elsewhere."""
    import torch

    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(begin, end) -> float:
    """Milliseconds."""
    return (end - begin) * 1000 if isinstance(begin, float) else begin.elapsed_time(end)


def _synchronize(device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def tables(result: dict[str, Any]) -> str:
    """Markdown: one table for each language model."""
    texts = list(dict.fromkeys(row["text"] for row in result["cases"]))
    return "\n\n".join(
        f"A language model of {text}:\n\n" + table([row for row in result["cases"] if row["text"] == text], COLUMNS)
        for text in texts
    )


def _milliseconds(name: str):
    return lambda row: show(row[name], ".1f")


COLUMNS = [
    ("model", lambda row: row["model"] + ("" if row["cache"] == "dynamic" else f", {row['cache']} cache")),
    ("height x width", lambda row: " x ".join(map(str, row["size"]))),
    ("batch", lambda row: str(row["batch"])),
    ("visual tokens", lambda row: str(row["visual_tokens"])),
    ("first token, ms", lambda row: show(row["first_token_s"] * 1000, ".1f")),
    ("prefill, ms", _milliseconds("prefill_ms")),
    ("tower", _milliseconds("tower_ms")),
    ("projector", _milliseconds("projector_ms")),
    ("language model", _milliseconds("language_model_ms")),
    ("tokens/s", lambda row: show(row["tokens_per_s"], ".1f")),
    ("weights", lambda row: show(row["weights"] / 2**30, ".2f", " GiB")),
    ("peak", lambda row: show(row["peak"] and row["peak"] / 2**30, ".2f", " GiB")),
    ("warm-up", lambda row: show(row["warm_up_s"], ".1f", " s")),
]


if __name__ == "__main__":
    sys.exit(main("answers", cases, __doc__))
