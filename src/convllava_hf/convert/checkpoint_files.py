"""Finding checkpoints and reading them tensor by tensor."""

import contextlib
import os
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from ..errors import ConvLlavaError, first_line
from ..utils.json_files import read_json_object
from ..utils.links import check_links
from ..utils.repo_ids import is_repo_id
from .writing import SAFETENSORS_DTYPES


_DTYPES = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items()}
_WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
_SHARD = re.compile(r"(?!\.)[^/\\:\x00-\x1f]+\.(?:safetensors|bin)")
# What is small in a repository; its weights are downloaded by name, and only those that are read.
SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt")
_HUB_ERRORS = (OSError, ValueError, HfHubHTTPError, HFValidationError)


class UnreachableError(ConvLlavaError):
    """A folder or repository that does not exist, is private, or cannot be reached now."""


def locate(
    reference: str | Path, what: str, weights: Sequence[str] = ("",), files: Sequence[str] = SMALL_FILES
) -> Path:
    """The folder that `reference` names: a folder on disk, or a repository on the Hub, which is downloaded.

    Of weights in both formats only the safetensors are downloaded.

    Args:
        reference: a path or a Hub id.
        what: what it is, for messages.
        weights: the repository's folders of which the weights are wanted as well; `""` is the repository itself.
        files: patterns of the other files that are wanted.

    Raises:
        UnreachableError: neither a folder nor a repository that can be downloaded.
        ConvLlavaError: it is a file, a folder with a link out of it, or its weights cannot be downloaded.
    """
    path = Path(os.path.expanduser(reference))
    if os.path.isdir(path):
        check_links(path)  # much of it is copied into the new checkpoint
        return path
    if os.path.exists(path):
        raise ConvLlavaError(f"{what}: {path} is a file; expected the folder of a checkpoint or an id on the Hub.")
    if not is_repo_id(str(reference), needs_owner=False):
        raise UnreachableError(f"{what}: there is no folder {path}. Give an existing folder or an id on the Hub.")
    try:
        folder = Path(snapshot_download(str(reference), allow_patterns=list(files)))
    except _HUB_ERRORS as error:
        raise UnreachableError(
            f"{what}: there is no folder {str(reference)!r}, and as an id on the Hub it cannot be downloaded: "
            f"{first_line(error)}"
        ) from error
    for inner in weights:
        _download_weights(str(reference), folder, inner, what)
    return folder


def _download_weights(repository: str, folder: Path, inner: str, what: str) -> None:
    """Downloads the weights of a repository's folder into its snapshot, if it has any.

    Args:
        folder: the snapshot, which is called as its commit is.

    Raises:
        ConvLlavaError: there are some that cannot be downloaded, or the Hub cannot be asked whether there are.
    """
    unreachable = None
    prefix = f"{inner}/" if inner else ""
    for name in _WEIGHT_FILES:
        try:
            found = Path(hf_hub_download(repository, prefix + name, revision=folder.name))
        except LocalEntryNotFoundError as error:
            unreachable = error
        except EntryNotFoundError:
            continue
        except _HUB_ERRORS as error:
            raise ConvLlavaError(_not_downloaded(repository, prefix + name, what, error)) from error
        else:
            shards = _shard_names(found, what) if name.endswith(".index.json") else []
            try:
                for shard in shards:  # by name: in the cache, these are found without the Hub too
                    hf_hub_download(repository, prefix + shard, revision=folder.name)
            except _HUB_ERRORS as error:
                raise ConvLlavaError(_not_downloaded(repository, prefix + name, what, error)) from error
            return
    if unreachable is not None:
        raise ConvLlavaError(
            f"{what}: the Hub cannot be asked for the weights of {repository}: {first_line(unreachable)} Try again."
        ) from unreachable


def _not_downloaded(repository: str, name: str, what: str, error: BaseException) -> str:
    return f"{what}: {repository} has {name}, but the weights cannot be downloaded: {first_line(error)}. Try again."


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
        """The wanted weights in file order. Each may live in a mapped file: drop it before the next one."""
        wanted = set(wanted)
        for file in self.files:
            if wanted.intersection(self.shapes[file]):
                yield from ((name, tensor) for name, tensor in _iterate(file, self.what) if name in wanted)

    @contextlib.contextmanager
    def open(self, file: Path) -> Iterator[Callable[[str], torch.Tensor]]:
        """One of `files`, open: a function that reads a tensor by its name, in any order."""
        if file.suffix != ".safetensors":
            yield _load_pickle(file, self.what).__getitem__
            return
        with safe_open(file, framework="pt") as handle:
            yield handle.get_tensor


def has_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _WEIGHT_FILES)


def indexed_weights(folder: Path, what: str) -> list[str] | None:
    """Names of the weights by the index in a folder, without the shards; `None` where there is no index."""
    for name in _WEIGHT_FILES:
        if (folder / name).is_file():
            return list(_weight_map(folder / name, what)) if name.endswith(".index.json") else None
    return None


def _weight_map(index: Path, what: str) -> dict[str, str]:
    """Which file holds each weight, by an index.

    Raises:
        ConvLlavaError: there is no map, or it names files that are not next to it.
    """
    weight_map = read_json_object(index, what).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConvLlavaError(f"{what}: {index} has no weight_map.")
    for file in weight_map.values():
        if not isinstance(file, str) or not _SHARD.fullmatch(file):
            raise ConvLlavaError(
                f"{what}: {index} names the file {file!r}; expected a file next to it. The index "
                "is damaged, or was made to read other files: download it again from a source that you trust."
            )
    return weight_map


def _shard_names(index: Path, what: str) -> list[str]:
    return list(dict.fromkeys(_weight_map(index, what).values()))


def _weight_files(path: Path, what: str) -> list[Path]:
    if path.is_file():
        return [path]
    for name in _WEIGHT_FILES:
        if not (path / name).is_file():
            continue
        if not name.endswith(".index.json"):
            return [path / name]
        files = [path / file for file in _shard_names(path / name, what)]
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
    # Training scripts save the weights together with the optimizer's state.
    for key in ("state_dict", "model_ema", "model"):
        if isinstance(state_dict, dict) and isinstance(state_dict.get(key), dict):
            state_dict = state_dict[key]
            break
    if not isinstance(state_dict, dict):
        raise ConvLlavaError(f"{what}: {file} holds no state dict but a {type(state_dict).__name__}.")
    return {name.removeprefix("module."): value for name, value in state_dict.items()}
