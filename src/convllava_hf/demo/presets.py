"""Ways to look at a picture that a visitor can choose from: how many pixels the model sees and what they cost."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..modeling.configuration_convllava import visual_token_grid
from ..modeling.image_processing_convllava import ConvLlavaImageProcessor


_SIDES = (1536, 1024, 768, 512, 256, 128, 64)  # pixels; what is offered below the checkpoint's own resolution
_OFFERED = 4


@dataclass(frozen=True)
class Preset:
    """`name` is what the visitor reads; `images_kwargs` is what the image processor is called with."""

    name: str
    images_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class View:
    """What the model sees of one picture.

    `height`, `width`: pixels that come to the vision tower. `visual_tokens`: what they cost. `left`, `top`, `across`,
    `down`: the part of the model's view that the picture itself covers, in fractions of it; the rest is padding.
    """

    height: int
    width: int
    visual_tokens: int
    left: float
    top: float
    across: float
    down: float


def presets(image_processor: ConvLlavaImageProcessor) -> dict[str, Preset]:
    """By name, the checkpoint's own resolution first. Another mode of the image processor is added here."""
    height, width = image_processor.size["height"], image_processor.size["width"]
    stride = image_processor.stride
    own = [Preset(_name(height, width, stride))]
    smaller = [side for side in _SIDES if side < min(height, width) and side % stride == 0][: _OFFERED - 1]
    squares = [Preset(_name(side, side, stride), {"size": {"height": side, "width": side}}) for side in smaller]
    return {preset.name: preset for preset in own + squares}


def view(image_processor: ConvLlavaImageProcessor, preset: Preset, picture_width: int, picture_height: int) -> View:
    """What the model sees of a picture of this size, and where in it the picture lies."""
    height, width = image_processor.get_image_size(picture_height, picture_width, **preset.images_kwargs)
    rows, columns = visual_token_grid(height, width, image_processor.stride)
    mode = preset.images_kwargs.get("image_aspect_ratio", image_processor.image_aspect_ratio)
    if mode != "pad":
        return View(height, width, rows * columns, 0.0, 0.0, 1.0, 1.0)
    # As the image processor pads: to the longer side, of an odd remainder one pixel less before the picture.
    side = max(picture_width, picture_height)
    return View(
        height,
        width,
        rows * columns,
        left=(side - picture_width) // 2 / side,
        top=(side - picture_height) // 2 / side,
        across=picture_width / side,
        down=picture_height / side,
    )


def _name(height: int, width: int, stride: int) -> str:
    rows, columns = visual_token_grid(height, width, stride)
    tokens = rows * columns
    return f"{width} × {height} px · {tokens} visual token{'s' if tokens > 1 else ''}"
