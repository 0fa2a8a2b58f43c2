"""What the model card says: from the checkpoint itself, its training record, and what its publisher says."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open

from ..boxes import FRAMES, frame_of_mode
from ..errors import ConvLlavaError
from ..evaluation.paper import RESOLUTIONS
from ..modeling.configuration_convllava import PRESETS, ConvLlavaConfig, ImageSizing, tower_stride
from ..options import mode_of, sizing_values
from ..training_record import read_record, well_formed
from .markdown import cell, code_cell
from .staging import StagedRepo, is_hub_id


# What the Hub knows as licenses (https://huggingface.co/docs/hub/repositories-licenses). Others are `other`.
LICENSES = frozenset(
    """apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
    bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc
    cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0
    cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0
    cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1
    eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc intel-research lppl-1.3c ms-pl
    apple-ascl mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl
    lgpl-lr deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3
    llama4 grok2-community gemma unknown other""".split()
)
# Data that the recipes name, where its license was looked up on the data set's page (November 2026).
_KNOWN_DATA = {
    "share-captioner_coco_lcs_sam_1246k_1107.json": ("Lin-Chen/ShareGPT4V", "cc-by-nc-4.0"),
    "sharegpt4v_instruct_gpt4-vision_cap100k.json": ("Lin-Chen/ShareGPT4V", "cc-by-nc-4.0"),
    "llava_v1_5_mix665k.json": ("liuhaotian/LLaVA-Instruct-150K", "cc-by-4.0"),
    "ALLaVA-Caption-LAION-4V.json": ("FreedomIntelligence/ALLaVA-4V", None),
    "ALLaVA-Caption-VFLAN-4V.json": ("FreedomIntelligence/ALLaVA-4V", None),
    "annotation_191-task_1k.json": ("Vision-Flan/vision-flan_191-task_1k", None),
}
_ABOUT_KEYS = {
    "title": str,
    "description": str,
    "license": str,
    "license_name": str,
    "license_link": str,
    "language": list,
    "base_model": list,
    "vision_tower": str,
    "language_model": str,
    "datasets": list,
    "tags": list,
    "intended_use": str,
    "limits": list,
    "biases": list,
}
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "U8": "4 or 8 bits"}
_PARTS = ("vision_tower", "language_model", "checkpoint")  # of a record's origin: what may be on the Hub
_LANGUAGE = re.compile(r"[a-z]{2,3}|multilingual|code")


@dataclass
class About:
    """What only the publisher knows. Read from a YAML file by `read_about`, or given in Python.

    `license`: an id of the Hub's list; `other` needs `license_name` and `license_link`. `language`: ISO 639 codes.
    `base_model`: ids of the models that this one was made from. `datasets`: `{"id" or "name", "license", "use"}`.
    """

    title: str | None = None
    description: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    language: list[str] = field(default_factory=list)
    base_model: list[str] = field(default_factory=list)
    vision_tower: str | None = None
    language_model: str | None = None
    datasets: list[dict[str, str]] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    intended_use: str | None = None
    limits: list[str] = field(default_factory=list)
    biases: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Refuses what the Hub would not know what to do with.

        Raises:
            ConvLlavaError: see the messages.
        """
        if not self.license:
            raise ConvLlavaError(
                "A model page needs a license: pass --license with an id of the Hub's list. The licenses of the "
                "weights that the model was made from bind it: llama2 for Vicuna v1.5."
            )
        if self.license not in LICENSES:
            raise ConvLlavaError(
                f"The Hub does not know the license {self.license!r}. Its list: "
                "https://huggingface.co/docs/hub/repositories-licenses. For another, set license to other, with "
                "license_name and license_link, in the file of --about."
            )
        if self.license == "other" and not (self.license_name and self.license_link):
            raise ConvLlavaError("The license `other` needs license_name and license_link, in the file of --about.")
        for code in self.language:
            if not isinstance(code, str) or not _LANGUAGE.fullmatch(code):
                raise ConvLlavaError(f"The language {code!r} is no ISO 639 code such as en.")
        for base in self.base_model:
            if not isinstance(base, str) or not is_hub_id(base):
                raise ConvLlavaError(f"The base model {base!r} is no id on the Hub: expected owner/name.")
        for entry in self.datasets:
            if not isinstance(entry, dict) or not (entry.get("id") or entry.get("name")):
                raise ConvLlavaError(f"datasets has {entry!r}; expected id or name, license and use of a data set.")
            if entry.get("id") and not is_hub_id(str(entry["id"])):
                raise ConvLlavaError(f"The data set {entry['id']!r} is no id on the Hub: expected owner/name.")


