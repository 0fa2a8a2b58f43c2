# SPDX-License-Identifier: Apache-2.0
"""From files, bytes, URLs, arrays and tensors to upright RGB images of 8 bits.

Where white is depends on the kind of values and on what the file says about them:

| values | black to white |
|---|---|
| 8-bit images, `uint8` and the other integers | 0 to 255 |
| `bool` | False to True |
| `uint16`, PIL's `I;16`, and `I` (what PIL makes of 16 bits where it has to) | 0 to 65535 |
| TIFF | 0 to the most that its BitsPerSample can hold |
| floats, PIL's `F` | 0 to 1 |

Integers beyond these bounds are refused. Floats may go beyond theirs by 0.05, as resampling leaves them, and are cut
off there; NaN counts as black, infinity as white. Floats beyond 1.05 are 0-255 where the call says `do_rescale=False`,
or where they cannot be anything else: more than half of what is not black is beyond 1.05, and the largest beyond 25.
Few values beyond 1 (a hot pixel, say) are refused and never change the brightness of the others.
"""

import base64
import contextlib
import io
import os
import stat

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from transformers import image_utils


# The formats that are opened. PIL knows others, of which one starts a program (EPS: Ghostscript) and some have no mark
# by which to know them; whoever needs those opens them with PIL and passes the image.
IMAGE_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")

# transformers fetches URLs with httpx since version 5, before with requests; both know `get`.
_IS_HTTPX = hasattr(image_utils, "httpx")
_HTTP = image_utils.httpx if _IS_HTTPX else image_utils.requests
_FETCH_SECONDS = 60  # without a byte from the server
_STRIP = 2**22  # values of an image of more than 8 bits that are converted at once
_ROUNDING = 0.05  # of the range, by which floats may leave it
_LEAST_WHITE = 25.5  # an image of 0-255 that is darker everywhere cannot be told from one of [0, 1] that is too bright
_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # TIFF's tags
_EXIF = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")  # where PIL looks for an orientation
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_KINDS = ((stat.S_ISDIR, "folder"), (stat.S_ISFIFO, "pipe"), (stat.S_ISSOCK, "socket"))


class ImageError(ValueError):
    """An image that cannot be opened, decoded, turned upright, converted or prepared; the message names it."""


@contextlib.contextmanager
def image_errors(name: str):
    """Makes an `ImageError` of one sentence of all that is raised within, but for files that are not there.

    PIL's parsers let through whatever they stumble over: struct.error, IndexError, TypeError, SyntaxError and more.
    """
    try:
        yield
    except (ImageError, FileNotFoundError):
        raise
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{name} is not an image of a format that is opened here ({', '.join(IMAGE_FORMATS)})."
        ) from error
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"The image {name} cannot be decoded: {_first_line(error)} Make it smaller, or, if you know where it "
            "comes from, raise PIL.Image.MAX_IMAGE_PIXELS."
        ) from error
    except Exception as error:
        raise ImageError(f"The image {name} cannot be decoded: {_first_line(error)}") from error


def image_name(image, number: int = 1) -> str:
    """How messages call an image: its path or URL where it has one, else its number in the call."""
    if isinstance(image, dict):
        image = image.get("path") or "image in a data set"
    elif isinstance(image, Image.Image):
        image = getattr(image, "filename", None)
    if not isinstance(image, (str, os.PathLike)) or not str(image):
        return f"number {number} of the call"
    text = str(image)
    return repr(text if len(text) <= 200 else f"{text[:80]}...")


