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
_SECONDS = 20  # of computing; a conversation of four turns takes milliseconds


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

    def written(tokens: list[int]) -> str:
        return _without_blanks(tokenizer.decode(tokens))

    marked = written([token for token, is_assistant in zip(ids, mask, strict=True) if is_assistant])
    if any(_without_blanks(question) in marked for question in QUESTIONS):
        return "it marks what the user says as the assistant's"
    # As the tokenizer writes them: it may not know every letter.
    answers = [written(tokenizer(answer, add_special_tokens=False)["input_ids"]) for answer in ANSWERS]
    if not any(answer in marked for answer in answers):
        return "the tokens that it marks as the assistant's are not those of the answers"
    return None


def _without_blanks(text: str) -> str:
    return "".join(text.split())


@contextmanager
def time_limit(seconds: float | None = None) -> Iterator[None]:
    """Ends a chat template that loops for ever.

    transformers' sandbox bounds ranges, not what loops over them. Signals reach the main thread only, and there are
    none on Windows: elsewhere there is no limit.

    Args:
        seconds: of this process's computing, not of waiting.

    Raises:
        ConvLlavaError: what runs inside takes longer.
    """
    seconds = seconds or _SECONDS
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_) -> None:
        raise ConvLlavaError(
            f"The chat template has not written a short conversation after {seconds:g} seconds of computing. It "
            "probably loops for ever: use another one."
        )

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before or signal.SIG_DFL)
