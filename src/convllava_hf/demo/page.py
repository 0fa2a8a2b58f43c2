"""The page itself, in Gradio: its layout, and what happens on which event."""

import functools
import html
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from ..errors import ConvLlavaError
from ..inference import Assistant
from ..options import GenerationOptions
from .chat_session import ChatSession, Conversation, Figures, Update
from .examples import write_examples
from .guard import Guard
from .image_upload import ImageInput
from .images import read_image
from .limits import Limits
from .style import CSS, HEAD


logger = logging.getLogger(__name__)

HINT = "Drop an image, ask about it, and follow up. A new image begins a new conversation."
FAULT = "Something went wrong on the server; it has been written to its log. Try again, or start a new conversation."
BUSY = "The question did not get through: too many people are waiting. It is still there; ask again in a moment."


class Stops:
    """Which visitors want their answer to end. A visitor's mark is there from the question to the answer's end."""

    def __init__(self):
        self._events: dict[str | None, threading.Event] = {}
        self._lock = threading.Lock()

    def expect(self, visitor: str | None) -> threading.Event:
        """The mark of a visitor who has just asked. It may be set already: by who stopped while waiting."""
        with self._lock:
            return self._events.setdefault(visitor, threading.Event())

    def stop(self, visitor: str | None) -> None:
        with self._lock:
            event = self._events.get(visitor)
        if event is not None:
            event.set()

    def forget(self, visitor: str | None) -> None:
        with self._lock:
            self._events.pop(visitor, None)


class Events:
    """What happens on the page. Everything that a visitor should read is in what these return or raise."""

    def __init__(self, chat_session: ChatSession, limits: Limits):
        self.chat_session = chat_session
        self.limits = limits
        self.stops = Stops()
        self._decoding = threading.Lock()  # of images looked at outside the queue, which does not limit them

    def look(self, image: str | None):
        """A new image: a new conversation. A file that is not an image is taken off the page, with the reason."""
        if image is None:
            return gr.skip(), [], Conversation(), gr.skip()
        try:
            with self._decoding:
                width, height = read_image(image, self.limits).size
        except ConvLlavaError as error:
            gr.Warning(str(error), title="This image cannot be used")
            return None, [], Conversation(), error_html(str(error))
        return gr.skip(), [], Conversation(), note(f"An image of {width} × {height} pixels. What about it?")

    def begin(self, request: gr.Request):
        self.stops.expect(request.session_hash)
        return gr.update(submit_btn=False, stop_btn="Stop", interactive=False)

    def ask(
        self,
        image: str | None,
        question: str,
        resolution: str,
        max_new_tokens: int,
        temperature: float,
        conversation: Conversation,
        request: gr.Request,
    ) -> Iterator[tuple]:
        """Answers a visitor's question; an error is shown in place of the figures, and the question is kept."""
        asked = (conversation, image, question, resolution, max_new_tokens, temperature)
        cleared = ""
        try:
            for update in self._updates(asked, request.session_hash):
                kept = update.conversation if update.done else gr.skip()
                if update.done and update.conversation == conversation:
                    cleared = question  # stopped before the first word: it can be asked again
                yield messages(update.conversation, html.escape), figures(update), cleared, kept
                cleared = gr.skip()
        except ConvLlavaError as error:
            yield messages(conversation, html.escape), error_html(str(error)), question, gr.skip()

    def ask_by_program(
        self,
        image: str | None,
        question: str,
        resolution: str,
        max_new_tokens: int,
        temperature: float,
        conversation: Conversation,
        request: gr.Request,
    ) -> Iterator[tuple]:
        """The same for gradio_client: texts as they are, and an exception for what goes wrong."""
        asked = (conversation, image, question, resolution, max_new_tokens, temperature)
        try:
            for update in self._updates(asked, request.session_hash):
                kept = update.conversation if update.done else gr.skip()
                yield messages(update.conversation, str), figures(update), kept
        except ConvLlavaError as error:
            raise gr.Error(str(error), title="No answer", print_exception=False) from error

    def _updates(self, asked: tuple, visitor: str | None) -> Iterator[Update]:
        """What `ChatSession.ask` gives, until the visitor stops it.

        Raises:
            ConvLlavaError: any error, in words for the visitor.
        """
        stop = self.stops.expect(visitor)
        try:
            yield from self.chat_session.ask(*asked, wants_to_stop=stop.is_set)
        except ConvLlavaError:
            raise
        except Exception as error:
            logger.exception("No answer to a question of the page")
            raise ConvLlavaError(FAULT) from error
        finally:
            stop.set()
            self.stops.forget(visitor)

    def end(self, request: gr.Request):
        self.stops.forget(request.session_hash)
        return gr.update(submit_btn="Ask", stop_btn=False, interactive=True)

    def fail(self, request: gr.Request):
        """Gradio refused the question: the queue is full, or what came with it is not what the page sends."""
        return self.end(request), error_html(BUSY), gr.skip(), gr.skip()

    def stop(self, request: gr.Request) -> None:
        self.stops.stop(request.session_hash)

    def leave(self, request: gr.Request) -> None:
        self.stops.stop(request.session_hash)
        self.stops.forget(request.session_hash)

    def restart(self, request: gr.Request):
        self.stops.stop(request.session_hash)
        return [], Conversation(), note(HINT)


