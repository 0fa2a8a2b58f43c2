"""What is checked before a model is loaded: the checkpoint's files, the device, the dtype, the quantization."""

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor, BitsAndBytesConfig
from transformers.utils import cached_file

from ..errors import ConvLlavaError, first_line
from ..modeling.configuration_convllava import ConvLlavaConfig
from ..modeling.processing_convllava import ConvLlavaProcessor
from ..options import DTYPES as DTYPE_NAMES
from ..options import QUANTIZATIONS, with_image_options
from ..utils.json_files import read_json_object
from ..utils.repo_ids import is_repo_id
from .checkpoint_errors import wrap_checkpoint_errors
from .trust import check_code, explain_refusal, from_checkpoint, warn_about_foreign_code


DTYPES = {name: getattr(torch, name) for name in DTYPE_NAMES}
CONVERTED, ORIGINAL = "converted", "original"
PROCESSOR_FILES = ("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]


def load_processor(
    source: str | os.PathLike,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    image_options: Mapping[str, Any] | None = None,
) -> ConvLlavaProcessor:
    """The processor of a checkpoint; no weights are read.

    Args:
        revision: of a checkpoint on the Hub.
        trust_remote_code: whether the checkpoint's own code may run, see `trust`.
        image_options: how large the model sees images, where not as the checkpoint says: see `options.ImageOptions`.

    Raises:
        ConvLlavaError: `source` is not a ConvLLaVA checkpoint, the processor's files are missing or broken, it needs
            code that may not run, or the image options do not go together.
    """
    check_checkpoint(source, revision=revision, trust_remote_code=trust_remote_code)
    _check_processor_files(source)
    options: dict[str, Any] = {"revision": revision} if revision else {}
    with wrap_checkpoint_errors(source):
        try:
            processor = from_checkpoint(
                ConvLlavaProcessor, AutoProcessor, source, trust_remote_code=trust_remote_code, **options
            )
        except (OSError, ValueError) as error:  # ValueError: the tokenizer's files
            if not trust_remote_code and (reason := explain_refusal(error, source, revision)):
                raise ConvLlavaError(reason) from error
            raise
    # A chat template may try to leave its sandbox.
    with wrap_checkpoint_errors(source, "Cannot use the chat template of the checkpoint"):
        processor.apply_chat_template(_QUESTION, add_generation_prompt=True, tokenize=False)
    if not trust_remote_code:
        warn_about_foreign_code(source, revision)
    return with_image_options(processor, image_options)


def check_checkpoint(
    source: str | os.PathLike, *, revision: str | None = None, trust_remote_code: bool = False
) -> None:
    """Reads config.json only, before anything large, and refuses what is not in transformers' layout.

    Inference takes original checkpoints as well: see `convert.cache.converted_checkpoint`.

    Raises:
        ConvLlavaError: `source` is not a ConvLLaVA checkpoint, is one of the original code, or asks for code that may
            not run; the message says so.
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
        f"{name!r} is not a ConvLLaVA checkpoint: its config.json has the model_type {model_type!r}, and "
        f"{ConvLlavaConfig.model_type!r} is expected."
    )


def _check_processor_files(source: str | os.PathLike) -> None:
    """Refuses a folder that lacks files of the processor; transformers would load it without a part."""
    folder = Path(source)
    if folder.is_dir() and (missing := [name for name in PROCESSOR_FILES if not (folder / name).is_file()]):
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
            raise ConvLlavaError(f"{name!r} is not a checkpoint: the folder has no config.json.")
    else:
        config_file = _fetch_config(name, revision)
    return read_json_object(Path(config_file), f"The checkpoint {name!r}")


def _fetch_config(name: str, revision: str | None = None) -> str:
    if not is_repo_id(name):
        raise ConvLlavaError(f"There is no folder {name!r}, and it is not the id of a model on the Hub (owner/name).")
    try:
        found = cached_file(name, "config.json", revision=revision)
        if found is None:
            raise OSError("it has no config.json")
        return found
    except OSError as error:
        raise ConvLlavaError(
            f"There is no folder {name!r}, and no model with that id could be read from the Hub: {first_line(error)}"
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
    """The configuration of bitsandbytes.

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