def read_about(path: str | Path) -> About:
    """The publisher's words from a YAML file whose keys are `About`'s fields.

    Raises:
        ConvLlavaError: it cannot be read, or a key is unknown or of another kind.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ConvLlavaError(f"{str(path)!r} cannot be read: {error.strerror or error}.") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConvLlavaError(f"{str(path)!r} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConvLlavaError(f"{str(path)!r} holds no keys: expected some of {', '.join(_ABOUT_KEYS)}.")
    for key, value in values.items():
        if key not in _ABOUT_KEYS:
            raise ConvLlavaError(f"{str(path)!r} has the unknown key {key!r}: expected {', '.join(_ABOUT_KEYS)}.")
        if _ABOUT_KEYS[key] is list and not isinstance(value, list):
            values[key] = [value]
        elif not isinstance(value, _ABOUT_KEYS[key]):
            raise ConvLlavaError(f"{str(path)!r}: {key} is {value!r}; expected a text.")
    return About(**values)


def model_metadata(staged: StagedRepo) -> dict[str, Any]:
    """What the checkpoint says of itself: sizes, resolution, tokens. An adapter knows no more than its images."""
    processor = staged.json("preprocessor_config.json")
    sizes = _image_sizing(processor)
    parameters, dtypes = _count_weights(staged)
    facts: dict[str, Any] = {
        "parameters": _readable(parameters),
        "dtype": ", ".join(_DTYPES.get(dtype, dtype) for dtype in dtypes),
        "resolution": sizes.size,
        "stride": sizes.stride,
        "sees": _sees(sizes),
        "tokens": sizes.most_tokens,
        "token_table": _token_table(sizes),
        "preset_table": [
            {
                "name": name,
                "pixels": pixels,
                "tokens": pixels // sizes.stride**2,
                "own": sizes.mode == "native" and sizes.max_pixels == pixels,
            }
            for name, pixels in PRESETS.items()
        ],
        "images": mode_of(sizes).card_paragraph.format(**sizing_values(sizes)),
        "box_frame": frame_of_mode(sizes.mode),
    }
    if staged.base_model is None:
        config = ConvLlavaConfig(**_arguments(staged.json("config.json")))
        vision, text = config.vision_config, config.get_text_config()
        depths, widths = list(vision.depths or ()), list(vision.hidden_sizes or ())
        facts |= {
            "stride": tower_stride(vision),
            "depths": ", ".join(map(str, depths)),
            "widths": ", ".join(map(str, widths)),
            "stages": len(depths),
            "text_type": text.model_type,
            "text_layers": text.num_hidden_layers,
            "text_width": text.hidden_size,
            "context": getattr(text, "max_position_embeddings", None),
        }
    else:
        adapter = staged.json("adapter_config.json")
        saved = adapter.get("modules_to_save")
        facts["lora"] = {
            **{key: cell(adapter.get(key)) for key in ("r", "lora_alpha", "lora_dropout")},
            "modules_to_save": list(map(cell, saved)) if isinstance(saved, list) else [],
        }
    return facts


def lineage(staged: StagedRepo, about: About) -> dict[str, Any]:
    """Where the model comes from: its parts, its data with licenses, its stages, as far as anybody wrote it down."""
    record = well_formed(read_record(staged.folder))
    origin = record["origin"]
    stages = [_stage_row(number, stage) for number, stage in enumerate(record["stages"], 1)]
    started = record["stages"][0].get("started_from") if record["stages"] else None
    bases = list(about.base_model)
    if not bases and staged.base_model:
        bases = [staged.base_model]
    if not bases:
        candidates = [about.vision_tower, about.language_model, *(origin.get(part) for part in _PARTS)]
        if not any(candidates) and started:
            candidates = [started]
        bases = [name for name in candidates if name and is_hub_id(name)]
    return {
        "base_models": list(dict.fromkeys(bases)),
        "vision_tower": about.vision_tower or origin.get("vision_tower"),
        "tower_note": _tower_note(origin.get("vision_tower_choice")),
        "language_model": about.language_model or origin.get("language_model"),
        "checkpoint": origin.get("checkpoint"),
        "started_from": started,
        "data": _data_rows(record["stages"], about),
        "box_frames": _box_frames(record["stages"]),
        "stages": stages,
        "versions": {
            cell(name): cell(version) for name, version in (record["stages"][-1].get("versions") or {}).items()
        }
        if stages
        else {},
    }


def _tower_note(choice: Any) -> str | None:
    """Which tower a converted checkpoint has and how it compares with the other one, as the card says it."""
    if not isinstance(choice, dict):
        return None
    notes = {
        "named": "the tower that the original runs",
        "given": "a tower that the original's configuration does not name",
        "shards": "the tower in the original's shards, which the original does not run",
    }
    note = next((note for taken, note in notes.items() if choice.get("taken") == taken), None)
    if note is None:
        return None
    other = "that of the original's shards" if choice.get("taken") != "shards" else "the one that it runs"
    tensors, differing = choice.get("tensors"), choice.get("differing")
    if not isinstance(tensors, int) or not isinstance(differing, int):
        return note
    rounded = f" after rounding to {choice['rounded_to']}" if choice.get("rounded_to") in _DTYPES.values() else ""
    if not differing:
        return f"{note}; {other} is identical{rounded}"
    largest = choice.get("largest")
    most = f", by {largest:.3g} at most" if isinstance(largest, float) else ""
    return f"{note}; {differing} of {tensors} tensors differ from {other}{rounded}{most}"


def _arguments(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in ("model_type", "auto_map", "architectures")}


def _count_weights(staged: StagedRepo) -> tuple[int, list[str]]:
    """Parameters, and the dtypes of the weights by safetensors' names, the most frequent first."""
    total, by_dtype = 0, {}
    for name in staged.names():
        if name.endswith(".safetensors"):
            with safe_open(staged.folder / name, framework="pt") as handle:
                for key in handle.keys():
                    view = handle.get_slice(key)
                    number = math.prod(view.get_shape())
                    total += number
                    by_dtype[view.get_dtype()] = by_dtype.get(view.get_dtype(), 0) + number
    return total, sorted(by_dtype, key=by_dtype.__getitem__, reverse=True)


