"""ConvLLaVA as lmms-eval asks it: generated answers, several rounds, likelihoods, in batches.

lmms-eval's interface: `lmms_eval.api.model.lmms` (0.7). It has two kinds of models. To a chat model it hands messages,
and it asks for generated answers alone; to a simple one it hands a text and pictures, and may ask for likelihoods.
Nothing is caught here: an answer that cannot be had ends the run, rather than count as an empty one.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from tqdm import tqdm

from ..errors import ConvLlavaError
from ..inference import load, user_turn
from ..modeling.processing_convllava import IMAGE_TOKEN
from .batches import answer_batch, decode_answers, likelihoods


_MAX_NEW_TOKENS = 1024  # of tasks that do not say: as lmms-eval's own LLaVA has it
_SAMPLING = ("temperature", "top_p", "top_k")
_GENERATION = ("max_new_tokens", "num_beams", "repetition_penalty", *_SAMPLING)
_OTHER = ("do_sample", "until", "image_aspect_ratio")  # the last one is LLaVA's own

Conversation = list[dict[str, Any]]


@dataclass
class _Talk:
    """A document that is asked about in rounds. `next_turn`: what is said next, given the answers so far."""

    next_turn: Callable[[int, list[str]], Conversation | None]
    options: dict[str, Any]
    answers: list[str] = field(default_factory=list)


class _ConvLlava(lmms):
    """What both kinds have in common.

    Args:
        pretrained: folder of a checkpoint or its id on the Hub.
        batch_size: questions asked at once.
        device, dtype, quantization: see `convllava_hf.inference.load`.
        resolution: height and width of the pictures in pixels, other than the checkpoint's.

    Raises:
        ConvLlavaError: the checkpoint cannot be loaded, or a value is not one of those that can be.
    """

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str | None = None,
        quantization: str | None = None,
        resolution: int | None = None,
    ):
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ConvLlavaError(f"batch_size is {batch_size!r}, and a number of questions, 1 at least, is expected.")
        self.batch_size = int(batch_size)
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if self._world_size > 1 and self.accelerator.device.type != "cpu":
            device = str(self.accelerator.device)  # each process its own
        self._assistant = load(
            pretrained, device=device, dtype=None if dtype == "auto" else dtype, quantization=quantization
        )
        self._device = self._assistant.device
        self._images_kwargs = {} if resolution is None else {"size": int(resolution)}

    @property
    def device(self) -> torch.device:
        return self._device

    def clean(self) -> None:
        """Frees the model's memory: lmms-eval calls it before it scores, perhaps with another model as the judge."""
        self._assistant = None
        super().clean()

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """One answer to each request, in their order."""
        talks = [self._talk(request) for request in requests]
        results: list[GenerationResult | None] = [None] * len(requests)
        conversations = [talk.next_turn(0, []) for talk in talks]
        with self._progress(len(requests), "ConvLLaVA answers") as bar:
            for indices, answers in self._answers(conversations, [talk.options for talk in talks]):
                for index, answer in zip(indices, answers, strict=True):
                    results[index] = answer
                bar.update(len(indices))
        return results

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """Every round's answers to each request: a round of all requests is asked before the next."""
        talks = [self._talk(request) for request in requests]
        going_on, number = talks, 0
        while going_on:
            turns = [(talk, talk.next_turn(number, list(talk.answers))) for talk in going_on]
            turns = [(talk, turn) for talk, turn in turns if turn is not None]
            going_on = [talk for talk, _ in turns]
            with self._progress(len(turns), f"ConvLLaVA answers, round {number + 1}") as bar:
                for indices, answers in self._answers([turn for _, turn in turns], [t.options for t in going_on]):
                    for index, answer in zip(indices, answers, strict=True):
                        going_on[index].answers.append(answer.text)
                    bar.update(len(indices))
            number += 1
        return [talk.answers for talk in talks]

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """The loss of each request's answer, and whether it is the greedy one, as `text` of a result.

        The loss, not the logarithm of the probability, for lmms-eval takes the option with the smallest number. It is
        the mean over the answer's tokens, as with lmms-eval's other models. lmms-eval 0.7.3 makes a string of the
        bare pair that its interface asks for, and then cannot score it; of a result it takes what is in it.
        """
        asked = [self._asked(request) for request in requests]
        results: list[GenerationResult | None] = [None] * len(requests)
        order = sorted(range(len(asked)), key=lambda index: -_length(asked[index][0]) - len(asked[index][1]))
        with self._progress(len(requests), "ConvLLaVA weighs answers") as bar:
            for indices in _chunks(order, self.batch_size):
                conversations, answers = zip(*(asked[index] for index in indices), strict=True)
                found = likelihoods(self._assistant, conversations, answers, images_kwargs=self._images_kwargs)
                for index, one in zip(indices, found, strict=True):
                    results[index] = GenerationResult((one.loss, one.greedy))
                bar.update(len(indices))
        return results

    def _talk(self, request: Instance) -> _Talk:
        raise NotImplementedError

    def _asked(self, request: Instance) -> tuple[Conversation, str]:
        raise NotImplementedError

    def _document(self, task: str, split: str, number: int) -> dict[str, Any]:
        return self.task_dict[task][split][number]

    def _progress(self, total: int, what: str) -> tqdm:
        return tqdm(total=total, desc=what, disable=self.rank != 0)

    def _answers(
        self, conversations: Sequence[Conversation], options: Sequence[dict[str, Any]]
    ) -> Iterator[tuple[list[int], list[GenerationResult]]]:
        """Batches of conversations with the same options and of like length, the longest first."""
        keys = [repr(sorted(one.items())) for one in options]
        order = sorted(range(len(conversations)), key=lambda index: (keys[index], -_length(conversations[index])))
        for _, group in groupby(order, key=lambda index: keys[index]):
            for indices in _chunks(list(group), self.batch_size):
                given = options[indices[0]]
                ids = answer_batch(
                    self._assistant,
                    [conversations[index] for index in indices],
                    images_kwargs=self._images_kwargs,
                    **{name: value for name, value in given.items() if name != "until"},
                )
                texts = decode_answers(self._assistant, ids)
                yield (
                    indices,
                    [
                        GenerationResult(_cut(text, given["until"]), TokenCounts(output_tokens=len(row)))
                        for text, row in zip(texts, ids, strict=True)
                    ],
                )


