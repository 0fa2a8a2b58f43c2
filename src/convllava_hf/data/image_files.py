"""Looks at an image in a file or in bytes and says what is wrong with it."""

import functools
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image, UnidentifiedImageError

from ..errors import first_line

# The image processor's own way from files to RGB, so that what is found good here is what it can read.
from ..modeling.image_utils_convllava import ImageError, image_errors, open_image, orientation_of, to_rgb


_TURNED = (5, 6, 7, 8)  # orientations that swap height and width
# Photos that hold a preview or a depth map besides the image: they are not animations.
_SEVERAL_IMAGES = ("MPO",)


@dataclass(frozen=True)
class Examined:
    """`size`: height and width in pixels as it is looked at (turned as EXIF says), `None` if unknown.
    `kind`: of the problem, `None` where there is none; `detail`: what is wrong."""

    size: tuple[int, int] | None
    kind: str | None = None
    detail: str = ""


def stored_size(image: Mapping[str, Any]) -> tuple[int, int] | None:
    """Height and width of an image, `bytes` or else a `path`, rotated as EXIF says; `None` if the header does not say.

    Reads only the header. For a PNG whose EXIF comes after its pixels, the size is the one before turning.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with open_image(_source(image), "to be measured") as opened:
                decodes = opened.format == "PNG" and "exif" not in opened.info
                return (opened.height, opened.width) if decodes else upright_size(opened)
    except (ImageError, OSError):
        return None


def examine(image: Mapping[str, Any]) -> Examined:
    """Decodes an image, `bytes` or else a `path`, to its end, and brings it to RGB as the image processor does."""
    source = _source(image)
    if isinstance(source, str):
        return _examine_file(source)
    name = _printable(str(image.get("path") or "an image in the data set"))
    if not isinstance(source, bytes):
        return Examined(None, "unreadable image", f"{name} is given as {type(image.get('bytes')).__name__}")
    if not source:
        return Examined(None, "empty image", f"{name} has no bytes")
    return _examine(source, name)


def _source(image: Mapping[str, Any]) -> str | bytes | None:
    """Its bytes, or else its path; `None` where they are of another type."""
    content, path = image.get("bytes"), image.get("path")
    if content is not None:
        return bytes(content) if isinstance(content, (bytes, bytearray, memoryview)) else None
    return os.fspath(path) if isinstance(path, (str, os.PathLike)) else None


@functools.lru_cache(maxsize=2**18)  # data sets ask several questions about an image
def _examine_file(path: str) -> Examined:
    name = _printable(path)
    try:
        if os.path.isdir(path):
            return Examined(None, "missing image", f"{name} is a folder")
        if os.path.isfile(path) and os.path.getsize(path) == 0:
            return Examined(None, "empty image", f"{name} has no bytes")
        return _examine(path, name)
    except FileNotFoundError:
        return Examined(None, "missing image", f"{name} does not exist")


def _printable(path: str) -> str:
    """A path as UTF-8 can hold it, on one line: names of files are bytes, and any of them may be in one."""
    return " ".join(path.encode("utf-8", "backslashreplace").decode().splitlines())


def _examine(source: Any, name: str) -> Examined:
    size, largest = None, Image.MAX_IMAGE_PIXELS
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what PIL warns of is either refused here or harmless
            with open_image(source, repr(name)) as image, image_errors(repr(name)):
                size = (image.height, image.width)
                if largest is not None and size[0] * size[1] > largest:
                    raise Image.DecompressionBombError
                frames = 1 if image.format in _SEVERAL_IMAGES else getattr(image, "n_frames", 1)
                image.draft(None, (1, 1))  # JPEG: everything is read, but less of it is transformed
                image.load()
                size = size[::-1] if _is_turned(image) else size  # a draft is smaller than the image
                to_rgb(image, repr(name))
    except ImageError as error:
        cause = error.__cause__
        if isinstance(cause, Image.DecompressionBombError):
            pixels = f"{size[1]} x {size[0]} pixels" if size else "too many pixels"
            return Examined(size, "gigantic image", f"{name} has {pixels}; at most {largest} are safe")
        if isinstance(cause, UnidentifiedImageError):
            return Examined(None, "unreadable image", f"{name} is not in a supported format")
        if cause is None or getattr(cause, "errno", None) is not None:  # said by us, or by the system
            return Examined(size, "unreadable image", str(error))
        return Examined(size, "truncated image", f"{name} cannot be decoded completely: {first_line(cause)}")
    if frames > 1:
        return Examined(size, "animated image", f"{name} has {frames} frames; only the first would be seen")
    return Examined(size)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Height and width in pixels of an opened image, turned as its EXIF says."""
    size = (image.height, image.width)
    return size[::-1] if _is_turned(image) else size


def _is_turned(image: Image.Image) -> bool:
    """Whether EXIF exchanges height and width. Of TIFF, PIL gives them as they are looked at."""
    return image.format != "TIFF" and orientation_of(image) in _TURNED
