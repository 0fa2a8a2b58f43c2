"""Writing a checkpoint: tensor by tensor, into a temporary folder that is renamed at the end if all went well."""

import contextlib
import json
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch

from ..errors import ConvLlavaError
from ..utils.atomic import check_destination, lock_next_to, naming, replacing_folder


SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(size: int | str) -> int:
    """Bytes of a size such as `"2GB"` or `"500MiB"`.

    Raises:
        ConvLlavaError: not a positive size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(size).strip())
    unit = _UNITS.get(match[2].upper()) if match else None
    number = float(match[1]) * unit if match and unit else 0
    if not 1 <= number < 2**63:
        raise ConvLlavaError(f"max_shard_size is {size!r:.60}; expected a number of bytes or a size such as '2GB'.")
    return int(number)


@contextlib.contextmanager
def new_checkpoint_folder(output: str | Path, overwrite: bool, inputs: tuple[Path, ...] = ()) -> Iterator[Path]:
    """A temporary folder next to `output` that becomes `output` if the block succeeds, and is deleted if not.

    Args:
        output: the folder to make.
        overwrite: whether an existing checkpoint there is replaced, after the block, in one step.
        inputs: folders that are read meanwhile; `output` may be none of them and contain none of them.

    Raises:
        ConvLlavaError: `output` exists and may not be replaced, or another process is making it.
    """
    output = _real(output)
    check_output(output, overwrite, inputs)
    with replacing_folder(output) as temporary:
        yield temporary


def check_output(output: str | Path, overwrite: bool, inputs: tuple[Path, ...] = ()) -> None:
    """Refuses an output that cannot be written, before any long work; see `new_checkpoint_folder`.

    If a process died while it was replacing the output, the old one is put back and leftovers are deleted.
    """
    if not os.fspath(output):
        raise ConvLlavaError("The name of the folder to write is empty.")
    check_destination(output, "The folder to write")
    output = _real(output)
    if output.parent.is_dir():
        with lock_next_to(output):
            pass
    if not os.path.lexists(output):
        return
    if not overwrite:
        raise ConvLlavaError(f"{output} exists already. Choose another folder, or pass --overwrite to replace it.")
    for folder in inputs:
        folder = Path(folder).resolve()
        if output == folder or output in folder.parents:
            raise ConvLlavaError(f"{output} contains what is being read ({folder}); choose another folder to write.")
    if not output.is_dir() or (any(output.iterdir()) and not _is_checkpoint(output)):
        raise ConvLlavaError(
            f"{output} is not a model checkpoint, so it is not replaced even with --overwrite. Choose another folder, "
            "or remove it yourself."
        )


def _real(path: str | Path) -> Path:
    """As `Path.resolve`, which before Python 3.13 fails on circular links."""
    return Path(os.path.realpath(os.path.expanduser(path)))


def _is_checkpoint(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "model_type" in config


@dataclass
class _Shard:
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = field(default_factory=dict)
    size: int = 0


class WeightSource(Protocol):
    """Weights that are read by name, one at a time."""

    def __iter__(self) -> Iterator[str]: ...

    def shape(self, name: str) -> torch.Size: ...

    def tensors(self, wanted: Any) -> Iterator[tuple[str, torch.Tensor]]: ...


class ShardWriter:
    """Writes safetensors shards one tensor at a time, so that memory does not grow with the shards' size.

    The safetensors library wants a whole shard at once, and before 0.8 copies it. Its format is a header of JSON with
    every tensor's place, then the tensors' bytes; sizes are known before the weights are read, so the header can go
    first.

    Args:
        folder: where to write.
        tensors: name, shape and dtype of every tensor, in the order in which they will be written.
        max_shard_size: bytes of a shard; a larger tensor gets its own shard.
    """

    def __init__(self, folder: Path, tensors: dict[str, tuple[tuple[int, ...], torch.dtype]], max_shard_size: int):
        self.folder = folder
        self.total = 0
        shards = [_Shard()]
        for name, (shape, dtype) in tensors.items():
            size = torch.Size(shape).numel() * dtype.itemsize
            if shards[-1].tensors and shards[-1].size + size > max_shard_size:
                shards.append(_Shard())
            shards[-1].tensors[name] = (tuple(shape), dtype)
            shards[-1].size += size
            self.total += size
        self._shards = shards
        self._names = [
            "model.safetensors" if len(shards) == 1 else f"model-{index:05d}-of-{len(shards):05d}.safetensors"
            for index in range(1, len(shards) + 1)
        ]
        self._pending = [(index, name) for index, shard in enumerate(shards) for name in shard.tensors]
        self._pending.reverse()
        self._file: BinaryIO | None = None
        self._open_shard = -1

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Writes the next tensor, in the dtype announced for it.

        Raises:
            ValueError: it is not the next one, or its shape is not the one announced.
        """
        index, expected = self._pending.pop()
        shape, dtype = self._shards[index].tensors[expected]
        if name != expected or tuple(tensor.shape) != shape:
            raise ValueError(
                f"The next tensor to write is {expected} of shape {shape}, not {name} of {tuple(tensor.shape)}."
            )
        file = self._begin(index) if self._file is None or index != self._open_shard else self._file
        data = tensor.detach().to(device="cpu", dtype=dtype).contiguous().reshape(-1)
        with naming(self.folder / self._names[index]):
            file.write(memoryview(data.view(torch.uint8).numpy()))  # pyright: ignore[reportArgumentType]

    def finish(self) -> None:
        """Closes the last shard and writes the index, where there is more than one.

        Raises:
            ValueError: tensors that were announced have not been written.
        """
        self.close()
        if self._pending:
            raise ValueError(f"{len(self._pending)} tensors were not written, {self._pending[-1][1]} the first.")
        if len(self._shards) > 1:
            weight_map = {
                name: file for file, shard in zip(self._names, self._shards, strict=True) for name in shard.tensors
            }
            index = {"metadata": {"total_size": self.total}, "weight_map": dict(sorted(weight_map.items()))}
            path = self.folder / "model.safetensors.index.json"
            path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def close(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            with naming(Path(file.name)):
                file.close()

    def _begin(self, index: int) -> BinaryIO:
        self.close()
        header: dict = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, (shape, dtype) in self._shards[index].tensors.items():
            size = torch.Size(shape).numel() * dtype.itemsize
            header[name] = {
                "dtype": SAFETENSORS_DTYPES[dtype],
                "shape": list(shape),
                "data_offsets": [offset, offset + size],
            }
            offset += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
        file = open(self.folder / self._names[index], "wb")  # noqa: SIM115 (closed with the next shard)
        self._file, self._open_shard = file, index
        with naming(Path(file.name)):
            file.write(struct.pack("<Q", len(text)) + text)
        return file
