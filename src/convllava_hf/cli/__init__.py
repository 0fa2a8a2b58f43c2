"""The command `convllava`: one module a command, each with `register(subparsers)` and `run(args) -> int`.

Modules of commands import nothing heavy outside `run`, so that `convllava --help` answers at once.
"""

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version

from ..errors import ConvLlavaError
from ..noise import quiet_imports
from . import ask, assemble, bench, chat, convert, data, demo, eval, push, quickstart, train


COMMANDS = (quickstart, convert, assemble, ask, chat, demo, data, train, eval, push, bench)
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130

# What the person at the keyboard can mend. Every other exception is a fault of this program and keeps its traceback.
_FILE_ERRORS = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
_STORAGE_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="convllava",
        description="Convert, assemble, ask, train, publish and measure ConvLLaVA models through transformers.",
    )
    parser.set_defaults(registers=True)  # the model, before the command runs; false where the command sees to it
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
        if args.registers:  # which takes seconds: not before it is needed
            from .. import ConvLlavaConfig  # noqa: F401
        return args.run(args)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output (`| head`) has gone. Python would complain once more when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13
    except ConvLlavaError as error:
        return _complain(str(error), error.exit_code)
    except OSError as error:
        if not isinstance(error, _FILE_ERRORS) and error.errno not in _STORAGE_ERRNOS:
            raise
        return _complain(f"{error.strerror}: {error.filename}" if error.strerror and error.filename else str(error))


def _complain(message: str, code: int = EXIT_USER_ERROR) -> int:
    print("convllava: error:", " ".join(message.split()), file=sys.stderr)
    return code
