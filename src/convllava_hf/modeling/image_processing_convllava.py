# SPDX-License-Identifier: Apache-2.0
"""From images to `pixel_values`, with PIL and NumPy alone."""

import itertools
import math
import os

import numpy as np
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature, get_size_dict
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, PILImageResampling
from transformers.processing_utils import ImagesKwargs

from .configuration_convllava import PRESETS, ImageSizing, set_in_package, visual_token_grid
from .image_utils_convllava import ImageError, image_name, read_image, to_rgb


# Values of a batch beyond which images of very different shapes are refused together: 4 GiB in float32.
_MOST_VALUES = 2**30
# Arguments that decide how large the tower sees an image.
IMAGE_ARGUMENTS = ("image_aspect_ratio", "size", "min_pixels", "max_pixels", "preset")


class ConvLlavaImagesKwargs(ImagesKwargs, total=False):
    image_aspect_ratio: str | None
    min_pixels: int | None
    max_pixels: int | None
    preset: str | None


class ConvLlavaImageProcessor(BaseImageProcessor):
    """Prepares images: in a square as the original ConvLLaVA does, to the pixel, or in their own aspect ratio.

    Args:
        image_aspect_ratio (`str`, defaults to `"pad"`): how an image comes to the tower's shape. `"pad"`: put into
            the middle of a square of the mean color, then resized. `"native"`: resized, where that is needed at all,
            to sides that are multiples of `stride` and an area from `min_pixels` to `max_pixels`. `"shortest_edge"`:
            resized such that the shorter side is `size`, the paper's protocol for table 7.
        size (`dict` or `int`, defaults to 768 x 768): `height` and `width` in pixels of the square, or
            `shortest_edge`; a multiple of `stride`. Of native images, `max_pixels` where that is not given.
        min_pixels, max_pixels (`int`, *optional*): bounds of height times width of what the tower sees of a native
            image; the defaults are those of `ImageSizing`, which says all about sizes.
        preset (`str`, *optional*): `"tiny"`, `"small"`, `"base"`, `"large"` or `"full"`, in place of
            `image_aspect_ratio="native"` and `max_pixels`: native images of up to 512, 768, 1024, 1536 or 3072
            pixels squared.
        stride (`int`, defaults to 64): side in pixels of the square that one visual token stands for.
        resample (`int`, defaults to bicubic): one of PIL's filters.
        do_resize, do_convert_rgb, do_rescale, do_normalize (`bool`, default to `True`): steps to take.
        rescale_factor (`float`, defaults to 1/255): from 0-255 to 0-1.
        image_mean, image_std (`list[float]`, default to CLIP's): of the pixels after rescaling; the mean is also the
            color of the padding.

    Returns of a call:
        `pixel_values`: normalized images, (N, 3, height, width). `image_sizes`: height and width in pixels that each
        image covers of that, (N, 2).

    Raises:
        ImageError: something that is no image, or an image that cannot be opened, decoded, turned upright, converted
            or prepared, by its name or its number in the call. It is a `ValueError`.
        FileNotFoundError: a path at which there is no file.
        ValueError: sizes that the tower cannot take, images so different in shape that a common size would be
            enormous.
    """

    model_input_names = ["pixel_values", "image_sizes"]
    valid_kwargs = ConvLlavaImagesKwargs

    def __init__(
        self,
        image_aspect_ratio: str | None = None,
        size: dict[str, int] | int | None = None,
        stride: int = 64,
        resample: int = PILImageResampling.BICUBIC,
        do_resize: bool = True,
        do_convert_rgb: bool = True,
        do_rescale: bool = True,
        rescale_factor: float = 1 / 255,
        do_normalize: bool = True,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        preset: str | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if preset is not None:
            image_aspect_ratio, max_pixels = _preset(preset, image_aspect_ratio, max_pixels)
        image_aspect_ratio = "pad" if image_aspect_ratio is None else image_aspect_ratio
        side = _square_side(768 if size is None else size)
        ImageSizing(image_aspect_ratio, side, stride, min_pixels, max_pixels)  # refuses what cannot work
        self.image_aspect_ratio = image_aspect_ratio
        self.stride = stride
        self.size = {"height": side, "width": side}
        self.min_pixels = min_pixels
        self.max_pixels = max_pixels
        self.resample = resample
        self.do_resize = do_resize
        self.do_convert_rgb = do_convert_rgb
        self.do_rescale = do_rescale
        self.rescale_factor = rescale_factor
        self.do_normalize = do_normalize
        self.image_mean = list(OPENAI_CLIP_MEAN if image_mean is None else image_mean)
        self.image_std = list(OPENAI_CLIP_STD if image_std is None else image_std)

    @classmethod
    def from_dict(cls, image_processor_dict: dict, **kwargs):
        """As in transformers; what is said about images' sizes means what it means in a call."""
        given = {name: kwargs.pop(name, None) for name in IMAGE_ARGUMENTS}
        made = super().from_dict(image_processor_dict, **kwargs)
        processor = made[0] if isinstance(made, tuple) else made
        sizes = processor.image_sizing(**given)
        processor.image_aspect_ratio = sizes.mode
        processor.size = {"height": sizes.size, "width": sizes.size}
        processor.min_pixels, processor.max_pixels = sizes.min_pixels, sizes.max_pixels
        return made

    def fetch_images(self, images):
        """Opens paths, URLs, base64 strings and the `bytes` and `path` of undecoded rows of `datasets`.

        Returns upright RGB images; arrays and tensors pass through, nested lists keep their shape.

        Raises:
            ImageError, FileNotFoundError: as in a call.
        """
        return self._fetched(images, itertools.count(1))

    def _fetched(self, images, numbers):
        if isinstance(images, (list, tuple)):
            return [self._fetched(image, numbers) for image in images]
        number = next(numbers)
        image = _opened(images, number)
        is_array = hasattr(image, "shape")  # converted where its range and its axes are known
        return image if is_array else to_rgb(image, image_name(images, number))

    def preprocess(
        self,
        images,
        image_aspect_ratio: str | None = None,
        size: dict[str, int] | int | None = None,
        resample: int | None = None,
        do_resize: bool | None = None,
        do_convert_rgb: bool | None = None,
        do_rescale: bool | None = None,
        rescale_factor: float | None = None,
        do_normalize: bool | None = None,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        preset: str | None = None,
        return_tensors=None,
        input_data_format=None,
        **kwargs,
    ) -> BatchFeature:
        """Prepares one image or (nested) lists of them; arguments left out are those of the constructor.

        Args:
            images: PIL images, paths, URLs, base64 strings, rows with `bytes` or `path`, arrays or tensors on any
                device: (height, width), (height, width, channels) or (channels, height, width) of 1 to 4 channels,
                an alpha channel being left out. Integers are 0-255, `uint16` 0-65535, floats [0, 1], or 0-255 with
                `do_rescale=False`; `image_utils_convllava` says it of files, and of values beyond.
            input_data_format: `"channels_first"` or `"channels_last"`, for arrays where it is not plain.
        """
        sizes = self.image_sizing(image_aspect_ratio, size, min_pixels, max_pixels, preset)
        do_resize = self.do_resize if do_resize is None else do_resize
        resample = self.resample if resample is None else resample
        do_convert_rgb = self.do_convert_rgb if do_convert_rgb is None else do_convert_rgb
        scale = self.rescale_factor if rescale_factor is None else rescale_factor
        scale = scale if (self.do_rescale if do_rescale is None else do_rescale) else None
        mean = self.image_mean if image_mean is None else image_mean
        std = self.image_std if image_std is None else image_std
        do_normalize = self.do_normalize if do_normalize is None else do_normalize

        do_rescale = scale is not None
        prepared = []
        for number, image in enumerate(_flatten(images), start=1):
            name = image_name(image, number)
            rgb = to_rgb(_opened(image, number), name, input_data_format, do_convert_rgb, do_rescale)
            try:
                pixels = self._prepared(rgb, sizes, do_resize, resample, mean)
            except (ValueError, MemoryError) as error:
                reason = str(error) or "it takes too much memory."
                raise ImageError(f"The image {name} cannot be prepared: {reason}") from error
            prepared.append(_normalize(pixels, scale, mean if do_normalize else None, std))
        if not prepared:
            raise ValueError("No images were given. Pass at least one, or leave `images` out for text alone.")
        image_sizes = [list(array.shape[1:]) for array in prepared]
        data = {"pixel_values": _pad_to_common_size(prepared), "image_sizes": image_sizes}
        return BatchFeature(data=data, tensor_type=return_tensors)

    def _prepared(self, image: Image.Image, sizes: ImageSizing, do_resize: bool, resample: int, mean) -> np.ndarray:
        """An RGB image as the tower sees it: (height, width, 3), 0-255."""
        if sizes.mode == "pad":
            image = _pad_to_square(image, mean)
        if do_resize:
            height, width = sizes.seen(image.height, image.width)
            image = image.resize((width, height), resample=resample)
        pixels = np.asarray(image)
        visual_token_grid(*pixels.shape[:2], self.stride)
        return pixels

    def get_image_size(self, height: int, width: int, **kwargs) -> tuple[int, int]:
        """Height and width in pixels that the tower sees of an image of such a size; arguments as in a call."""
        sizes = self.image_sizing(**{name: kwargs.get(name) for name in IMAGE_ARGUMENTS})
        do_resize = kwargs.get("do_resize")
        if self.do_resize if do_resize is None else do_resize:
            return sizes.seen(height, width)
        side = max(height, width)
        return (side, side) if sizes.mode == "pad" else (height, width)

    def image_sizing(
        self,
        image_aspect_ratio: str | None = None,
        size: dict[str, int] | int | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        preset: str | None = None,
    ) -> ImageSizing:
        """What a call with these arguments makes of images' sizes; arguments left out are the constructor's."""
        if preset is not None:
            image_aspect_ratio, max_pixels = _preset(preset, image_aspect_ratio, max_pixels)
        mode = self.image_aspect_ratio if image_aspect_ratio is None else image_aspect_ratio
        side = _square_side(self.size if size is None else size)
        own = mode == self.image_aspect_ratio  # bounds of another mode say nothing about this one
        if own and max_pixels is None and size is None:
            max_pixels = self.max_pixels
        if own and min_pixels is None and (self.min_pixels or 0) <= (max_pixels or side**2):
            min_pixels = self.min_pixels  # else it gives way to what was chosen for this call
        return ImageSizing(mode, side, self.stride, min_pixels, max_pixels)


def _preset(name: str, mode: str | None, max_pixels: int | None) -> tuple[str, int]:
    """The mode and the most pixels that a preset stands for."""
    if name not in PRESETS:
        raise ValueError(f"preset is {name!r}, expected one of {', '.join(PRESETS)}.")
    if mode not in (None, "native") or max_pixels is not None:
        raise ValueError(
            f"preset={name!r} stands for image_aspect_ratio='native' and max_pixels={PRESETS[name]}, but "
            f"{f'image_aspect_ratio={mode!r}' if max_pixels is None else f'max_pixels={max_pixels}'} is given as "
            "well: leave one of them out."
        )
    return "native", PRESETS[name]


def _square_side(size) -> int:
    """`size` in pixels, from a number, `height` and `width`, or `shortest_edge`."""
    size = dict(get_size_dict(size, default_to_square=True))
    if set(size) == {"shortest_edge"}:
        return size["shortest_edge"]
    if set(size) != {"height", "width"} or size["height"] != size["width"]:
        raise ValueError(
            f"size is {size}, but it means the side of square images, or the shorter side: pass one number, or the "
            "same height and width. The shape of native images is their own; min_pixels and max_pixels bound it."
        )
    return size["height"]


def _opened(image, number: int):
    """The image of a path, a URL, base64 or a row of a data set, in its own mode; others as they are."""
    if isinstance(image, (str, os.PathLike)):
        return read_image(image, number)
    if isinstance(image, dict) and (image.get("bytes") is not None or image.get("path") is not None):
        return read_image(image, number)
    return image


def _flatten(images) -> list:
    if isinstance(images, (list, tuple)):
        return [image for nested in images for image in _flatten(nested)]
    if getattr(images, "ndim", 0) == 4:  # a batch in one array
        return list(images)
    return [images]


def _pad_to_square(image: Image.Image, mean) -> Image.Image:
    """The image in the middle of a square of the mean color; of an odd remainder, one pixel less stands before.

    A square beyond what PIL takes for a bomb would cost gigabytes that show nothing: such images are made smaller.
    """
    width, height = image.size
    if width == height:
        return image
    most = math.isqrt(2 * Image.MAX_IMAGE_PIXELS) if Image.MAX_IMAGE_PIXELS else max(width, height)
    if max(width, height) > most:
        size = [max(1, side * most // max(width, height)) for side in (width, height)]
        image = image.resize(size, resample=Image.Resampling.BICUBIC)
        width, height = image.size
    side = max(width, height)
    square = Image.new("RGB", (side, side), tuple(int(255 * channel) for channel in mean))
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def _pad_to_common_size(images: list[np.ndarray]) -> list[np.ndarray]:
    """Zeros at the right and bottom of the smaller images, which the vision tower leaves out of account."""
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    values = 3 * height * width * len(images)
    if values > _MOST_VALUES and values > 8 * sum(image.size for image in images):
        shapes = [image.shape[1:] for image in images]
        low, high = min(shapes), max(shapes)
        raise ValueError(
            f"Images of {low[0]} x {low[1]} and {high[0]} x {high[1]} pixels (height x width) in one call would be "
            f"padded to {height} x {width} each, {4 * values / 2**30:.0f} GiB in all. Pass them in calls of their "
            "own, or lower max_pixels."
        )
    return [np.pad(image, ((0, 0), (0, height - image.shape[1]), (0, width - image.shape[2]))) for image in images]


def _normalize(pixels: np.ndarray, scale: float | None, mean, std) -> np.ndarray:
    """(height, width, 3) of 0-255 -> (3, height, width) of float32."""
    pixels = pixels.astype(np.float32)
    if scale is not None:
        pixels *= np.float32(scale)
    if mean is not None:
        pixels = (pixels - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


set_in_package(__name__)
