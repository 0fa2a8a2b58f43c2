"""Original checkpoints used as they are: converted once into a cache folder, and taken from there afterwards.

The cache is `convllava/` in the folder of Hugging Face's caches (`HF_HOME`), or what the environment variable
`CONVLLAVA_CACHE` names. A converted checkpoint in it is called by what it was made from: the original's commit on the
Hub, or names, sizes and times of its files; the same of its vision tower; and the code that converted it. Nothing is
ever removed from it: each folder in it can be deleted at any time.
"""

import contextlib
import errno
import functools
import hashlib
import json
import logging
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError

from ..errors import ConvLlavaError, first_line
from ..inference.loading import ORIGINAL, kind_of_checkpoint
from ..training_record import read_record


logger = logging.getLogger(__name__)

CACHE_VARIABLE = "CONVLLAVA_CACHE"
_FULL_OR_CLOSED = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),  # full
    *(errno.EROFS, errno.EACCES, errno.EPERM),  # closed
    *(errno.EEXIST, errno.ENOTDIR),  # no folder
}
_CHECKPOINT_FILES = {".json", ".safetensors", ".bin", ".model", ".txt"}


def converted_checkpoint(source: str | os.PathLike, *, trust_remote_code: bool = False) -> str:
    """The checkpoint to load for `source`: itself, or of an original checkpoint its copy in transformers' layout.

    The copy is made the first time, which takes minutes for a model of 7 B parameters and as much space as the
    original, and is logged. If two processes want it at the same time, one makes it for both.

    Args:
        source: folder or Hub id of a checkpoint, in transformers' layout or in that of the original code.
        trust_remote_code: whether the checkpoint's own code may run, see `trust`.

    Raises:
        ConvLlavaError: it is no checkpoint of either kind, it cannot be converted, or the cache cannot be written.
    """
    name = os.fspath(source)
    if kind_of_checkpoint(name, trust_remote_code=trust_remote_code) != ORIGINAL:
        return name
    folder = cache_folder() / _cached_name(name)
    if not _is_there(folder):
        _convert_once(name, folder)
    elif _took_the_second_choice(folder):
        logger.warning(
            "%s has the vision tower of its shards, which the original would not use: when it was converted, the one "
            "that its config.json names was not available.",
            name,
        )
    return str(folder)


def cache_folder() -> Path:
    """The folder of the converted checkpoints, which need not exist yet."""
    return Path(os.path.expanduser(os.environ.get(CACHE_VARIABLE) or os.path.join(constants.HF_HOME, "convllava")))


def _convert_once(name: str, folder: Path) -> None:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _alone(name, folder):
            if _is_there(folder):  # another process was first
                return
            logger.warning(
                "%s is a checkpoint in the layout of the original code: converting it once into %s.", name, folder
            )
            _convert(name, folder)
    except OSError as error:
        if error.errno not in _FULL_OR_CLOSED:
            raise
        raise ConvLlavaError(
            f"{name!r} is a checkpoint in the layout of the original code, and its converted copy cannot be written "
            f"into the cache {str(folder.parent)!r}: {error.strerror}. Name another folder with the environment "
            f"variable {CACHE_VARIABLE}, or convert it yourself: convllava convert {name} OUT"
        ) from error


@contextlib.contextmanager
def _alone(name: str, folder: Path) -> Iterator[None]:
    """Waits until no other process converts into `folder`, and keeps others from starting."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder.with_name(f".cached-{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("Waiting for another process, which is converting %s.", name)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _convert(name: str, folder: Path) -> None:
    from .checkpoint import convert_checkpoint

    try:
        convert_checkpoint(name, folder, progress=sys.stderr.isatty())
    except ConvLlavaError as error:
        raise ConvLlavaError(
            f"{name!r} is a checkpoint in the layout of the original code, which cannot be converted. {error} Options "
            f"for it has the command convllava convert {name} OUT."
        ) from error


def _is_there(folder: Path) -> bool:
    return (folder / "config.json").is_file()  # a checkpoint gets its name when it is complete


def _took_the_second_choice(folder: Path) -> bool:
    choice = read_record(folder)["origin"].get("vision_tower_choice")
    return isinstance(choice, dict) and choice.get("taken") == "shards" and not choice.get("asked_for")


def _cached_name(name: str) -> str:
    """The name in the cache: readable at its start, and different if anything that the content depends on differs."""
    folder, state = _state(name)
    states = {"checkpoint": state, "tower": _tower_state(name, folder), "code": _code()}
    digest = hashlib.sha256(json.dumps(states, sort_keys=True).encode()).hexdigest()[:16]
    readable = re.sub(r"[^\w.-]+", "--", Path(name).resolve().name if os.path.isdir(name) else name)
    return f"{readable.lstrip('.-')[-80:] or 'checkpoint'}-{digest}"


def _state(name: str) -> tuple[Path, list]:
    """Where the config.json of a checkpoint lies, and what changes when anything in the checkpoint does.

    Raises:
        OSError, ValueError: there is no folder and no repository of that name, as far as is known here.
    """
    if os.path.isdir(name):
        folder = Path(name).resolve()
        return folder, [str(folder), _listing(folder)]
    folder = Path(hf_hub_download(name, "config.json")).parent
    return folder, [name, folder.name]  # a snapshot is called as its commit is


def _tower_state(name: str, folder: Path) -> list:
    """As `_state`, of the tower that is converted with the checkpoint; what is not available has a state as well."""
    states: list = [_listing(folder / "vision_tower")] if os.path.isdir(name) else []
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    named = str(config["mm_vision_tower"])
    for reference in (str(folder / named), named):
        try:
            return [*states, _state(reference)[1]]
        except (OSError, ValueError, HfHubHTTPError) as error:
            logger.debug("%s: %s", reference, first_line(error))
    return [*states, None]


def _listing(folder: Path) -> list:
    """Names, sizes and times of a checkpoint's files in a folder."""
    if not folder.is_dir():
        return []
    files = sorted(path for path in folder.iterdir() if path.suffix in _CHECKPOINT_FILES and path.is_file())
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]


@functools.cache
def _code() -> str:
    """A digest of the code that converts, and of the code that is saved with every checkpoint."""
    from .. import modeling

    digest = hashlib.sha256()
    for folder in (Path(__file__).parent, Path(next(iter(modeling.__path__)))):
        for path in sorted(folder.iterdir()):
            if path.suffix in (".py", ".jinja"):
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
