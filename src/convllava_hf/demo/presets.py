"""Image sizes that a visitor can choose from: how many pixels the model sees and what they cost."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..boxes import place_in_square
from ..modeling.configuration_convllava import PRESETS, ImageSizing, visual_token_grid
from ..modeling.image_processing_convllava import ConvLlavaImageProcessor
from ..options import mode_of, sizing_values


_SIDES = (1536, 1024, 768, 512, 256, 128, 64)  # pixels; what is offered below the checkpoint's own resolution
_OFFERED = 4
_OFFERED_NATIVE = 2  # of the image processor's presets, the largest that cost no more than the checkpoint's own way


@dataclass(frozen=True)
class Preset:
    """`name` is what the visitor reads; `image_options`: see `options.ImageOptions`."""

    name: str
    image_options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class View:
    """What the model sees of one image.

    `height`, `width`: pixels that come to the vision tower. `visual_tokens`: what they cost. `left`, `top`, `across`,
    `down`: the part of the model's view that the image itself covers, in fractions of it; the rest is padding.
    """

    height: int
    width: int
    visual_tokens: int
    left: float
    top: float
    across: float
    down: float


def presets(image_processor: ConvLlavaImageProcessor) -> dict[str, Preset]:
    """By name, the checkpoint's own way first, then smaller squares, then images in their own shape."""
    own, stride = image_processor.image_sizing(), image_processor.stride
    sides = [side for side in _SIDES if side < own.size and side % stride == 0][: _OFFERED - 1]
    offered = [Preset(_name(own))]
    for side in sides:
        kwargs = {"image_aspect_ratio": "pad", "size": side}
        offered.append(Preset(_name(image_processor.image_sizing(**kwargs)), kwargs))
    within = [name for name, pixels in PRESETS.items() if pixels <= max(own.size**2, own.most_pixels)]
    for name in within[: -_OFFERED_NATIVE - 1 : -1]:
        offered.append(Preset(_name(image_processor.image_sizing(preset=name)), {"preset": name}))
    by_name: dict[str, Preset] = {}
    for preset in offered:
        by_name.setdefault(preset.name, preset)  # the checkpoint's own way may be one of the others
    return by_name


def view(image_processor: ConvLlavaImageProcessor, preset: Preset, image_width: int, image_height: int) -> View:
    """What the model sees of an image of this size, and where in it the image lies."""
    height, width = image_processor.get_image_size(image_height, image_width, **preset.image_options)
    rows, columns = visual_token_grid(height, width, image_processor.stride)
    if not mode_of(image_processor.image_sizing(**preset.image_options)).square:
        return View(height, width, rows * columns, 0.0, 0.0, 1.0, 1.0)
    return View(height, width, rows * columns, *place_in_square(image_height, image_width))


def _name(sizes: ImageSizing) -> str:
    return mode_of(sizes).page_text.format(**sizing_values(sizes))
