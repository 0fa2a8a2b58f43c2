"""What Ctrl-C and a termination signal do to the command line: no traceback, and nothing incomplete is left."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator


def _leave(number, frame) -> None:
    """Ends the process at once: during imports there is nothing to clean up, and some code that is imported turns an
    exception into another."""
    os._exit(128 + number)


def exit_quietly() -> None:
    """From now on Ctrl-C ends the process silently; to be called before anything large is imported."""
    if _is_main_thread() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


@contextlib.contextmanager
def cleanup_on_signals() -> Iterator[None]:
    """In the block Ctrl-C raises `KeyboardInterrupt` and a termination signal `SystemExit`: temporary files go."""
    before = {}
    if _is_main_thread():
        if signal.getsignal(signal.SIGINT) is _leave:
            before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            before[signal.SIGTERM] = signal.signal(signal.SIGTERM, _terminating(os.getpid()))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _terminating(process: int):
    def terminate(number, frame) -> None:
        if os.getpid() == process:
            sys.exit(128 + number)
        signal.signal(number, signal.SIG_DFL)  # a forked worker: its parent cleans up
        os.kill(os.getpid(), number)

    return terminate


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
