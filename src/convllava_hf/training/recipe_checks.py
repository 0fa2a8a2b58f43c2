"""Checks a recipe before weights are loaded: numbers, packages, and the model without its weights."""

import math
import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, get_scheduler
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from trl import ModelConfig, get_peft_config, get_quantization_config

from ..errors import ConvLlavaError, first_line
from ..modeling.configuration_convllava import ConvLlavaConfig
from ..options import IMAGE_RANGES
from .trainable import set_trainable


if TYPE_CHECKING:
    from .arguments import TrainingArguments

# Key -> the least and the most that it may be, both included; `_ABOVE_0` and `_BELOW_1` are the next numbers to these.
_ABOVE_0, _BELOW_1, _COUNT = math.nextafter(0, 1), math.nextafter(1, 0), 10**9
_RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), (1, _COUNT)),
    **dict.fromkeys(
        ("gradient_accumulation_steps", "eval_accumulation_steps", "torch_empty_cache_steps"), (1, _COUNT)
    ),
    **dict.fromkeys(("num_train_epochs", "logging_steps", "save_steps", "eval_steps"), (_ABOVE_0, _COUNT)),
    **dict.fromkeys(("learning_rate", "projector_learning_rate", "vision_tower_learning_rate"), (0, 1e3)),
    **dict.fromkeys(("weight_decay", "adam_epsilon", "max_grad_norm", "neftune_noise_alpha"), (0, 1e6)),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "lora_dropout"), (0, _BELOW_1)),
    **dict.fromkeys(("warmup_steps", "eval_delay", "save_total_limit"), (0, _COUNT)),
    **dict.fromkeys(("max_length", "resolution", "pad_to_multiple_of", "ddp_bucket_cap_mb"), (1, _COUNT)),
    **IMAGE_RANGES,
    **dict.fromkeys(("dataset_num_proc", "dataloader_prefetch_factor", "lora_r"), (1, 2**16)),
    **dict.fromkeys(("seed", "data_seed"), (0, 2**32 - 1)),
    **dict.fromkeys(("max_bad_images", "max_bad_samples"), (0, _COUNT)),
    "label_smoothing_factor": (0, 1),
    "dataloader_num_workers": (0, 1024),
    "lora_alpha": (1, _COUNT),
}
# What transformers, TRL, PEFT and torch raise on settings that do not go together, or for which a package is missing.
_REFUSALS = (ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError, NotImplementedError)


def check_values(*arguments: Any) -> None:
    """Refuses numbers that cannot work.

    Raises:
        ConvLlavaError: names the key, the value, and what was expected.
    """
    for part in arguments:
        for key, (least, most) in _RANGES.items():
            value = getattr(part, key, None)
            if value is None or (key == "save_total_limit" and value == -1):
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
                raise ConvLlavaError(f"{key} is {value!r}; expected {_range(least, most)}.")
        steps = getattr(part, "max_steps", -1)
        if steps != -1 and not 1 <= steps <= _COUNT:
            raise ConvLlavaError(
                f"max_steps is {steps}; expected a number from 1 up, or -1 to go by num_train_epochs."
            )


def check_packages(training: "TrainingArguments", model: ModelConfig) -> None:
    """Refuses what needs a package that is not installed.

    Raises:
        ConvLlavaError: says which, and what to do.
    """
    available = get_available_reporting_integrations()
    for name in training.report_to or []:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ConvLlavaError(
                f"report_to is {name!r}; expected none, or some of {', '.join(sorted(INTEGRATION_TO_CALLBACK))}."
            )
        if name not in available:
            raise ConvLlavaError(f"report_to is {name!r}, which is not installed: install it, or set report_to: none.")
    if model.load_in_4bit or model.load_in_8bit:
        if not model.use_peft:
            raise ConvLlavaError(
                "Weights in 4 or 8 bits cannot be trained themselves: set use_peft, or leave load_in_4bit and "
                "load_in_8bit out."
            )
        if find_spec("bitsandbytes") is None:
            raise ConvLlavaError(
                "load_in_4bit and load_in_8bit need bitsandbytes: pip install 'convllava-hf[quantization]'"
            )
    if training.use_liger_kernel and find_spec("liger_kernel") is None:
        raise ConvLlavaError("use_liger_kernel needs liger-kernel: pip install liger-kernel, or leave it out.")
    try:
        get_quantization_config(model)
    except _REFUSALS as error:
        raise ConvLlavaError(f"The model cannot be quantized as the recipe says: {first_line(error)}") from error