def _readable(number: int) -> str:
    for size, unit in ((10**9, "billion"), (10**6, "million")):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:,}"


def _image_sizing(processor: dict[str, Any]) -> ImageSizing:
    """What preprocessor_config.json says of the sizes of images."""
    return ImageSizing(
        processor.get("image_aspect_ratio", "pad"),
        (processor.get("size") or {}).get("height"),
        processor.get("stride", 64),
        processor.get("min_pixels"),
        processor.get("max_pixels"),
    )


def _sees(sizes: ImageSizing) -> str:
    """How the model sees an image, in few words."""
    return mode_of(sizes).card_text.format(**sizing_values(sizes))


def _token_table(sizes: ImageSizing) -> list[dict[str, Any]]:
    own = sizes.size if mode_of(sizes).square else None
    sides = sorted({sizes.size, *(one for one in RESOLUTIONS if one % sizes.stride == 0)})
    return [{"side": one, "tokens": (one // sizes.stride) ** 2, "own": one == own} for one in sides]


def _stage_row(number: int, stage: dict[str, Any]) -> dict[str, Any]:
    """One stage as the card's table has it; what the record does not say stays empty."""
    values = stage.get("hyperparameters") or {}
    rates = [_number(values.get("learning_rate"))]
    for part in ("projector", "vision_tower"):
        if (rate := values.get(f"{part}_learning_rate")) is not None:
            rates.append(f"{part.replace('_', ' ')} {_number(rate)}")
    lora = stage.get("lora") or {}
    trains = ", ".join(map(code_cell, stage.get("trainable") or []))
    if lora:
        method = str(stage.get("method", "lora")).upper().replace("LORA", "LoRA")
        trains = f"{cell(method)}, rank {cell(lora.get('r', '?'))}"
        if saved := lora.get("modules_to_save"):
            trains += " and " + ", ".join(map(code_cell, saved if isinstance(saved, list) else [saved]))
    warmup = values.get("warmup_steps", values.get("warmup_ratio"))
    if isinstance(warmup, float) and 0 < warmup < 1:
        warmup = f"{warmup:.0%}"
    dtype = "bf16" if values.get("bf16") else "fp16" if values.get("fp16") else stage.get("dtype")
    row = {
        "name": stage.get("name") or f"stage {number}",
        "learning rate": "; ".join(filter(None, rates)),
        "schedule": values.get("lr_scheduler_type"),
        "warm-up": warmup,
        "weight decay": _number(values.get("weight_decay")),
        "optimizer": values.get("optim"),
        "global batch": stage.get("global_batch_size"),
        "devices": stage.get("devices"),
        "epochs": stage.get("epochs"),
        "steps": stage.get("steps"),
        "longest sample": values.get("max_length"),
        "precision": dtype,
        "seed": values.get("seed"),
        "training loss": _number(stage.get("train_loss")),
        "evaluation loss": _number(stage.get("eval_loss")),
    }
    cells = {key: "" if value is None else cell(value) for key, value in row.items()}
    return {"name": cells["name"], "trains": trains, **cells}


def _data_rows(stages: Iterable[dict[str, Any]], about: About) -> list[dict[str, str]]:
    """Every data set once, with its license where it is known, and the stages that saw it."""
    rows: dict[str, dict[str, str]] = {}
    for entry in about.datasets:
        identity = str(entry.get("id") or entry["name"])
        license = str(entry.get("license") or "")
        rows[identity] = {"id": str(entry.get("id") or ""), "name": str(entry.get("name") or identity),
                          "license": license, "use": str(entry.get("use") or "")}  # fmt: skip
    for number, stage in enumerate(stages, 1):
        for entry in stage.get("data") or []:
            name = str(entry.get("name", ""))
            known, license = _KNOWN_DATA.get(Path(name).name, (None, None))
            identity = known or name
            id_ = known or (name if is_hub_id(name) and not Path(name).suffix else "")
            row = rows.setdefault(identity, {"id": id_, "name": identity, "license": license or "", "use": ""})
            label = str(stage.get("name") or f"stage {number}")
            if label not in row["use"].split(", "):
                row["use"] = ", ".join(filter(None, (row["use"], label)))
    return [{key: value if key == "id" else cell(value) for key, value in row.items()} for row in rows.values()]


def _box_frames(stages: Iterable[dict[str, Any]]) -> list[str]:
    """The frames of the boxes in the data of the stages that say so."""
    said: list[Any] = []
    for stage in stages:
        if (of_stage := stage.get("boxes")) in FRAMES:
            entries = [entry for entry in stage.get("data") or [] if isinstance(entry, dict)]
            said += [entry.get("boxes", of_stage) for entry in entries] or [of_stage]
    return [frame for frame in FRAMES if frame in said]


def _number(value: Any) -> str | None:
    return f"{value:.4g}" if isinstance(value, int | float) and not isinstance(value, bool) else None
