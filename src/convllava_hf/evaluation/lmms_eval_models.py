"""ConvLLaVA as lmms-eval asks it: generated answers, several rounds, likelihoods, in batches.

lmms-eval's interface: `lmms_eval.api.model.lmms` (0.7). It has two kinds of models. To a chat model it hands messages,
and it asks only for generated answers; to a simple one it hands a text and images, and may ask for likelihoods.
Nothing is caught here: an error ends the run, rather than counting as an empty answer.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts  # pyright: ignore[reportMissingImports]
from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
from tqdm import tqdm

from ..errors import ConvLlavaError
from ..inference import load, user_turn
from ..modeling.processing_convllava import IMAGE_TOKEN
from ..options import IMAGE_OPTIONS
from .engine import Conversation, answer_batch, score_batch


_MAX_NEW_TOKENS = 1024  # of tasks that do not say: as lmms-eval's own LLaVA has it
_SAMPLING = ("temperature", "top_p", "top_k")
_GENERATION = ("max_new_tokens", "num_beams", "repetition_penalty", *_SAMPLING)
_OTHER = ("do_sample", "until", "image_aspect_ratio")  # the last one is LLaVA's own


@dataclass
class _Talk:
    """A document that is asked about, perhaps in rounds.

    `next_turn`: what is said next, given the answers so far; `None` if nothing is. It opens the images, so it is
    called when its batch is due. `options`: see `_options`. `length`: characters of the question.
    """

    next_turn: Callable[[int, list[str]], Conversation | None]
    options: dict[str, Any]
    length: int
    answers: list[GenerationResult] = field(default_factory=list)


class _ConvLlava(lmms):
    """What both kinds have in common.

    Args:
        pretrained: folder of a checkpoint or its id on the Hub.
        batch_size: questions asked at once.
        device, dtype: see `convllava_hf.inference.load`.
        **options: other arguments of `load`, and those of `options.ImageOptions`: how large images are seen, where not
            as the checkpoint says.

    Raises:
        ConvLlavaError: the checkpoint cannot be loaded, or a value is not one of those that can be.
    """

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str | None = None,
        **options: Any,
    ):
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ConvLlavaError(f"batch_size is {batch_size!r}, expected a number of questions, at least 1.")
        self.batch_size = int(batch_size)
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if self._world_size > 1 and self.accelerator.device.type != "cpu":
            device = str(self.accelerator.device)  # each process its own
        dtype = None if dtype == "auto" else dtype
        image_options = {name: options.pop(name) for name in IMAGE_OPTIONS if name in options}
        self._assistant = load(pretrained, device=device, dtype=dtype, image_options=image_options, **options)
        self._device = self._assistant.device

    @property
    def device(self) -> torch.device:
        return self._device

    def clean(self) -> None:
        """Frees the model's memory: lmms-eval calls it before it scores, perhaps by another model."""
        del self._assistant
        super().clean()

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """One answer to each request, in their order."""
        talks = [self._talk(request) for request in requests]
        self._ask_round(talks, 0, "ConvLLaVA answers")
        return [talk.answers[0] for talk in talks]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """Every round's answers to each request: a round of all requests is asked before the next."""
        talks = [self._talk(request) for request in requests]
        going_on, number = talks, 0
        while going_on:
            self._ask_round(going_on, number, f"ConvLLaVA answers, round {number + 1}")
            number += 1
            going_on = [talk for talk in going_on if len(talk.answers) == number]
        return [[answer.text for answer in talk.answers] for talk in talks]

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """The loss of each request's answer, and whether it is the greedy one, as `text` of a result.

        The loss, not the logarithm of the probability, for lmms-eval takes the option with the smallest number. It is
        the mean over the answer's tokens, as with lmms-eval's other models. lmms-eval 0.7.3 makes a string of the
        bare pair that its interface asks for, and then cannot score it; of a result it takes what is in it.
        """
        results: list[GenerationResult | None] = [None] * len(requests)
        order = sorted(range(len(requests)), key=lambda index: -len(requests[index].args[0]))
        with self._progress(len(requests), "ConvLLaVA scores answers") as bar:
            for indices in _chunks(order, self.batch_size):
                conversations, answers = zip(*(self._asked(requests[index]) for index in indices), strict=True)
                replies = score_batch(self._assistant, conversations, [[answer] for answer in answers])
                for index, reply in zip(indices, replies, strict=True):
                    (answer,) = reply.likelihoods
                    results[index] = GenerationResult((-answer.log_likelihood, answer.greedy))
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

    def _ask_round(self, talks: Sequence[_Talk], number: int, what: str) -> None:
        """Adds an answer to each talk that goes on: in batches with the same options, the longest questions first."""
        talks = sorted(talks, key=lambda talk: (_key(talk.options), -talk.length))
        with self._progress(len(talks), what) as bar:
            for _, group in groupby(talks, key=lambda talk: _key(talk.options)):
                for batch in _chunks(list(group), self.batch_size):
                    turns = [(talk, talk.next_turn(number, [one.text for one in talk.answers])) for talk in batch]
                    self._ask([(talk, turn) for talk, turn in turns if turn is not None])
                    bar.update(len(batch))

    def _ask(self, turns: Sequence[tuple[_Talk, Conversation]]) -> None:
        if not turns:
            return
        until = turns[0][0].options["until"]
        options = {name: value for name, value in turns[0][0].options.items() if name != "until"}
        conversations = [turn for _, turn in turns]
        for (talk, _), reply in zip(turns, answer_batch(self._assistant, conversations, **options), strict=True):
            tokens = TokenCounts(output_tokens=len(reply.token_ids))
            talk.answers.append(GenerationResult(_cut(reply.text, until), tokens))


