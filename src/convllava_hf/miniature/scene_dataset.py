"""Scenes as a data set of the form that training reads: images, and conversations about them."""

import io
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..utils.atomic import replacing_folder
from ..utils.logging_utils import disable_progress_bars
from .drawing import draw
from .language import Mix, conversation
from .world import World


_REPORT_EVERY = 50  # scenes


def write_samples(
    folder: Path,
    world: World,
    *,
    size: int,
    seed: int | Sequence[int],
    mix: Mix,
    side: int = 256,
    on_scene: Callable[[int], None] | None = None,
) -> Path:
    """Writes samples about training scenes as a data set on disk, with the columns `messages` and `images`.

    Args:
        folder: what `datasets.load_from_disk` reads; it appears when it is complete.
        size: number of scenes, one sample each.
        seed: of scenes and questions.
        mix: what is said about them.
        side: height and width of the images in pixels.
        on_scene: called with the number of scenes drawn so far.
    """
    import datasets

    features = datasets.Features(
        {
            "images": datasets.List(datasets.Image()),
            "messages": datasets.List(
                {
                    "role": datasets.Value("string"),
                    "content": datasets.List({"type": datasets.Value("string"), "text": datasets.Value("string")}),
                }
            ),
        }
    )
    rows = []
    for row in sample_rows(world, size=size, seed=seed, mix=mix, side=side):
        rows.append(row)
        if on_scene and (len(rows) % _REPORT_EVERY == 0 or len(rows) == size):
            on_scene(len(rows))
    folder = Path(folder)
    disable_progress_bars(with_datasets=True)
    with replacing_folder(folder) as temporary:
        datasets.Dataset.from_list(rows, features=features).save_to_disk(temporary)
    return folder


def sample_rows(
    world: World,
    *,
    size: int,
    seed: int | Sequence[int],
    mix: Mix,
    side: int = 256,
) -> Iterator[dict[str, Any]]:
    """Samples of the Hub's form: `images` as PNG bytes and `messages`, the image first in the first of them."""
    rng = np.random.default_rng(seed)
    for scene in islice(world.scenes("train", seed), size):
        messages = []
        for question, answer in conversation(scene, rng, mix):
            content = [{"type": "text", "text": question}]
            if not messages:
                content.insert(0, {"type": "image", "text": None})
            messages.append({"role": "user", "content": content})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        yield {"images": [{"bytes": _png(draw(scene, side)), "path": None}], "messages": messages}


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()
