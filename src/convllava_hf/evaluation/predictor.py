"""From a benchmark's samples to batches that the engine asks, with the samples that cannot be asked set apart."""

import copy
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..data.image_files import stored_size, upright_size
from ..errors import first_line
from ..inference import Assistant, prompt_inputs
from ..modeling.processing_convllava import ConvLlavaProcessor
from ..options import mode_of
from .engine import INPUT_ERRORS, Reply, generate_replies, option_token_ids, score_options
from .samples import MissingValueError, Sample
from .scorers import ImageGeometry
from .sources import Failure, Source


@dataclass
class Batch:
    """Questions that are ready to be asked. `inputs`: of the model, on the CPU; `None` if no sample is left, or they
    cannot be asked at once.

    `seen`: their images; `options`: the tokens of each sample's options, where their likelihoods decide; `failures`:
    of samples that are not in the batch, by id.
    """

    samples: list[Sample]
    seen: list[ImageGeometry]
    inputs: Any = None
    options: list[list[list[int]]] = field(default_factory=list)
    failures: dict[str, Failure] = field(default_factory=dict)


@dataclass(frozen=True)
class Predictor:
    """Asks the questions of a benchmark.

    `likelihood`: whether options are chosen by their likelihoods.
    """

    assistant: Assistant
    source: Source
    max_new_tokens: int
    likelihood: bool = False
    _of_thread: threading.local = field(default_factory=threading.local, repr=False)

    @property
    def _processor(self) -> ConvLlavaProcessor:
        """A processor of this thread's own: a fast tokenizer cannot be set to pad while another thread uses it."""
        if not hasattr(self._of_thread, "processor"):
            self._of_thread.processor = copy.deepcopy(self.assistant.processor)
        return self._of_thread.processor

    def prepare(self, samples: Sequence[Sample]) -> Batch:
        """Opens images and makes the model's inputs; may run in a thread of its own. Failures are set apart."""
        batch = Batch([], [])
        conversations = []
        for sample in samples:
            try:
                image = self._processor.image_processor.fetch_images(self.source.image_of(sample))
                seen = self._seen(image)
            except MissingValueError as error:
                batch.failures[sample.id] = Failure("missing value", str(error))
            except INPUT_ERRORS as error:
                batch.failures[sample.id] = Failure("image", first_line(error))
            else:
                batch.samples.append(sample)
                batch.seen.append(seen)
                conversations.append([user_question(self._words(sample), image)])
        self._encode(batch, conversations)
        if self.likelihood and batch.samples and batch.samples[0].choices:
            batch.options = [
                option_token_ids(self._processor, [user_question(sample.stem, None)], sample.choices)
                for sample in batch.samples
            ]
        return batch

    def predict(self, batch: Batch) -> list[Reply]:
        """The replies to a batch's questions, in its order.

        Raises:
            torch.OutOfMemoryError: ask fewer at once.
        """
        inputs = batch.inputs.to(self.assistant.device)
        if batch.options:
            return score_options(self.assistant, inputs, batch.options)
        return generate_replies(self.assistant, inputs, self.max_new_tokens)

    def lengths(self, samples: Sequence[Sample]) -> list[int]:
        """Tokens of each question, visual ones included where images have different numbers of them."""
        processor = self._processor
        encoded = processor.tokenizer([self._words(sample) for sample in samples], add_special_tokens=False)
        lengths = [len(ids) for ids in encoded["input_ids"]]
        if self._padded:
            return lengths
        return [length + self._visual_tokens(sample) for length, sample in zip(lengths, samples, strict=True)]

    @property
    def _padded(self) -> bool:
        return mode_of(self.assistant.processor.image_processor.image_sizing()).square

    def _visual_tokens(self, sample: Sample) -> int:
        """Read from the file's header."""
        try:
            size = stored_size(self.source.image_of(sample))
        except INPUT_ERRORS:
            size = None
        if size is None:
            return 0  # its error is reported when it is asked about
        counted: Any = self._processor._get_num_multimodal_tokens(image_sizes=[size])
        return counted.num_image_tokens[0]

    def _words(self, sample: Sample) -> str:
        return sample.stem if self.likelihood and sample.choices else sample.prompt

    def _seen(self, image) -> ImageGeometry:
        height, width = upright_size(image)
        return ImageGeometry(width, height, padded=self._padded)

    def _encode(self, batch: Batch, conversations: list[list[dict]]) -> None:
        """Fills `inputs`, and leaves out samples whose image cannot be decoded after all, or which are too long."""
        while conversations:
            try:
                inputs: Any = prompt_inputs(self._processor, conversations)
            except INPUT_ERRORS:
                if self._drop_unreadable(batch, conversations):
                    continue
                if len(conversations) == 1:
                    raise
                return  # each is fine on its own: their shapes differ too much for one batch
            context, lengths = self.assistant.context, inputs["attention_mask"].sum(1).tolist()
            room = (context or math.inf) - self.max_new_tokens
            long = [index for index, length in enumerate(lengths) if length > room]
            if not long:
                batch.inputs = inputs.to("cpu", self.assistant.dtype)
                return
            for index in long:
                batch.failures[batch.samples[index].id] = Failure(
                    "too long",
                    f"The prompt has {lengths[index]} tokens, and {self.max_new_tokens} are kept for the answer; the "
                    f"model's context holds {context}.",
                )
            _drop(long, batch.samples, batch.seen, conversations)

    def _drop_unreadable(self, batch: Batch, conversations: list[list[dict]]) -> list[int]:
        """Encodes each sample of a batch separately to find those that fail."""
        bad = []
        for index, conversation in enumerate(conversations):
            try:
                prompt_inputs(self._processor, [conversation])
            except INPUT_ERRORS as error:
                batch.failures[batch.samples[index].id] = Failure("image", first_line(error))
                bad.append(index)
        _drop(bad, batch.samples, batch.seen, conversations)
        return bad


def user_question(text: str, image) -> dict[str, Any]:
    """A user's turn with an image before the text; without one, the place of an image is kept."""
    part = {"type": "image"} if image is None else {"type": "image", "image": image}
    return {"role": "user", "content": [part, {"type": "text", "text": text}]}


def _drop(indices: Sequence[int], *lists: list) -> None:
    for values in lists:
        values[:] = [value for index, value in enumerate(values) if index not in indices]
