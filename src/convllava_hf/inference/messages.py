"""The entries of a conversation, as chat templates take them, and the images in them."""

import os
from collections.abc import Sequence
from typing import Any

from PIL import Image

from ..errors import ConvLlavaError, first_line
from ..modeling.image_processing_convllava import ConvLlavaImageProcessor
from ..modeling.processing_convllava import IMAGE_TOKEN
from ..utils.texts import check_text


def system_turn(text: str) -> dict[str, Any]:
    """The conversation's first entry, where the chat template's own system message will not do.

    Raises:
        ConvLlavaError: UTF-8 cannot hold the text.
    """
    return {"role": "system", "content": [{"type": "text", "text": check_text(text, "The system message")}]}


def assistant_turn(text: str) -> dict[str, Any]:
    """An answer given earlier in the conversation."""
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def user_turn(text: str, images: Sequence[Image.Image] = ()) -> dict[str, Any]:
    """A question about images. They come before the text, or where the text says `<image>`.

    Raises:
        ConvLlavaError: the text says `<image>` a number of times that is not the number of images, or UTF-8 cannot
            hold it.
    """
    texts = check_text(text, "The question").split(IMAGE_TOKEN)
    if len(texts) == 1:
        texts = [""] * len(images) + texts
    if len(texts) != len(images) + 1:
        raise ConvLlavaError(
            f"The question says {IMAGE_TOKEN} {len(texts) - 1} times and comes with {len(images)} images. Give as "
            f"many images as {IMAGE_TOKEN}, or leave {IMAGE_TOKEN} out: the images then come before the question."
        )
    content: list[dict[str, Any]] = []
    for piece, image in zip(texts, [*images, None], strict=True):
        if all(part["type"] == "image" for part in content):
            piece = piece.removeprefix("\n")  # the chat template writes the line break after images that come first
        if piece:
            content.append({"type": "text", "text": piece})
        if image is not None:
            content.append({"type": "image", "image": image})
    return {"role": "user", "content": content}


def open_image(source: str | os.PathLike) -> Image.Image:
    """Read an image from a path, a URL or a data URL, as the image processor reads it.

    Raises:
        ConvLlavaError: there is no such file, or it is not an image.
    """
    name = os.fspath(source)
    try:
        image: Any = ConvLlavaImageProcessor().fetch_images(name)
        return image
    except (OSError, ValueError) as error:
        shown = name if len(name) <= 200 else f"{name[:80]}..."  # a data URL, say
        raise ConvLlavaError(f"Cannot read the image {shown!r}: {first_line(error)}") from error