def build(
    assistant: Assistant,
    name: str,
    folder: Path,
    limits: Limits,
    *,
    system: str | None = None,
    max_new_tokens: int = GenerationOptions.max_new_tokens,
    temperature: float = GenerationOptions.temperature,
    **generation: Any,
) -> gr.Blocks:
    """The page of a model. `folder` is Gradio's own, for uploads; everything in it can be read by visitors.

    `max_new_tokens` and `temperature` are where the page's settings start; visitors do not see what else is in
    `generation`.
    """
    chat_session = ChatSession(assistant, folder, limits, system, generation)
    keep = (max(1, limits.stored_seconds // 6), limits.stored_seconds)
    with gr.Blocks(title=f"{name} · ConvLLaVA", analytics_enabled=False, delete_cache=keep, fill_width=True) as page:
        gr.HTML(header(name, assistant), elem_id="header")
        events = Events(chat_session, limits)
        _connect(_lay_out(chat_session, folder, limits, max_new_tokens, temperature), events)
        page.unload(events.leave)
    page.queue(max_size=limits.queue, status_update_rate=1, api_open=False)  # no way round the queue
    return page


@dataclass(frozen=True)
class _Parts:
    """What events on the page come from and change. `length` and `temperature` are of answers."""

    conversation: gr.State
    image: ImageInput
    question: gr.Textbox
    resolution: gr.Radio
    length: gr.Slider
    temperature: gr.Slider
    chat: gr.Chatbot
    status: gr.HTML
    restart: gr.Button


def _lay_out(
    chat_session: ChatSession, folder: Path, limits: Limits, max_new_tokens: int, temperature: float
) -> _Parts:
    """The layout."""
    conversation = gr.State(Conversation(), time_to_live=limits.stored_seconds)
    question = gr.Textbox(
        placeholder="What is in the image?", label="Question", show_label=False, submit_btn="Ask",
        lines=1, max_lines=6, max_length=limits.question_characters, elem_id="question", autofocus=False,
        render=False,
    )  # fmt: skip
    with gr.Row(elem_id="columns"):
        with gr.Column(scale=4, min_width=300):
            image = ImageInput(
                label="Image", sources=["upload", "clipboard"], type="filepath", image_mode=None, height=340,
                buttons=["fullscreen"], elem_id="image", alt_text="The image that the questions are about",
            )  # fmt: skip
            gr.Examples(
                [list(example) for example in write_examples(folder / "examples")], [image, question],
                label="Examples", cache_examples=False, visible_columns=[0], elem_id="examples",
            )  # fmt: skip
            offered = list(chat_session.presets)
            resolution = gr.Radio(offered, value=offered[0], label="The model sees", elem_id="resolution")
            with gr.Accordion("Answer settings", open=False, elem_id="settings"):
                length = gr.Slider(1, limits.answer_tokens, max_new_tokens, step=1, label="Longest answer, in tokens")
                temperature_slider = gr.Slider(
                    0, limits.temperature, temperature, step=0.05, label="Temperature",
                    info="0 always takes the likeliest word",
                )  # fmt: skip
        with gr.Column(scale=6, min_width=300):
            chat = gr.Chatbot(
                label="Conversation", show_label=False, elem_id="chat", height=None, buttons=["copy"],
                render_markdown=False, feedback_options=None, placeholder="", layout="bubble",
            )  # fmt: skip
            status = gr.HTML(note(HINT), elem_id="status")
            question.render()
            restart = gr.Button("New conversation", size="sm", variant="secondary", elem_id="restart")
    return _Parts(conversation, image, question, resolution, length, temperature_slider, chat, status, restart)


def _connect(parts: _Parts, events: Events) -> None:
    """What happens on which event."""
    at_once: dict[str, Any] = {"queue": False, "show_progress": "hidden"}
    unnamed: dict[str, Any] = {"api_name": False}  # no endpoint for programs
    one_at_a_time: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}
    chat, status, question, conversation = parts.chat, parts.status, parts.question, parts.conversation
    asked_with = [parts.image, question, parts.resolution, parts.length, parts.temperature, conversation]
    begun = question.submit(events.begin, None, question, **at_once, **unnamed)
    answered = begun.then(
        events.ask,
        asked_with,
        [chat, status, question, conversation],
        **one_at_a_time,
        show_progress="hidden",
        **unnamed,
    )
    answered.then(events.end, None, question, **at_once, **unnamed)
    # Naming all that the question would have changed takes Gradio's own mark of an error off it.
    answered.failure(events.fail, None, [question, status, chat, conversation], **at_once, **unnamed)
    gr.Button(visible=False).click(
        events.ask_by_program, asked_with, [chat, status, conversation], **one_at_a_time, api_name="ask"
    )
    question.stop(events.stop, **at_once, api_name="stop")
    parts.image.change(events.look, parts.image, [parts.image, chat, conversation, status], **at_once, api_name="look")
    parts.image.clear(functools.partial(note, HINT), None, status, **at_once, **unnamed)
    gr.on(
        [parts.restart.click, chat.clear],
        events.restart,
        None,
        [chat, conversation, status],
        **at_once,
        api_name="restart",
    )


def launch(page: gr.Blocks, host: str, port: int | None, folder: Path, limits: Limits) -> str:
    """Serve a page from threads of this process; its address.

    Raises:
        OSError: the port is taken.
    """
    guard = Middleware(
        Guard,
        upload_bytes=limits.upload_bytes,
        stored_bytes=limits.stored_bytes,
        stored_files=limits.stored_files,
        stored_seconds=limits.stored_seconds,
        folder=str(folder),
    )
    _, url, _ = page.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        max_threads=limits.queue + 8,
        max_file_size=limits.upload_bytes,
        state_session_capacity=500,
        allowed_paths=[],
        show_error=False,  # `gr.Error` is shown all the same; texts of other exceptions name files of this machine
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        footer_links=["settings"],
        app_kwargs={"middleware": [guard]},
        theme=theme(),
        css=CSS,
        head=HEAD,
    )
    return url


