"""Speed and memory of a training step in the three stages, with and without gradient checkpointing.

    python benchmarks/train_step.py

Trains with the recipes' own settings, the script's trainer and its data loader on made-up pictures (JPEG, 1024 x 768)
and random weights, each combination in a process of its own. On a CPU the model is a small one of the same shape; with
CUDA it is the full-size tower with language models of 0.5 and 1.5 billion weights, in bfloat16, at 768, 1024 and 1536
pixels. The first steps are not counted. Prints Markdown tables for benchmarks/README.md.
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


ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
RECIPES = ROOT / "recipes" / "convllava-7b-768"
STAGES = {1: "stage1_projector", 2: "stage2_pretrain", 3: "stage3_instruct"}
QWEN = {"model_type": "qwen2", "vocab_size": 151936, "num_key_value_heads": 2, "tie_word_embeddings": True}
TOWERS = {
    "small": {"depths": [2, 2, 6, 2, 3], "hidden_sizes": [32, 64, 128, 256, 512]},
    "full": {"depths": [3, 3, 27, 3, 6], "hidden_sizes": [192, 384, 768, 1536, 3072]},
}
MODELS = {  # tower and language model; the larger two have the shapes of Qwen2.5's 0.5B and 1.5B
    "small": (
        "small",
        {"model_type": "llama", "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6}
        | {"num_attention_heads": 6, "num_key_value_heads": 6, "vocab_size": 8192},
    ),
    "0.5b": (
        "full",
        {**QWEN, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
    ),
    "1.5b": (
        "full",
        {**QWEN, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12},
    ),
}
WARM_UP = 2  # steps that are not counted
PICTURES = 8  # files; samples share them
LOADED = (768, 1024, 1536)  # pixels at which the data loader is measured alone


def main() -> int:
    import torch

    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["0.5b", "1.5b"] if cuda else ["small"])
    parser.add_argument("--resolutions", nargs="+", type=int, default=[768, 1024, 1536] if cuda else [384])
    parser.add_argument("--stages", nargs="+", type=int, choices=STAGES, default=list(STAGES))
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
        make_data(Path(folder), arguments.words)
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
    return {**settings, **json.loads(done.stdout.splitlines()[-1])}


def make_data(folder: Path, words: int) -> None:
    """Pictures with structure, so that JPEG has something to do, and one conversation about each."""
    import numpy as np
    from PIL import Image

    from convllava_hf.convert import convert_checkpoint

    convert_checkpoint(GOLDEN / "checkpoint-init", folder / "golden", progress=False)
    rng = np.random.default_rng(0)
    samples = []
    for number in range(PICTURES):
        coarse = Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).resize((1024, 768))
        noise = rng.integers(-12, 12, (768, 1024, 3))
        picture = Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8))
        picture.save(folder / f"{number}.jpg", quality=90)
        turns = [
            {"from": "human", "value": "<image>\nWhat is in the picture?"},
            {"from": "gpt", "value": " ".join(["the red sign"] * (words // 3))},
        ]
        samples.append({"id": str(number), "image": f"{number}.jpg", "conversations": turns})
    (folder / "samples.json").write_text(json.dumps(samples * 64))


def child(settings: dict) -> dict:
    return load_alone(settings) if settings.get("loader") else train(settings)


def train(settings: dict) -> dict:
    import torch

    from convllava_hf.data import load_training_data
    from convllava_hf.training.arguments import make_parser
    from convllava_hf.training.trainable import set_trainable
    from convllava_hf.training.trainer import ConvLlavaTrainer

    cuda = torch.cuda.is_available()
    before = resident()
    folder = Path(settings["folder"])
    data, training, _ = make_parser().parse_args_and_config(command_of(settings, cuda))
    model, processor = make_model(settings, folder)
    set_trainable(model, training.trainable)
    clock = make_clock(cuda)
    trainer = ConvLlavaTrainer(
        model=model,
        args=training,
        train_dataset=load_training_data(data.dataset_name, image_folder=folder),
        processing_class=processor,
        callbacks=[clock],
    )
    trainer.train()
    counted = len(clock.steps)
    seconds = sum(clock.steps) + sum(clock.waits)
    peak = torch.cuda.max_memory_allocated() if cuda else peak_resident() - before
    tokens = model.config.num_visual_tokens(settings["side"], settings["side"])
    return {
        "samples": counted * settings["batch"] / seconds,
        "tokens": counted * settings["batch"] * tokens / seconds,
        "peak": peak,
        "waits": sum(clock.waits) / seconds,
        "weights": sum(one.numel() for one in model.parameters()),
        "trains": sum(one.numel() for one in model.parameters() if one.requires_grad),
    }


def command_of(settings: dict, cuda: bool) -> list[str]:
    """A stage's recipe, with what a benchmark has otherwise."""
    values = {
        "dataset_name": Path(settings["folder"]) / "samples.json",
        "output_dir": Path(settings["folder"]) / "out",
        "per_device_train_batch_size": settings["batch"],
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": settings["checkpointing"],
        "max_steps": settings["steps"] + WARM_UP,
        "dataloader_num_workers": settings["workers"],
        "bf16": cuda,
        "use_cpu": not cuda,
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }
    options = [str(word) for key, value in values.items() for word in (f"--{key}", value)]
    return ["--config", str(RECIPES / f"{STAGES[settings['stage']]}.yaml"), *options]


def make_model(settings: dict, folder: Path):
    """A model of random weights, with the golden checkpoint's tokenizer in the larger vocabulary."""
    from transformers import AutoConfig

    from convllava_hf import ConvLlavaConfig, ConvLlavaForConditionalGeneration, ConvLlavaProcessor

    tower, text = MODELS[settings["model"]]
    processor = ConvLlavaProcessor.from_pretrained(folder / "golden")
    processor.image_processor.size = {"height": settings["side"], "width": settings["side"]}
    config = ConvLlavaConfig(
        vision_config={**TOWERS[tower], "image_size": settings["side"]},
        text_config=AutoConfig.for_model(**text),
        image_token_id=processor.image_token_id,
    )
    return ConvLlavaForConditionalGeneration(config), processor


def make_clock(cuda: bool):
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        """Seconds of every counted step, and seconds waited for its batch."""

        def __init__(self):
            self.steps, self.waits, self.last = [], [], None

        def on_step_begin(self, args, state, control, **kwargs):
            self.began = self.now()
            if state.global_step >= WARM_UP:
                self.waits.append(self.began - self.last)

        def on_step_end(self, args, state, control, **kwargs):
            self.last = self.now()
            if state.global_step > WARM_UP:
                self.steps.append(self.last - self.began)
            if state.global_step == WARM_UP:
                reset_peak(cuda)

        def now(self):
            if cuda:
                torch.cuda.synchronize()
            return time.perf_counter()

    return Clock()


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
        for number in range(PICTURES):
            processor(processor.fetch_images(str(folder / f"{number}.jpg")), return_tensors="pt")
        seconds[side] = (time.perf_counter() - start) / PICTURES
    return {"seconds": seconds}


def resident() -> int:
    return _status("VmRSS")


def peak_resident() -> int:
    return _status("VmHWM")


def _status(key: str) -> int:
    """Bytes of this process's memory as Linux counts it; 0 where there is no such count."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    line = next(line for line in status.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def reset_peak(cuda: bool) -> None:
    """Forgets what the first steps took."""
    import torch

    if cuda:
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


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
