"""Seconds to the first token, and tokens a second after it, with the same language model behind each tower.

    python benchmarks/speed_answers.py

Ours at 768 and 1536 pixels square and for an A4 page at 1536 x 1088; transformers' own classes of LLaVA-1.5 (336
pixels), LLaVA-NeXT (672), FastVLM (1024 and 1536) and Qwen2.5-VL (the A4 page, in multiples of 28). The language model
has the shape of Qwen2.5's 0.5B, on a GPU --text 7b. Writes answers.md, answers.json and answers.png into
benchmarks/results/speed.
"""

import sys

from speed_contest import chosen, common, contest, note, of_sizes, options, publish

from convllava_hf.profiling.tables import gib, seconds, table


PAGE = [1536, 1088]
SPECS = [
    {"name": "ours, eager", "kind": "ours"},
    {"name": "ours, fused", "kind": "ours", "tower": "fused"},
    {"name": "ours, int8", "kind": "ours", "tower": "int8"},
    {"name": "LLaVA-1.5", "kind": "llava"},
    {"name": "LLaVA-NeXT", "kind": "llava_next"},
    {"name": "FastVLM", "kind": "fast_vlm"},
    {"name": "Qwen2.5-VL", "kind": "qwen2_5_vl"},
]
GPU = [{"name": f"ours, {tower}", "kind": "ours", "tower": tower} for tower in ("eager", "compiled", "cuda-graphs")]
TASKS = {
    "LLaVA-1.5": [[336, 336]],
    "LLaVA-NeXT": [[672, 672]],
    "FastVLM": [[1024, 1024], [1536, 1536]],
    "Qwen2.5-VL": [PAGE],
}
OURS = [[768, 768], [1536, 1536], PAGE]
FEWER = {"ours, eager": [PAGE]}  # the others show what is worth knowing


def main() -> int:
    parser = options(__doc__, rounds=2)
    parser.add_argument("--text", default="0.5b", help="size of the language model (%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=8, help="over which tokens a second are taken (%(default)s)")
    arguments = parser.parse_args()
    specs = chosen([*GPU, *SPECS[3:]] if arguments.device == "cuda" else SPECS, arguments)
    sizes = {name: [[128, 128]] for name in TASKS} if arguments.tiny else {**FEWER, **TASKS}
    default = [[128, 128]] if arguments.tiny else OURS
    tasks = {spec["name"]: [{"size": size} for size in sizes.get(spec["name"], default)] for spec in specs}
    text = "tiny" if arguments.tiny else arguments.text
    shared = {**common(arguments), "text": text, "new_tokens": arguments.new_tokens}
    rows = contest(specs, of_sizes(tasks, arguments), arguments.rounds, shared)
    columns = [
        ("model", lambda row: row["name"]),
        ("height x width", lambda row: " x ".join(map(str, row["task"]["size"]))),
        ("visual tokens", lambda row: f"{row['visual_tokens']:.0f}"),
        ("first token after", lambda row: seconds(row["seconds"])),
        ("tokens/s", lambda row: f"{row['tokens_per_second']:.1f}"),
        ("weights", lambda row: gib(row["weights"])),
        ("peak memory", lambda row: gib(row["peak"])),
    ]
    arguments.results.mkdir(parents=True, exist_ok=True)
    plot(rows, arguments.results / "answers.png")
    heading = f"First token and tokens a second, with a language model of {text} behind each tower"
    publish("answers", heading, rows, [table(rows, columns)], arguments)
    return 0


def plot(rows: list[dict], path) -> None:
    """Bars of the seconds to the first token, the quickest on top; ours in a color of their own."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = sorted(rows, key=lambda row: -row["seconds"])
    labels = [
        f"{row['name']}, {' x '.join(map(str, row['task']['size']))}: {row['visual_tokens']:.0f} tokens"
        for row in rows
    ]
    colors = ["tab:blue" if row["name"].startswith("ours") else "lightgrey" for row in rows]
    figure, axis = pyplot.subplots(figsize=(9, 0.32 * len(rows) + 1), layout="constrained")
    bars = axis.barh(labels, [row["seconds"] for row in rows], color=colors)
    axis.bar_label(bars, fmt="%.1f s", padding=3)
    axis.set(xlabel="seconds to the first token: tower, projector and prompt")
    axis.margins(x=0.08, y=0.01)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    note(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
