"""Looks at a picture in a file or in bytes and says what is wrong with it."""

import functools
import io
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from PIL import Image, UnidentifiedImageError


EXIF_ORIENTATION = 0x0112
_TURNED = (5, 6, 7, 8)  # orientations that swap height and width
# Photographs that hold a preview or a depth map beside the picture; nothing moves in them.
_SEVERAL_PICTURES = ("MPO",)


@dataclass(frozen=True)
class Examined:
    """`size`: height and width in pixels as it is looked at (turned as EXIF says), `None` if unknown.
    `kind`: of the problem, `None` where there is none; `detail`: what is wrong."""

    size: tuple[int, int] | None
    kind: str | None = None
    detail: str = ""


def stored_size(picture: Mapping[str, Any]) -> tuple[int, int] | None:
    """Height and width of a picture, `bytes` or else a `path`, turned as EXIF says; `None` if they cannot be told.

    The header alone is read. Of a PNG whose EXIF stands after its pixels, the size is that before turning.
    """
    source = picture["path"] if picture.get("bytes") is None else io.BytesIO(picture["bytes"])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(source) as opened:
                size = (opened.height, opened.width)
                exif = opened.getexif() if opened.format != "PNG" or "exif" in opened.info else {}
                return size[::-1] if exif.get(EXIF_ORIENTATION) in _TURNED else size
    except Exception:  # PIL's parsers let through whatever they stumble over
        return None


def examine(picture: Mapping[str, Any]) -> Examined:
    """Decodes a picture, `bytes` or else a `path`, to its end."""
    if picture.get("bytes") is None:
        return _examine_file(picture["path"])
    name = picture.get("path") or "a picture in the data set"
    if not picture["bytes"]:
        return Examined(None, "empty picture", f"{name} has no bytes")
    return _examine(io.BytesIO(picture["bytes"]), name)


@functools.lru_cache(maxsize=2**18)  # data sets ask several questions about a picture
def _examine_file(path: str) -> Examined:
    try:
        if os.path.isdir(path):
            return Examined(None, "missing picture", f"{path} is a folder")
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                return Examined(None, "empty picture", f"{path} has no bytes")
            return _examine(file, path)
    except FileNotFoundError:
        return Examined(None, "missing picture", f"{path} is not there")
    except OSError as error:
        return Examined(None, "unreadable picture", f"{path}: {error.strerror or error}")


def _examine(file: BinaryIO, name: str) -> Examined:
    size, largest = None, Image.MAX_IMAGE_PIXELS
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what PIL warns of is either refused here or harmless
            with Image.open(file) as picture:
                size = (picture.height, picture.width)
                if largest is not None and size[0] * size[1] > largest:
                    raise Image.DecompressionBombError
                frames = 1 if picture.format in _SEVERAL_PICTURES else getattr(picture, "n_frames", 1)
                picture.draft(None, (1, 1))  # JPEG: everything is read, but less of it is transformed
                picture.load()
                if picture.getexif().get(EXIF_ORIENTATION) in _TURNED:
                    size = size[::-1]
    except UnidentifiedImageError:
        return Examined(None, "unreadable picture", f"{name} is of no format that PIL can read")
    except Image.DecompressionBombError:
        pixels = f"{size[1]} x {size[0]} pixels" if size else "too many pixels"
        return Examined(size, "gigantic picture", f"{name} has {pixels}; {largest} in all are safe")
    except Exception as error:  # PIL's parsers let through whatever they stumble over
        return Examined(size, "truncated picture", f"{name} cannot be decoded to its end: {error}")
    if frames > 1:
        return Examined(size, "animated picture", f"{name} has {frames} frames; only the first would be seen")
    return Examined(size)
