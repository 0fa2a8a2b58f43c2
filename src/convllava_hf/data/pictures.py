"""Opens the pictures of a batch, and does what the recipe says where one cannot be read."""

import itertools
import json
import logging
import random
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import get_worker_info

from ..errors import ConvLlavaError
from .boxes import in_model_frame
from .conversations import DataError


logger = logging.getLogger(__name__)

POLICIES = ("error", "skip")
_TRIES = 1000  # samples looked at for one that can stand in for another
_STREAM_POOL = 32  # good samples from the beginning of a stream that stand in for others
_LOGGED = 20  # skipped samples of a process named one by one; then only every hundredth
_WORKERS = 1024  # counters; workers with higher numbers share them


class PictureError(DataError):
    """A picture cannot be read, or too many could not."""


class SafePictureCollator:
    """Opens the pictures of a batch, brings its boxes into the model's frame, and hands it on to TRL's collator.

    Args:
        collator: makes a batch of examples whose `images` are PIL pictures; has a `processor`.
        dataset: where samples to stand in for others are taken from.
        policy: `"error"` ends the run at a picture that cannot be read, naming file and sample. `"skip"` takes
            another sample of the data set in its place: which one depends on the index of the bad one alone, so that
            every rank and a resumed run choose alike and no rank has fewer samples. Of a data set that streams, the
            first 32 good samples with pictures stand in.
        max_skipped: samples that this process (one rank, with all its data loader's workers) may skip; one more ends
            the run. A resumed run counts anew.

    Attributes:
        skipped (`int`): samples skipped so far in this process and its workers, with those of batches loaded ahead.

    Raises of a call:
        PictureError: see `policy` and `max_skipped`.
    """

    def __init__(self, collator: Callable, dataset: Any, policy: str = "error", max_skipped: int = 100):
        if policy not in POLICIES:
            raise ConvLlavaError(f"The policy for bad pictures is {policy!r}; expected {' or '.join(POLICIES)}.")
        if isinstance(max_skipped, bool) or not isinstance(max_skipped, int) or max_skipped < 0:
            raise ConvLlavaError(f"The bound of skipped samples is {max_skipped!r}; expected a number from 0 up.")
        self.collator = collator
        self.policy = policy
        self.max_skipped = max_skipped
        # One counter a worker in memory that they share: nobody writes where another does, so no lock is needed.
        self._counts = torch.zeros(_WORKERS, dtype=torch.int64).share_memory_()
        self._samples = dataset
        if policy == "skip" and not hasattr(dataset, "__len__"):
            # Now and not when needed: within a worker of a data loader a stream is only that worker's part of it.
            self._samples = self._beginning_of_stream(dataset)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        return self.collator([self._readable(example) for example in examples])

    @property
    def skipped(self) -> int:
        return int(self._counts.sum())

    def _readable(self, example: dict[str, Any]) -> dict[str, Any]:
        """The example with its pictures opened, or another one."""
        try:
            return self._opened(example)
        except PictureError as error:
            if self.policy == "error":
                raise PictureError(
                    f"{error} `convllava data check` finds all such pictures; with on_bad_picture: skip in the recipe "
                    "another sample is taken instead."
                ) from error.__cause__
            self._count(error)
            return self._replacement(example)

    def _opened(self, example: dict[str, Any]) -> dict[str, Any]:
        fetch = self.collator.processor.image_processor.fetch_images
        pictures = []
        for picture in example.get("images") or ():
            try:
                pictures.append(fetch(picture))
            except (OSError, ValueError, RuntimeError) as error:  # the last from PIL's AVIF
                reason = str(error).rstrip(".")
                raise PictureError(f"Sample {_index(example)} has a picture that cannot be read: {reason}.") from error
        return in_model_frame({**example, "images": pictures}, self.collator.processor.image_processor)

    def _count(self, error: PictureError) -> None:
        worker = get_worker_info()
        self._counts[0 if worker is None else 1 + worker.id % (_WORKERS - 1)] += 1
        skipped = self.skipped
        if skipped <= _LOGGED or skipped % 100 == 0:
            logger.warning("%s Another one is taken; %d skipped so far in this process.", error, skipped)
        if skipped > self.max_skipped:
            raise PictureError(
                f"{skipped} samples have pictures that cannot be read, and the recipe allows {self.max_skipped} for a "
                f"process (max_bad_pictures). Find them with `convllava data check`. The last one: {error}"
            )

    def _replacement(self, example: dict[str, Any]) -> dict[str, Any]:
        for candidate in itertools.islice(self._candidates(_index(example)), _TRIES):
            if not candidate.get("images"):
                continue  # a sample with pictures stands in for one with pictures
            try:
                return self._opened(candidate)
            except PictureError:
                continue
        raise PictureError(
            f"None of {_TRIES} other samples can stand in for sample {_index(example)}: they have no pictures, or "
            "none that can be read. Check the data set with `convllava data check`."
        )

    def _candidates(self, index: int) -> Iterator[dict[str, Any]]:
        """Samples in an order that depends on the index alone."""
        choice = random.Random(index)
        while len(self._samples):
            yield self._samples[choice.randrange(len(self._samples))]

    def _beginning_of_stream(self, dataset: Any) -> list[dict[str, Any]]:
        good = filter(self._is_good, itertools.islice(iter(dataset), _TRIES))
        return list(itertools.islice(good, _STREAM_POOL))

    def _is_good(self, example: dict[str, Any]) -> bool:
        try:
            return bool(self._opened(example)["images"])
        except PictureError:
            return False


def _index(example: Mapping[str, Any]) -> int:
    """The index of a sample in its file; where that was left out, a number made of its conversation."""
    sample = example.get("sample")
    if sample is None:
        sample = zlib.crc32(json.dumps(example.get("messages"), sort_keys=True, default=str).encode())
    return int(sample)
