"""A conversation about one image, and how its answers are generated; independent of the page that shows it."""

import logging
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import ConvLlavaError
from ..inference import Answer, Assistant, assistant_turn, system_turn, user_turn
from .answer_boxes import boxes_in, draw, on_image
from .images import read_image
from .limits import Limits
from .presets import Preset, View, presets, view


logger = logging.getLogger(__name__)

_SHOWN_EVERY = 0.05  # seconds between two updates of a streaming answer
_POLL = 0.25  # seconds between two looks at whether the visitor wants the answer to end


@dataclass(frozen=True)
class Turn:
    """A question and its answer. `drawn`: path of the image with the answer's boxes, where it has any."""

    question: str
    answer: str
    drawn: str | None = None


@dataclass(frozen=True)
class Conversation:
    """What was said about the image at `image`, oldest first."""

    image: str | None = None
    turns: tuple[Turn, ...] = ()


@dataclass(frozen=True)
class Figures:
    """What an answer took so far; `None` where it is not known yet. `ended` says why an answer ended early."""

    seen: View
    visual_tokens: int
    first_token_seconds: float | None = None
    new_tokens: int | None = None
    seconds: float | None = None
    boxes: int = 0
    ended: str | None = None


@dataclass(frozen=True)
class Update:
    """The conversation as it is to be shown now. `done`: it is complete."""

    conversation: Conversation
    figures: Figures
    done: bool = False


@dataclass
class _Work:
    """What the thread that generates shares with the one that shows."""

    stop: threading.Event = field(default_factory=threading.Event)
    pieces: queue.Queue = field(default_factory=queue.Queue)


