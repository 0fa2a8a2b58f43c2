"""Links in a checkpoint's folder: what they lead to is copied and published only if it belongs to the checkpoint.

`git clone` keeps symbolic links, so a downloaded folder can hold `LICENSE -> ../diary.txt`. A link may lead to a file
of the same folder. In the Hub's cache, where a snapshot consists of links, it may also lead to the `blobs` of the same
repository.
"""

import stat
from fnmatch import fnmatchcase
from pathlib import Path

from ..errors import ConvLlavaError


# What is copied as it is from a checkpoint into one that is made from it. Weights are read tensor by tensor.
COPIED_AS_TEXT = ("*.json", "*.jinja", "*.txt", "*.model", "*.py", "LICENSE*", "NOTICE*")


def file_inside(path: Path, folder: Path) -> Path:
    """The file that `path` names, after all links, if it is a regular file that belongs to `folder`.

    Raises:
        ConvLlavaError: a link on the way leads out of the folder or nowhere, or there is no regular file at its end.
    """
    name = path.relative_to(folder) if path.is_relative_to(folder) else path
    try:
        target = path.resolve(strict=True)
        mode = target.stat().st_mode
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        raise ConvLlavaError(
            f"{name} in {folder} is a broken link. Remove it, or replace it with the file itself."
        ) from error
    if not any(target.is_relative_to(root) for root in _roots(folder)):
        raise ConvLlavaError(
            f"{name} in {folder} is a link out of that folder, to {target}. Files outside a checkpoint are neither "
            "copied nor published: replace the link with the file itself, or remove the link."
        )
    if not stat.S_ISREG(mode):
        raise ConvLlavaError(
            f"{name} in {folder} is {_kind(mode)}, and a file is expected. Remove it, or put a file in its place."
        )
    return target


def check_links(folder: str | Path, patterns: tuple[str, ...] = COPIED_AS_TEXT) -> None:
    """Refuses a folder in which an entry whose name matches a pattern is not a regular file of that folder.

    Subfolders with such names are ignored: nothing is copied from them.

    Raises:
        ConvLlavaError: names the first of them.
    """
    folder = Path(folder)
    for path in sorted(folder.iterdir()):
        if any(fnmatchcase(path.name, pattern) for pattern in patterns) and (path.is_symlink() or not path.is_dir()):
            file_inside(path, folder)


def _roots(folder: Path) -> list[Path]:
    """The folders in which what belongs to `folder` lies."""
    folder = folder.resolve()
    repository = folder.parent.parent
    in_cache = folder.parent.name == "snapshots" and repository.name.startswith(("models--", "datasets--"))
    blobs = repository / "blobs"
    return [folder, blobs] if in_cache and not blobs.is_symlink() else [folder]


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")
