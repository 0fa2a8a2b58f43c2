"""What is looked at before a model is loaded: the checkpoint's files, the device, the dtype, the quantization."""

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import AutoProcessor, BitsAndBytesConfig
from transformers.utils import cached_file

from .checkpoint_errors import wrap_checkpoint_errors
from .errors import ConvLlavaError, first_line
from .modeling.configuration_convllava import ConvLlavaConfig
from .modeling.processing_convllava import ConvLlavaProcessor
from .trust import check_code, explain_refusal, from_checkpoint, warn_about_foreign_code


DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
CONVERTED, ORIGINAL = "converted", "original"
QUANTIZATIONS = ("4bit", "8bit")
_PROCESSOR_FILES = ("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]


def load_processor(
    source: str | os.PathLike, *, revision: str | None = None, trust_remote_code: bool = False
) -> ConvLlavaProcessor:
    """The processor of a checkpoint, which takes no weights to be read.

    Args:
        revision: of a checkpoint on the Hub.
        trust_remote_code: whether the checkpoint's own code may run, see `trust`.

    Raises:
        ConvLlavaError: `source` is no ConvLLaVA checkpoint, the processor's files are missing or broken, or it needs
            code that may not run.
    """
    check_checkpoint(source, revision=revision, trust_remote_code=trust_remote_code)
    _check_processor_files(source)
    options = {"trust_remote_code": trust_remote_code} | ({"revision": revision} if revision else {})
    with wrap_checkpoint_errors(source):
        try:
            processor = from_checkpoint(ConvLlavaProcessor, AutoProcessor, source, **options)
        except (OSError, ValueError) as error:  # ValueError: the tokenizer's files
            if not trust_remote_code and (reason := explain_refusal(error, source, revision)):
                raise ConvLlavaError(reason) from error
            raise
    with wrap_checkpoint_errors(
        source, "Cannot use the chat template of the checkpoint"
    ):  # which may try to leave the sandbox
        processor.apply_chat_template(_QUESTION, add_generation_prompt=True, tokenize=False)
    if not trust_remote_code:
        warn_about_foreign_code(source, revision)
    return processor


def check_checkpoint(
    source: str | os.PathLike, *, revision: str | None = None, trust_remote_code: bool = False
) -> None:
    """Look at config.json alone, before anything large is read, and refuse what is not in transformers' layout.

    Whoever only asks a model takes original checkpoints as well: see `convert.cache.converted_checkpoint`.

    Raises:
        ConvLlavaError: `source` is no ConvLLaVA checkpoint, is one of the original code, or asks for code that may not
            run; the message says so.
    """
    if kind_of_checkpoint(source, revision=revision, trust_remote_code=trust_remote_code) == ORIGINAL:
        raise ConvLlavaError(
            f"{os.fspath(source)!r} is a checkpoint in the layout of the original code. Convert it first: "
            f"convllava convert {os.fspath(source)} OUT"
        )


def kind_of_checkpoint(
    source: str | os.PathLike, *, revision: str | None = None, trust_remote_code: bool = False
) -> str:
    """`CONVERTED` or `ORIGINAL`: whether a checkpoint is in transformers' layout or in that of the original code.

    Raises:
        ConvLlavaError: `source` is neither, or asks for code that may not run; the message says so.
    """
    name = os.fspath(source)
    config = _read_config(name, revision)
    model_type = config.get("model_type")
    if model_type == ConvLlavaConfig.model_type:
        check_code(name, config, trust_remote_code)
        return CONVERTED
    if "mm_vision_tower" in config:
        return ORIGINAL
    raise ConvLlavaError(
        f"{name!r} is no ConvLLaVA checkpoint: its config.json has the model_type {model_type!r}, and "
        f"{ConvLlavaConfig.model_type!r} is expected."
    )


def _check_processor_files(source: str | os.PathLike) -> None:
    """Refuses a folder that lacks what the processor is made of; transformers would go on without a part of it."""
    folder = Path(source)
    if folder.is_dir() and (missing := [name for name in _PROCESSOR_FILES if not (folder / name).is_file()]):
        raise ConvLlavaError(
            f"The checkpoint {os.fspath(source)!r} is incomplete: {', '.join(missing)} is missing. Save the processor "
            "along with the model, or convert the original again."
        )


def _read_config(name: str, revision: str | None = None) -> dict[str, Any]:
    path = Path(name)
    if path.is_file():
        raise ConvLlavaError(f"{name!r} is a file, and the folder of a checkpoint is expected.")
    if path.is_dir():
        config_file = path / "config.json"
        if not config_file.is_file():
            raise ConvLlavaError(f"{name!r} is no checkpoint: the folder holds no config.json.")
    else:
        config_file = _fetch_config(name, revision)
    try:
        config = json.loads(Path(config_file).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConvLlavaError(f"{str(config_file)!r} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConvLlavaError(f"{str(config_file)!r} holds no JSON object, so it is no model's configuration.")
    return config


def _fetch_config(name: str, revision: str | None = None) -> str:
    try:
        validate_repo_id(name)
    except HFValidationError:
        repo_like = False
    else:
        repo_like = "/" in name and not name.startswith((".", "~"))
    if not repo_like:
        raise ConvLlavaError(f"There is no folder {name!r}, and it is no model's id on the Hub (owner/name) either.")
    try:
        return cached_file(name, "config.json", revision=revision)
    except OSError as error:
        raise ConvLlavaError(
            f"There is no folder {name!r}, and no model of that id could be read from the Hub: {first_line(error)}"
        ) from error


def choose_device(device: str | torch.device | None = None) -> torch.device:
    """The device asked for, or the best there is: CUDA, else Apple's GPU (`mps`), else the CPU.

    Raises:
        ConvLlavaError: the device is unknown to torch or is not in this machine.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(device)
        if device.type == "meta":
            raise RuntimeError("it computes nothing")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:  # torch asserts that it was compiled with CUDA
        raise ConvLlavaError(f"The device {str(device)!r} cannot be used: {first_line(error)}") from error
    return device


def choose_dtype(device: torch.device, dtype: str | torch.dtype | None = None) -> torch.dtype:
    """The dtype asked for, or bfloat16 where the device computes in it natively.

    A GPU without bfloat16 gets float16, as in the original's inference code: float32 would not fit 7 B parameters into
    most of them. A CPU without it gets float32: it emulates the others, slower than float32 is.

    Raises:
        ConvLlavaError: the name is none of `DTYPES`.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype is not None:
        if dtype not in DTYPES:
            raise ConvLlavaError(f"The dtype {dtype!r} is not supported: choose one of {', '.join(DTYPES)}.")
        return DTYPES[dtype]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu":
        return torch.bfloat16 if _cpu_has_bfloat16() else torch.float32
    return torch.float16


def _cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies matrices of bfloat16 in hardware; `False` where torch is too old to tell."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def quantization_config(quantization: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """What bitsandbytes is to do.

    Raises:
        ConvLlavaError: the name is none of `QUANTIZATIONS`, or bitsandbytes is not installed.
    """
    if quantization not in QUANTIZATIONS:
        raise ConvLlavaError(f"quantization is {quantization!r}: choose one of {', '.join(QUANTIZATIONS)}.")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConvLlavaError(f"{quantization} needs bitsandbytes: pip install 'convllava-hf[quantization]'")
    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
