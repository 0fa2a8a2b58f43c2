"""Training steps at true shapes: samples a second, share of peak, memory, and how long a step waits for data.

Each case trains with a recipe's settings, the project's trainer, collator and data loader, two steps to warm up and
five that are counted; the model has random weights that are drawn on the device. Answers are made up, of 150 to 210
words, so that a sample has about 200 tokens of text, which is what we take LLaVA's mix of 665 thousand to have;
batches are sorted by length as the recipes have it, and padding is not counted.

The share of peak is model FLOPs (`step_flops.py` has the formula: what a step must compute, without what checkpointing
computes twice) a second, waiting for data included, by the rate of a large bfloat16 product measured in this run and
by the data sheet's 989 TFLOP/s of an H100 SXM and an H200. Seven steps are fewer than what the loader prepares ahead,
so what it can do for long is measured in cases of their own, without a model.

The original took 5 hours for the 665 thousand samples of stage 3 at 768 pixels with 7 B on 8 A800: 4.6 samples a
second and GPU. Goals are 1.5 times that, and 45 % of peak.

Cases name how they differ from the recipe: `bf16` is weights in bfloat16 with bitsandbytes' 8-bit AdamW, `fp32` is
weights in float32 with AdamW, both under autocast as the recipes have it; `pure bf16` is without autocast, `kept`
keeps all activations where the recipe checkpoints them, and `torchao` has the 8-bit AdamW of the 1.5B recipe. Where
memory is short the batch is halved once, and the row says so.
"""

import os
import shutil
import sys
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).parents[1]))

from job import Case, Context, free_memory, main, show, table  # noqa: E402
from training_steps import make_data, measure, measure_loader  # noqa: E402


ORIGINAL = 665_000 / (5 * 3600) / 8  # samples a second and GPU, of stage 3 at 768 pixels with 7 B
GOALS = {"samples": 1.5 * ORIGINAL, "share": 0.45}
DATA_SHEET = 989e12  # dense bfloat16 FLOP/s of an H100 SXM and of an H200
WORDS = (150, 165, 180, 195, 210)  # of the answers
EIGHT_BITS = {"dtype": "bfloat16", "optim": "adamw_bnb_8bit"}
MASTER = {"dtype": "float32", "optim": "adamw_torch_fused"}
TORCHAO = {"dtype": "bfloat16", "optim": "adamw_torch_8bit", "optim_args": "bf16_stochastic_round=True"}
# Name, model, pixels, stage, batch, options over the recipe, checkpointing, seconds on an H100 (an estimate).
CASES = (
    ("7b 768 stage 3 bf16", "7b", 768, "3", 16, EIGHT_BITS, True, 16),
    ("7b 768 stage 3 bf16 kept", "7b", 768, "3", 8, EIGHT_BITS, False, 11),
    ("1.5b 768 stage 3 bf16", "1.5b", 768, "3", 32, EIGHT_BITS, True, 9),
    ("1.5b 768 stage 2 bf16", "1.5b", 768, "2", 32, EIGHT_BITS, True, 12),
    ("1.5b 768 stage 1 fp32", "1.5b", 768, "1", 32, {}, True, 10),
    ("1.5b 768 stage 3 fp32", "1.5b", 768, "3", 32, MASTER, True, 10),
    ("1.5b 768 stage 3 pure bf16", "1.5b", 768, "3", 32, {**EIGHT_BITS, "bf16": False}, True, 9),
    ("7b 768 lora", "7b", 768, "lora", 16, {}, True, 14),
    ("7b 768 stage 1 fp32", "7b", 768, "1", 16, {}, True, 16),
    ("loader 768", "tiny", 768, "3", 8, {}, True, 6),
    ("0.5b 768 stage 3 bf16", "0.5b", 768, "3", 32, EIGHT_BITS, True, 7),
    ("0.5b 768 stage 2 bf16", "0.5b", 768, "2", 32, EIGHT_BITS, True, 10),
    ("0.5b 768 stage 1 fp32", "0.5b", 768, "1", 32, {}, True, 8),
    ("7b 1536 stage 3 bf16", "7b", 1536, "3", 8, EIGHT_BITS, True, 18),
    ("1.5b 1536 stage 3 bf16", "1.5b", 1536, "3", 16, EIGHT_BITS, True, 12),
    ("1.5b 1536 stage 2 bf16", "1.5b", 1536, "2", 16, EIGHT_BITS, True, 20),
    ("loader 1536", "tiny", 1536, "3", 8, {}, True, 10),
    ("1.5b 768 stage 3 bf16 kept", "1.5b", 768, "3", 32, EIGHT_BITS, False, 9),
    ("7b 1536 lora", "7b", 1536, "lora", 8, {}, True, 18),
    ("7b 1536 stage 1 fp32", "7b", 1536, "1", 8, {}, True, 20),
    ("1.5b 768 stage 3 bf16 torchao", "1.5b", 768, "3", 32, TORCHAO, True, 45),
)
TINY = (
    ("tiny 128 stage 3 bf16", "tiny", 128, "3", 4, {**EIGHT_BITS, "bf16": True}, True, 1),
    ("tiny 128 stage 1 fp32 kept", "tiny", 128, "1", 4, {}, False, 1),
    ("tiny 128 lora", "tiny", 128, "lora", 4, {"bf16": True}, True, 1),
    ("loader 128", "tiny", 128, "3", 4, {}, True, 1),
)


