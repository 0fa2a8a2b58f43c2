"""training_record.json: what a checkpoint was made from and how it was trained, for publishing it.

It lies in the checkpoint's folder and grows with each stage: `origin` names the parts that a model was assembled or
converted from, `stages` has one entry a training run, the earliest first. Every key may be missing. Nothing in it says
where a file lay on the machine: of what lies here, and of an absolute path, the last name stays.
"""

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from .utils.json_files import write_json


logger = logging.getLogger(__name__)

RECORD_FILE = "training_record.json"
_FORMAT = 1
# Types of a stage's entries; all others are plain.
_PLAIN = (str, int, float, type(None))
_STAGE: dict[str, Any] = {
    "name": str,
    "started_from": str,
    "method": str,
    "trainable": (list, type(None)),
    "data": list,
    "hyperparameters": dict,
    "lora": dict,
    "versions": dict,
    "images": dict,
    "samples_left_out": dict,
}
_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\")


def read_record(folder: str | Path) -> dict[str, Any]:
    """The record in a checkpoint's folder: `{"origin": {...}, "stages": [...]}`, empty where there is none.

    A record that cannot be read is reported in a warning and counts as none: a training run need not fail for it.
    """
    empty: dict[str, Any] = {"format": _FORMAT, "origin": {}, "stages": []}
    path = Path(folder) / RECORD_FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return empty
    except (OSError, ValueError, RecursionError) as error:
        logger.warning("%s cannot be read (%s); going on without it.", path, error)
        return empty
    if not isinstance(record, dict) or not isinstance(record.get("stages", []), list):
        logger.warning("%s holds no training record; going on without it.", path)
        return empty
    stages = [stage for stage in record.get("stages", []) if isinstance(stage, dict)]
    origin = record.get("origin")
    return {"format": _FORMAT, "origin": origin if isinstance(origin, dict) else {}, "stages": stages}


def well_formed(record: dict[str, Any]) -> dict[str, Any]:
    """What of a record can be used: entries of another type than `convllava` writes are left out, with a warning.

    A checkpoint may come from a stranger, and so may its record.
    """
    origin = {
        part: source
        for part, source in record["origin"].items()
        if isinstance(source, dict if part == "vision_tower_choice" else str)
    }
    stages = []
    for stage in record["stages"]:
        kept = {key: value for key, value in stage.items() if isinstance(value, _STAGE.get(key, _PLAIN))}
        for key in ("trainable", "data"):
            if key in kept:
                kind = str if key == "trainable" else dict
                kept[key] = [one for one in kept[key] or () if isinstance(one, kind)]
        for key in ("hyperparameters", "versions"):
            if key in kept:
                kept[key] = {name: value for name, value in kept[key].items() if isinstance(value, _PLAIN)}
        stages.append(kept)
    if origin != record["origin"] or stages != record["stages"]:
        logger.warning("Some entries of %s are not of the type expected, and are left out of the card.", RECORD_FILE)
    return {**record, "origin": origin, "stages": stages}


def write_record(
    folder: str | Path, *, origin: dict[str, Any] | None = None, stages: Sequence[dict[str, Any]] = ()
) -> Path:
    """Writes the record of a checkpoint.

    Args:
        folder: the checkpoint.
        origin: `vision_tower`, `language_model` or `checkpoint`: what each was made from, an id on the Hub or a name.
            `vision_tower_choice`: of a converted checkpoint, which tower was taken (`taken`: `"named"` by config.json,
            `"given"` by the caller, or `"shards"`), and how it compares with the other one; see
            `convert.tower_comparison.Comparison`.
        stages: the training runs, the earliest first.
    """
    origin = {
        part: source if isinstance(source, dict) else portable_name(source)
        for part, source in (origin or {}).items()
        if source
    }
    return write_json(Path(folder) / RECORD_FILE, {"format": _FORMAT, "origin": origin, "stages": list(stages)})


def portable_name(source: str | Path) -> str:
    """What is recorded of a source: an id as it is, of a path only the last name; the rest means nothing to others.

    A relative path of two parts looks like an id on the Hub; it is a path if it exists here.
    """
    text = str(source)
    if _WINDOWS.match(text):
        return PureWindowsPath(text).name
    if text.startswith(("/", "~", "file:")):
        return PurePosixPath(text).name
    return Path(text).resolve().name if Path(text).exists() else text
