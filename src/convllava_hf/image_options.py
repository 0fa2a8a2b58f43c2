"""How a checkpoint looks at images, chosen anew by options of commands and recipes."""

import copy
import os
from collections.abc import Mapping
from typing import Any

from .checkpoint_errors import wrap_checkpoint_errors
from .errors import ConvLlavaError


# Of the image processor's arguments, those that decide how large the tower sees an image.
IMAGE_OPTIONS = ("image_aspect_ratio", "size", "min_pixels", "max_pixels", "preset")


def with_image_options(processor: Any, options: Mapping[str, Any]) -> Any:
    """A `ConvLlavaProcessor` that looks at images as the options say; of others, as it did before.

    Args:
        options: some of `IMAGE_OPTIONS`; those that are `None` are not given.

    Raises:
        ConvLlavaError: the options do not go together, or with the tower.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if not given:
        return processor
    before = processor.image_processor
    try:
        after = type(before).from_dict(before.to_dict(), **given)
    except ValueError as error:
        raise ConvLlavaError(f"Images cannot be looked at like this. {error}") from error
    processor = copy.copy(processor)
    processor.image_processor = after
    return processor


def check_image_options(model: str | os.PathLike, options: Mapping[str, Any]) -> None:
    """Refuses what a checkpoint's image processor would refuse, before its weights are read.

    Raises:
        ConvLlavaError: the options do not go together, or with the tower.
    """
    from .modeling.image_processing_convllava import ConvLlavaImageProcessor

    if options:
        with wrap_checkpoint_errors(model):
            processor = ConvLlavaImageProcessor.from_pretrained(model)
        try:
            processor.image_sizing(**options)
        except (OSError, ValueError) as error:
            raise ConvLlavaError(f"Images cannot be looked at like this. {error}") from error
