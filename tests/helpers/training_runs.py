"""Trainings on the golden data through the script and the recipes, in this process or in one that may be killed."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file

from helpers import fork_server
from helpers.fresh_process import fresh_environment
from helpers.paths import GOLDEN, ROOT


RECIPES = ROOT / "recipes" / "convllava-7b"
STAGES = {1: "stage1_projector", 2: "stage2_pretrain", 3: "stage3_instruct"}
STARTS = {1: "init", 2: "stage1", 3: "stage2"}  # golden checkpoints
ON_CPU = {"use_cpu": "true", "bf16": "false", "dtype": "float32", "report_to": "none", "disable_tqdm": "true"}


def options(**values) -> list[str]:
    """`{"max_steps": 6}` as `["--max_steps", "6"]`; a list becomes several words, `None` nothing."""
    arguments = []
    for key, value in values.items():
        if value is not None:
            arguments += [f"--{key}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return arguments


def arguments_of(recipe: Path, model: Path, output: Path, **overrides) -> list[str]:
    """A recipe's command line on the golden conversations, in float32."""
    values = {
        "model_name_or_path": model,
        "dataset_name": GOLDEN / "conversations.json",
        "image_folder": GOLDEN / "images",
        "output_dir": output,
        "resolution": resolution_of(model),
        "logging_steps": 1,
        "dataloader_num_workers": 0,
        **ON_CPU,
        **overrides,
    }
    return ["--config", str(recipe), *options(**values)]


def resolution_of(model: Path) -> int | None:
    """The side of the squares that a checkpoint sees; `None` where its processor says nothing of them."""
    file = Path(model) / "processor_config.json"
    if not file.is_file():
        return None
    return json.loads(file.read_text())["image_processor"]["size"]["height"]


def run(recipe: Path, model: Path, output: Path, **overrides):
    """Trains in this process and returns the trainer."""
    from convllava_hf.train import main

    return main(arguments_of(recipe, model, output, **overrides))


def logged(trainer, key: str) -> list[float]:
    return [row[key] for row in trainer.state.log_history if key in row]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint, or its adapter's."""
    name = "adapter_model.safetensors" if (folder / "adapter_model.safetensors").exists() else "model.safetensors"
    return load_file(folder / name)


def losses_of(folder: Path) -> dict[int, float]:
    """The losses of a run by step, from its last state."""
    rows = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def assert_same_weights(ours: Path, theirs: Path) -> None:
    """Bit for bit."""
    ours, theirs = weights_of(ours), weights_of(theirs)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def assert_same_updates(ours: Path, theirs: Path, start: Path, tolerance: float) -> None:
    """What training changed is the same but for rounding, by the norm of each tensor.

    Single weights may differ more: AdamW moves one whose gradient is all rounding as far as any other.
    """
    ours, theirs, before = weights_of(ours), weights_of(theirs), weights_of(start)
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        update = expected - before[name] if name in before else expected
        assert (ours[name] - expected).norm() <= tolerance * update.norm(), name


def with_images_inside(folder: Path, *splits: str) -> Path:
    """The golden samples as a folder of parquet, as the Hub has them: `messages`, and `images` as bytes."""
    from datasets import Features, Image, List

    from convllava_hf.data import load_training_data

    def read(row: dict) -> dict:
        return {"images": [{"bytes": Path(one["path"]).read_bytes(), "path": None} for one in row["images"]]}

    dataset = load_training_data(GOLDEN / "conversations.json", image_folder=GOLDEN / "images")
    dataset = dataset.select_columns(["messages", "images"])
    features = Features({**dataset.features, "images": List(Image())})
    folder.mkdir(parents=True)
    for split in splits:
        dataset.map(read, features=features).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


def some_samples(folder: Path, names: Iterable[str], **images: str) -> Path:
    """A file with these of the golden conversations in this order; `images` names other files for some."""
    known = {sample["id"]: sample for sample in json.loads((GOLDEN / "conversations.json").read_text())}
    samples = [{**known[name], "id": f"{name}-{number}"} for number, name in enumerate(names)]
    for sample in samples:
        if (other := images.get(sample["id"].rpartition("-")[0].replace("-", "_"))) is not None:
            sample["image"] = other
    file = folder / "samples.json"
    file.write_text(json.dumps(samples))
    return file


class Started:
    """A command in a process of its own, with children of its own; what it writes goes to a file.

    Args:
        command: after the interpreter, such as `["-m", "convllava_hf.train", ...]`.
        folder: for its output and its caches.
        environment: variables to set, or to remove (`None`).
    """

    def __init__(self, command: list, folder: Path, python: str = sys.executable, **environment: str | None):
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "output.txt"
        variables = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **environment}
        with open(self.log, "w") as stream:
            self.process = fork_server.start(
                [python, *map(str, command)],
                stdout=stream,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env=fresh_environment(folder / "home", **variables),
                start_new_session=True,
            )

    def __enter__(self) -> "Started":
        return self

    def __exit__(self, *_) -> None:
        """Leaves nothing running, whatever happened."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_until(self, condition: Callable[[], bool], timeout: float = 120) -> None:
        """Returns as soon as the condition holds while the process runs.

        Raises:
            AssertionError: the process ended before, or did not come so far in time.
        """
        end = time.monotonic() + timeout
        while not condition():
            assert self.process.poll() is None, f"It ended too early:\n{self.output[-6000:]}"
            assert time.monotonic() < end, f"It did not come so far in {timeout} s:\n{self.output[-6000:]}"
            time.sleep(0.002)

    def wait(self, timeout: float = 240) -> int:
        """The exit code; a process that hangs is ended with its children, and fails the test."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"It hangs:\n{self.output[-6000:]}") from None

    def succeed(self, timeout: float = 240) -> str:
        """What it wrote, once it has ended well."""
        code = self.wait(timeout)
        assert code == 0, f"It ended with {code}:\n{self.output[-8000:]}"
        return self.output


@contextlib.contextmanager
def started_together(command: list, folder: Path, processes: int = 2, **environment: str) -> Iterator[list[Started]]:
    """A script in several processes, which find each other by what torchrun says to those that it starts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(
                Started(command, folder / f"rank-{rank}", **world, **environment, RANK=str(rank), LOCAL_RANK=str(rank))
            )
            for rank in range(processes)
        ]
