"""Asks a model a batch of questions: greedy answers, or the likelihood of each option."""

import copy
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..data.image_files import stored_size, upright_size
from ..errors import first_line
from ..inference import Assistant, assistant_turn, prompt_inputs
from ..modeling.processing_convllava import ConvLlavaProcessor
from ..options import mode_of
from .batches import generate
from .samples import MissingValueError, Sample
from .scorers import ImageGeometry
from .sources import Failure, Source


# What the image processor raises of images that it cannot decode.
_UNREADABLE = (OSError, ValueError, RuntimeError)


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
class Reply:
    """What came of one question. `log_likelihoods`: of each option, in nats a token, where these were asked for."""

    text: str
    prompt_tokens: int
    visual_tokens: int
    new_tokens: int = 0
    log_likelihoods: list[float] | None = None


@dataclass(frozen=True)
class Predictor:
    """Asks the questions of a benchmark.

    `likelihood`: whether options are chosen by their likelihoods. `images_kwargs`: of the image processor.
    """

    assistant: Assistant
    source: Source
    max_new_tokens: int
    likelihood: bool = False
    images_kwargs: Mapping[str, Any] = field(default_factory=dict)
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
            except _UNREADABLE as error:
                batch.failures[sample.id] = Failure("image", first_line(error))
            else:
                batch.samples.append(sample)
                batch.seen.append(seen)
                conversations.append([user_question(self._words(sample), image)])
        self._encode(batch, conversations)
        if self.likelihood and batch.samples and batch.samples[0].choices:
            self._add_options(batch)
        return batch

    def predict(self, batch: Batch) -> list[Reply]:
        """The replies to a batch's questions, in its order.

        Raises:
            torch.OutOfMemoryError: ask fewer at once.
        """
        inputs = batch.inputs.to(self.assistant.device)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        visual = (ids == self.assistant.model.config.image_token_id).sum(1).tolist()
        lengths = mask.sum(1).tolist()
        if batch.options:
            likelihoods = option_log_likelihoods(self.assistant.model, inputs, batch.options)
            return [
                Reply("", length, tokens, log_likelihoods=values)
                for length, tokens, values in zip(lengths, visual, likelihoods, strict=True)
            ]
        new = generate(self.assistant.model, inputs, self.max_new_tokens)
        texts = self.assistant.processor.tokenizer.batch_decode(new, skip_special_tokens=True)
        return [
            Reply(text.strip(), length, tokens, len(row))
            for text, length, tokens, row in zip(texts, lengths, visual, new, strict=True)
        ]

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
        return mode_of(self.assistant.processor.image_processor.image_sizing(**self.images_kwargs)).square

    def _visual_tokens(self, sample: Sample) -> int:
        """By the file's header alone."""
        try:
            size = stored_size(self.source.image_of(sample))
        except _UNREADABLE:
            size = None
        if size is None:
            return 0  # what is wrong with it is told when it is asked about
        counted = self._processor._get_num_multimodal_tokens(image_sizes=[size], **self.images_kwargs)
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
                inputs = prompt_inputs(self._processor, conversations, self.images_kwargs)
            except _UNREADABLE:
                if self._drop_unreadable(batch, conversations):
                    continue
                if len(conversations) == 1:
                    raise
                return  # each is fine by itself: their shapes are too different for one batch
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
        """Looks at each sample of a batch alone for what is wrong with it."""
        bad = []
        for index, conversation in enumerate(conversations):
            try:
                prompt_inputs(self._processor, [conversation], self.images_kwargs)
            except _UNREADABLE as error:
                batch.failures[batch.samples[index].id] = Failure("image", first_line(error))
                bad.append(index)
        _drop(bad, batch.samples, batch.seen, conversations)
        return bad

    def _add_options(self, batch: Batch) -> None:
        processor = self._processor
        for sample in batch.samples:
            question = [user_question(sample.stem, None)]
            prompt = processor.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
            texts = [processor.apply_chat_template([*question, assistant_turn(choice)]) for choice in sample.choices]
            batch.options.append([continuation_ids(processor.tokenizer, prompt, text) for text in texts])


def user_question(text: str, image) -> dict[str, Any]:
    """A user's turn with an image before the text; without one, the place of an image is kept."""
    part = {"type": "image"} if image is None else {"type": "image", "image": image}
    return {"role": "user", "content": [part, {"type": "text", "text": text}]}


def continuation_ids(tokenizer, prompt: str, text: str) -> list[int]:
    """The tokens by which a conversation goes on after its prompt, with what ends a turn."""
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    after = tokenizer(text, add_special_tokens=False)["input_ids"]
    if after[: len(before)] == before and len(after) > len(before):
        return after[len(before) :]
    # A token spans the prompt's end and the answer's beginning; the answer is then tokenized by itself.
    return tokenizer(text[len(prompt) :], add_special_tokens=False)["input_ids"]


@torch.inference_mode()
def option_log_likelihoods(
    model, inputs: Mapping[str, torch.Tensor], options: Sequence[Sequence[Sequence[int]]]
) -> list[list[float]]:
    """The log-likelihood in nats of each option as the answer: the mean over its tokens, by which lmms-eval chooses.

    Prompts and images pass the model once, whatever the number of options.

    Args:
        inputs: of a batch of prompts, padded on the left.
        options: for each prompt, the tokens of each option; one token at least.
    """
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    out = model(**inputs, position_ids=positions, use_cache=True, logits_to_keep=1)
    first = out.logits[:, -1].float().log_softmax(-1)  # (batch, vocabulary)
    found: list[list[float]] = [[] for _ in options]
    for number in range(max(map(len, options))):
        rows = [list(row[number]) if number < len(row) else list(row[-1]) for row in options]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [row[-1]] * (longest - len(row)) for row in rows], device=mask.device)
        scores = [first.gather(1, ids[:, :1])]  # (batch, 1)
        if longest > 1:
            following = model(
                input_ids=ids[:, :-1],
                attention_mask=torch.cat([mask, torch.ones_like(ids[:, :-1])], dim=1),
                position_ids=positions[:, -1:] + 1 + torch.arange(longest - 1, device=mask.device),
                past_key_values=copy.deepcopy(out.past_key_values),
                use_cache=True,
            ).logits
            scores.append(following.float().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0])
        table = torch.cat(scores, dim=1).tolist()  # (batch, longest)
        for index, row in enumerate(options):
            if number < len(row):
                found[index].append(sum(table[index][: len(row[number])]) / len(row[number]))
    return found


def _drop(indices: Sequence[int], *lists: list) -> None:
    for values in lists:
        values[:] = [value for index, value in enumerate(values) if index not in indices]