def theme() -> gr.themes.Base:
    """Gradio's own look with the system's fonts: no font is fetched from anywhere."""
    sans, mono = ("system-ui", "-apple-system", "Segoe UI", "sans-serif"), ("ui-monospace", "Consolas", "monospace")
    return gr.themes.Default(primary_hue="blue", neutral_hue="slate", font=sans, font_mono=mono)


def messages(conversation: Conversation, text: Callable[[str], str]) -> list[dict]:
    """A conversation as `gr.Chatbot` takes it, the images with boxes below the answers that they belong to.

    `text`: what is done to texts; the browser reads what looks like a tag as one, although they are not Markdown.
    """
    shown = []
    for turn in conversation.turns:
        shown.append({"role": "user", "content": text(turn.question)})
        if turn.answer:
            shown.append({"role": "assistant", "content": text(turn.answer)})
        if turn.drawn:
            alt = "The image, with the boxes that the answer names"
            shown.append({"role": "assistant", "content": {"path": turn.drawn, "alt_text": alt}})
    return shown


def header(name: str, assistant: Assistant) -> str:
    runs = f"{assistant.device.type.upper()}, {str(assistant.dtype).removeprefix('torch.')}"
    return f"<h1>{html.escape(name)}</h1><p>ConvLLaVA: high-resolution images in few visual tokens · {runs}</p>"


def note(text: str) -> str:
    return f"<div class='note' role='status'>{html.escape(text)}</div>"


def error_html(text: str) -> str:
    return f"<div class='error' role='alert'>{html.escape(text)}</div>"


def figures(update: Update) -> str:
    """What the answer takes, as it becomes known."""
    known: Figures = update.figures
    cells = [
        ("resolution", f"{known.seen.width} × {known.seen.height} px"),
        ("visual tokens", str(known.visual_tokens)),
        ("first token", "…" if known.first_token_seconds is None else f"{known.first_token_seconds:.2f} s"),
    ]
    if known.new_tokens is not None and known.seconds:
        cells.append(("answer", f"{known.new_tokens} tokens in {known.seconds:.1f} s"))
    if known.boxes:
        cells.append(("boxes", str(known.boxes)))
    if known.ended is not None:
        cells.append(("ended", known.ended))
    items = "".join(f"<div><dt>{html.escape(what)}</dt><dd>{html.escape(value)}</dd></div>" for what, value in cells)
    live = "off" if not update.done else "polite"  # a screen reader hears the figures once, not with every word
    return f"<dl class='figures' role='status' aria-live='{live}'>{items}</dl>"
