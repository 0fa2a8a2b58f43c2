"""Records a finished run for the model card: its data, what trained, hyperparameters, and the last step."""

from pathlib import Path
from typing import Any

from transformers.utils import cached_file
from trl import ModelConfig

from ..training_record import RECORD_FILE, portable_name, read_record, write_record
from ..utils.environment import versions_of
from .arguments import DataArguments, TrainingArguments


_HYPERPARAMETERS = (
    "learning_rate",
    "projector_learning_rate",
    "vision_tower_learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "warmup_ratio",
    "weight_decay",
    "optim",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_length",
    "assistant_only_loss",
    "group_by_modality_length",
    "group_by_image_shape",
    "bf16",
    "fp16",
    "seed",
)
_LORA = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_modules_to_save", "use_dora")
_PACKAGES = ("convllava-hf", "torch", "transformers", "trl", "peft", "accelerate", "datasets")


def save_training_record(
    folder: str | Path, data: DataArguments, training: TrainingArguments, model: ModelConfig, state, processes: int
) -> Path:
    """Adds this run to the record of the checkpoint that it started from, and writes it next to the new one.

    Args:
        folder: the checkpoint just written.
        state: the trainer's `TrainerState`.
        processes: of the run, one a device.
    """
    before = record_before(model)
    stage = describe_run(data, training, model, state, processes)
    return write_record(folder, origin=before["origin"], stages=[*before["stages"], stage])


def record_before(model: ModelConfig) -> dict[str, Any]:
    """The record of the checkpoint that a run starts from; for a model on the Hub, the one published with it."""
    flags = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors", "gated_repo")}
    found = cached_file(model.model_name_or_path, RECORD_FILE, revision=model.model_revision, **flags)
    return read_record(Path(found).parent if found else model.model_name_or_path)


def describe_run(
    data: DataArguments, training: TrainingArguments, model: ModelConfig, state, processes: int
) -> dict[str, Any]:
    """One entry of the record's `stages`."""
    values = training.to_dict()
    quantized = model.use_peft and (model.load_in_4bit or model.load_in_8bit)
    final = {key: row[key] for row in state.log_history for key in ("train_loss", "eval_loss") if key in row}
    stage = {
        "name": Path(training.output_dir).resolve().name,
        "started_from": portable_name(model.model_name_or_path),
        "method": "qlora" if quantized else "lora" if model.use_peft else "full",
        "trainable": None if model.use_peft else list(training.trainable),
        "data": _describe_data(data),
        "boxes": data.boxes,
        "hyperparameters": {key: values[key] for key in _HYPERPARAMETERS if values.get(key) is not None},
        "devices": processes,
        "global_batch_size": training.per_device_train_batch_size * training.gradient_accumulation_steps * processes,
        "steps": state.global_step,
        "epochs": round(state.epoch, 4) if state.epoch is not None else None,
        **final,
        "dtype": str(model.dtype or "float32"),
        "versions": versions_of(_PACKAGES),
    }
    if data.bad_samples.counts:
        stage["samples_left_out"] = data.bad_samples.as_dict()
    if data.image_options:
        stage["images"] = data.image_options
    if model.use_peft:
        stage["lora"] = {key.removeprefix("lora_"): value for key in _LORA if (value := getattr(model, key, None))}
    return stage


def _describe_data(data: DataArguments) -> list[dict[str, Any]]:
    """Names, configurations, splits and weights of the data sets, and frames of boxes other than the run's."""
    if not data.datasets:
        values = {"name": data.dataset_name, "config": data.dataset_config, "split": data.dataset_train_split}
        return [_without_blanks(values)]
    entries = []
    for entry in data.datasets:
        values = {"name": entry["path"], "config": entry.get("name")}
        more = {key: entry.get(key) for key in ("split", "boxes", "weight")}
        entries.append(_without_blanks({**values, **more}))
    return entries


def _without_blanks(entry: dict[str, Any]) -> dict[str, Any]:
    entry = {key: value for key, value in entry.items() if value is not None}
    if str(entry["name"]).endswith((".json", ".jsonl")):
        entry.pop("split", None)  # such a file has none; the argument has a default
    return {**entry, "name": portable_name(entry["name"])}
