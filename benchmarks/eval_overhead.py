"""What `convllava eval` costs beside the model's own generation in batches, on the same samples.

    python benchmarks/eval_overhead.py

Both open the same images (JPEG, 1024 x 768, in a parquet file), make the same batches and generate the same answers;
the bare loop does nothing else; `convllava eval` reads the data set, plans, judges every answer, writes it down and
makes the record as well. They take turns, and in every second round `convllava eval` comes first, so that what else
the machine does meets both alike. Loading the model is counted in neither. Exits with 1 if the overhead, in the median
of rounds, is 5 % or more by the clock.
"""

import argparse
import io
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path


GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
LIMIT = 0.05
TOWER = {"depths": [2, 2, 6, 2, 3], "hidden_sizes": [32, 64, 128, 256, 512], "image_size": 384}
TEXT = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6}
TEXT |= {"num_attention_heads": 6, "num_key_value_heads": 6, "vocab_size": 8192, "max_position_embeddings": 2048}


def main() -> int:
    import torch

    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint; by default a small one with random weights is made")
    parser.add_argument("--samples", type=int, default=512 if cuda else 64, help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="samples asked at once (%(default)s)")
    parser.add_argument("--rounds", type=int, default=12, help="of each (%(default)s)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="eval-overhead-") as name:
        folder = Path(name)
        os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
        data = make_data(folder, arguments.samples)
        model = arguments.model or str(make_model(folder))
        rounds = measure(model, data, folder, arguments)
    return report(rounds, arguments)


def make_model(folder: Path) -> Path:
    """A small model with random weights, and the processor of the golden checkpoint at 384 pixels."""
    import torch
    from transformers import AutoConfig

    from convllava_hf import ConvLlavaConfig, ConvLlavaForConditionalGeneration, ConvLlavaProcessor
    from convllava_hf.convert import convert_checkpoint

    golden = convert_checkpoint(GOLDEN / "checkpoint-init", folder / "golden", progress=False)
    processor = ConvLlavaProcessor.from_pretrained(golden)
    processor.image_processor.size = {"height": 384, "width": 384}
    config = ConvLlavaConfig(
        vision_config=TOWER,
        text_config=AutoConfig.for_model("llama", **TEXT),
        image_token_id=processor.image_token_id,
    )
    torch.manual_seed(0)
    model = ConvLlavaForConditionalGeneration(config)
    model.generation_config.suppress_tokens = [processor.image_token_id]
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return folder / "model"


def make_data(folder: Path, samples: int) -> Path:
    """TextVQA's columns with made-up questions of different length."""
    import datasets as hf
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    images = []
    for _ in range(16):
        coarse = Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).resize((1024, 768))
        noise = rng.integers(-12, 12, (768, 1024, 3))
        buffer = io.BytesIO()
        Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        images.append({"bytes": buffer.getvalue(), "path": None})
    rows = [
        {
            "question": f"what is written {'and shown ' * int(rng.integers(12))}on sign number {number}?",
            "answers": ["sign"] * 10,
            "image": images[number % len(images)],
        }
        for number in range(samples)
    ]
    hf.Dataset.from_list(rows).cast_column("image", hf.Image()).to_parquet(folder / "rows.parquet")
    return folder / "rows.parquet"


def measure(source: str, data: Path, folder: Path, arguments: argparse.Namespace) -> list[dict[str, dict[str, float]]]:
    """Seconds of each round, by the clock and of the CPUs."""
    from convllava_hf.evaluation.benchmarks import BENCHMARKS
    from convllava_hf.evaluation.prediction_log import read_rows
    from convllava_hf.evaluation.run_settings import Model, Settings
    from convllava_hf.evaluation.runner import evaluate
    from convllava_hf.inference import load

    assistant = load(source)
    model = Model(source, lambda: assistant, assistant.dtype)
    benchmark, settings = BENCHMARKS["textvqa"], Settings(batch_size=arguments.batch)
    bare(assistant, benchmark, data, settings)  # whatever is done once is done here
    rounds = []

    def ask(name: str, output: Path):
        if name == "bare":
            return bare(assistant, benchmark, data, settings)
        return evaluate(benchmark, model, assistant.processor, output, data, settings, progress=False)

    for number in range(arguments.rounds):
        seconds, results = {}, {}
        for name in ("bare", "eval") if number % 2 == 0 else ("eval", "bare"):
            start = now()
            results[name] = ask(name, folder / str(number))
            seconds[name] = since(start, now())
        rounds.append(seconds)
        rows = read_rows(results["eval"][0])
        assert {name: row["prediction"] for name, row in rows.items()} == results["bare"]
        print(f"round {number + 1}: {rounds[-1]}", file=sys.stderr)
    return rounds


def bare(assistant, benchmark, data: Path, settings) -> dict[str, str]:
    """Generation in batches and nothing else: the batches are made before the clock runs, for they cost eval alone."""
    import torch

    from convllava_hf.evaluation.predictor import Predictor
    from convllava_hf.evaluation.runner import make_batches
    from convllava_hf.evaluation.sources import open_source, plan_samples
    from convllava_hf.inference import prompt_inputs

    if not _PLANNED:
        source = open_source(benchmark, data)
        samples = list(plan_samples(source, benchmark.prompt).samples.values())
        lengths = Predictor(assistant, source, 1).lengths(samples)
        _PLANNED.append((source, make_batches(samples, lengths, settings.batch_size, apart=False)))
    source, batches = _PLANNED[0]
    processor, answers = assistant.processor, {}
    for batch in batches:
        conversations = []
        for sample in batch:
            image = processor.image_processor.fetch_images(source.images[sample.row]["image"])
            content = [{"type": "image", "image": image}, {"type": "text", "text": sample.prompt}]
            conversations.append([{"role": "user", "content": content}])
        inputs = prompt_inputs(processor, conversations).to(assistant.device, assistant.dtype)
        with torch.inference_mode():
            output = assistant.model.generate(**inputs, max_new_tokens=benchmark.max_new_tokens, do_sample=False)
        texts = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers |= {sample.id: text.strip() for sample, text in zip(batch, texts, strict=True)}
    return answers


_PLANNED: list = []


def now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def since(start: tuple[float, float], end: tuple[float, float]) -> dict[str, float]:
    return {"clock": round(end[0] - start[0], 3), "cpu": round(end[1] - start[1], 3)}


def report(rounds: list[dict], arguments: argparse.Namespace) -> int:
    import torch
    import transformers

    print(f"\n{arguments.samples} samples in batches of {arguments.batch}, {arguments.rounds} rounds of each:\n")
    print("| | bare generation | `convllava eval` | overhead, median of rounds |\n|---|---:|---:|---:|")
    overheads = {}
    for kind, label in (("clock", "seconds by the clock"), ("cpu", "seconds of CPUs")):
        medians = [statistics.median(one[name][kind] for one in rounds) for name in ("bare", "eval")]
        overheads[kind] = statistics.median(one["eval"][kind] / one["bare"][kind] - 1 for one in rounds)
        print(f"| {label} | {medians[0]:.2f} | {medians[1]:.2f} | {overheads[kind]:+.1%} |")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"\n{device}, {platform.system()}, Python {platform.python_version()}, {versions}.")
    return 0 if overheads["clock"] < LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
