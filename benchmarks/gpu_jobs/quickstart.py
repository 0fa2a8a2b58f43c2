"""`convllava quickstart` on the device: seconds of each stage, and what the model answers rightly.

Runs in a process of its own with seed 0, as the CPU's run in `benchmarks/results/quickstart/seed0.json` did, beside
which it is shown. Random numbers and the order of sums differ between devices, so accuracies are those of another run
of the same recipe, not the same to the last digit: the CPU's three seeds say how far runs are apart. What is done when
the time is up is kept.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from job import Case, Context, main


CPU = Path(__file__).parents[1] / "results" / "quickstart"
TINY = {
    "tower_steps": 4,
    "language_steps": 4,
    "stage1_scenes": 32,
    "stage2_scenes": 32,
    "stage3_scenes": 32,
    "test_scenes": 8,
}
RUN = """
import json, sys
from convllava_hf.miniature.quickstart import Plan, open_run, quickstart

folder, plan, device = sys.argv[1:]
quickstart(open_run(folder, seed=0, plan=Plan(**json.loads(plan))), device=device)
"""


def cases(context: Context) -> list[Case]:
    # All of it is expected to take two to three minutes; in one, stage 0 and the drawing of scenes are done.
    return [Case("seed 0", _run, 60)]


def _run(context: Context) -> dict[str, Any]:
    """The run's record: `seconds` by step, and `accuracy` if the time was enough.

    Raises:
        RuntimeError: the run failed; the message has the end of what it said.
    """
    folder = context.folder / "quickstart"
    log = context.folder / "quickstart.txt"
    plan = json.dumps(TINY if context.tiny else {})
    command = [sys.executable, "-c", RUN, str(folder), plan, context.device.type]
    started = time.monotonic()
    with log.open("w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(timeout=max(1.0, context.remaining - 5))
        except subprocess.TimeoutExpired:
            code = None
        finally:  # also where this process is ended
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if code:
        raise RuntimeError(f"The quickstart ended with {code}: {log.read_text(errors='replace')[-800:]}")
    figures = {"finished": code == 0, "wall": time.monotonic() - started, "seconds": {}, "accuracy": {}}
    if (record := folder / "run.json").exists():
        kept = json.loads(record.read_text())
        figures["seconds"] = {name: kept["seconds"][name] for name in kept["done"]}
        figures["accuracy"] = kept["results"].get("evaluation", {}).get("accuracy", {})
    return figures


def tables(result: dict[str, Any]) -> str:
    """Seconds of each step and accuracies, beside the CPU's: its first seed for time, the span of all for accuracy."""
    runs = [json.loads(path.read_text()) for path in sorted(CPU.glob("seed*.json"))]
    parts = []
    for row in result["cases"]:
        if "failed" in row:
            parts.append(f"{row['name']}: failed: {' '.join(row['failed'].split())[:300]}")
            continue
        parts.append(
            f"{row['name']}: {row['wall']:.0f} s{'' if row['finished'] else ', cut off when the time was up'}."
        )
        lines = ["| step | this device | CPU |", "|---|---:|---:|"]
        for name, seconds in runs[0]["seconds"].items():
            ours = row["seconds"].get(name, row["wall"] if name == "total" and row["finished"] else None)
            lines.append(f"| {name} | {'' if ours is None else f'{ours:.0f} s'} | {seconds:.0f} s |")
        lines.append(f"\nCPU: {runs[0]['machine']}.\n")
        if row["accuracy"]:
            lines += ["| question | this device | CPU, three seeds |", "|---|---:|---:|"]
            for kind, share in row["accuracy"].items():
                theirs = [run["accuracy"][kind] for run in runs]
                lines.append(f"| {kind} | {share:.1%} | {min(theirs):.1%} to {max(theirs):.1%} |")
        parts.append("\n".join(lines).rstrip())
    return "\n\n".join(parts)


if __name__ == "__main__":
    sys.exit(main("quickstart", cases, __doc__))
