"""Speed and memory of a training step in the three stages, with and without gradient checkpointing.

    python benchmarks/train_step.py

Trains with the recipes' own settings, the script's trainer and its data loader on made-up images (JPEG, 1024 x 768)
and random weights, each combination in a process of its own. On a CPU the model is a small one of the same shape; with
CUDA it is the full-size tower with language models of 0.5 and 1.5 billion weights, computed in bfloat16, at 768, 1024
and 1536 pixels. The first steps are not counted. Prints Markdown tables for benchmarks/README.md.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from training_steps import IMAGES, ROOT, STAGES, make_data, measure


MODELS = ("small", "0.5b", "1.5b")  # of the language model; the larger two have the shapes of Qwen2.5's
LOADED = (768, 1024, 1536)  # pixels at which the data loader is measured alone


def main() -> int:
    import torch

    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["0.5b", "1.5b"] if cuda else ["small"])
    parser.add_argument("--resolutions", nargs="+", type=int, default=[768, 1024, 1536] if cuda else [384])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=["1", "2", "3"])
    parser.add_argument("--batch", type=int, default=8 if cuda else 4, help="samples of a step (%(default)s)")
    parser.add_argument("--words", type=int, default=60, help="of a sample's answer (%(default)s)")
    parser.add_argument("--steps", type=int, default=20 if cuda else 5, help="that are counted (%(default)s)")
    parser.add_argument("--workers", type=int, default=8 if cuda else 1, help="of the data loader (%(default)s)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(json.loads(arguments.child))))
        return 0
    with tempfile.TemporaryDirectory(prefix="train-step-") as folder:
        make_data(Path(folder), [arguments.words])
        shared = {name: getattr(arguments, name) for name in ("batch", "steps", "workers")} | {"folder": folder}
        rows = [
            run_child({**shared, "model": model, "side": side, "stage": stage, "checkpointing": checkpointing})
            for model in arguments.models
            for side in arguments.resolutions
            for stage in arguments.stages
            for checkpointing in (False, True)
        ]
        loader = run_child({"loader": True, "folder": folder})
    report(rows, loader, arguments)
    return 0


def run_child(settings: dict) -> dict:
    """This script in a fresh process, so that memory is its own."""
    command = [sys.executable, __file__, "--child", json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        if "OutOfMemoryError" in done.stderr:
            return {**settings, "failed": "out of memory"}
        sys.exit(f"{settings} failed:\n{done.stderr[-4000:]}")
    return {**json.loads(done.stdout.splitlines()[-1]), **settings}


def child(settings: dict) -> dict:
    if settings.get("loader"):
        return load_alone(settings)
    recipe = ROOT / "recipes" / "convllava-7b" / f"{STAGES[settings['stage']]}.yaml"
    return measure({**settings, "recipe": recipe})


def load_alone(settings: dict) -> dict:
    """Seconds that one process needs to read and prepare a sample, by resolution."""
    import torch
    from PIL import Image

    from convllava_hf import ConvLlavaProcessor

    torch.set_num_threads(1)  # as in a data loader's worker
    folder = Path(settings["folder"])
    processor = ConvLlavaProcessor.from_pretrained(folder / "golden").image_processor
    seconds = {}
    for side in LOADED:
        processor.size = {"height": side, "width": side}
        processor(Image.open(folder / "0.jpg"))
        start = time.perf_counter()
        for number in range(IMAGES):
            processor(processor.fetch_images(str(folder / f"{number}.jpg")), return_tensors="pt")
        seconds[side] = (time.perf_counter() - start) / IMAGES
    return {"seconds": seconds}


def report(rows: list[dict], loader: dict, arguments: argparse.Namespace) -> None:
    print(", ".join(machine()), end="\n\n")
    print(f"Batch {arguments.batch}, {arguments.workers} worker(s), {arguments.steps} steps counted.", end="\n\n")
    print("| model | px | stage | trains | checkpointing | samples/s | visual tokens/s | peak | waits for data |")
    print("|---|---:|---:|---:|---|---:|---:|---:|---:|")
    for row in rows:
        head = f"| {row['model']} | {row['side']} | {row['stage']} "
        kind = "yes" if row["checkpointing"] else "no"
        if "failed" in row:
            print(f"{head}| | {kind} | {row['failed']} | | | |")
            continue
        print(
            f"{head}| {row['trains'] / 1e6:.1f} of {row['weights'] / 1e6:.1f} M | {kind} | {row['samples']:.2f} | "
            f"{row['tokens']:.0f} | {row['peak'] / 2**30:.2f} GiB | {row['waits']:.1%} |"
        )
    print("\n| px | a sample in one process | samples/s of a worker |\n|---:|---:|---:|")
    for side, seconds in loader["seconds"].items():
        print(f"| {side} | {seconds * 1000:.0f} ms | {1 / seconds:.0f} |")


def machine() -> list[str]:
    import torch
    import transformers
    import trl

    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else names[0] if names else platform.processor()
    versions = [f"{module.__name__} {module.__version__}" for module in (torch, transformers, trl)]
    python = f"Python {platform.python_version()}"
    return [device, f"{os.cpu_count()} cores", platform.platform(terse=True), python, *versions]


if __name__ == "__main__":
    sys.exit(main())