class ConvLlavaChat(_ConvLlava):
    """The kind that gets messages: `lmms-eval --model convllava`."""

    is_simple = False

    def _talk(self, request: Instance) -> _Talk:
        _, doc_to_messages, gen_kwargs, number, task, split = request.args
        document, state = self._document(task, split, number), {"info": None}

        def next_turn(round_number: int, answers: list[str]) -> Conversation | None:
            if round_number == 0:
                return _from_messages(doc_to_messages(document), task)
            payload = doc_to_messages(
                document, round_idx=round_number, previous_output=answers, previous_round_info=state["info"]
            )
            if not isinstance(payload, tuple):
                raise ConvLlavaError(
                    f"The task {task!r} gave {type(payload).__name__} for round {round_number + 1}, and messages, "
                    "whether it ends, answers and notes are expected: its doc_to_messages knows one round alone."
                )
            messages, ends, _, state["info"] = payload
            return None if ends else _from_messages(messages, task)

        return _Talk(next_turn, _options(gen_kwargs, task))

    def _asked(self, request: Instance) -> tuple[Conversation, str]:
        raise ConvLlavaError(
            "lmms-eval asks chat models for generated answers alone. Add --force_simple for tasks by log-likelihood."
        )


class ConvLlavaSimple(_ConvLlava):
    """The kind that gets a text and pictures: `lmms-eval --model convllava --force_simple`."""

    is_simple = True

    def _talk(self, request: Instance) -> _Talk:
        text, gen_kwargs, doc_to_visual, *doc_to_text, number, task, split = request.args
        document, state = self._document(task, split, number), {"info": None}

        def next_turn(round_number: int, answers: list[str]) -> Conversation | None:
            if round_number == 0:
                return _from_text(text, doc_to_visual(document), task)
            visuals, question, ends, _, state["info"] = doc_to_text[0](
                document, round_idx=round_number, previous_output=answers, previous_round_info=state["info"]
            )
            return None if ends else _from_text(question, visuals, task)

        return _Talk(next_turn, _options(gen_kwargs, task))

    def _asked(self, request: Instance) -> tuple[Conversation, str]:
        text, answer, doc_to_visual, number, task, split = request.args
        document = self._document(task, split, number)
        # The chat template puts a blank before the answer.
        answer = (answer if isinstance(answer, str) else answer(document)).lstrip(" ")
        return _from_text(text, doc_to_visual(document), task), answer


