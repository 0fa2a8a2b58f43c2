"""Serving the page: what runs `convllava demo`, and a Space."""

import contextlib
import logging
import os
import signal
import threading
import webbrowser
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import ConvLlavaError
from ..inference import Assistant, load
from ..utils.atomic import temporary_folder
from .limits import Limits


logger = logging.getLogger(__name__)

# Read by Gradio when it is imported. It would report the start to its makers, look for newer versions of itself, and
# keep visitors' files in a folder that all pages on the machine share.
_ENVIRONMENT = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_RUN_HISTORY": "False",
    "GRADIO_SHARE": "False",
    "GRADIO_MCP_SERVER": "False",
    "GRADIO_SSR_MODE": "False",
    "GRADIO_ALLOWED_PATHS": "",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


def serve(
    model: str,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    limits: Limits | None = None,
    system: str | None = None,
    generation: Mapping[str, Any] | None = None,
    open_browser: bool = False,
    on_ready: Callable[[str], None] | None = None,
    **loading: Any,
) -> None:
    """Load a model and show its page until the process is interrupted or terminated.

    Args:
        model: folder of a checkpoint, or its id on the Hub, as `inference.load` takes it.
        host, port: where to listen; without a port, the first free one from 7860 on.
        system: system message in place of the chat template's own.
        generation: arguments of `Assistant.answer`; `max_new_tokens` and `temperature` are where the page's settings
            start.
        on_ready: called with the page's address once it answers.
        **loading: arguments of `convllava_hf.inference.load`, such as `device`.

    Raises:
        ConvLlavaError: gradio is not installed, the checkpoint cannot be loaded, or the port is taken.
    """
    require_gradio()
    assistant = load(model, **loading)
    name = Path(model).name if os.path.isdir(model) else model
    limits = limits or Limits()
    with page_of(assistant, name, host=host, port=port, limits=limits, system=system, **(generation or {})) as url:
        if on_ready is not None:
            on_ready(url)
        if open_browser:
            webbrowser.open(url)
        _wait_for_the_end()


@contextlib.contextmanager
def page_of(
    assistant: Assistant, name: str, *, host: str = "127.0.0.1", port: int | None = None, limits: Limits, **options
) -> Iterator[str]:
    """The page of a loaded model, served during the block from threads of this process; yields its address.

    Raises:
        ConvLlavaError: gradio is not installed, or the port is taken.
    """
    require_gradio()
    with temporary_folder("convllava-demo-") as folder:  # readable by this user only
        own = {"GRADIO_TEMP_DIR": str(folder), "GRADIO_EXAMPLES_CACHE": str(folder / "examples")}
        with _environment({**_ENVIRONMENT, **own}):
            from .page import build, launch

            page = build(assistant, name, folder, limits, **options)
            try:
                url = launch(page, host, port, folder, limits)
            except OSError as error:
                raise ConvLlavaError(
                    f"The page cannot listen on {host}, port {port or '7860 to 7959'}: it is taken or not this "
                    "machine's. Choose another with --host or --port."
                ) from error
            try:
                yield url
            finally:
                page.close(verbose=False)


def require_gradio() -> None:
    """Says how to install what is missing, before anything large is loaded."""
    try:
        with _environment(_ENVIRONMENT):
            import gradio  # noqa: F401
    except ImportError as error:
        raise ConvLlavaError("The web page needs gradio: pip install 'convllava-hf[demo]'") from error


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _wait_for_the_end() -> None:
    """Until Ctrl-C or a termination signal: either is the ordinary way to end a server."""
    over = threading.Event()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda number, frame: over.set())
    with contextlib.suppress(KeyboardInterrupt):
        while not over.wait(0.5):
            pass
