"""This process as a client of the Hub's double."""

import contextlib
import logging
from collections.abc import Iterator

import huggingface_hub
from huggingface_hub import constants

from convllava_hf.publish import About
from convllava_hf.publish.card import CardInput, render_card
from convllava_hf.publish.preflight import check_files
from convllava_hf.publish.staging import stage
from helpers.fake_hub import Hub, serve_hub


@contextlib.contextmanager
def own_hub(monkeypatch) -> Iterator[Hub]:
    """A fresh double that this process and its children take for the Hub, with a token that can write."""
    with serve_hub() as hub:
        files = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        patched = {"ENDPOINT": hub.url, "HUGGINGFACE_CO_URL_TEMPLATE": files}
        for name, value in {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, **patched}.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        monkeypatch.setenv("HF_TOKEN", "hf_writer")
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.setattr(logging.getLogger("huggingface_hub"), "disabled", True)
        _forget_connections()
        yield hub
    _forget_connections()


def card_of(checkpoint, tmp_path) -> str:
    folder = tmp_path / "staged"
    folder.mkdir(parents=True)
    staged = stage(checkpoint, folder)
    card = render_card(staged, CardInput("user/tiny", About(license="llama2")))
    check_files(staged)
    return card


def _forget_connections() -> None:
    """Sessions remember whether they may reach the Hub."""
    name = "reset_sessions" if hasattr(huggingface_hub.utils, "reset_sessions") else "close_session"
    getattr(huggingface_hub.utils, name)()