class ConvLlavaChat(_ConvLlava):
    """The kind that gets messages: `lmms-eval --model convllava`."""

    is_simple = False

    def _talk(self, request: Instance) -> _Talk:
        text, doc_to_messages, gen_kwargs, number, task, split = request.args
        state = {"info": None}

        def next_turn(round_number: int, answers: list[str]) -> Conversation | None:
            document = self._document(task, split, number)
            if round_number == 0:
                return _from_messages(doc_to_messages(document), task)
            payload = doc_to_messages(
                document, round_idx=round_number, previous_output=answers, previous_round_info=state["info"]
            )
            if not isinstance(payload, tuple):
                raise ConvLlavaError(
                    f"The task {task!r} gave {type(payload).__name__} for round {round_number + 1}, and messages, "
                    "whether it ends, answers and notes are expected: its doc_to_messages knows only one round."
                )
            messages, ends, _, state["info"] = payload
            return None if ends else _from_messages(messages, task)

        return _Talk(next_turn, _options(gen_kwargs, task), len(text))

    def _asked(self, request: Instance) -> tuple[Conversation, str]:
        raise ConvLlavaError(
            "lmms-eval asks chat models only for generated answers. Add --force_simple for tasks by log-likelihood."
        )


class ConvLlavaSimple(_ConvLlava):
    """The kind that gets a text and images: `lmms-eval --model convllava --force_simple`."""

    is_simple = True

    def _talk(self, request: Instance) -> _Talk:
        text, gen_kwargs, doc_to_visual, *doc_to_text, number, task, split = request.args
        state = {"info": None}

        def next_turn(round_number: int, answers: list[str]) -> Conversation | None:
            document = self._document(task, split, number)
            if round_number == 0:
                return _from_text(text, doc_to_visual(document), task)
            visuals, question, ends, _, state["info"] = doc_to_text[0](
                document, round_idx=round_number, previous_output=answers, previous_round_info=state["info"]
            )
            return None if ends else _from_text(question, visuals, task)

        return _Talk(next_turn, _options(gen_kwargs, task), len(text))

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
            raise _only_images(task, kinds)
        texts = [part["text"] for part in parts if part["type"] == "text"]
        images: list[Any] = [part["url"] for part in parts if part["type"] == "image"]
        if any(IMAGE_TOKEN in text for text in texts):  # the text says where the images go
            turns.append({**user_turn("".join(texts), images), "role": message["role"]})
        else:
            content = [part if part["type"] == "text" else {"type": "image", "image": part["url"]} for part in parts]
            turns.append({"role": message["role"], "content": content})
    return turns


def _from_text(text: str, visuals: Sequence[Any] | None, task: str) -> Conversation:
    images = [visual for visual in visuals or [] if visual is not None]
    if kinds := {type(one).__name__ for one in images if isinstance(one, dict)}:
        raise _only_images(task, kinds)
    return [user_turn(text, images)]


def _only_images(task: str, kinds: set[str]) -> ConvLlavaError:
    return ConvLlavaError(f"The task {task!r} shows {', '.join(sorted(kinds))}, and ConvLLaVA reads texts and images.")


def _key(options: dict[str, Any]) -> str:
    return repr(sorted(options.items()))


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _cut(text: str, until: Sequence[str]) -> str:
    for end in filter(None, until):
        text = text.split(end)[0]
    return text.strip()
