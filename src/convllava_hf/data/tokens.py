"""Counts the tokens of a sample as training will see it, without preparing its images."""

import copy
from collections.abc import Sequence
from typing import Any

from ..chat_templates import assistant_mask_error
from .check_report import Tokens


class _Size:
    """Stands for an image of which only height and width matter.

    No dataclass: transformers 5.24 makes dicts of those that it finds in messages.
    """

    def __init__(self, height: int, width: int):
        self.height = height
        self.width = width


class _SizesOnly:
    """An image processor that says how large images come out, and prepares none."""

    def __init__(self, image_processor: Any):
        self._image_processor = image_processor

    def __getattr__(self, name: str) -> Any:
        if name == "_image_processor":
            raise AttributeError(name)
        return getattr(self._image_processor, name)

    def __call__(self, images: Any, **kwargs) -> dict[str, list]:
        return {"image_sizes": [self.get_image_size(one.height, one.width) for one in _flat(images)]}


class TokenCounter:
    """Runs the processor with its chat template, tokenizer and placeholders on messages.

    Args:
        processor: a `ConvLlavaProcessor` whose chat template marks what the assistant says.
        max_length: what training cuts samples to, in tokens.
    """

    def __init__(self, processor: Any, max_length: int):
        self.max_length = max_length
        self.template_fault = template_fault(processor)
        self.processor = copy.copy(processor)
        self.processor.image_processor = _SizesOnly(processor.image_processor)

    def __call__(self, messages: Sequence[dict], sizes: Sequence[tuple[int, int]]) -> tuple[Tokens, int]:
        """Tokens of one sample whose images have these heights and widths in pixels; and how many of those that a
        loss is taken on are left within `max_length`."""
        counted, left = self.count(messages, sizes)
        return counted, left.supervised

    def count(self, messages: Sequence[dict], sizes: Sequence[tuple[int, int]]) -> tuple[Tokens, Tokens]:
        """Tokens of one sample, as a whole and within `max_length`.

        Raises:
            Exception: the chat template refuses the messages; what it raises.
        """
        output = self.processor.apply_chat_template(
            with_images(messages, [_Size(*size) for size in sizes]),
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        # Of one conversation, not of a batch; some versions of transformers make it a batch of one.
        ids, mask = (
            row[0] if row and isinstance(row[0], list) else row
            for row in (output["input_ids"], output["assistant_masks"])
        )
        counted = Tokens(
            samples=1,
            total=len(ids),
            visual=sum(token == self.processor.image_token_id for token in ids),
            supervised=sum(mask),
            longest=len(ids),
        )
        ids, mask = ids[: self.max_length], mask[: self.max_length]
        visual = sum(token == self.processor.image_token_id for token in ids)
        return counted, Tokens(1, len(ids), visual, sum(mask), len(ids))


def template_fault(processor: Any) -> str | None:
    """Why the chat template does not allow a loss on the assistant's tokens only; `None` if it does."""
    if (fault := assistant_mask_error(processor)) is None:
        return None
    return (
        f"The model's chat template is at fault, not the data: {fault}. Mark what the assistant says in its "
        "chat_template.jinja with {% generation %} and {% endgeneration %}, as convllava assemble does"
    )


def with_images(messages: Sequence[dict], images: Sequence[Any]) -> list[dict]:
    """Messages with the images in their places."""
    following = iter(images)
    return [
        {
            "role": message["role"],
            "content": [
                {"type": "image", "image": next(following)} if part["type"] == "image" else part
                for part in message["content"]
            ],
        }
        for message in messages
    ]


def _flat(images: Any) -> list:
    return [one for image in images for one in _flat(image)] if isinstance(images, (list, tuple)) else [images]