class ChatSession:
    """Answers questions of many visitors, one at a time.

    Args:
        folder: where images with boxes go; the page lets visitors read it.
        system: system message in place of the chat template's own.
        generation: arguments of `Assistant.answer` that visitors do not choose.
    """

    def __init__(
        self,
        assistant: Assistant,
        folder: Path,
        limits: Limits,
        system: str | None = None,
        generation: Mapping[str, Any] | None = None,
    ):
        self.assistant = (
            assistant.with_prompt_cache()
        )  # one for all visitors: their images are few, and turns alternate
        self.folder = folder
        self.limits = limits
        self.system = system
        self.generation = dict(generation or {})
        self.presets = presets(assistant.processor.image_processor)
        self._one_at_a_time = threading.Lock()

    def view(self, preset: Preset, image: Image.Image) -> View:
        return view(self.assistant.processor.image_processor, preset, *image.size)

    def ask(
        self,
        conversation: Conversation,
        image: str | None,
        question: str,
        preset: str,
        max_new_tokens: int,
        temperature: float,
        wants_to_stop: Callable[[], bool],
    ) -> Iterator[Update]:
        """Continue the conversation by an answer, or begin one if the image is another.

        The iterator's end, or closing it early, ends the generation.

        Raises:
            ConvLlavaError: something about the question cannot be done; the message is for the visitor.
        """
        chosen, question, image = self._check(image, question, preset, max_new_tokens, temperature)
        if image != conversation.image:
            conversation = Conversation(image)
        if len(conversation.turns) >= self.limits.questions:
            raise ConvLlavaError(
                f"This conversation has {len(conversation.turns)} questions, and no more are taken. Start a new one."
            )
        pixels = read_image(image, self.limits)
        seen = self.view(chosen, pixels)
        figures = Figures(seen, seen.visual_tokens)
        yield Update(_with(conversation, question, ""), figures)

        work = _Work()
        messages = self._messages(conversation, question, pixels)
        assistant = self.assistant.with_image_options(**chosen.image_options)
        options = {**self.generation, "max_new_tokens": max_new_tokens, "temperature": temperature}
        thread = threading.Thread(target=self._generate, args=(work, assistant, messages, options), daemon=True)
        thread.start()
        try:
            yield from self._follow(work, conversation, question, figures, pixels, max_new_tokens, wants_to_stop)
        finally:
            work.stop.set()

    def _check(
        self, image: str | None, question: str, preset: str, max_new_tokens: int, temperature: float
    ) -> tuple[Preset, str, str]:
        """Everything about a question that can be refused without opening the image."""
        question = (question or "").strip()
        if image is None:
            raise ConvLlavaError("There is no image yet. Drop one on the page, or choose an example.")
        if not question:
            raise ConvLlavaError("There is no question yet. Type one, then press Ask.")
        if len(question) > self.limits.question_characters:
            raise ConvLlavaError(
                f"The question has {len(question)} characters, and {self.limits.question_characters} are taken. "
                "Make it shorter."
            )
        if preset not in self.presets:
            raise ConvLlavaError(f"Unknown resolution {preset!r}; choose one of: {'; '.join(self.presets)}.")
        if not 1 <= max_new_tokens <= self.limits.answer_tokens:
            raise ConvLlavaError(
                f"The longest answer is {max_new_tokens} tokens; choose 1 to {self.limits.answer_tokens}."
            )
        if not 0 <= temperature <= self.limits.temperature:
            raise ConvLlavaError(f"The temperature is {temperature}; choose 0 to {self.limits.temperature:g}.")
        return self.presets[preset], question, image

    def _messages(self, conversation: Conversation, question: str, image: Image.Image) -> list[dict]:
        messages = [system_turn(self.system)] if self.system else []
        images = [image]
        for turn in conversation.turns:
            messages += [user_turn(self.as_text(turn.question), images), assistant_turn(self.as_text(turn.answer))]
            images = []
        return [*messages, user_turn(self.as_text(question), images)]

    def as_text(self, typed: str) -> str:
        """What somebody typed, such that the tokenizer reads none of its special tokens in it.

        `<image>` would ask for another image, and `</s>` would end the question: a blank within makes them text.
        """
        tokenizer = self.assistant.processor.tokenizer
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        special |= {*tokenizer.all_special_tokens, self.assistant.processor.image_token}
        for token in sorted(special, key=len, reverse=True):
            if len(token) > 1:
                typed = typed.replace(token, f"{token[0]} {token[1:]}")
        return typed

    def _generate(self, work: _Work, assistant: Assistant, messages: list[dict], options: dict) -> None:
        """In a thread of its own: pieces of text, then the `Answer` or what was raised, go into the queue."""
        try:
            with self._one_at_a_time:  # an answer that was given up may still be at its prompt
                deadline = time.monotonic() + self.limits.answer_seconds

                def should_stop() -> bool:
                    return work.stop.is_set() or time.monotonic() > deadline

                answer = assistant.answer(messages, on_text=work.pieces.put, should_stop=should_stop, **options)
            work.pieces.put(answer)
        except BaseException as error:  # nothing may be lost: the other thread waits for the end
            work.pieces.put(error)

    def _follow(
        self,
        work: _Work,
        conversation: Conversation,
        question: str,
        figures: Figures,
        pixels: Image.Image,
        max_new_tokens: int,
        wants_to_stop: Callable[[], bool],
    ) -> Iterator[Update]:
        """Updates while the answer grows, the last of them with all of its figures."""
        start = shown = time.perf_counter()
        text = ""
        while True:
            if wants_to_stop():
                work.stop.set()
            try:
                piece = work.pieces.get(timeout=_POLL)
            except queue.Empty:
                if work.stop.is_set() and not text:  # still at the prompt: the visitor need not wait for its end
                    yield Update(conversation, replace(figures, ended="stopped"), done=True)
                    return
                continue
            if isinstance(piece, BaseException):
                raise piece
            if isinstance(piece, Answer):
                break
            now = time.perf_counter()
            if not text:
                figures = replace(figures, first_token_seconds=now - start)
            text += piece
            if now - shown >= _SHOWN_EVERY or len(text) == len(piece):
                shown = now
                yield Update(_with(conversation, question, text), figures)
        yield self._finished(piece, conversation, question, figures, pixels, max_new_tokens, work.stop.is_set())

    def _finished(
        self,
        answer: Answer,
        conversation: Conversation,
        question: str,
        figures: Figures,
        pixels: Image.Image,
        max_new_tokens: int,
        stopped: bool,
    ) -> Update:
        boxes = [on_image(box, figures.seen) for box in boxes_in(answer.text)]
        boxes = [box for box in boxes if box is not None]
        drawn = None
        if boxes:
            drawn = str(self.folder / f"boxes-{uuid.uuid4().hex}.webp")
            draw(pixels, boxes).save(drawn, quality=88)
        ended = None
        if stopped:
            ended = "stopped"
        elif answer.seconds >= self.limits.answer_seconds:
            ended = f"ended after {self.limits.answer_seconds:g} s"
        elif len(answer.token_ids) >= max_new_tokens:
            ended = f"cut at {max_new_tokens} tokens"
        figures = replace(
            figures,
            visual_tokens=answer.visual_tokens,
            first_token_seconds=answer.first_token_seconds,
            new_tokens=len(answer.token_ids),
            seconds=answer.seconds,
            boxes=len(boxes),
            ended=ended,
        )
        return Update(_with(conversation, question, answer.text, drawn), figures, done=True)


def _with(conversation: Conversation, question: str, answer: str, drawn: str | None = None) -> Conversation:
    return replace(conversation, turns=(*conversation.turns, Turn(question, answer, drawn)))
