"""Checkpoints of a run: which is the last complete one."""

import json
import logging
import re
import struct
import zipfile
from pathlib import Path


logger = logging.getLogger(__name__)

_NAME = re.compile(r"checkpoint-(\d+)")


def get_last_complete_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest `checkpoint-N` in `output_dir` that is complete; `None` if there is none.

    A run that was killed, or whose disk was full, leaves a checkpoint that cannot be resumed from. Those newer than
    the one returned are named in a warning.
    """
    folder = Path(output_dir)
    numbered = [(int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    for _, path in sorted(numbered, reverse=True):
        fault = checkpoint_error(path)
        if fault is None:
            return path
        logger.warning("%s is incomplete (%s); looking for an earlier one.", path, fault)
    return None


def checkpoint_error(folder: Path) -> str | None:
    """What makes a checkpoint of the Trainer unusable for resuming, or `None`.

    `trainer_state.json` is written last. The other files are checked as far as their formats allow without loading
    them: a safetensors file's length is in its header, a PyTorch file is a zip archive with checksums.
    """
    try:
        state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "trainer_state.json is missing"
    except (OSError, ValueError):
        return "trainer_state.json is cut off"
    if not isinstance(state, dict) or "global_step" not in state:
        return "trainer_state.json names no step"
    if fault := _fault_of_weights(folder) or _missing_state(folder):
        return fault
    for file in sorted(folder.glob("*.json")):
        if not _json_is_whole(file):
            return f"{file.name} is cut off"
    for file in sorted(file for suffix in ("pt", "pth", "bin") for file in folder.rglob(f"*.{suffix}")):
        if not _zip_is_whole(file):
            return f"{file.relative_to(folder)} is cut off"
    return None


def _fault_of_weights(folder: Path) -> str | None:
    weights = sorted(folder.glob("*.safetensors"))
    for index in folder.glob("*.safetensors.index.json"):
        try:
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError):
            return f"{index.name} is cut off"
        if lacking := named - {file.name for file in weights}:
            return f"{', '.join(sorted(lacking))} of {index.name} is missing"
    for file in weights:
        if not _safetensors_is_whole(file):
            return f"{file.name} is cut off"
    # FSDP with sharded state and ZeRO-3 may keep weights in separate files, see `_missing_state`.
    if not weights and not (folder / "pytorch_model_fsdp_0").is_dir() and not _deepspeed_folders(folder):
        return "there are no weights"
    return None


def _missing_state(folder: Path) -> str | None:
    """The file that is missing of the states of optimizer, scheduler and random numbers, which every wrapper of the
    model saves under its own names."""
    if deepspeed := _deepspeed_folders(folder):
        latest = folder / "latest"  # written after the folder that it names
        if not latest.is_file() or latest.read_text(encoding="utf-8").strip() not in {path.name for path in deepspeed}:
            return "latest is missing or cut off"
        needed = []
    elif (folder / "pytorch_model_fsdp_0").is_dir():
        needed = ["pytorch_model_fsdp_0/.metadata", "optimizer_0/.metadata", "scheduler.pt"]  # .metadata comes last
    elif (folder / "pytorch_model_fsdp.bin").is_file():
        needed = ["optimizer.bin", "scheduler.pt"]
    else:
        needed = ["optimizer.pt", "scheduler.pt"]
    for name in needed:
        if not (folder / name).is_file():
            return f"{name} is missing"
    if not any(folder.glob("rng_state*.pth")):
        return "rng_state.pth is missing"
    return None


def _deepspeed_folders(folder: Path) -> list[Path]:
    return [path for path in folder.glob("global_step*") if path.is_dir()]


def _json_is_whole(file: Path) -> bool:
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _safetensors_is_whole(file: Path) -> bool:
    size = file.stat().st_size
    try:
        with open(file, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size:
                return False
            header = json.loads(stream.read(length))
    except (OSError, ValueError, struct.error):
        return False
    ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
    return size == 8 + length + max(ends, default=0)


def _zip_is_whole(file: Path) -> bool:
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.testzip() is None
    except (OSError, EOFError, zipfile.BadZipFile):
        return False
