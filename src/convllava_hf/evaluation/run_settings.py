"""What a run is: how it is asked, of which model, and the folder that is its own."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers.utils import cached_file

from ..errors import ConvLlavaError
from ..inference import Assistant
from ..modeling.processing_convllava import ConvLlavaProcessor
from ..options import sizing_record
from ..training_record import portable_name
from ..utils.atomic import discard_folder
from ..utils.json_files import read_json_object, write_json
from .benchmarks import CHOICES, Benchmark
from .sources import Plan, Source


RUN_FILE = "run.json"


@dataclass(frozen=True)
class Settings:
    """How a benchmark is run.

    `choice`: multiple choice by the `"letter"` that is answered, or by the `"likelihood"` of each option's text.
    `ocr_tokens`: TextVQA's prompt names what an OCR system read. `split`, `config`: other ones than the benchmark's.
    `limit`: the first so many samples. `batch_size`: samples asked at once. `image_options`: how large images
    are seen, as arguments of the image processor (`options.ImageOptions`); what is not given is the checkpoint's own.
    """

    choice: str = "letter"
    ocr_tokens: bool = False
    split: str | None = None
    config: str | None = None
    limit: int | None = None
    batch_size: int = 8
    image_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.choice not in CHOICES:
            raise ConvLlavaError(f"choice is {self.choice!r}: expected one of {', '.join(CHOICES)}.")

    def folder_name(self, benchmark: Benchmark) -> str:
        """Of a run in an output folder: runs of a benchmark with different settings get different folders."""
        parts = [benchmark.name, self.split, self.config, "ocr" if self.ocr_tokens else None]
        if benchmark.has_choices and self.choice != CHOICES[0]:
            parts.append(self.choice)
        parts += [str(value) for _, value in sorted(self.image_options.items())]
        if self.limit is not None:
            parts.append(f"first{self.limit}")
        return "-".join(part.replace("/", "_") for part in parts if part)


@dataclass(frozen=True)
class Model:
    """The model that is asked: `source` is its folder or id, `load` loads it, which is left until there is a question.

    `dtype`, `quantization`: in which it is loaded. `device`: as the record names it. `checkpoint`: what is loaded, if
    it is not `source` itself but its converted copy.
    """

    source: str
    load: Callable[[], Assistant]
    dtype: torch.dtype
    quantization: str | None = None
    device: str = "cpu"
    checkpoint: str | None = None


def describe_run(
    source: Source, plan: Plan, model: Model, processor: ConvLlavaProcessor, prompt: str, settings: Settings
) -> dict[str, Any]:
    """What decides the answers: a run goes on only if all of it is as it was.

    Raises:
        ConvLlavaError: the image processor cannot do what the settings ask for.
    """
    image_processor, benchmark = processor.image_processor, source.benchmark
    try:
        sizes = image_processor.image_sizing(**settings.image_options)
    except ValueError as error:
        raise ConvLlavaError(f"These image options cannot be used: {error}") from error
    return {
        "format": 1,
        "benchmark_name": benchmark.name,
        "dataset": source.dataset,
        "config": source.config,
        "split": source.split,
        "limit": settings.limit,
        "questions": plan.checksum,
        "prompt": prompt,
        "choice": settings.choice if benchmark.has_choices else None,
        "ocr_tokens": settings.ocr_tokens,
        "max_new_tokens": benchmark.max_new_tokens,
        "model": {"name": portable_name(model.source), **_checkpoint_state(model.checkpoint or model.source)},
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": model.quantization,
        "images": sizing_record(sizes),
    }


def begin(folder: Path, run: dict[str, Any], overwrite: bool) -> None:
    """Makes the folder of a run, or makes sure that it is this run's; to be called while it is locked.

    Raises:
        ConvLlavaError: it is another run's; the message names what differs.
    """
    path = folder / RUN_FILE
    if folder.exists() and overwrite:
        if _holds_files(folder) and not path.exists():
            raise ConvLlavaError(f"{str(folder)!r} is not empty and not a run of convllava eval.")
        discard_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        if _holds_files(folder):
            raise ConvLlavaError(f"{str(folder)!r} is not empty and no run of convllava eval: name another --output.")
        write_json(path, run)
        return
    before = read_json_object(path, "An earlier run's settings, which --overwrite replaces")
    if differing := [key for key in run if before.get(key) != run[key]]:
        key = differing[0]
        raise ConvLlavaError(
            f"{str(folder)!r} holds a run that differs in {', '.join(differing)}: {key} was {before.get(key)!r} and "
            f"is {run[key]!r}. Name another --output, or start over with --overwrite."
        )


def _holds_files(folder: Path) -> bool:
    """Whether there are files, other than those that a killed run has left half-written."""
    return any(path.suffix != ".partial" for path in folder.iterdir())


def _checkpoint_state(source: str) -> dict[str, str | None]:
    """Which state a checkpoint has: the Hub's commit, or a checksum of names, sizes and times of its files."""
    folder = Path(source)
    if folder.is_dir():
        files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".jinja"))
        listed = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        return {"commit": None, "files": hashlib.sha256(repr(listed).encode()).hexdigest()[:16]}
    parts = Path(cached_file(source, "config.json") or "").parts
    commit = parts[parts.index("snapshots") + 1] if "snapshots" in parts else None
    return {"commit": commit, "files": None}