def read_image(source, number: int = 1) -> Image.Image:
    """The image at a path or URL, in a base64 string, or in a row's `bytes` or `path`: decoded, not yet turned.

    Args:
        number: of the image in the call, for messages.

    Raises:
        ImageError: it cannot be opened or decoded.
        FileNotFoundError: nothing lies at the path.
    """
    name = image_name(source, number)
    with image_errors(name):
        content = source.get("bytes") if isinstance(source, dict) else None
        if content is None:
            path = source["path"] if isinstance(source, dict) else source
            content = _located(os.fspath(path), name) if isinstance(path, (str, os.PathLike)) else path
        elif isinstance(content, str):
            raise ImageError(f"The image {name} has text as its bytes: pass bytes, or a path as its path.")
        image = open_image(content, name)
        image.load()
        return image


def open_image(source: str | bytes, name: str) -> Image.Image:
    """Reads the header of a file, given by its path or its bytes; pixels are decoded when they are asked for.

    Args:
        name: for messages.

    Raises:
        ImageError: it is of no format of `IMAGE_FORMATS`, damaged, or no file (a folder, a pipe, a device, ...).
        FileNotFoundError: nothing lies at the path.
    """
    with image_errors(name):
        if isinstance(source, (bytes, bytearray, memoryview)):
            source = io.BytesIO(source)
        elif isinstance(source, (str, os.PathLike)):
            _check_is_file(source, name)
        else:
            raise ImageError(f"The image {name} is given as {type(source).__name__}: pass a path or bytes.")
        Image.init()
        image = Image.open(source, formats=[known for known in IMAGE_FORMATS if known in Image.OPEN])
        if 0 in image.size:
            raise ImageError(f"The image {name} has {image.width} x {image.height} pixels: there is nothing to see.")
        return image


def orientation_of(image: Image.Image) -> int:
    """The orientation from 1 (upright) to 8 that an image's EXIF or XMP gives it; 1 where that cannot be read."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
        return int(orientation) if orientation in _TRANSPOSE else 1
    except Exception:  # of broken EXIF, PIL raises whatever it stumbles over; the pixels are fine all the same
        return 1


def upright(image: Image.Image) -> Image.Image:
    """The image turned and mirrored as its EXIF says, and without it then.

    `ImageOps.exif_transpose` turns as well, but writes EXIF again, which fails where any other of its tags is broken.
    """
    image.load()
    method = _TRANSPOSE.get(orientation_of(image))
    if method is None:
        return image
    turned = image.transpose(method)
    turned.info = {key: value for key, value in image.info.items() if key not in _EXIF}
    return turned


def to_rgb(image, name: str, input_data_format=None, do_convert_rgb: bool = True, do_rescale: bool = True):
    """An image of PIL's, an array or a tensor as an upright RGB image of PIL's. An alpha channel is left out.

    Args:
        name: for messages.
        input_data_format: `"channels_first"` or `"channels_last"`, for arrays where it is not plain.
        do_convert_rgb: whether anything but RGB is converted; else it is refused.
        do_rescale: `False` says that floats are 0-255.

    Raises:
        ImageError: it is no image, cannot be decoded, or its values are beyond their range.
    """
    with image_errors(name):
        if not isinstance(image, Image.Image):
            image = _from_array(image, name, input_data_format, not do_rescale)
        elif 0 in image.size:
            raise ImageError(f"The image {name} has {image.width} x {image.height} pixels: there is nothing to see.")
        elif image.format == "EPS":  # loading it would start Ghostscript
            raise ImageError(f"The image {name} is PostScript: convert it to RGB before you pass it.")
        elif image.mode == "F" or image.mode.startswith("I"):
            image = _from_deep_gray(image, name, not do_rescale)
        else:
            image = upright(image)
        if image.mode == "RGB":
            return image
        if not do_convert_rgb:
            raise ImageError(
                f"The image {name} is of PIL's mode {image.mode!r}, but the vision tower sees RGB: convert it, or "
                "leave do_convert_rgb at True."
            )
        return image.convert("RGB")


def _located(source: str, name: str) -> str | bytes:
    """A path as it is; the bytes at a URL, in a data URL or in a base64 string."""
    try:
        if source.startswith(("http://", "https://")):
            options = {"follow_redirects": True} if _IS_HTTPX else {}  # requests does so by itself
            response = _HTTP.get(source, timeout=_FETCH_SECONDS, **options)
            response.raise_for_status()
            return response.content
        if source.startswith("data:"):
            return base64.b64decode(source.partition(",")[2])
        if _looks_like_base64(source) and not os.path.exists(source):
            return base64.b64decode(source)
    except Exception as error:  # httpx and requests have different ideas of what an error is
        raise ImageError(f"Cannot read an image from {name}: {_first_line(error)}") from error
    return source


def _looks_like_base64(text: str) -> bool:
    """Whether a string that is no file may be an encoded image: long, and of base64's characters alone."""
    return len(text) >= 64 and all(char.isalnum() or char in "+/=\n\r" for char in text)


