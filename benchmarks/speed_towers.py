"""Vision towers side by side: time, operations, share of the machine's matrix rate, memory.

    python benchmarks/speed_towers.py

The paper's ConvNeXt-L of five stages, run in our ways and as the original runs transformers' ConvNextModel; CLIP
ViT-L/14 at the same resolutions, at 336 pixels as LLaVA-1.5 has it and with five tiles of 336 as LLaVA-NeXT has it at
672; FastVLM's tower. Writes benchmarks/results/speed/towers.md and .json.
"""

import sys

from speed_contest import chosen, common, contest, of_sizes, options, publish

from convllava_hf.profiling.tables import gib, percent, seconds, table


SQUARES = [[336, 336], [768, 768], [1024, 1024], [1536, 1536]]
SHAPES = [[1536, 1088], [832, 1536], [512, 1536]]  # A4, 16:9 and 3:1
SPECS = [
    {"name": "ours, eager", "kind": "ours_tower"},
    {"name": "ours, fused", "kind": "ours_tower", "tower": "fused"},
    {"name": "ours, int8", "kind": "ours_tower", "tower": "int8"},
    {"name": "ConvNextModel", "kind": "convnext"},
    {"name": "CLIP ViT-L/14", "kind": "clip"},
    {"name": "FastViT mci3", "kind": "fastvit"},
]
GPU = [
    {"name": f"ours, {tower}", "kind": "ours_tower", "tower": tower}
    for tower in ("eager", "channels-last", "compiled", "cuda-graphs")
]


def tasks_of(name: str, tiny: bool) -> list[dict]:
    if tiny:
        return [{"size": [128, 128]}]
    if name.startswith("CLIP"):
        return [{"size": size} for size in SQUARES[:3]] + [{"size": [336, 336], "batch": 5}]
    if name.startswith("FastViT"):
        return [{"size": size} for size in [*SQUARES[1:], SHAPES[0]]]
    if name == "ConvNextModel":
        return [{"size": size} for size in [*SQUARES[1:]]]
    # 336 is no multiple of 64: the nearest that is one
    return [{"size": size} for size in [[320, 320], *SQUARES[1:], *SHAPES]]


def main() -> int:
    parser = options(__doc__, rounds=2)
    arguments = parser.parse_args()
    specs = [*GPU, *SPECS[3:]] if arguments.device == "cuda" else SPECS
    specs = chosen(specs, arguments)
    tasks = {spec["name"]: tasks_of(spec["name"], arguments.tiny) for spec in specs}
    rows = contest(specs, of_sizes(tasks, arguments), arguments.rounds, common(arguments))
    for row in rows:
        row["share"] = row["operations"] / row["seconds"] / row["rate"]
    columns = [
        ("tower", lambda row: row["name"]),
        ("height x width", lambda row: " x ".join(map(str, row["task"]["size"])) + times(row["task"])),
        ("visual tokens", lambda row: f"{row['tokens']:.0f}"),
        ("time", lambda row: seconds(row["seconds"])),
        ("operations", lambda row: f"{row['operations'] / 1e12:.2f} T"),
        ("share of matrix rate", lambda row: percent(row["share"])),
        ("weights", lambda row: gib(row["weights"])),
        ("peak memory", lambda row: gib(row["peak"])),
    ]
    publish("towers", "Vision towers", rows, [table(rows, columns)], arguments)
    return 0


def times(task: dict) -> str:
    return f", {task['batch']} of them" if task.get("batch", 1) > 1 else ""


if __name__ == "__main__":
    sys.exit(main())
