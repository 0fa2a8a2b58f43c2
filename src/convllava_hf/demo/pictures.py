"""Pictures that strangers upload: what is read of them, and what is refused."""

import os
import warnings

from PIL import Image, UnidentifiedImageError

from ..errors import ConvLlavaError

# The image processor's own way from any mode to RGB, so that what is drawn on is what the model sees.
from ..modeling.image_processing_convllava import _to_picture
from .limits import Limits


# Others of PIL's formats start programs (EPS starts Ghostscript) or are of no use to a visitor.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
_NAMED = "JPEG, PNG, WebP, GIF, BMP or TIFF"


def read_picture(path: str | os.PathLike, limits: Limits) -> Image.Image:
    """The picture of an uploaded file, decoded, upright, in RGB, no side longer than the limit.

    Raises:
        ConvLlavaError: the file is no picture, is damaged, or has too many pixels. The message is for the visitor
            and does not name the file's place on this machine.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is what counts here
            with Image.open(path, formats=_formats()) as picture:
                width, height = picture.size
                if width * height <= limits.pixels:
                    return _decode(picture, limits)
        size = f"{width} x {height}"
    except Image.DecompressionBombError:  # PIL counts before the size can be asked
        size = "far more"
    except UnidentifiedImageError as error:
        raise ConvLlavaError(
            f"This file is no picture that can be read here, whatever its name says. Use {_NAMED}."
        ) from error
    except Exception as error:  # PIL's parsers let through whatever they stumble over
        raise ConvLlavaError(
            "This picture is damaged or incomplete and cannot be decoded. Save it again, or take another one."
        ) from error
    raise ConvLlavaError(
        f"This picture is too large: it has {size} pixels, and this page takes {limits.pixels // 1_000_000} million. "
        "Make it smaller and try again."
    )


def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _decode(picture: Image.Image, limits: Limits) -> Image.Image:
    side = limits.longest_side
    if picture.format == "JPEG":
        picture.draft(None, (side, side))  # decodes a large JPEG at a fraction of its size, never below this one
    picture.load()
    picture = _to_picture(picture, None, True)
    if max(picture.size) > side:
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return picture
