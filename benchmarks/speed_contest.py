"""Contenders that take turns, each in a process of its own: what else the machine does meets all of them alike, and
each one's memory is its own. The other speed_*.py use it; as a script it is one contender's process.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


RESULTS = Path(__file__).parent / "results" / "speed"


class Contender:
    """One process with one model. `spec`: `kind` (of `speed_contenders.KINDS`), `name`, and what the kind takes."""

    def __init__(self, spec: dict[str, Any], common: dict[str, Any]):
        self.name = spec["name"]
        command = [sys.executable, __file__, "--contender", json.dumps({**common, **spec})]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, task: dict[str, Any]) -> dict[str, Any]:
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()
        return self.read()

    def read(self) -> dict[str, Any]:
        for line in self.process.stdout:
            if line.startswith("{"):  # libraries print, too
                return json.loads(line)
        raise SystemExit(f"{self.name} ended early, with the exit code {self.process.wait()}.")

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def contest(
    specs: Sequence[dict[str, Any]], tasks: dict[str, list[Any]], rounds: int, common: dict[str, Any]
) -> list[dict[str, Any]]:
    """Rows of every contender and task: medians over `rounds`, in each of which all take their turns.

    Args:
        tasks: what each contender, by name, is asked to do in each round.
    """
    contenders = []
    try:
        for spec in specs:
            contenders.append(Contender(spec, common))
            ready = contenders[-1].read()
            note(f"{spec['name']}: {ready['weights'] / 2**30:.2f} GiB of weights, built in {ready['seconds']:.0f} s")
            contenders[-1].ready = ready
        answers: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for number in range(rounds):
            start = time.perf_counter()
            for contender in contenders:
                for index, task in enumerate(tasks[contender.name]):
                    answer = contender.ask(task)
                    answers.setdefault((contender.name, index), []).append(answer)
                    note(f"{contender.name}, {json.dumps(task)}: {answer['seconds']:.2f} s")
            note(f"round {number + 1} of {rounds}: {time.perf_counter() - start:.0f} s")
        return [
            {"name": one.name, "task": task, "weights": one.ready["weights"], **middle(answers[one.name, index])}
            for one in contenders
            for index, task in enumerate(tasks[one.name])
        ]
    finally:
        for contender in contenders:
            contender.end()


def middle(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """The median of each figure, and all seconds."""
    figures = {
        name: statistics.median(answer[name] for answer in answers)
        for name, value in answers[0].items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
    others = {name: value for name, value in answers[0].items() if name not in figures}
    return {**others, **figures, "all_seconds": [answer["seconds"] for answer in answers]}


def note(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def contender(spec: dict[str, Any]) -> int:
    """A contender's process: builds its model, then does one task a line until its input ends."""
    import torch
    from speed_contenders import KINDS

    from convllava_hf.inference.loading import choose_device, choose_dtype
    from convllava_hf.profiling.machine import product
    from convllava_hf.profiling.measuring import clocked, peak, reset_peak, resident

    device = choose_device(spec.get("device"))
    dtype = choose_dtype(device, spec.get("dtype"))
    matrices, operations = product(device, dtype)
    matrices()
    empty = resident(device)
    start = time.perf_counter()
    do = KINDS[spec["kind"]](spec, device, dtype)
    weights = resident(device) - empty
    print(json.dumps({"weights": weights, "seconds": time.perf_counter() - start}), flush=True)
    warm = set()
    for line in sys.stdin:
        task = json.loads(line)
        with torch.inference_mode():
            call, facts = do(task)
            # The first call of all chooses kernels; on a GPU each size may be compiled.
            if not warm or (device.type == "cuda" and line not in warm):
                call()
            warm.add(line)
            reset_peak(device)
            seconds = clocked(call, device)
            most = peak(device) - empty
            rate = operations / clocked(matrices, device)
        facts = {name: value() if callable(value) else value for name, value in facts.items()}
        print(json.dumps({"seconds": seconds, "peak": most, "rate": rate, **facts}), flush=True)
    return 0


def options(description: str, rounds: int) -> argparse.ArgumentParser:
    """What the command lines of all parts share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help="of which medians are taken (%(default)s)")
    parser.add_argument("--contenders", nargs="+", help="only these, by name")
    parser.add_argument("--sizes", nargs="+", metavar="HEIGHTxWIDTH", help="only these of the images' sizes")
    parser.add_argument("--tiny", action="store_true", help="tiny models and images: tries the script out, no more")
    parser.add_argument("--device", help="cpu, cuda (default: the best there is)")
    parser.add_argument("--dtype", help="default: bfloat16 where the device has it")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder (%(default)s)")
    return parser


def chosen(specs: Sequence[dict[str, Any]], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    names = [spec["name"] for spec in specs]
    if unknown := set(arguments.contenders or []) - set(names):
        sys.exit(f"There is no contender {', '.join(unknown)}: choose of {', '.join(names)}.")
    return [spec for spec in specs if not arguments.contenders or spec["name"] in arguments.contenders]


def of_sizes(tasks: dict[str, list[Any]], arguments: argparse.Namespace) -> dict[str, list[Any]]:
    """Without the sizes that were not asked for."""
    if not arguments.sizes:
        return tasks
    wanted = [[int(side) for side in size.split("x")] for size in arguments.sizes]
    return {name: [task for task in mine if task["size"] in wanted] for name, mine in tasks.items()}


def common(arguments: argparse.Namespace) -> dict[str, Any]:
    return {"device": arguments.device, "dtype": arguments.dtype, "tiny": arguments.tiny}


def publish(name: str, heading: str, rows: Any, tables: Sequence[str], arguments: argparse.Namespace) -> None:
    """Write `name`.md and `name`.json, and print the Markdown."""
    from convllava_hf.inference.loading import choose_device, choose_dtype
    from convllava_hf.profiling.machine import copy_bandwidth, describe, in_words, matrix_rate
    from convllava_hf.profiling.tables import write, write_json

    device = choose_device(arguments.device)
    dtype = choose_dtype(device, arguments.dtype)
    machine = describe(device, dtype)
    limits = {"operations": matrix_rate(device, dtype), "bytes": copy_bandwidth(device)}
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    text = "\n\n".join(
        [
            f"# {heading}",
            f"`{command}`",
            *tables,
            f"Matrix products: {limits['operations'] / 1e9:.0f} GFLOP/s, copies: {limits['bytes'] / 1e9:.1f} GB/s, "
            "measured at the end of the run.",
            in_words(machine),
        ]
    )
    write(arguments.results / f"{name}.md", text + "\n")
    write_json(
        arguments.results / f"{name}.json", {"command": command, "machine": machine, "limits": limits, "rows": rows}
    )
    print(text)


if __name__ == "__main__":
    own = argparse.ArgumentParser()
    own.add_argument("--contender", required=True)
    sys.exit(contender(json.loads(own.parse_args().contender)))
