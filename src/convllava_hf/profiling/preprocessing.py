"""Preprocessing: images a second from JPEG to tensor."""

import io
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from ..modeling.image_processing_convllava import ConvLlavaImageProcessor


def jpeg(width: int, height: int, seed: int = 0) -> bytes:
    """An image with structure at several scales, so that decoding has something to do."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    coarse = coarse.resize((width, height), Image.Resampling.BICUBIC)
    noise = rng.integers(-12, 12, (height, width, 3), dtype=np.int16)
    buffer = io.BytesIO()
    Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def open_jpeg(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def seconds_per_image(prepare: Callable[[bytes], Any], data: bytes, repeats: int) -> float:
    """Median of `repeats`, after one that is not counted."""
    prepare(data)
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        prepare(data)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def measure_preparing(
    processor: ConvLlavaImageProcessor, sides: Sequence[int], repeats: int = 5, photo: tuple[int, int] = (1600, 1200)
) -> list[dict[str, Any]]:
    """One row for each resolution of the tower: a JPEG of `photo` (width, height) pixels, padded and resized to it."""
    data = jpeg(*photo)
    rows = []
    for side in sides:
        taken = seconds_per_image(
            lambda bytes_, side=side: processor(open_jpeg(bytes_), size=side, return_tensors="pt"), data, repeats
        )
        rows.append({"side": side, "photo": list(photo), "seconds": taken, "images_per_second": 1 / taken})
    return rows
