"""The size at which the tower will see each image of a data set, from the images' headers."""

import logging
from typing import Any

from datasets import Dataset, Features, List, Value

from ..data.image_files import stored_size


logger = logging.getLogger(__name__)

Shapes = list[list[tuple[int, int]]]
_FEATURES = Features({"sizes": List(List(Value("int64")))})
_UNKNOWN = (-1, -1)


def image_shapes(dataset: Dataset, image_processor: Any, processes: int | None = None) -> Shapes:
    """Rows and columns of visual tokens of every image of every sample.

    The sizes are kept in the cache of `datasets`, so that the next run of the same data, or the next process, need not
    read them again. An image whose header cannot be read counts as a square; what is done about it is decided when it
    is opened.

    Args:
        dataset: with a column `images` of undecoded images.
        processes: that read headers; `None` for only this one.
    """
    seen = image_processor.image_sizing()
    sizes = dataset.select_columns(["images"]).map(
        _sizes,
        batched=True,
        batch_size=100,
        remove_columns=["images"],
        features=_FEATURES,
        num_proc=processes,
        desc="Reading sizes of images",
    )
    known: dict[tuple[int, int], tuple[int, int]] = {}
    shapes: Shapes = []
    unknown = 0
    for row in sizes["sizes"]:
        pairs = [tuple(size) for size in row]
        unknown += pairs.count(_UNKNOWN)
        for size in set(pairs) - set(known):
            height, width = (seen.size, seen.size) if size == _UNKNOWN else size
            known[size] = tuple(side // seen.stride for side in seen.seen(height, width))
        shapes.append([known[size] for size in pairs])
    if unknown:
        logger.warning("The sizes of %d images could not be read; they count as squares.", unknown)
    return shapes


def max_grid(shapes: list[tuple[int, int]]) -> tuple[int, int]:
    """Rows and columns that all images of a sample fit into; (0, 0) for none."""
    return max((rows for rows, _ in shapes), default=0), max((columns for _, columns in shapes), default=0)


def _sizes(batch: dict[str, list]) -> dict[str, list]:
    """Heights and widths of a batch's images; -1 where unknown."""
    return {"sizes": [[_size(image) for image in images or ()] for images in batch["images"]]}


def _size(image: dict[str, Any]) -> tuple[int, int]:
    size = stored_size(image)
    return _UNKNOWN if size is None or min(size) < 1 else size
