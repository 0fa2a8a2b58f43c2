"""The command `convllava`: one module a command, each with `register(subparsers)` and `run(args) -> int`.

Modules of commands import nothing heavy outside `run`, so that `convllava --help` answers at once.
"""

import argparse
import errno
import os
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

from ..errors import ConvLlavaError, first_line
from ..options import shortened
from ..utils.interrupts import cleanup_on_signals
from ..utils.logging_utils import quiet_imports
from ..utils.texts import check_text
from . import ask, assemble, chat, convert, data, demo, eval, profile, push, quickstart, train


COMMANDS = (quickstart, convert, assemble, ask, chat, demo, data, train, eval, push, profile)
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
_LONGEST_MESSAGE = 2000  # characters

# What the user can fix. Every other exception is a bug in this program and keeps its traceback.
_FILE_ERRORS = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
_STORAGE_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.ENAMETOOLONG, errno.ELOOP}
# What Python and torch raise as a RuntimeError although it is not a bug: too little memory, a path such as
# ~nobody/model, and links in a loop (before Python 3.13).
_NO_MEMORY = "DefaultCPUAllocator: can't allocate memory"
_NO_PLACE = ("Could not determine home directory", "Symlink loop")
_MAY_BE_EMPTY = ("question", "system", "space", "example", "arguments")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="convllava",
        description="Convert, assemble, ask, train, publish and measure ConvLLaVA models through transformers.",
    )
    parser.set_defaults(registers=True)  # the model, before the command runs; false where the command does it itself
    parser.add_argument("--version", action="version", version=f"convllava {version('convllava-hf')}")
    subparsers = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.register(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 for a result that is not as it should be, 2 for a mistake in
    what was asked for, 130 after Ctrl-C."""
    args = build_parser().parse_args(argv)
    quiet_imports()
    try:
        check_texts(args)
        if args.registers:  # which takes seconds: not before it is needed
            from .. import ConvLlavaConfig  # noqa: F401
        with cleanup_on_signals():
            return args.run(args)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output (`| head`) has gone. Python would complain once more when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13
    except ConvLlavaError as error:
        return _complain(str(error), error.exit_code)
    except MemoryError as error:
        return _complain(f"There is not enough memory for this. {first_line(error)}")
    except RuntimeError as error:
        if _NO_MEMORY in str(error) or type(error).__name__ == "OutOfMemoryError":  # torch's, of a device
            return _complain(f"There is not enough memory for this. {first_line(error)}")
        if not str(error).startswith(_NO_PLACE):
            raise
        return _complain(f"A path cannot be used: {first_line(error)}")
    except OSError as error:
        if not isinstance(error, _FILE_ERRORS) and error.errno not in _STORAGE_ERRNOS:
            raise
        return _complain(f"{error.strerror}: {error.filename}" if error.strerror and error.filename else str(error))


def check_texts(args: argparse.Namespace) -> None:
    """Refuses arguments that no option can use.

    Raises:
        ConvLlavaError: one is empty, holds a NUL, or holds bytes that are not UTF-8.
    """
    for name, value in vars(args).items():
        for text in _texts_in(value):
            argument = f"The argument {name.replace('_', '-')}"
            shown = f"{argument} is {shortened(text)}"
            if "\0" in text:
                raise ConvLlavaError(f"{shown}, which holds a NUL character: leave it out.")
            check_text(text, argument)
            if not text.strip() and name not in _MAY_BE_EMPTY:
                raise ConvLlavaError(f"{shown}: it must not be empty. Leave it out, or give a value.")


def _texts_in(value) -> Iterator[str]:
    if isinstance(value, str | Path):
        yield str(value)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _texts_in(one)


def _complain(message: str, code: int = EXIT_USER_ERROR) -> int:
    line = " ".join(message.split())
    if len(line) > _LONGEST_MESSAGE:  # a path of thousands of characters, say
        line = f"{line[: _LONGEST_MESSAGE // 2]} ... {line[-_LONGEST_MESSAGE // 2 :]}"
    print("convllava: error:", line.encode("utf-8", "backslashreplace").decode(), file=sys.stderr)
    return code
