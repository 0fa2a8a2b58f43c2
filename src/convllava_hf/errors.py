"""The one exception class of this package."""


class ConvLlavaError(ValueError):
    """What was asked for cannot be done, and the message says why and what to do instead.

    The command line shows the message as one line without a traceback and exits with code 2. Being a `ValueError`,
    it is caught by code that already handles transformers' own complaints.
    """
