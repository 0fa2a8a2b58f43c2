"""What a chat template marks as the assistant's, found out by rendering a conversation with it."""

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .errors import ConvLlavaError, first_line


QUESTIONS = ("what is on the table", "which color has it")
ANSWERS = ("a round lamp", "it is yellow")
_SECONDS = 20  # a conversation of four turns takes milliseconds


def turn(role: str, text: str, **more: Any) -> dict:
    """A message whose content is written in parts, as processors hand it to templates."""
    return {"role": role, "content": [{"type": "text", "text": text}], **more}


def has_generation_markers(template: str) -> bool:
    """Whether the template marks anything; by the same rule as transformers and TRL."""
    return re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None


def assistant_mask_error(processing_class: Any, chat_template: str | None = None) -> str | None:
    """What is wrong with the tokens that a chat template marks as the assistant's; `None` if it marks the answers.

    Args:
        processing_class: a processor or a tokenizer.
        chat_template: in place of its own.

    Raises:
        ConvLlavaError: the template does not come to an end.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    messages = [
        turn(role, text)
        for question, answer in zip(QUESTIONS, ANSWERS, strict=True)
        for role, text in (("user", question), ("assistant", answer))
    ]
    try:
        with time_limit():
            output = processing_class.apply_chat_template(
                messages,
                chat_template=chat_template,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
    except ConvLlavaError:
        raise
    except Exception as error:  # a template is a program: it may raise anything
        return f"it cannot write a conversation of two questions and answers ({first_line(error)})"
    # Of one conversation, not of a batch; some versions of transformers make it a batch of one.
    ids, mask = (
        row[0] if len(row) and not isinstance(row[0], int) else row
        for row in (output["input_ids"], output["assistant_masks"])
    )
    if not any(mask):
        return "it marks no token as the assistant's"

    def words(tokens: list[int]) -> str:
        return "".join(tokenizer.decode(tokens).split())

    def is_marked(text: str) -> bool:
        return words(tokenizer(text, add_special_tokens=False)["input_ids"]) in marked

    marked = words([token for token, is_assistant in zip(ids, mask, strict=True) if is_assistant])
    if any(map(is_marked, QUESTIONS)):
        return "it marks what the user says as the assistant's"
    if not any(map(is_marked, ANSWERS)):
        return "the tokens that it marks as the assistant's are not those of the answers"
    return None


@contextmanager
def time_limit(seconds: float | None = None) -> Iterator[None]:
    """Ends a chat template that loops for ever.

    transformers' sandbox bounds ranges, not what loops over them. Signals reach the main thread only, and not on
    Windows: elsewhere there is no limit.

    Raises:
        ConvLlavaError: what runs inside takes longer.
    """
    seconds = seconds or _SECONDS
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_) -> None:
        raise ConvLlavaError(
            f"The chat template has not written a short conversation after {seconds:g} seconds. It probably loops "
            "for ever: use another one."
        )

    before = signal.signal(signal.SIGALRM, stop)
    rest, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, rest)
        signal.signal(signal.SIGALRM, before)
