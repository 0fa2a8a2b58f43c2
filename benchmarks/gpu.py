"""Tests and measures everything that runs on a GPU, in one command that can be cut off at any moment: `make gpu`.

    python benchmarks/gpu.py --budget 480 --out benchmarks/results/gpu

Each job is a process with its own time limit. The most valuable come first, and a job for which too little of the
budget remains is left out. A job writes its JSON after every case, and `summary.md` is written again after every job.

For a machine without a network, collect the missing packages elsewhere with `make gpu-bundle`, and add
`--bundle gpu-bundle`.
`--tiny` rehearses everything with small shapes, on a CPU as well.
"""

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path


HERE = Path(__file__).parent
JOB_SCRIPTS = HERE / "gpu_jobs"
TINY_LIMIT = 300  # seconds; a rehearsal is short where the machine is quiet, and libraries take long to import
STARTED = "CONVLLAVA_GPU_STARTED"  # when the run began, for the process within the bundle's environment


@dataclass(frozen=True)
class Job:
    """One script of `gpu_jobs`.

    Args:
        name: of the script, and of its JSON file.
        seconds: its time limit on a GPU.
        least: seconds without which it is not started.
        what: for the list in `--help`.
    """

    name: str
    seconds: int
    least: int
    what: str


JOBS = (
    Job("tests", 110, 40, "the tests marked gpu"),
    Job("tower", 120, 30, "milliseconds and share of the matrix rate, against CLIP, SigLIP and FastViT"),
    Job("answers", 110, 30, "first token and tokens per second, against LLaVA, LLaVA-NeXT, FastVLM and Qwen2.5-VL"),
    Job("training", 150, 40, "samples per second, share of the peak and memory in the three stages"),
    Job("profile_tower", 25, 15, "the kernels of the tower"),
    Job("profile_training", 30, 20, "the kernels of a training step"),
    Job("quickstart", 150, 60, "seconds per stage and accuracies of the quickstart"),
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="jobs:\n" + "\n".join(f"  {job.name:18}{job.what}" for job in JOBS),
    )
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder for the figures (%(default)s)")
    parser.add_argument("--budget", type=float, default=480, help="seconds for everything (%(default)s)")
    parser.add_argument("--jobs", nargs="+", choices=[job.name for job in JOBS], help="run only these")
    parser.add_argument(
        "--only", nargs="+", metavar="CASE", help="of each job, only the cases whose names contain one"
    )
    parser.add_argument(
        "--limits",
        nargs="+",
        type=job_limit,
        default=[],
        metavar="JOB=SECONDS",
        help="other time limits than the jobs'",
    )
    parser.add_argument("--bundle", type=Path, metavar="DIR", help="folder of wheels to make an environment from")
    parser.add_argument("--tiny", action="store_true", help="small shapes and few repeats, also without a GPU")
    arguments = parser.parse_args()
    arguments.limits = dict(arguments.limits)
    sys.path.insert(0, str(JOB_SCRIPTS))
    started = float(os.environ.setdefault(STARTED, str(time.time())))
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="convllava-gpu-") as folder:
        if arguments.bundle:
            return run_in_bundle(Path(folder), arguments.bundle)
        return run_jobs(arguments, started + arguments.budget, Path(folder))


def job_limit(text: str) -> tuple[str, float]:
    """The type of `--limits`."""
    name, _, seconds = text.partition("=")
    if name not in [job.name for job in JOBS]:
        raise argparse.ArgumentTypeError(f"{name!r} is not a job; the jobs are {', '.join(job.name for job in JOBS)}")
    return name, float(seconds)


def run_in_bundle(folder: Path, bundle: Path) -> int:
    """This script again, with the same arguments, in an environment made from the bundle."""
    from environment import make_environment

    began = time.monotonic()
    python = make_environment(folder / "venv", bundle)
    print(f"{time.monotonic() - began:5.0f} s  environment", flush=True)
    position = next(n for n, word in enumerate(sys.argv) if word.startswith("--bundle"))
    words = sys.argv[1:position] + sys.argv[position + (1 if "=" in sys.argv[position] else 2) :]
    return subprocess.run([str(python), __file__, *words]).returncode


def run_jobs(arguments: argparse.Namespace, deadline: float, folder: Path) -> int:
    """The jobs one after another; in a rehearsal two at once, since its times mean nothing."""
    chosen = [job for job in JOBS if not arguments.jobs or job.name in arguments.jobs]
    summing_up = threading.Lock()

    def run(job: Job) -> str:
        remaining = deadline - time.time()
        if remaining < (10 if arguments.tiny else job.least):
            outcome = f"left out, {max(remaining, 0):.0f} s remain"
        else:
            limit = arguments.limits.get(job.name, TINY_LIMIT if arguments.tiny else job.seconds)
            outcome = run_job(job, arguments, min(limit, remaining), folder)
            with summing_up:
                write_summary(arguments.out)
        print(f"{time.time() - deadline + arguments.budget:5.0f} s  {job.name}: {outcome}", flush=True)
        return outcome

    with ThreadPoolExecutor(2 if arguments.tiny else 1) as pool:
        outcomes = list(pool.map(run, chosen))
    summary = arguments.out / "summary.md"
    print(f"\n{summary.read_text() if summary.exists() else ''}")
    failed = [job.name for job, outcome in zip(chosen, outcomes, strict=True) if outcome != "done"]
    if failed:
        print(f"Not whole: {', '.join(failed)}. See {arguments.out / 'JOB.log'}.", file=sys.stderr)
    return 1 if failed else 0


def run_job(job: Job, arguments: argparse.Namespace, seconds: float, folder: Path) -> str:
    """What became of it: "done", or why not. Its output goes to a log next to its JSON."""
    scratch = folder / job.name
    scratch.mkdir()
    result = arguments.out.resolve() / f"{job.name}.json"
    result.unlink(missing_ok=True)
    command = [sys.executable, str(JOB_SCRIPTS / f"{job.name}.py"), "--out", str(result)]
    command += ["--folder", str(scratch), "--seconds", str(round(seconds - 5))]
    command += ["--tiny"] if arguments.tiny else []
    command += ["--only", *arguments.only] if arguments.only else []
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    with result.with_suffix(".log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True, cwd=HERE.parent
        )
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds:.0f} s"
        finally:
            stop(process)
    return "done" if status == 0 else f"exit code {status}"


def stop(process: subprocess.Popen) -> None:
    """Ends the job's process and whatever it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # all have ended
    process.wait()


def write_summary(out: Path) -> None:
    """The tables of all the results that there are, in the order of the jobs."""
    parts, machine = [], None
    for job in JOBS:
        path = out / f"{job.name}.json"
        if not path.exists():
            continue
        result = json.loads(path.read_text())
        machine = machine or result["machine"]
        tables = importlib.import_module(job.name).tables(result)
        parts.append(f"## {job.what[0].upper()}{job.what[1:]}\n\n{tables}")
        if result.get("skipped"):
            parts.append(f"Left out for lack of time: {'; '.join(result['skipped'])}.")
    if machine:
        versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
        head = f"{machine['device']}, Python {machine['python']}, {versions}."
        temporary = out / ".summary.md"
        temporary.write_text("\n\n".join([head, *parts]) + "\n")
        temporary.replace(out / "summary.md")


if __name__ == "__main__":
    sys.exit(main())
