"""How a checkpoint looks at pictures, chosen anew by options of commands and recipes."""

import copy
import os
from collections.abc import Mapping
from typing import Any

from .damaged import blamed_on
from .errors import ConvLlavaError


# Of the image processor's arguments, those that decide how large the tower sees a picture.
PICTURE_OPTIONS = ("image_aspect_ratio", "size", "min_pixels", "max_pixels", "preset")


def with_picture_options(processor: Any, options: Mapping[str, Any]) -> Any:
    """A `ConvLlavaProcessor` that looks at pictures as the options say; of others, as it did before.

    Args:
        options: some of `PICTURE_OPTIONS`; those that are `None` are not given.

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
        raise ConvLlavaError(f"Pictures cannot be looked at like this. {error}") from error
    processor = copy.copy(processor)
    processor.image_processor = after
    return processor


def check_picture_options(model: str | os.PathLike, options: Mapping[str, Any]) -> None:
    """Refuses what a checkpoint's image processor would refuse, before its weights are read.

    Raises:
        ConvLlavaError: the options do not go together, or with the tower.
    """
    from .modeling.image_processing_convllava import ConvLlavaImageProcessor

    if options:
        with blamed_on(model):
            processor = ConvLlavaImageProcessor.from_pretrained(model)
        try:
            processor.picture_sizes(**options)
        except (OSError, ValueError) as error:
            raise ConvLlavaError(f"Pictures cannot be looked at like this. {error}") from error
