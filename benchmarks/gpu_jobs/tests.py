"""Runs the tests marked `gpu` in several processes, and records what became of each."""

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import job


ROOT = Path(__file__).parents[2]
OUTCOME = re.compile(r"\[gw\d+\] \[ *\d+%\] (PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS) (tests/\S.*?)\s*$")
COLLECTED = re.compile(r"\d+ workers? \[(\d+) items?\]")
REASON = re.compile(r"(FAILED|ERROR) (tests/\S.*?) - (.*)")
SKIPPED = re.compile(r"SKIPPED \[(\d+)\] (\S+): (.*)")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--folder", type=Path, required=True, help="an existing folder for temporary files")
    parser.add_argument("--seconds", type=float, default=600, help="time limit (%(default)s)")
    parser.add_argument("--tiny", action="store_true", help="on the CPU what can run there")
    parser.add_argument("--only", nargs="+", help="pytest's -k, joined by or")
    arguments = parser.parse_args()
    started = time.monotonic()
    context = job.Context(arguments.tiny, started + arguments.seconds, arguments.folder)
    result: dict[str, Any] = {"job": "tests", "tiny": arguments.tiny, "machine": job.machine(context), "cases": []}
    lines = run_tests(arguments, context)
    result["cases"] = outcomes(lines)
    result["collected"] = next((int(found[1]) for line in lines if (found := COLLECTED.search(line))), 0)
    result["why_skipped"] = {found[3]: int(found[1]) for line in lines if (found := SKIPPED.match(line))}
    result["seconds"] = round(time.monotonic() - started, 1)
    job.write(arguments.out, result)
    whole = 0 < result["collected"] == len(result["cases"])
    return 0 if whole and not any("failed" in case for case in result["cases"]) else 1


def run_tests(arguments: argparse.Namespace, context: job.Context) -> list[str]:
    """pytest's output, line by line. It is interrupted shortly before the deadline, so that it still sums up."""
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-m", "gpu", "-v", "-ra", "--tb=short", "--durations=15"]
    workers = 1 if arguments.tiny else min(8, max(2, (os.cpu_count() or 2) // 2))
    command += ["-n", str(workers), "--dist", "worksteal", "--basetemp", str(arguments.folder / "pytest")]
    # A rehearsal leaves out trainings, which the other tests have on CPUs.
    chosen = " or ".join(arguments.only) if arguments.only else "not test_train" if arguments.tiny else ""
    command += ["-k", chosen] if chosen else []
    environment = os.environ | ({"CONVLLAVA_GPU_REHEARSAL": "1"} if arguments.tiny else {}) | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    signal.signal(signal.SIGALRM, lambda *_: process.send_signal(signal.SIGINT))
    signal.setitimer(signal.ITIMER_REAL, max(context.remaining - 8, 1))
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line.rstrip("\n"))
    process.wait()
    signal.setitimer(signal.ITIMER_REAL, 0)
    return lines


def outcomes(lines: list[str]) -> list[dict[str, Any]]:
    """Of each test its name and outcome, and of those that failed the reason, from pytest's verbose output."""
    reasons = {found[2]: found[3] for line in lines if (found := REASON.match(line))}
    cases = {}
    for line in lines:
        if found := OUTCOME.match(line):
            case = {"name": found[2], "outcome": found[1].lower()}
            if found[1] in ("FAILED", "ERROR"):
                case["failed"] = reasons.get(found[2], "no reason given")
            cases[found[2]] = case
    return list(cases.values())


def tables(result: dict[str, Any]) -> str:
    counts: dict[str, int] = {}
    for case in result["cases"]:
        counts[case["outcome"]] = counts.get(case["outcome"], 0) + 1
    if missing := result["collected"] - len(result["cases"]):
        counts["not finished in time"] = missing
    text = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())) + f"; {result['seconds']} s."
    for reason, count in result["why_skipped"].items():
        text += f"\n- skipped, {count}: {reason}"
    for case in result["cases"]:
        if "failed" in case:
            text += f"\n- {case['outcome']}: {case['name']}: {case['failed']}"
    return text


if __name__ == "__main__":
    sys.exit(main())
