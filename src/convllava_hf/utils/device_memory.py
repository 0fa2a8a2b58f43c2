"""A device's memory that has run out, in one line: what was being done, how much was needed, what would take less."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..errors import ConvLlavaError, first_line


# Libraries below torch's own allocator, and devices other than NVIDIA's, say it by a RuntimeError.
_TEXTS = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "CUSOLVER_STATUS_ALLOC_FAILED")
_SIZE = r"([\d.]+ (?:bytes|[KMGT]iB))"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device's memory did not suffice."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in _TEXTS)
    )


def needed_and_free(error: BaseException) -> str:
    """What torch says of the memory that was asked for and that there is, without its advice about the allocator."""
    text = str(error)
    needed = re.search(rf"Tried to allocate {_SIZE}", text)
    if needed is None:
        return first_line(error).rstrip(".")
    said = f"{needed[1]} more were needed"
    if free := re.search(rf"{_SIZE} of which {_SIZE} is free", text):
        said += f", and {free[2]} of {free[1]} are free"
    if allowed := re.search(rf"{_SIZE} allowed", text):
        said += f" (this process may use {allowed[1]})"
    return said


@contextmanager
def explain_out_of_memory(what: str, device: torch.device | str, remedies: str) -> Iterator[None]:
    """Makes a `ConvLlavaError` of whatever is raised within where the device's memory ran out.

    Args:
        what: the memory does not hold, after "does not hold".
        remedies: what would take less memory, as sentences.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise ConvLlavaError(
            f"The memory of {device} does not hold {what}: {needed_and_free(error)}. {remedies}"
        ) from error
