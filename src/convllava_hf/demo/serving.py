"""Serving the page: what runs `convllava demo`, and a Space."""

import contextlib
import logging
import os
import signal
import threading
import webbrowser
from collections.abc import Callable, Iterator
from pathlib import Path

from ..atomic import temporary_folder
from ..errors import ConvLlavaError
from ..inference import Assistant, load
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
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    system: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    quantization: str | None = None,
    vision_backend: str | None = None,
    trust_remote_code: bool = False,
    open_browser: bool = False,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Load a model and show its page until the process is interrupted or terminated.

    Args:
        model: folder of a checkpoint, or its id on the Hub, as `inference.load` takes it.
        host, port: where to listen; without a port, the first free one from 7860 on.
        device, dtype, quantization, vision_backend, trust_remote_code: see `convllava_hf.inference.load`.
        max_new_tokens, temperature: where the page's settings stand at first.
        on_ready: called with the page's address once it answers.

    Raises:
        ConvLlavaError: gradio is not installed, the checkpoint cannot be loaded, or the port is taken.
    """
    require_gradio()
    assistant = load(
        model,
        device=device,
        dtype=dtype,
        quantization=quantization,
        vision_backend=vision_backend,
        trust_remote_code=trust_remote_code,
    )
    name = Path(model).name if os.path.isdir(model) else model
    limits = limits or Limits()
    options = {"limits": limits, "max_new_tokens": max_new_tokens, "temperature": temperature, "system": system}
    with page_of(assistant, name, host=host, port=port, **options) as url:
        if on_ready is not None:
            on_ready(url)
        if open_browser:
            webbrowser.open(url)
        _wait_for_the_end()


@contextlib.contextmanager
def page_of(
    assistant: Assistant, name: str, *, host: str = "127.0.0.1", port: int | None = None, limits: Limits, **options
) -> Iterator[str]:
    """The page of a loaded model, served meanwhile from threads of this process; yields its address.

    Raises:
        ConvLlavaError: gradio is not installed, or the port is taken.
    """
    require_gradio()
    with temporary_folder("convllava-demo-") as folder:  # readable by this user alone
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
