"""How time and memory of a tower grow with pixels and with batch size: measured, fitted, plotted.

    python benchmarks/speed_growth.py

Ours and FastVLM's tower from 256 to 1536 pixels square, CLIP ViT-L/14 to 1024, and ours with batches of 1 to 8 at 512.
Each growth is fitted by a power of the pixels on logarithmic axes (1: linear; CLIP's attention: towards 2), and ours
by a line with a start. Writes growth.md, growth.json and growth.png into benchmarks/results/speed.
"""

import sys

import numpy as np
from speed_contest import chosen, common, contest, note, options, publish

from convllava_hf.profiling.tables import gib, seconds, table


SPECS = [
    {"name": "ours", "kind": "ours_tower", "tower": "fused"},
    {"name": "CLIP ViT-L/14", "kind": "clip"},
    {"name": "FastViT mci3", "kind": "fastvit"},
]
SIDES = {
    "ours": (256, 512, 768, 1024, 1280, 1536),
    "CLIP ViT-L/14": (336, 504, 672, 840, 1008),
    "FastViT mci3": (256, 512, 768, 1024, 1280, 1536),
}
BATCHES = (1, 2, 4, 8)
BATCH_SIDE = 512


def main() -> int:
    arguments = options(__doc__, rounds=2).parse_args()
    specs = chosen(SPECS, arguments)
    if arguments.device == "cuda":
        specs = [{**spec, "tower": "channels-last"} if "tower" in spec else spec for spec in specs]
    sides = dict.fromkeys(SIDES, (64, 128, 192)) if arguments.tiny else SIDES
    batch_side = 64 if arguments.tiny else BATCH_SIDE
    tasks = {spec["name"]: [{"size": [side, side]} for side in sides[spec["name"]]] for spec in specs}
    if "ours" in tasks:
        tasks["ours"] += [{"size": [batch_side, batch_side], "batch": batch} for batch in BATCHES]
    rows = contest(specs, tasks, arguments.rounds, common(arguments))
    for row in rows:
        row["pixels"] = row["task"]["size"][0] * row["task"]["size"][1]
        row["beyond"] = max(row["peak"] - row["weights"], 1)
    single = [row for row in rows if "batch" not in row["task"]]
    batches = [row for row in rows if "batch" in row["task"]]
    fits = [fit(name, [row for row in single if row["name"] == name]) for name in tasks]
    tables = [measured(rows), fitted(fits)]
    if batches:
        line = np.polyfit([row["task"]["batch"] for row in batches], [row["seconds"] for row in batches], 1)
        tables.append(
            f"A batch of ours at {batch_side} x {batch_side} takes {seconds(line[1])} and {seconds(line[0])} "
            f"an image (a line through batches of {', '.join(str(row['task']['batch']) for row in batches)})."
        )
    arguments.results.mkdir(parents=True, exist_ok=True)
    plot(single, batches, fits, arguments.results / "growth.png")
    publish("growth", "Growth with pixels and with batch size", {"measured": rows, "fits": fits}, tables, arguments)
    return 0


def fit(name: str, rows: list[dict]) -> dict:
    """Powers of the pixels for time and memory, and the line that the time follows."""
    pixels = np.array([row["pixels"] for row in rows], dtype=float)
    taken = np.array([row["seconds"] for row in rows])
    power, _ = np.polyfit(np.log(pixels), np.log(taken), 1)
    memory, _ = np.polyfit(np.log(pixels), np.log([row["beyond"] for row in rows]), 1)
    slope, start = np.polyfit(pixels / 1e6, taken, 1)
    left = taken - (slope * pixels / 1e6 + start)
    explained = 1 - float((left**2).sum() / ((taken - taken.mean()) ** 2).sum())
    figures = {"power": power, "memory_power": memory, "per_megapixel": slope, "start": start, "r2": explained}
    return {"name": name, **{key: float(value) for key, value in figures.items()}}


def measured(rows: list[dict]) -> str:
    return table(
        rows,
        [
            ("tower", lambda row: row["name"]),
            ("pixels", lambda row: " x ".join(map(str, row["task"]["size"]))),
            ("batch", lambda row: str(row["task"].get("batch", 1))),
            ("time", lambda row: seconds(row["seconds"])),
            ("memory beyond the weights", lambda row: gib(row["beyond"])),
        ],
    )


def fitted(fits: list[dict]) -> str:
    return table(
        fits,
        [
            ("tower", lambda row: row["name"]),
            ("time grows with pixels to the power", lambda row: f"{row['power']:.2f}"),
            ("memory", lambda row: f"{row['memory_power']:.2f}"),
            ("seconds a megapixel", lambda row: f"{row['per_megapixel']:.2f}"),
            ("a line explains", lambda row: f"{row['r2']:.1%}"),
        ],
    )


def plot(single: list[dict], batches: list[dict], fits: list[dict], path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (time_axis, memory_axis, batch_axis) = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for found in fits:
        rows = [row for row in single if row["name"] == found["name"]]
        megapixels = [row["pixels"] / 1e6 for row in rows]
        label = f"{found['name']}: pixels^{found['power']:.2f}"
        time_axis.plot(megapixels, [row["seconds"] for row in rows], "o-", label=label)
        memory_axis.plot(megapixels, [row["beyond"] / 2**20 for row in rows], "o-")
    time_axis.set(xlabel="megapixels", ylabel="seconds", title="Time of a tower, one image")
    memory_axis.set(xlabel="megapixels", ylabel="MiB", title="Memory beyond the weights")
    if batches:
        batch_axis.plot([row["task"]["batch"] for row in batches], [row["seconds"] for row in batches], "o-")
        batch_axis.set(ylim=(0, None))
    batch_axis.set(xlabel="images in a batch", ylabel="seconds", title="Ours, by batch size")
    for axis in (time_axis, memory_axis):
        axis.set(xlim=(0, None), ylim=(0, None))
    time_axis.legend()
    figure.savefig(path, dpi=120)
    note(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
