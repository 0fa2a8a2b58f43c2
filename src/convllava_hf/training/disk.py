"""A disk that is full, in one line: which file, how much is missing, and what is still complete."""

import errno
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

from ..errors import ConvLlavaError, first_line
from .checkpoints import get_last_complete_checkpoint


logger = logging.getLogger(__name__)

_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# safetensors and torch write by themselves and raise their own errors, in which only the text says what happened.
_TEXTS = (
    "No space left on device",
    "Disk quota exceeded",
    "File too large",
    *(f"os error {number}" for number in _ERRNOS),
    "PytorchStreamWriter failed writing",
    "file write failed",
    "unexpected pos",
)


class DiskFullError(ConvLlavaError):
    """A file could not be written, since the disk is full. Not a mistake in what was asked for: exit code 1."""

    exit_code = 1


def is_full_disk(error: BaseException | None) -> bool:
    """Whether an error or one of its causes says that there was no space for a file."""
    return any(
        (isinstance(one, OSError) and one.errno in _ERRNOS)
        or (isinstance(one, (SafetensorError, RuntimeError, OSError)) and any(text in str(one) for text in _TEXTS))
        for one in _chain(error)
    )


@contextmanager
def reporting_full_disk(folder: str | os.PathLike, needed: Callable[[], int] | None = None) -> Iterator[None]:
    """Turns any error in the block into a `DiskFullError` if there was no space for a file.

    Args:
        folder: what is written to.
        needed: bytes of all that is to be written there.
    """
    try:
        yield
    except DiskFullError:
        raise
    except Exception as error:
        if not is_full_disk(error):
            raise
        raise DiskFullError(_message(Path(folder), error, needed() if needed else 0)) from error


def checkpoint_bytes(model: nn.Module, *, adapter: bool, states: bool, optimizer=None) -> int:
    """Bytes of a checkpoint, about.

    Args:
        adapter: whether only what trains is saved.
        states: whether the optimizer's states are saved too.
        optimizer: whose states these are; before the first step they are taken to be AdamW's.
    """
    weights = {id(one): one for one in model.parameters() if one.requires_grad or not adapter}
    trained = [one for one in weights.values() if one.requires_grad]
    size = sum(one.numel() * one.element_size() for one in weights.values())
    if not states:
        return size
    kept = (state for of_one in getattr(optimizer, "state", {}).values() for state in of_one.values())
    tensors = [state for state in kept if torch.is_tensor(state)] or 2 * trained
    return size + sum(one.numel() * one.element_size() for one in tensors)


def warn_if_low_on_space(folder: str | os.PathLike, needed: int) -> None:
    """Warns before the first step if there is no space for a checkpoint."""
    free = shutil.disk_usage(_existing(Path(folder))).free
    if free < needed:
        logger.warning(
            "A checkpoint takes about %s, and %s has %s free: saving will fail unless space is freed.",
            _size(needed),
            folder,
            _size(free),
        )


def _message(folder: Path, error: Exception, needed: int) -> str:
    written = _files(folder)
    # What was written last, where the error itself names nothing.
    file = _file_of(error) or max(written, key=lambda path: path.stat().st_mtime_ns, default=folder)
    free = shutil.disk_usage(_existing(folder)).free
    missing = needed - free - sum(path.stat().st_size for path in written)
    text = f"There is no space left for {file}: {_size(free)} are free"
    if missing > 0:
        text += f", and {folder} needs about {_size(needed)} in total, so about {_size(missing)} are missing"
    else:  # a quota, a limit on the size of files, or a cache on another disk
        text += f", which is not enough or may not be used ({first_line(error)})"
    output = folder.parent if folder.name.startswith("checkpoint-") else folder
    whole = get_last_complete_checkpoint(output) if output.is_dir() else None
    if whole is not None:
        text += f". The last complete checkpoint is {whole}: free some space and continue with"
        text += " --resume_from_checkpoint true"
    else:
        text += ". There is no complete checkpoint yet: free some space and start again"
    return text + (f". {folder} is incomplete and can be deleted." if whole != folder and folder != output else ".")


def _files(folder: Path) -> list[Path]:
    """The files in a folder, at any depth, but not those of checkpoints in it."""
    if not folder.is_dir():
        return []
    own = (path for path in folder.iterdir() if not path.name.startswith("checkpoint-"))
    return [file for path in own for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()]


def _file_of(error: BaseException | None) -> Path | None:
    for one in _chain(error):
        if isinstance(one, OSError) and isinstance(one.filename, (str, os.PathLike)):
            return Path(one.filename)
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it came from, each once: `raise ... from` can lead in a circle."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _existing(path: Path) -> Path:
    return next(one for one in (path.absolute(), *path.absolute().parents) if one.exists())


def _size(size: int) -> str:
    for number, unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= number:
            return f"{size / number:.1f} {unit}"
    return f"{size} bytes"
