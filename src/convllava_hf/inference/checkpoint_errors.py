"""Checkpoints with damaged or edited files: transformers and tokenizers raise almost any exception for them."""

import contextlib
import logging
import os
from collections.abc import Iterator

from huggingface_hub import errors as hub_errors
from jinja2 import TemplateError
from safetensors import SafetensorError

from ..errors import ConvLlavaError, first_line
from ..utils.device_memory import is_out_of_memory


logger = logging.getLogger(__name__)

# What libraries raise when they read a file of an unexpected structure without checking it first.
_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RuntimeError,  # RecursionError too
    AssertionError,
    TemplateError,
    SafetensorError,
    # A configuration's field of another type, in transformers 5.
    *(getattr(hub_errors, name) for name in ("StrictDataclassError",) if hasattr(hub_errors, name)),
)
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_eos_token_id")
_TOKEN_LISTS = ("suppress_tokens", "begin_suppress_tokens")
_NUMBERS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "repetition_penalty",
    "encoder_repetition_penalty",
    "length_penalty",
    "no_repeat_ngram_size",
    "min_length",
    "min_new_tokens",
    "num_return_sequences",
)


@contextlib.contextmanager
def wrap_checkpoint_errors(source: str | os.PathLike, what: str = "Cannot load the checkpoint") -> Iterator[None]:
    """For calls that do nothing but read and interpret a checkpoint's files.

    Raises:
        ConvLlavaError: names the checkpoint. The cause, with its traceback, is logged as debugging information.
    """
    try:
        yield
    except ConvLlavaError:
        raise
    except _ERRORS as error:
        if is_out_of_memory(error):  # the device's memory, whatever the files say
            raise
        raise _damaged(error, source, what) from error
    except Exception as error:
        if type(error) is not Exception:  # which is what tokenizers raises; all other kinds are faults of a program
            raise
        raise _damaged(error, source, what) from error


def _damaged(error: Exception, source: str | os.PathLike, what: str) -> ConvLlavaError:
    logger.debug("%s %s", what, source, exc_info=error)
    kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
    return ConvLlavaError(
        f"{what} {os.fspath(source)!r}: {kind}{first_line(error):.500}. If this checkpoint loaded before, one of its "
        "files is damaged or was edited: get it again."
    )


def check_generation_config(config, tokens: int, source: str | os.PathLike) -> None:
    """Refuses values with which `generate` would fail.

    Args:
        config: transformers' `GenerationConfig`.
        tokens: rows of the model's vocabulary.

    Raises:
        ConvLlavaError: names the key.
    """

    def is_token(value) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and -1 <= value < tokens

    def is_tokens(value) -> bool:
        return isinstance(value, list) and all(map(is_token, value))

    def is_number(value) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9

    kinds = {
        **dict.fromkeys(_TOKEN_IDS, (lambda value: is_token(value) or is_tokens(value), f"a token below {tokens}")),
        **dict.fromkeys(_TOKEN_LISTS, (is_tokens, f"a list of tokens below {tokens}")),
        **dict.fromkeys(_NUMBERS, (is_number, "a number")),
    }
    for key, (test, expected) in kinds.items():
        value = getattr(config, key, None)
        if value is not None and not test(value):
            raise ConvLlavaError(
                f"Cannot load the checkpoint {os.fspath(source)!r}: its generation_config.json has {key}="
                f"{value!r:.60}; expected {expected}."
            )
