"""Opens the images of a batch, and does what the recipe says where one cannot be read."""

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
from ..utils.texts import shown
from .box_frames import in_model_frame
from .conversations import DataError, SampleError


logger = logging.getLogger(__name__)

POLICIES = ("error", "skip")
_TRIES = 1000  # samples tried as a replacement for another
_STREAM_POOL = 32  # good samples from the beginning of a stream that replace others
_LOGGED = 20  # skipped samples of a process named one by one; then only every hundredth
_WORKERS = 1024  # counters; workers with higher numbers share them


class TrainingImageError(DataError):
    """An image cannot be used, or too many could not."""


class SafeImageCollator:
    """Opens the images of a batch, brings its boxes into the model's frame, and hands it on to TRL's collator.

    Where a sample fails on this way, it does what the recipe says.

    Args:
        collator: makes a batch of examples whose `images` are PIL images; has a `processor`.
        dataset: where replacements for samples are taken from.
        policy: for a sample whose images cannot be used: they cannot be opened or prepared, or they have more visual
            tokens than fit. `"error"` ends the run, naming file and sample. `"skip"` takes another sample of the data
            set in its place: which one depends only on the index of the bad one, so that every rank and a resumed run
            choose alike and no rank has fewer samples. Of a data set that streams, the first 32 good samples with
            images are the replacements.
        max_skipped: samples that this process (one rank, with all its data loader's workers) may skip; one more ends
            the run. A resumed run starts counting from zero.
        sample_policy, max_bad_samples: the same for a conversation that the chat template refuses.

    Attributes:
        skipped (`int`): samples skipped so far in this process and its workers, with those of batches loaded ahead.

    Raises of a call:
        TrainingImageError, SampleError: see the policies and their bounds.
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
            raise ConvLlavaError(f"The policy for bad images is {policy!r}; expected {' or '.join(POLICIES)}.")
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
        except TrainingImageError as error:
            if self.policy == "error":
                raise TrainingImageError(
                    f"{error} `convllava data check` finds all such images; with on_bad_image: skip in the recipe "
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
        """The example with its images opened.

        Raises:
            TrainingImageError: one cannot be opened.
        """
        fetch = self.collator.processor.image_processor.fetch_images
        images = []
        for image in example.get("images") or ():
            try:
                images.append(fetch(image))
            except (OSError, ValueError) as error:  # ImageError is a ValueError; all else is a fault of a program
                raise TrainingImageError(
                    f"Sample {_index(example)} has an image that cannot be read: {_reason(error)}."
                ) from error
        opened = in_model_frame({**example, "images": images}, self.collator.processor.image_processor)
        return {**opened, "files": example.get("images")}

    def _tried(self, example: dict[str, Any]) -> dict[str, Any]:
        """The example, opened already, if a batch can be made of it.

        Raises:
            TrainingImageError, SampleError: its images or its conversation cannot be used.
        """
        try:
            self._collated([example])
        except Exception as error:
            index, processor = _index(example), self.collator.processor
            try:
                if example["images"]:
                    processor.image_processor(example["images"])
            except (OSError, ValueError, MemoryError) as of_image:
                names = ", ".join(_name(image) for image in example["files"])
                raise TrainingImageError(
                    f"Sample {index} has an image that cannot be prepared ({names}): {_reason(of_image)}."
                ) from of_image
            if (refusal := self._refusal(example, error)) is not None:
                raise SampleError(
                    "refused by the template", f"Sample {index} is refused by the chat template: {_reason(refusal)}."
                ) from refusal
            if isinstance(error, (ValueError, MemoryError)) and example["images"]:
                names = ", ".join(_name(image) for image in example["files"][:3])
                raise TrainingImageError(
                    f"Sample {index} has {len(example['images'])} images ({names}) that cannot be trained on: "
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
        except Exception as refusal:  # a template can raise any exception
            return refusal
        return None

    def _collated(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        return self.collator([{name: value for name, value in one.items() if name != "files"} for one in examples])

    def _without_most_extreme(self, examples: list[dict[str, Any]], error: Exception) -> list[dict[str, Any]]:
        """The batch without the samples whose images, each good by itself, are too different to be padded to one size.

        Raises:
            Exception: the given one, where there is no such sample or none may be skipped.
        """
        longest = [max((max(image.size) for image in one["images"]), default=0) for one in examples]
        if self.policy == "error" or not isinstance(error, (ValueError, MemoryError)) or sum(map(bool, longest)) < 2:
            raise error
        worst = longest.index(max(longest))
        self._count(
            TrainingImageError(f"Sample {_index(examples[worst])} does not fit into its batch: {_reason(error)}.")
        )
        usable = [*examples[:worst], self._replacement(examples[worst]), *examples[worst + 1 :]]
        try:
            self._collated(usable)
        except Exception as still:
            if max(longest) == max(max(image.size) for image in usable[worst]["images"]):
                raise still from error
            return self._without_most_extreme(usable, still)
        return usable

    def _count(self, error: TrainingImageError) -> None:
        skipped = self._counted(self._counts, error)
        if skipped > self.max_skipped:
            raise TrainingImageError(
                f"{skipped} samples have images that cannot be read, and the recipe allows {self.max_skipped} for a "
                f"process (max_bad_images). Find them with `convllava data check`. The last one: {error}"
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
        """Another sample, which can be used: it was opened and prepared."""
        for candidate in itertools.islice(self._candidates(_index(example)), _TRIES):
            if example.get("images") and not candidate.get("images"):
                continue  # a sample with images replaces one with images
            try:
                return self._tried(self._opened(candidate))
            except (TrainingImageError, SampleError):
                continue
        raise TrainingImageError(
            f"None of {_TRIES} other samples can replace sample {_index(example)}: they have no images, or "
            "none that can be read. Check the data set with `convllava data check`."
        )

    def _candidates(self, index: int) -> Iterator[dict[str, Any]]:
        """Samples in an order that depends only on the index."""
        choice = random.Random(index)
        while len(self._samples):
            yield self._samples[choice.randrange(len(self._samples))]

    def _beginning_of_stream(self, dataset: Any) -> list[dict[str, Any]]:
        good = filter(self._is_good, itertools.islice(iter(dataset), _TRIES))
        return list(itertools.islice(good, _STREAM_POOL))

    def _is_good(self, example: dict[str, Any]) -> bool:
        try:
            return bool(self._tried(self._opened(example))["images"])
        except (TrainingImageError, SampleError):
            return False


def _reason(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__).rstrip(".")


def _name(image: Mapping[str, Any]) -> str:
    return shown(image.get("path") or "an image in the data set")


def _index(example: Mapping[str, Any]) -> int:
    """The index of a sample in its file; where that was left out, a number made of its conversation."""
    sample = example.get("sample")
    if sample is None:
        sample = zlib.crc32(json.dumps(example.get("messages"), sort_keys=True, default=str).encode())
    return int(sample)