def check_output(folder: str | os.PathLike) -> None:
    """Refuses a folder that cannot be written to.

    Raises:
        ConvLlavaError: says why.
    """
    name = os.fspath(folder)
    try:
        os.stat(name)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or first_line(error)
        raise ConvLlavaError(f"output_dir {name[:200]!r} cannot be used: {why}.") from error
    nearest = next(path for path in (Path(name).absolute(), *Path(name).absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise ConvLlavaError(f"output_dir is {name!r}, but {str(nearest)!r} is a file: name a folder.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConvLlavaError(f"output_dir is {name!r}, but {str(nearest)!r} cannot be written to.")


def check_model(training: "TrainingArguments", model: ModelConfig) -> None:
    """Builds the model without weights, with everything that the recipe asks for.

    Raises:
        ConvLlavaError: the attention, what trains, the adapter, the optimizer or the schedule is not possible.
    """
    if is_deepspeed_zero3_enabled():
        return  # which shards every model that is built, meant or not
    try:
        config = ConvLlavaConfig.from_pretrained(model.model_name_or_path, revision=model.model_revision)
        attention = {"attn_implementation": model.attn_implementation} if model.attn_implementation else {}
        with torch.device("meta"):
            empty = AutoModelForImageTextToText.from_config(config, trust_remote_code=False, **attention)
    except (*_REFUSALS, OSError) as error:
        what = f" with attn_implementation {model.attn_implementation!r}" if model.attn_implementation else ""
        raise ConvLlavaError(f"{model.model_name_or_path!r} cannot be built{what}: {first_line(error)}") from error
    if model.use_peft:
        _check_adapter(empty, model)
    else:
        set_trainable(empty, training.trainable)
    _check_optimizer(training, empty)


def check_resolution(resolution: int | None, processor: Any, model_name: str) -> None:
    """Refuses to train at another resolution than the recipe says.

    Raises:
        ConvLlavaError: images are padded to squares of another size.
    """
    images = processor.image_processor
    if resolution is None or images.image_aspect_ratio != "pad":
        return
    if (side := images.size["height"]) != resolution:
        raise ConvLlavaError(
            f"resolution is {resolution}, but {model_name!r} sees squares of {side} x {side} pixels: give "
            f"--resolution {side}, or name a checkpoint that was assembled with --resolution {resolution}."
        )


def _check_adapter(empty: nn.Module, model: ModelConfig) -> None:
    from peft import get_peft_model

    try:
        with torch.device("meta"):
            get_peft_model(empty, get_peft_config(model))
    except _REFUSALS as error:
        raise ConvLlavaError(f"The adapter cannot be made as the recipe says: {first_line(error)}") from error


def _check_optimizer(training: "TrainingArguments", empty: nn.Module) -> None:
    from .trainer import ConvLlavaTrainer

    name = training.optim.value
    try:
        optimizer_class, options = ConvLlavaTrainer.get_optimizer_cls_and_kwargs(training, empty)
        if own := {"params", "model", "optimizer_dict"} & set(options):
            raise ConvLlavaError(
                f"optim is {name!r}, which chooses its {', '.join(sorted(own))} by itself: here the recipe says what "
                "trains and at which rate. Choose another, such as adamw_torch_fused."
            )
        optimizer_class([nn.Parameter(torch.zeros(2))], **options)
    except ConvLlavaError:
        raise
    except _REFUSALS as error:
        raise ConvLlavaError(f"optim {name!r} cannot be used as the recipe says: {first_line(error)}") from error
    try:
        get_scheduler(
            training.lr_scheduler_type,
            optimizer=torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=1.0),
            num_warmup_steps=1,
            num_training_steps=10,
            scheduler_specific_kwargs=dict(training.lr_scheduler_kwargs or {}),
        )
    except _REFUSALS as error:
        raise ConvLlavaError(
            f"lr_scheduler_type {training.lr_scheduler_type.value!r} cannot be used with lr_scheduler_kwargs "
            f"{training.lr_scheduler_kwargs}: {first_line(error)}"
        ) from error


def _range(least: float, most: float) -> str:
    low = "a number above 0" if least == _ABOVE_0 else f"a number from {least:g} up"
    if most == _COUNT or most >= 1e3:
        return low if most >= _COUNT else f"{low} to {most:g}"
    return f"a number from {least:g} to below 1" if most == _BELOW_1 else f"a number from {least:g} to {most:g}"
