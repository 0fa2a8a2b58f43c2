"""Boxes of training data: brought into the frame in which the model sees its images, and counted."""

import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ..boxes import DEFAULT_FRAME, TextBox, convert_boxes, find_boxes, frame_of_mode, place_in_square
from .image_files import upright_size


logger = logging.getLogger(__name__)

_SAME_PLACE = 0.005  # images whose places in the square differ by less have one shape
_SQUARE = 0.95  # images whose shorter side is more than this part of the longer one say nothing about the frame
_ROUNDING = 0.01  # of boxes with two decimals
_MIN_EXPECTED = 3  # boxes that would have to be outside; by chance none is in 5 of 100 cases


def in_model_frame(example: Mapping[str, Any], image_processor: Any) -> dict[str, Any]:
    """A sample with its boxes in the frame of what the model sees.

    Boxes of all turns are converted, questions included. Samples without images are left as they are, and so are those
    with images of different shapes: it is unclear which image a box belongs to. The first of these is logged.

    Args:
        example: `messages`, `images` (opened) and `boxes`, the frame that the data has its boxes in (default:
            `"square"`).
        image_processor: a `ConvLlavaImageProcessor`; its `image_aspect_ratio` decides on the frame.
    """
    example = dict(example)
    source = example.get("boxes") or DEFAULT_FRAME
    target = frame_of_mode(image_processor.image_sizing().mode)
    if source == target or not example.get("images") or not boxes_in(example.get("messages") or ()):
        return example
    shape = shared_shape(example["images"])
    if shape is None:
        _warn_unclear(source)
        return example
    return {**example, "messages": convert_messages(example["messages"], *shape, source, target)}


def convert_messages(messages: Sequence[Mapping], height: int, width: int, source: str, target: str) -> list[dict]:
    """Messages with the boxes of all texts in another frame; see `convert_boxes`."""

    def converted(content: Any) -> Any:
        if isinstance(content, str):
            return convert_boxes(content, height, width, source, target)
        return [{**part, "text": converted(part["text"])} if part.get("text") else part for part in content]

    return [{**message, "content": converted(message["content"])} for message in messages]


def boxes_in(messages: Sequence[Mapping]) -> list[TextBox]:
    """The boxes of all turns, in their order."""
    return [box for text in _texts(messages) for box in find_boxes(text)]


def _texts(messages: Sequence[Mapping]) -> Iterator[str]:
    for message in messages:
        if isinstance(message["content"], str):
            yield message["content"]
        else:
            yield from (part["text"] for part in message["content"] if part.get("text"))


def shared_shape(images: Sequence[Any]) -> tuple[int, int] | None:
    """Height and width in pixels, upright, of opened images of one shape; `None` if shapes differ."""
    return shape_of([upright_size(image) if isinstance(image, Image.Image) else None for image in images])


def shape_of(sizes: Sequence[tuple[int, int] | None]) -> tuple[int, int] | None:
    """Height and width in pixels of images of one shape, at any scale; `None` if shapes differ.

    Args:
        sizes: heights and widths in pixels; `None` where they are not known.
    """
    if not sizes or None in sizes:
        return None
    first, *others = (place_in_square(*size) for size in sizes)
    same = all(abs(one - other) <= _SAME_PLACE for place in others for one, other in zip(first, place, strict=True))
    return sizes[0] if same else None


@functools.cache
def _warn_unclear(source: str) -> None:
    logger.warning(
        "Some samples have boxes and images of different shapes. Nothing says which image a box belongs to, so these "
        "boxes stay in fractions of the %s; `convllava data check` counts them.",
        "padded square" if source == "square" else "image",
    )


@dataclass
class BoxCounts:
    """The boxes of a data set, and what tells their frame.

    In the square, no box reaches into the padding above and below (or left and right of) its image; in the image,
    many boxes do. Images close to a square say nothing.

    `samples`: with boxes. `boxes`: all of them, in `thousandths` some. `unclear`: boxes of samples whose images have
    different shapes. `telling`: boxes of images that are no squares. `outside`: those of them that reach into the
    padding. `expected`: how many would, if they were in the image's frame and lay anywhere.
    """

    samples: int = 0
    boxes: int = 0
    thousandths: int = 0
    unclear: int = 0
    telling: int = 0
    outside: int = 0
    expected: float = 0.0

    def add_sample(self, messages: Sequence[Mapping], sizes: Sequence[tuple[int, int]]) -> None:
        """Counts a sample; `sizes`: height and width in pixels of its images, none if they are not known."""
        boxes = boxes_in(messages)
        self.samples += bool(boxes)
        self.boxes += len(boxes)
        self.thousandths += sum(box.decimals is None for box in boxes)
        if not boxes or not sizes:
            return
        shape = shape_of(sizes)
        if shape is None:
            self.unclear += len(boxes)
        elif min(shape) <= _SQUARE * max(shape):
            left, top, across, down = place_in_square(*shape)
            axis, first, part = (0, left, across) if across < down else (1, top, down)  # where the padding is
            boxes = [box for box in boxes if box.decimals != 0]  # `[0, 0, 1, 1]` is the whole of either, or no box
            self.telling += len(boxes)
            self.expected += len(boxes) * (1 - part**2)  # of boxes with two edges drawn from 0 to 1
            for box in boxes:
                low, high = box.box[axis], box.box[axis + 2]
                self.outside += low < first - _ROUNDING or high > first + part + _ROUNDING

    def add(self, other: "BoxCounts") -> None:
        for name in self.__dataclass_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def looks_like(self) -> str | None:
        """The frame that the boxes seem to be in; `None` if unclear."""
        if self.outside > 0.3 * self.expected:
            return "image"
        if self.expected >= _MIN_EXPECTED and self.outside <= 0.1 * self.expected:
            return "square"
        return None

    def warning(self, declared: str) -> str | None:
        """The warning, if the boxes seem to be in another frame than the recipe says."""
        if self.looks_like in (None, declared):
            return None
        reach = f"{self.outside:,} of the {self.telling:,} boxes in images that are no squares reach into the padding"
        return (
            f"The boxes look like fractions of the {_NAMES[self.looks_like]} ({reach} that a square would have), but "
            f"`boxes: {declared}` says fractions of the {_NAMES[declared]}. If so, set `boxes: {self.looks_like}` for "
            "this data set in the recipe."
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        counts = {name: getattr(self, name) for name in ("samples", "boxes", "thousandths", "unclear", "telling")}
        return {**counts, "reach_into_padding": self.outside, "looks_like": self.looks_like}


_NAMES = {"square": "padded square", "image": "image"}