def _options(gen_kwargs: dict[str, Any], task: str) -> dict[str, Any]:
    """A task's `generation_kwargs` as `answer_batch` takes them, and `until`: texts at which an answer ends."""
    if unknown := sorted(set(gen_kwargs) - {*_GENERATION, *_OTHER}):
        raise ConvLlavaError(
            f"The task {task!r} asks to generate with {', '.join(unknown)}; known are "
            f"{', '.join((*_GENERATION, *_OTHER))}."
        )
    options = {name: gen_kwargs[name] for name in _GENERATION if gen_kwargs.get(name) is not None}
    options.setdefault("max_new_tokens", _MAX_NEW_TOKENS)
    # Tasks say `temperature: 0` for the likeliest token, which `generate` refuses, with or without `do_sample`.
    if options.get("temperature", 1.0) == 0 or not gen_kwargs.get("do_sample", "temperature" in options):
        options = {name: value for name, value in options.items() if name not in _SAMPLING}
    else:
        options["do_sample"] = True
    until = gen_kwargs.get("until") or []
    return {**options, "until": [until] if isinstance(until, str) else list(until)}


def _from_messages(messages: Sequence[dict[str, Any]], task: str) -> Conversation:
    """lmms-eval's messages as our chat template takes them."""
    turns = []
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if kinds := {part["type"] for part in parts} - {"text", "image"}:
            raise _only_pictures(task, kinds)
        texts = [part["text"] for part in parts if part["type"] == "text"]
        pictures = [part["url"] for part in parts if part["type"] == "image"]
        if any(IMAGE_TOKEN in text for text in texts):  # the text says where the pictures go
            turns.append({**user_turn("".join(texts), pictures), "role": message["role"]})
        else:
            content = [
                {"type": "text", "text": part["text"]} if part["type"] == "text" else _picture(part["url"])
                for part in parts
            ]
            turns.append({"role": message["role"], "content": content})
    return turns


def _from_text(text: str, visuals: Sequence[Any] | None, task: str) -> Conversation:
    pictures = [visual for visual in visuals or [] if visual is not None]
    if kinds := {type(one).__name__ for one in pictures if isinstance(one, dict)}:
        raise _only_pictures(task, kinds)
    return [user_turn(text, pictures)]


def _picture(picture: Any) -> dict[str, Any]:
    return {"type": "image", "image": picture}


def _only_pictures(task: str, kinds: set[str]) -> ConvLlavaError:
    return ConvLlavaError(
        f"The task {task!r} shows {', '.join(sorted(kinds))}, and ConvLLaVA reads texts and pictures."
    )


def _length(conversation: Conversation) -> int:
    """Characters, a picture counted as very many: what is sorted by."""
    parts = [part for turn in conversation for part in turn["content"]]
    return sum(len(part["text"]) if part["type"] == "text" else 10_000 for part in parts)


def _chunks(indices: Sequence[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(indices), size):
        yield list(indices[start : start + size])


def _cut(text: str, until: Sequence[str]) -> str:
    for end in filter(None, until):
        text = text.split(end)[0]
    return text.strip()
