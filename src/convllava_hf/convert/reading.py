"""Finding checkpoints and reading them tensor by tensor."""

import json
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open

from ..errors import ConvLlavaError, first_line
from .writing import SAFETENSORS_DTYPES


_DTYPES = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items()}
_WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?")
# Weights in other frameworks' formats are not read, so they are not downloaded.
_DOWNLOADED = ["*.json", "*.jinja", "*.model", "*.txt", "*.safetensors", "*.bin"]


def locate(reference: str | Path, what: str) -> Path:
    """The folder that `reference` names: a folder on disk, or a repository on the Hub, which is downloaded.

    Args:
        reference: a path or a Hub id.
        what: what it is, for messages.

    Raises:
        ConvLlavaError: neither a folder nor a repository that can be downloaded.
    """
    path = Path(reference).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ConvLlavaError(f"{what}: {path} is a file; expected the folder of a checkpoint or an id on the Hub.")
    if not _HUB_ID.fullmatch(str(reference)):
        raise ConvLlavaError(f"{what}: there is no folder {path}. Give an existing folder or an id on the Hub.")
    try:
        return Path(snapshot_download(str(reference), allow_patterns=_DOWNLOADED))
    except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
        raise ConvLlavaError(
            f"{what}: there is no folder {str(reference)!r}, and as an id on the Hub it cannot be downloaded: "
            f"{first_line(error)}"
        ) from error


def read_json(path: Path, what: str) -> dict:
    """The object in a JSON file.

    Raises:
        ConvLlavaError: the file is missing or does not hold a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConvLlavaError(f"{what}: {path} is missing.") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConvLlavaError(f"{what}: {path} is not JSON ({error}).") from None
    if not isinstance(value, dict):
        raise ConvLlavaError(f"{what}: {path} holds no JSON object.")
    return value


class Weights:
    """The weights of a checkpoint, read one file at a time.

    Args:
        path: a folder with safetensors or PyTorch weights, sharded or not, or one such file.
        what: what it is, for messages.

    Raises:
        ConvLlavaError: there are no weights, a shard is missing, or a file cannot be read safely.
    """

    def __init__(self, path: Path, what: str):
        self.what = what
        self.files = _weight_files(Path(path), what)
        # {file: {name: shape}}; reading it touches no weights.
        self.shapes: dict[Path, dict[str, torch.Size]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for file in self.files:
            self.shapes[file] = {}
            for name, tensor in _iterate(file, what, only_metadata=True):
                self.shapes[file][name] = tensor.shape
                self.dtypes[name] = tensor.dtype

    def __iter__(self) -> Iterator[str]:
        """The names of all weights, file by file."""
        return (name for names in self.shapes.values() for name in names)

    def __contains__(self, name: str) -> bool:
        return name in self.dtypes

    def shape(self, name: str) -> torch.Size:
        return next(names[name] for names in self.shapes.values() if name in names)

    def tensors(self, wanted) -> Iterator[tuple[str, torch.Tensor]]:
        """The wanted weights in file order. Each may live in a mapped file: let go of it before the next."""
        wanted = set(wanted)
        for file in self.files:
            if wanted.intersection(self.shapes[file]):
                yield from ((name, tensor) for name, tensor in _iterate(file, self.what) if name in wanted)


def has_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _WEIGHT_FILES)


def _weight_files(path: Path, what: str) -> list[Path]:
    if path.is_file():
        return [path]
    for name in _WEIGHT_FILES:
        if not (path / name).is_file():
            continue
        if not name.endswith(".index.json"):
            return [path / name]
        index = read_json(path / name, what).get("weight_map")
        if not isinstance(index, dict) or not index:
            raise ConvLlavaError(f"{what}: {path / name} has no weight_map.")
        files = [path / file for file in dict.fromkeys(index.values())]
        if lacking := [file.name for file in files if not file.is_file()]:
            raise ConvLlavaError(
                f"{what}: {name} names {len(files)} files, but {len(lacking)} are missing from {path}: "
                f"{', '.join(lacking)}. Download them again."
            )
        return files
    hint = ""
    if (path / "mm_projector.bin").is_file():
        hint = " It holds only mm_projector.bin, the projector of a stage-1 run: convert the whole model."
    raise ConvLlavaError(f"{what}: {path} holds no weights; looked for {', '.join(_WEIGHT_FILES)}.{hint}")


def _iterate(file: Path, what: str, only_metadata: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
    if file.suffix == ".safetensors":
        yield from _iterate_safetensors(file, what, only_metadata)
    else:
        state_dict = _load_pickle(file, what)
        for name in list(state_dict):
            tensor = state_dict.pop(name)
            if isinstance(tensor, torch.Tensor):
                yield name, tensor


def _iterate_safetensors(file: Path, what: str, only_metadata: bool):
    try:
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():
                if not only_metadata:
                    yield name, handle.get_tensor(name)
                    continue
                view = handle.get_slice(name)
                if (dtype := _DTYPES.get(view.get_dtype())) is None:
                    raise ConvLlavaError(
                        f"{what}: {name} in {file} has the dtype {view.get_dtype()}; quantized weights cannot be "
                        "converted. Start from the weights before quantization."
                    )
                yield name, torch.empty(view.get_shape(), dtype=dtype, device="meta")
    except (SafetensorError, OSError) as error:
        raise ConvLlavaError(f"{what}: {file} cannot be read as safetensors ({error}). Is it complete?") from error


def _load_pickle(file: Path, what: str) -> dict:
    """The state dict in a PyTorch file, mapped where the format allows it."""
    try:
        try:
            state_dict = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:
            # Files of PyTorch before 1.6 cannot be mapped.
            state_dict = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise ConvLlavaError(
            f"{what}: {file} cannot be read as PyTorch weights ({first_line(error)}). It must hold tensors and "
            "nothing else."
        ) from error
    # Training scripts put the weights beside the optimizer's state.
    for key in ("state_dict", "model_ema", "model"):
        if isinstance(state_dict, dict) and isinstance(state_dict.get(key), dict):
            state_dict = state_dict[key]
            break
    if not isinstance(state_dict, dict):
        raise ConvLlavaError(f"{what}: {file} holds no state dict but a {type(state_dict).__name__}.")
    return {name.removeprefix("module."): value for name, value in state_dict.items()}