def _check_is_file(path: str | os.PathLike, name: str) -> None:
    """Looks before anything is opened: opening a pipe waits for whoever writes into it, and a device never ends."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(f"There is no image at {name}: check the path.") from error
    except (OSError, ValueError) as error:  # a name that is too long, with a NUL, or that no file can have
        reason = error.strerror if isinstance(error, OSError) else error
        raise ImageError(f"There can be no image at {name[:200]}: {reason}.") from None
    if not stat.S_ISREG(mode):
        kind = next((kind for holds, kind in _KINDS if holds(mode)), "device")
        raise ImageError(f"{name} is not an image but a {kind}: pass the path of a file.")


def _first_line(error: BaseException) -> str:
    """What an error says, on one line that ends as a sentence does."""
    text = " ".join(str(error).split())[:300] or type(error).__name__
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _from_array(image, name: str, input_data_format, is_255: bool) -> Image.Image:
    """An array or a tensor as an image of PIL's of 8 bits, in mode L, LA, RGB or RGBA."""
    if hasattr(image, "detach"):
        tensor = image.detach().cpu()
        # NumPy has no bfloat16.
        image = tensor.float().numpy() if str(tensor.dtype) == "torch.bfloat16" else tensor.numpy()
    is_array = isinstance(image, np.ndarray)
    if not is_array or image.ndim not in (2, 3) or 0 in image.shape or image.dtype.kind not in "buif":
        described = f" of shape {image.shape} and type {image.dtype}" if is_array else ""
        raise ImageError(
            f"{name[:1].upper() + name[1:]}, a {type(image).__name__}{described}, is no image. Pass a PIL image, "
            "a path, a URL, or an array of (height, width), (height, width, channels) or (channels, height, width)."
        )
    array = _channels_last(image, name, input_data_format)
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    elif array.dtype != np.uint8:
        colors = array[..., :3] if array.shape[-1] > 2 else array[..., :1]  # alpha has a range of its own
        white = _white_of(colors, name, is_255)
        array = _to_8_bits(lambda: _strips(array), array.shape, white)
    return Image.fromarray(np.ascontiguousarray(array[..., 0] if array.shape[-1] == 1 else array))


def _channels_last(array: np.ndarray, name: str, input_data_format) -> np.ndarray:
    """(height, width), (height, width, channels) or (channels, height, width) -> (height, width, channels)"""
    if array.ndim == 2:
        return array[..., None]
    # Gray and RGB before those with alpha, and channels first before last, as transformers decides it.
    fits = [(axis, size) for size in ((1, 3), (2, 4)) for axis in (0, 2) if array.shape[axis] in size]
    if input_data_format is not None:
        wanted = 0 if str(getattr(input_data_format, "value", input_data_format)) == "channels_first" else 2
        fits = [fit for fit in fits if fit[0] == wanted]
    if not fits:
        raise ImageError(
            f"The image {name} has the shape {array.shape}, in which there is no axis of 1 to 4 channels"
            f"{'' if input_data_format is None else f' as {input_data_format} says'}."
        )
    return array if fits[0][0] == 2 else array.transpose(1, 2, 0)


