"""Opens the pictures of a batch, and does what the recipe says where one cannot be read."""

import itertools
import json
import logging
import random
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from jinja2 import TemplateError
from torch.utils.data import get_worker_info

from ..errors import ConvLlavaError
from ..texts import shown
from .boxes import in_model_frame
from .conversations import DataError, SampleError


logger = logging.getLogger(__name__)

POLICIES = ("error", "skip")
_TRIES = 1000  # samples looked at for one that can stand in for another
_STREAM_POOL = 32  # good samples from the beginning of a stream that stand in for others
_LOGGED = 20  # skipped samples of a process named one by one; then only every hundredth
_WORKERS = 1024  # counters; workers with higher numbers share them


class PictureError(DataError):
    """A picture cannot be used, or too many could not."""


class SafePictureCollator:
    """Opens the pictures of a batch, brings its boxes into the model's frame, and hands it on to TRL's collator.

    Where a sample fails on this way, it does what the recipe says.

    Args:
        collator: makes a batch of examples whose `images` are PIL pictures; has a `processor`.
        dataset: where samples to stand in for others are taken from.
        policy: for a sample whose pictures cannot be used: they cannot be opened or prepared, or they have more visual
            tokens than fit. `"error"` ends the run, naming file and sample. `"skip"` takes another sample of the data
            set in its place: which one depends on the index of the bad one alone, so that every rank and a resumed run
            choose alike and no rank has fewer samples. Of a data set that streams, the first 32 good samples with
            pictures stand in.
        max_skipped: samples that this process (one rank, with all its data loader's workers) may skip; one more ends
            the run. A resumed run counts anew.
        sample_policy, max_bad_samples: the same for a conversation that the chat template refuses.

    Attributes:
        skipped (`int`): samples skipped so far in this process and its workers, with those of batches loaded ahead.

    Raises of a call:
        PictureError, SampleError: see the policies and their bounds.
    """

    def __init__(
        self,
        collator: Callable,
        dataset: Any,
        policy: str = "error",
        max_skipped: int = 100,
        sample_policy: str = "error",
        max_bad_samples: int = 100,
    ):
        if policy not in POLICIES:
            raise ConvLlavaError(f"The policy for bad pictures is {policy!r}; expected {' or '.join(POLICIES)}.")
        if isinstance(max_skipped, bool) or not isinstance(max_skipped, int) or max_skipped < 0:
            raise ConvLlavaError(f"The bound of skipped samples is {max_skipped!r}; expected a number from 0 up.")
        self.collator = collator
        self.policy = policy
        self.max_skipped = max_skipped
        self.sample_policy = sample_policy
        self.max_bad_samples = max_bad_samples
        # One counter a worker in memory that they share: nobody writes where another does, so no lock is needed.
        self._counts = torch.zeros(_WORKERS, dtype=torch.int64).share_memory_()
        self._refused = torch.zeros(_WORKERS, dtype=torch.int64).share_memory_()
        self._samples = dataset
        if "skip" in (policy, sample_policy) and not hasattr(dataset, "__len__"):
            # Now and not when needed: within a worker of a data loader a stream is only that worker's part of it.
            self._samples = self._beginning_of_stream(dataset)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        opened = [self._usable(example, self._opened) for example in examples]
        try:
            return self._collated(opened)
        except Exception as error:  # of which example, or whether of any, is found by trying each
            usable = [self._usable(example, self._tried) for example in opened]
            if all(one is other for one, other in zip(usable, opened, strict=True)):
                usable = self._without_most_extreme(opened, error)
            return self._collated(usable)

    @property
    def skipped(self) -> int:
        return int(self._counts.sum() + self._refused.sum())

    def _usable(self, example: dict[str, Any], attempt: Callable) -> dict[str, Any]:
        """What `attempt` makes of the example, or another one."""
        try:
            return attempt(example)
        except PictureError as error:
            if self.policy == "error":
                raise PictureError(
                    f"{error} `convllava data check` finds all such pictures; with on_bad_picture: skip in the recipe "
                    "another sample is taken instead."
                ) from error.__cause__
            self._count(error)
        except SampleError as error:
            if self.sample_policy == "error":
                raise SampleError(
                    error.kind,
                    f"{error} `convllava data check --model` finds all such samples; with on_bad_sample: skip in the "
                    "recipe another sample is taken instead.",
                ) from error.__cause__
            self._count_refused(error)
        return self._replacement(example)

    def _opened(self, example: dict[str, Any]) -> dict[str, Any]:
        """The example with its pictures opened.

        Raises:
            PictureError: one cannot be opened.
        """
        fetch = self.collator.processor.image_processor.fetch_images
        pictures = []
        for picture in example.get("images") or ():
            try:
                pictures.append(fetch(picture))
            except (OSError, ValueError) as error:  # ImageError is a ValueError; all else is a fault of a program
                raise PictureError(
                    f"Sample {_index(example)} has a picture that cannot be read: {_reason(error)}."
                ) from error
        opened = in_model_frame({**example, "images": pictures}, self.collator.processor.image_processor)
        return {**opened, "files": example.get("images")}

    def _tried(self, example: dict[str, Any]) -> dict[str, Any]:
        """The example, opened already, if it can be made a batch of its own.

        Raises:
            PictureError, SampleError: whatever its pictures, or its conversation, stumble over.
        """
        try:
            self._collated([example])
        except Exception as error:
            index, processor = _index(example), self.collator.processor
            try:
                if example["images"]:
                    processor.image_processor(example["images"])
            except (OSError, ValueError, MemoryError) as of_picture:
                names = ", ".join(_name(picture) for picture in example["files"])
                raise PictureError(
                    f"Sample {index} has a picture that cannot be prepared ({names}): {_reason(of_picture)}."
                ) from of_picture
            if (refusal := self._refusal(example, error)) is not None:
                raise SampleError(
                    "refused by the template", f"Sample {index} is refused by the chat template: {_reason(refusal)}."
                ) from refusal
            if isinstance(error, (ValueError, MemoryError)) and example["images"]:
                names = ", ".join(_name(picture) for picture in example["files"][:3])
                raise PictureError(
                    f"Sample {index} has {len(example['images'])} pictures ({names}) that cannot be trained on: "
                    f"{_reason(error)}."
                ) from error
            raise  # a fault of the program
        return example

    def _refusal(self, example: dict[str, Any], error: Exception) -> Exception | None:
        """What the chat template raises of the sample's messages, if it does."""
        if isinstance(error, TemplateError):
            return error
        try:
            self.collator.processor.apply_chat_template(
                example["messages"], getattr(self.collator, "chat_template", None), tokenize=False
            )
        except Exception as refusal:  # a template raises whatever its expressions stumble over
            return refusal
        return None

    def _collated(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        return self.collator([{name: value for name, value in one.items() if name != "files"} for one in examples])

    def _without_most_extreme(self, examples: list[dict[str, Any]], error: Exception) -> list[dict[str, Any]]:
        """The batch without the samples whose pictures, each good alone, are too different to be padded to one size.

        Raises:
            Exception: the given one, where there is no such sample or none may be skipped.
        """
        longest = [max((max(picture.size) for picture in one["images"]), default=0) for one in examples]
        if self.policy == "error" or not isinstance(error, (ValueError, MemoryError)) or sum(map(bool, longest)) < 2:
            raise error
        worst = longest.index(max(longest))
        self._count(PictureError(f"Sample {_index(examples[worst])} does not fit into its batch: {_reason(error)}."))
        usable = [*examples[:worst], self._replacement(examples[worst]), *examples[worst + 1 :]]
        try:
            self._collated(usable)
        except Exception as still:
            if max(longest) == max(max(picture.size) for picture in usable[worst]["images"]):
                raise still from error
            return self._without_most_extreme(usable, still)
        return usable

    def _count(self, error: PictureError) -> None:
        skipped = self._counted(self._counts, error)
        if skipped > self.max_skipped:
            raise PictureError(
                f"{skipped} samples have pictures that cannot be read, and the recipe allows {self.max_skipped} for a "
                f"process (max_bad_pictures). Find them with `convllava data check`. The last one: {error}"
            )

    def _count_refused(self, error: SampleError) -> None:
        refused = self._counted(self._refused, error)
        if refused > self.max_bad_samples:
            raise SampleError(
                "too many bad samples",
                f"{refused} samples cannot be used, and the recipe allows {self.max_bad_samples} for a process "
                f"(max_bad_samples). Find them with `convllava data check --model`. The last one: {error}",
            )

    def _counted(self, counts: torch.Tensor, error: Exception) -> int:
        worker = get_worker_info()
        counts[0 if worker is None else 1 + worker.id % (_WORKERS - 1)] += 1
        skipped = int(counts.sum())
        if skipped <= _LOGGED or skipped % 100 == 0:
            logger.warning("%s Another one is taken; %d skipped so far in this process.", error, skipped)
        return skipped

    def _replacement(self, example: dict[str, Any]) -> dict[str, Any]:
        """Another sample, which has been tried to the end."""
        for candidate in itertools.islice(self._candidates(_index(example)), _TRIES):
            if example.get("images") and not candidate.get("images"):
                continue  # a sample with pictures stands in for one with pictures
            try:
                return self._tried(self._opened(candidate))
            except (PictureError, SampleError):
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
            return bool(self._tried(self._opened(example))["images"])
        except (PictureError, SampleError):
            return False


def _reason(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__).rstrip(".")


def _name(picture: Mapping[str, Any]) -> str:
    return shown(picture.get("path") or "a picture in the data set")


def _index(example: Mapping[str, Any]) -> int:
    """The index of a sample in its file; where that was left out, a number made of its conversation."""
    sample = example.get("sample")
    if sample is None:
        sample = zlib.crc32(json.dumps(example.get("messages"), sort_keys=True, default=str).encode())
    return int(sample)
