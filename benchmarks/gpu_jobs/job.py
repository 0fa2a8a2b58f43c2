"""What every job of `benchmarks/gpu.py` has in common: its command line, its clock and its JSON file.

A job is a script with a list of cases, the most valuable first. Its JSON is written again after every case, so a job
that is stopped, by its time limit or from outside, loses only the case that it was at. A case that fails is recorded
with its error, and the job goes on with the next one.
"""

import argparse
import gc
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Context:
    """What a case needs to know about the run that it is part of.

    Args:
        tiny: whether this is a rehearsal: small shapes, few repeats, any device.
        deadline: `time.monotonic()` at which the job must have ended.
        folder: a folder for the job's temporary files, removed by `gpu.py`.
    """

    tiny: bool
    deadline: float
    folder: Path

    @property
    def device(self):
        import torch

        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def remaining(self) -> float:
        """Seconds until the job's deadline."""
        return self.deadline - time.monotonic()


@dataclass
class Case:
    """One measurement.

    Args:
        name: of the row, unique within the job.
        measure: returns the figures as a dictionary that JSON can hold.
        seconds: how long it takes about, on a GPU; it is skipped when less time remains.
        settings: what the row is about, written beside its figures.
    """

    name: str
    measure: Callable[[Context], dict[str, Any]]
    seconds: float = 5.0
    settings: dict[str, Any] = field(default_factory=dict)


def main(job: str, cases: Callable[[Context], Iterable[Case]], doc: str) -> int:
    """The command line of a job: runs its cases and writes their figures.

    Args:
        cases: makes the list of cases for a context.
        doc: the script's docstring, for `--help`.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--folder", type=Path, required=True, help="an existing folder for temporary files")
    parser.add_argument("--seconds", type=float, default=600, help="time limit (%(default)s)")
    parser.add_argument("--tiny", action="store_true", help="small shapes and few repeats, also without a GPU")
    parser.add_argument(
        "--only", nargs="+", metavar="CASE", help="run only the cases whose names contain one of these"
    )
    arguments = parser.parse_args()
    started = time.monotonic()
    context = Context(arguments.tiny, started + arguments.seconds, arguments.folder)
    result: dict[str, Any] = {
        "job": job,
        "tiny": context.tiny,
        "machine": machine(context),
        "cases": [],
        "skipped": [],
    }
    chosen = [
        case for case in cases(context) if not arguments.only or any(part in case.name for part in arguments.only)
    ]
    for case in chosen:
        if context.remaining < (0 if context.tiny else case.seconds):
            continue
        print(f"{time.monotonic() - started:7.1f} s  {job}: {case.name}", flush=True)
        result["cases"].append({"name": case.name, **case.settings, **_measure(case, context)})
        done = {row["name"] for row in result["cases"]}
        result["skipped"] = [one.name for one in chosen if one.name not in done]
        result["seconds"] = round(time.monotonic() - started, 1)
        write(arguments.out, result)
    write(arguments.out, result)
    failed = [case["name"] for case in result["cases"] if "failed" in case]
    print(f"{time.monotonic() - started:7.1f} s  {job}: {len(result['cases'])} cases, failed: {failed or 'none'}")
    return 1 if failed else 0


def _measure(case: Case, context: Context) -> dict[str, Any]:
    started = time.monotonic()
    try:
        figures = case.measure(context)
    except Exception as error:  # one case must not take the others with it; its error is its result
        traceback.print_exc()
        figures = {"failed": f"{type(error).__name__}: {error}"[:1000]}
    free_memory()
    return {**figures, "took": round(time.monotonic() - started, 2)}


def free_memory() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def machine(context: Context) -> dict[str, Any]:
    """What a table must say about where it was measured."""
    import torch

    from convllava_hf.profiling.machine import describe

    found = describe(context.device, torch.float32 if context.tiny else torch.bfloat16)
    if context.device.type == "cuda":
        found["memory"] = torch.cuda.get_device_properties(context.device).total_memory
        found["cuda"] = torch.version.cuda
    return found


def write(path: Path, result: dict[str, Any]) -> None:
    """Replaces the file as a whole; a case takes a line."""
    from convllava_hf.utils.json_files import write_json_rows

    write_json_rows(path, result)


def milliseconds(call: Callable[[], Any], context: Context, repeats: int = 20, warm_up: int = 3) -> float:
    """Median time of a call in milliseconds, by CUDA events on a GPU and by the clock elsewhere."""
    import statistics

    import torch

    repeats, warm_up = (2, 1) if context.tiny else (repeats, warm_up)
    for _ in range(warm_up):
        call()
    times = []
    if context.device.type != "cuda":
        for _ in range(repeats):
            started = time.perf_counter()
            call()
            times.append((time.perf_counter() - started) * 1000)
        return statistics.median(times)
    torch.cuda.synchronize()
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def show(value: float | None, form: str = ".1f", unit: str = "") -> str:
    """A figure for a table; empty where there is none."""
    return "" if value is None else f"{value:{form}}{unit}"


def table(rows: list[dict[str, Any]], columns: list[tuple[str, Callable[[dict[str, Any]], str]]]) -> str:
    """A Markdown table with a column of names and columns of figures; a failed row shows its error."""
    lines = ["| " + " | ".join(title for title, _ in columns) + " |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    for row in rows:
        if "failed" in row:
            lines.append(
                f"| {row['name']} | failed: {row['failed'].splitlines()[0][:100]} |" + " |" * (len(columns) - 2)
            )
        else:
            lines.append("| " + " | ".join(cell(row) for _, cell in columns) + " |")
    return "\n".join(lines)