def _white_of(array: np.ndarray, name: str, is_255: bool) -> float:
    """The value that stands for white."""
    if array.dtype.kind == "f":
        return _white_of_floats(lambda: _strips(array), name, is_255)
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        return 65535
    low, high = int(array.min()), int(array.max())
    if low < 0 or high > 255:
        raise ImageError(
            f"The image {name} has values of {array.dtype} from {low} to {high}; expected 0-255. Pass 16 bits as "
            "uint16."
        )
    return 255


def _from_deep_gray(image: Image.Image, name: str, is_255: bool) -> Image.Image:
    """Gray of 16 or 32 bits or of floats as upright 8-bit gray; PIL's own conversion cuts off all above 255."""
    tags = getattr(image, "tag_v2", {})
    bits = int(tags.get(_BITS_PER_SAMPLE, (16,))[0]) if image.mode != "F" else 0
    signed = tags.get(_SAMPLE_FORMAT, (1,))[0] == 2
    image.load()  # before it is looked at in strips

    def strips():
        rows = max(1, _STRIP // image.width)
        for top in range(0, image.height, rows):
            strip = np.asarray(image.crop((0, top, image.width, min(top + rows, image.height))))
            yield strip.view(np.uint32) if bits == 32 and not signed else strip

    if image.mode == "F":
        white = _white_of_floats(strips, name, is_255)
    else:
        white = 2 ** (bits - signed) - 1
        high = max(int(strip.max()) for strip in strips()) if bits == 32 or not tags else 0
        if high > white or (bits == 32 and 0 < high <= 65535):
            raise ImageError(
                f"The image {name} has values up to {high}; expected 0 to {white}, which is white with {bits} bits. "
                "Save it with 8 or 16 bits."
            )
    gray = _to_8_bits(strips, (image.height, image.width), white, inverted=tags.get(_PHOTOMETRIC) == 0)
    converted = Image.fromarray(gray)
    method = _TRANSPOSE.get(orientation_of(image))
    return converted if method is None else converted.transpose(method)


def _white_of_floats(strips, name: str, is_255: bool) -> float:
    """1 or 255, from all values; see the module for how it is decided."""
    low, high, bright, beyond = 0.0, 0.0, 0, 0
    for strip in strips():
        values = strip[np.isfinite(strip)]
        if values.size:
            low, high = min(low, float(values.min())), max(high, float(values.max()))
            bright += np.count_nonzero(values > _ROUNDING)
            beyond += np.count_nonzero(values > 1 + _ROUNDING)
    if -_ROUNDING <= low and high <= 1 + _ROUNDING:
        return 1.0
    if -255 * _ROUNDING <= low and high <= 255 * (1 + _ROUNDING):
        if is_255 or (high > _LEAST_WHITE and 2 * beyond > bright):
            return 255.0
    raise ImageError(
        f"The image {name} has floats from {low:.4g} to {high:.4g}; expected [0, 1], or 0-255 with do_rescale=False. "
        "Divide them by what stands for white."
    )


def _to_8_bits(strips, shape: tuple[int, ...], white: float, inverted: bool = False) -> np.ndarray:
    """Values from 0 to `white` as 0-255, to the nearest; a strip at a time, for each takes eight bytes a value."""
    converted = np.empty(shape, np.uint8)
    top = 0
    for strip in strips():
        values = strip.astype(np.float64)
        values *= 255 / white
        if strip.dtype.kind == "f":
            np.nan_to_num(values, copy=False, nan=0.0, posinf=255.0, neginf=0.0)
        np.rint(values.clip(0, 255, out=values), out=values)
        converted[top : top + len(strip)] = 255 - values if inverted else values
        top += len(strip)
    return converted


def _strips(array: np.ndarray):
    rows = max(1, _STRIP // array[0].size)
    for top in range(0, len(array), rows):
        yield array[top : top + rows]
