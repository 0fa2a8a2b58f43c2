"""What imported libraries log about their own code, where nobody wants to read it."""

import logging


# torchao beside a newer torch, and bitsandbytes without its kernels for CPUs: who types a command can do nothing about
# either.
_LOGGERS = ("torch.utils._pytree", "bitsandbytes.backends.cpu.ops")


def quiet_imports() -> None:
    """Silences it; to be called before the first import of what is heavy."""
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
