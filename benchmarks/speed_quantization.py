"""Loading in 8 and 4 bits: speed, memory, and the change in logits.

    python benchmarks/speed_quantization.py
    python benchmarks/speed_quantization.py --model ConvLLaVA-1536

Each way of loading has a process of its own, and they take turns. Without --model, a checkpoint of random weights is
written to a temporary folder: a small tower, which stays as it is anyway, and a language model of the shape of
Qwen2.5's 0.5B. Logits are compared with those of the checkpoint as it is, at all positions of one prompt with an
image: relative change, and how often the likeliest token stays the same. Of random weights the change is that of
the rounding alone; tokens are nearly as likely as one another there, so that those of a trained model stay the same
more often. Peak memory is the process's: on a CPU it holds what the weights were read from, too, until other programs
want that memory. Writes benchmarks/results/speed/quantization.md and .json.
"""

import sys
import tempfile
from pathlib import Path

from speed_contest import chosen, common, contest, note, options, publish

from convllava_hf.profiling.tables import gib, percent, seconds, table


SPECS = [
    {"name": "as it is", "kind": "loaded"},
    {"name": "8 bits (bitsandbytes)", "kind": "loaded", "quantization": "8bit"},
    {"name": "4 bits, NF4 (bitsandbytes)", "kind": "loaded", "quantization": "4bit"},
    {"name": "8 bits (torchao, weights)", "kind": "loaded", "quantization": "torchao-8bit"},
]


def main() -> int:
    parser = options(__doc__, rounds=3)
    parser.add_argument("--model", help="folder of a checkpoint, or its id on the Hub")
    parser.add_argument("--text", default="0.5b", help="size of the random language model (%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=8)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="speed-quantization-") as folder:
        source = arguments.model or write_checkpoint(Path(folder) / "model", arguments)
        shared = {**common(arguments), "source": str(source), "new_tokens": arguments.new_tokens, "folder": folder}
        specs = chosen(SPECS, arguments)
        tasks = {spec["name"]: [{"size": [128, 128] if arguments.tiny else [768, 768]}] for spec in specs}
        rows = contest(specs, tasks, arguments.rounds, shared)
        compare(rows, Path(folder))
    columns = [
        ("loaded", lambda row: row["name"]),
        ("weights", lambda row: gib(row["stored"])),
        ("peak memory", lambda row: gib(row["peak"])),
        ("first token after", lambda row: seconds(row["seconds"])),
        ("tokens/s", lambda row: f"{row['tokens_per_second']:.1f}"),
        ("change in logits", lambda row: percent(row.get("change"))),
        ("likeliest token the same", lambda row: percent(row.get("agreement"))),
    ]
    publish("quantization", "Loading in 8 and 4 bits", rows, [table(rows, columns)], arguments)
    return 0


def write_checkpoint(folder: Path, arguments) -> Path:
    import torch

    from convllava_hf import ConvLlavaConfig, ConvLlavaForConditionalGeneration
    from convllava_hf.profiling.models import built, text_config, tower_config

    text = "tiny" if arguments.tiny else arguments.text
    config = ConvLlavaConfig(vision_config=tower_config(tiny=True), text_config=text_config(text), image_token_id=3)
    model = built(lambda: ConvLlavaForConditionalGeneration(config), torch.device("cpu"), torch.bfloat16)
    model.save_pretrained(folder)
    note(f"wrote a checkpoint of {sum(one.numel() for one in model.parameters()) / 1e6:.0f} M weights")
    return folder


def compare(rows: list[dict], folder: Path) -> None:
    """Logits against those of the checkpoint as it is."""
    import torch

    logits = {row["name"]: torch.load(folder / row["logits"]) for row in rows}
    expected = logits.get(SPECS[0]["name"])
    for row in rows:
        if expected is not None and row["name"] != SPECS[0]["name"]:
            given = logits[row["name"]]
            row["change"] = float((given - expected).norm() / expected.norm())
            row["agreement"] = float((given.argmax(-1) == expected.argmax(-1)).float().mean())


if __name__ == "__main__":
    sys.exit(main())
