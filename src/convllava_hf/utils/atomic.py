"""Files and folders that are written whole or not at all, and locks that show whether their writer still runs.

A lock is a file that a process holds open (`flock`). The system releases it when the process ends, however it ends, so
what is found under a released lock was left by a process that ended early. Where there are no such locks (Windows,
some network file systems), nothing is refused and nothing is removed.
"""

import contextlib
import ctypes
import errno
import hashlib
import os
import re
import shutil
import stat
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from ..errors import ConvLlavaError


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_MARK = re.compile(r"[0-9a-f]{8}")
_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}
_NO_EXCHANGE = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM}
_LONGEST_STEM = 200  # bytes of a name, so that there is room for what is added to it within 255
# Folders of the operating system. Nothing that we write belongs there.
_SYSTEM = ("/bin", "/boot", "/dev", "/etc", "/lib", "/lib32", "/lib64", "/proc", "/run", "/sbin", "/sys", "/usr")
_NOT_SYSTEM = ("/dev/shm", "/run/media", "/run/user", "/usr/local")
_held: set[int] = set()  # file descriptors of locks


class BusyError(ConvLlavaError):
    """Another running process has the lock."""


@contextlib.contextmanager
def locked(path: Path, what: str) -> Iterator[bool]:
    """Holds a lock file during the block, and removes it afterwards; yields whether the file system has locks.

    Args:
        path: the lock file.
        what: what is written under the lock, for the message.

    Raises:
        BusyError: another process holds it.
    """
    descriptor = _take(path, what)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            path.unlink(missing_ok=True)  # while it is held: a process that waits for it sees that it was removed
            _release(descriptor)


def _take(path: Path, what: str) -> int | None:
    if fcntl is None:
        return None
    while True:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        try:
            if not _lock(descriptor):
                raise BusyError(
                    f"{what} is being written by another process that is still running. Wait until it has ended, or "
                    "choose another folder."
                )
        except OSError as error:
            os.close(descriptor)
            if error.errno in _NO_LOCKS:
                path.unlink(missing_ok=True)
                return None
            raise
        except BusyError:
            os.close(descriptor)
            raise
        if _is_at(descriptor, path):
            _held.add(descriptor)
            return descriptor
        os.close(descriptor)  # its holder has removed it


def _lock(descriptor: int) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _release(descriptor: int) -> None:
    _held.discard(descriptor)
    os.close(descriptor)


def _let_go_in_child() -> None:
    """A forked process that outlives its parent must not hold the parent's locks."""
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)