def cases(context: Context):
    import torch

    from convllava_hf.profiling.machine import matrix_rate

    make_data(context.folder, WORDS)
    rate = matrix_rate(context.device, torch.float32 if context.tiny else torch.bfloat16)
    for name, model, side, stage, batch, options, checkpointing, seconds in TINY if context.tiny else CASES:
        settings = {
            "folder": str(context.folder),
            "model": model,
            "side": side,
            "stage": stage,
            "batch": batch,
            "steps": 2 if context.tiny else 5,
            "checkpointing": checkpointing,
            "options": options,
        }
        shown = {key: settings[key] for key in ("model", "side", "stage", "options")}
        if name.startswith("loader"):
            yield Case(name, lambda context, settings=settings: _loaded(settings), seconds, {"side": side})
        else:
            yield Case(name, lambda context, settings=settings: _measured(settings, rate), seconds, shown)


def _measured(settings: dict[str, Any], rate: float) -> dict[str, Any]:
    """The figures of a case, with half the batch if the whole one does not fit."""
    figures = _try(settings)
    halved = figures is None
    if halved:
        free_memory()
        settings = {**settings, "batch": settings["batch"] // 2}
        if (figures := _try(settings)) is None:
            raise MemoryError(f"Neither {2 * settings['batch']} samples nor half of them fit.")
    return {
        **figures,
        "batch": settings["batch"],
        "halved": halved,
        "matrix rate": rate,
        "share": figures["flops"] / rate,
        "share of data sheet": figures["flops"] / DATA_SHEET,
    }


def _loaded(settings: dict[str, Any]) -> dict[str, Any]:
    workers = loader_workers(settings["batch"], settings["side"])
    return {"loaded": measure_loader({**settings, "workers": workers}), "workers": workers}


def _try(settings: dict[str, Any]) -> dict[str, Any] | None:
    """The figures, `None` where the device's memory is too small. The error is let go here, for it holds the model."""
    import torch

    workers = loader_workers(settings["batch"], settings["side"])
    try:
        return {**measure({**settings, "workers": workers}), "workers": workers}
    except torch.OutOfMemoryError:
        return None


def loader_workers(batch: int, side: int) -> int:
    """The recipes' 8 processes, fewer where cores or the memory that they hand batches over in are short.

    A batch is handed over in shared memory, where each worker has two ready; a full one would end them.
    """
    workers = min(8, (os.cpu_count() or 1) - 1)
    shared = Path("/dev/shm")
    if shared.is_dir():
        workers = min(workers, int(shutil.disk_usage(shared).free // (3 * batch * 3 * side * side * 4)))
    return max(0, workers)


def tables(result: dict[str, Any]) -> str:
    """What a step reaches in each case, and beside it what it was to reach."""
    columns = [
        ("case", lambda row: row["name"]),
        ("trains", lambda row: f"{row['trains'] / 1e6:,.0f} of {row['weights'] / 1e6:,.0f} M"),
        ("batch", lambda row: f"{row['batch']}{' (halved)' if row['halved'] else ''}"),
        ("checkpointing", lambda row: "yes" if row["checkpointing"] else "no"),
        ("tokens", lambda row: show(row["length"], ".0f")),
        ("samples/s", lambda row: show(row["samples"], ".2f")),
        ("TFLOP/s", lambda row: show(row["flops"] / 1e12, ".0f")),
        ("of measured peak", lambda row: show(row["share"], ".1%")),
        ("of data sheet", lambda row: show(row["share of data sheet"], ".1%")),
        ("peak memory", lambda row: show(row["peak"] / 2**30, ".1f", " GiB")),
        ("waits for data", lambda row: show(row["waits"], ".1%")),
    ]
    loaders = [row for row in result["cases"] if row["name"].startswith("loader")]
    parts = [table([row for row in result["cases"] if row not in loaders], columns)]
    for row in loaders:
        if "failed" not in row:
            parts.append(f"{row['name']}: {row['loaded']:.0f} samples/s from {row['workers']} processes.")
    anchors = [row for row in result["cases"] if row["name"].startswith("7b 768 stage 3") and "failed" not in row]
    for row in anchors:
        reached = row["samples"] / ORIGINAL
        parts.append(
            f"{row['name']}: {row['samples']:.1f} samples/s, {reached:.2f} times the original's {ORIGINAL:.1f} a GPU "
            f"(8 A800); goal {GOALS['samples'] / ORIGINAL:.1f} times. {row['share']:.0%} of the measured peak; goal "
            f"{GOALS['share']:.0%}."
        )
    return "\n\n".join(parts)


if __name__ == "__main__":
    sys.exit(main("training", cases, __doc__))
