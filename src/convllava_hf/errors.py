"""The exception class of this package, and how other libraries' errors are quoted in its messages."""


class ConvLlavaError(ValueError):
    """What was asked for cannot be done, and the message says why and what to do instead.

    The command line shows the message as one line without a traceback and exits with `exit_code`. Being a
    `ValueError`, it is caught by code that already handles transformers' own complaints.
    """

    exit_code = 2


def first_line(error: BaseException) -> str:
    """An error's message up to its first line break: what follows is often advice about another library."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip() if lines else type(error).__name__
