"""Silencing what libraries log and show about their own work."""

import logging
import sys


# torchao next to a newer torch, and bitsandbytes without its kernels for CPUs: whoever types a command can do nothing
# about either.
_LOGGERS = ("torch.utils._pytree", "bitsandbytes.backends.cpu.ops")


def quiet_imports() -> None:
    """Silences what is logged during imports; to be called before the first import of what is heavy."""
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


def set_verbosity_error() -> None:
    """Lets transformers log nothing but errors: its warnings are about code that the user did not write."""
    from transformers.utils import logging

    logging.set_verbosity_error()


def disable_progress_bars(with_datasets: bool = False) -> None:
    """Switches off the progress bars of transformers and, if asked, those of datasets, which it imports for that."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    if with_datasets:
        import datasets

        datasets.disable_progress_bars()


def quiet_unless_tty(with_datasets: bool = False) -> None:
    """Switches off progress bars where stderr is not a terminal; see `disable_progress_bars`."""
    if not sys.stderr.isatty():
        disable_progress_bars(with_datasets)