@contextlib.contextmanager
def replacing_folder(output: Path) -> Iterator[Path]:
    """A temporary folder next to `output` that replaces it if the block succeeds, and is removed if it does not.

    At every moment `output` is the old folder or the new one, whole, where the file system can exchange two names;
    elsewhere it is missing for an instant, and a process that dies then leaves the old folder next to it, which the
    next call puts back. What dead processes have left next to `output` is removed.

    Raises:
        BusyError: another process is in such a block for the same `output`.
        ConvLlavaError: `output` did not exist at first, and another program has created it since.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with lock_next_to(output):
        existed = os.path.lexists(output)
        temporary = _hidden(output, f"{uuid.uuid4().hex[:8]}.partial")
        temporary.mkdir()
        try:
            yield temporary
            _move_into_place(temporary, output, existed)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def lock_next_to(folder: Path) -> Iterator[None]:
    """Makes this process the only one that writes `folder` during the block; its parent folder must exist.

    What a process that died while it replaced the folder has left is put back first, and the rest is cleared.

    Raises:
        BusyError: another process is writing it.
    """
    with locked(_hidden(folder, "lock"), str(folder)) as is_locked:
        if is_locked:
            _clear_up(folder)
        yield


def discard_folder(folder: Path) -> None:
    """Removes a folder: at every moment it is whole or not there. To be called within `lock_next_to`."""
    temporary = _hidden(folder, f"{uuid.uuid4().hex[:8]}.partial")
    folder.rename(temporary)
    shutil.rmtree(temporary)


def _hidden(path: Path, suffix: str) -> Path:
    stem = path.name
    if len(os.fsencode(stem)) > _LONGEST_STEM:
        stem = hashlib.sha256(os.fsencode(stem)).hexdigest()
    return path.with_name(f".{stem}.{suffix}")


def _clear_up(output: Path) -> None:
    """Puts back and removes what dead processes have left next to a folder. To be called under its lock."""
    beginning = _hidden(output, "").name
    left: dict[str, list[Path]] = {"old": [], "partial": []}
    for path in output.parent.iterdir():
        mark, _, kind = path.name.removeprefix(beginning).partition(".")
        if path.name.startswith(beginning) and kind in left and _MARK.fullmatch(mark):
            left[kind].append(path)
    if left["old"] and not os.path.lexists(output):
        newest = max(left["old"], key=lambda path: path.stat().st_ctime_ns)
        newest.rename(output)
        left["old"].remove(newest)
    for path in (*left["old"], *left["partial"]):
        shutil.rmtree(path, ignore_errors=True)


def _move_into_place(temporary: Path, output: Path, existed: bool) -> None:
    if not existed or not os.path.lexists(output):
        try:
            if not _rename(temporary, output, exchange=False):
                temporary.rename(output)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
            raise ConvLlavaError(
                f"Another program has created {output} in the meantime: it is left as it is."
            ) from error
    elif not _rename(temporary, output, exchange=True):
        old = temporary.with_suffix(".old")
        output.rename(old)
        try:
            temporary.rename(output)
        except OSError:
            old.rename(output)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _rename(source: Path, target: Path, exchange: bool) -> bool:
    """Exchanges two names, or gives a name that must be free, in one step; whether the system has such a step.

    Raises:
        OSError: the step is there, and failed.
    """
    names = os.fsencode(source), os.fsencode(target)
    library = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
    if sys.platform == "linux" and hasattr(library, "renameat2"):
        here = -100  # AT_FDCWD
        failed = library.renameat2(here, names[0], here, names[1], 2 if exchange else 1)
    elif sys.platform == "darwin" and hasattr(library, "renamex_np"):
        failed = library.renamex_np(*names, 2 if exchange else 4)
    else:
        return False
    if not failed:
        return True
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(target))


def write_atomic(path: Path, content: bytes) -> Path:
    """Writes a file whole or not at all. What a dead process left of an earlier attempt is removed.

    Raises:
        OSError: with the file's name, also where the disk is full.
    """
    if os.path.lexists(path) and not path.is_file():
        raise FileExistsError(errno.EEXIST, "There is something that is not a file", str(path))
    path = Path(os.path.realpath(path))  # a link to a file stays one
    _clear_partial_files(path)
    while True:
        temporary = _hidden(path, f"{uuid.uuid4().hex[:8]}.partial")
        try:
            with naming(path), open(temporary, "xb") as file:
                if fcntl is not None:
                    with contextlib.suppress(OSError):  # without locks the next call clears nothing
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                file.write(content)
                file.flush()
                # Not there: another process took it for a dead one's before it was locked.
                if fcntl is not None and _is_at(file.fileno(), temporary):
                    os.replace(temporary, path)
                    return path
            if fcntl is None:  # Windows replaces no open file
                os.replace(temporary, path)
                return path
        finally:
            temporary.unlink(missing_ok=True)


def _clear_partial_files(path: Path) -> None:
    if fcntl is None:
        return
    for left in path.parent.glob(".*.partial"):
        mark, _, kind = left.name.removeprefix(_hidden(path, "").name).partition(".")
        if kind != "partial" or not _MARK.fullmatch(mark) or not left.is_file():
            continue
        with contextlib.suppress(OSError), open(left, "rb") as file:  # another process is clearing it, too
            if _lock(file.fileno()):
                left.unlink()


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds the name of the file that was being written to a system error that names none, or another."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextlib.contextmanager
def temporary_folder(prefix: str) -> Iterator[Path]:
    """An empty folder for this user only, removed afterwards. Those of dead processes are removed first."""
    root = Path(tempfile.gettempdir())
    _clear_temporary_folders(root, prefix)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix))
        with contextlib.suppress(FileNotFoundError, BusyError):  # another process has just cleared it
            descriptor = _take(folder / "lock", str(folder))
            break
    try:
        (folder / "files").mkdir()
        yield folder / "files"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if descriptor is not None:
            _release(descriptor)


def _clear_temporary_folders(root: Path, prefix: str) -> None:
    if fcntl is None:
        return
    for folder in root.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):  # another process is clearing it, too
            about = folder.lstat()
            if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.geteuid():
                continue
            descriptor = os.open(folder / "lock", os.O_RDWR | os.O_NOFOLLOW)
            try:
                if _lock(descriptor):
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(descriptor)


def check_destination(path: str | os.PathLike, what: str) -> Path:
    """The path to write to, if it is one where a user's files belong.

    Args:
        what: the option that names it, for messages.

    Raises:
        ConvLlavaError: it is a device, a FIFO or a socket, or lies in a folder of the operating system.
    """
    path = Path(os.path.expanduser(path))
    real = Path(os.path.realpath(path))
    if real == Path(real.anchor) or _lies_in(real, _SYSTEM) and not _lies_in(real, _NOT_SYSTEM):
        raise ConvLlavaError(f"{what} is {str(path)!r}, in a folder of the operating system: name another place.")
    if real.exists() and not real.is_file() and not real.is_dir():
        raise ConvLlavaError(f"{what} is {str(path)!r}, which is a device, a FIFO or a socket: name another place.")
    return path


def _lies_in(path: Path, roots: tuple[str, ...]) -> bool:
    return any(path.is_relative_to(root) or path.is_relative_to(Path(root).resolve()) for root in roots)
