"""Images that strangers upload: what is read of them, and what is refused."""

import os
import warnings

from PIL import Image, UnidentifiedImageError

from ..errors import ConvLlavaError

# The image processor's own way from any mode to RGB, so that what is drawn on is what the model sees.
from ..modeling.image_utils_convllava import ImageError, open_image, to_rgb
from .limits import Limits


_NAME = "that was uploaded"
_NAMED = "JPEG, PNG, WebP, GIF, BMP or TIFF"


def read_image(path: str | os.PathLike, limits: Limits) -> Image.Image:
    """The image of an uploaded file, decoded, upright, in RGB, no side longer than the limit.

    Raises:
        ConvLlavaError: the file is not an image, is damaged, or has too many pixels. The message is for the visitor
            and does not name the file's place on this machine.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is what counts here
            with open_image(os.fspath(path), _NAME) as image:
                width, height = image.size
                if width * height <= limits.pixels:
                    return _decode(image, limits)
        size = f"{width} x {height}"
    except (ImageError, OSError) as error:
        if isinstance(error.__cause__, UnidentifiedImageError):
            raise ConvLlavaError(f"This file is not an image that can be read here. Use {_NAMED}.") from error
        if not isinstance(error.__cause__, Image.DecompressionBombError):
            raise ConvLlavaError(
                "This image is damaged or incomplete and cannot be decoded. Save it again, or take another one."
            ) from error
        size = "far more"  # PIL counts before the size can be asked
    raise ConvLlavaError(
        f"This image is too large: it has {size} pixels, and this page takes {limits.pixels // 1_000_000} million. "
        "Make it smaller and try again."
    )


def _decode(image: Image.Image, limits: Limits) -> Image.Image:
    side = limits.longest_side
    if image.format == "JPEG":
        image.draft(None, (side, side))  # decodes a large JPEG at a fraction of its size, never below this one
    image = to_rgb(image, _NAME)
    if max(image.size) > side:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return image
