"""Checks before training that the chat template marks the tokens that count in the loss."""

from typing import Any

from trl.chat_template_utils import get_training_chat_template

from ..chat_templates import assistant_mask_error, has_generation_markers, time_limit
from ..errors import ConvLlavaError


def check_chat_template(processor: Any, assistant_only_loss: bool) -> None:
    """Refuses a chat template with which nothing, or the wrong tokens, would be learned.

    Args:
        processor: of the checkpoint that is trained.
        assistant_only_loss: the recipe's setting; without it all tokens are learned, marked or not.

    Raises:
        ConvLlavaError: the template does not mark the assistant's turns, and TRL has no variant of it that does.
    """
    if not assistant_only_loss:
        return
    template = processor.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    fault = "there is none" if not template else assistant_mask_error(processor, _as_trained(processor, template))
    if fault is not None:
        raise ConvLlavaError(
            f"The recipe sets assistant_only_loss: true, which the checkpoint's chat template does not allow: {fault}."
            " Put {% generation %} and {% endgeneration %} around what the assistant says in its chat_template.jinja, "
            "end-of-turn token included, or make the checkpoint with convllava assemble, which does so; or set "
            "assistant_only_loss: false to train on every token."
        )


def _as_trained(processor: Any, template: str) -> str:
    """The template that TRL's trainer uses: for those that it knows, its own training variant."""
    if has_generation_markers(template):
        return template
    try:
        with time_limit():
            return get_training_chat_template(processor) or template
    except ConvLlavaError:
        raise  # the time is up
    except Exception:  # TRL does not know it, or the template raises an error, which is reported next
        return template
