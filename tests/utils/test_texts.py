"""Text that UTF-8 cannot hold is refused where it comes in, in one line that names it."""

import io
import json
from types import SimpleNamespace

import pytest
from helpers.tiny_models import make_image

from convllava_hf import cli
from convllava_hf.cli import chat
from convllava_hf.errors import ConvLlavaError
from convllava_hf.inference import assistant_turn, system_turn, user_turn
from convllava_hf.utils.texts import check_text, shown, storable, text_error


EMOJI = "\N{GRINNING FACE}"
BYTES = b"caf\xe9".decode("utf-8", "surrogateescape")  # as Python gives an argument that is not UTF-8
HALVES = ["\ud83d", "\ude00", "What \ud83d?", BYTES, EMOJI + "\ud83d", "\ude00\ud83d"]


@pytest.mark.parametrize("text", HALVES)
def test_what_utf8_cannot_hold_is_what_is_refused(text):
    with pytest.raises(UnicodeEncodeError) as caught:
        text.encode()
    assert f"at character {caught.value.start}," in text_error(text)
    with pytest.raises(ConvLlavaError, match=r"^The title has half a surrogate pair \(\\u[0-9a-f]{4}\)"):
        check_text(text, "The title")
    storable(text).encode()
    shown(text).encode()
    for turn in (system_turn, user_turn):
        with pytest.raises(ConvLlavaError, match="half a surrogate pair"):
            turn(text)


@pytest.mark.parametrize("text", ["", EMOJI, "\0", "\ufffd\uffff", "日本語", json.loads('"\\ud83d\\ude00"')])
def test_every_other_text_passes(text):
    assert text_error(text) is None
    assert check_text(text, "It") == storable(text) == text
    assert user_turn(text)["role"] == "user" and assistant_turn(text)


def test_any_value_can_be_shown():
    deep: list = []
    wide = {"a": [{"b": list(range(1000))}] * 1000}
    for _ in range(100_000):
        deep = [deep]
    for value in (deep, wide, 10**6000, [10**6000], "x" * 10**6, object(), {"a": deep}, {5: 1, "a": 2}):
        assert len(shown(value)) <= 123
    assert (shown("user"), shown(["a", 5]), shown({"b": None})) == ("'user'", "['a', 5]", "{'b': None}")


@pytest.fixture
def refused(checkpoint, tmp_path, capsys, monkeypatch):
    """A function: what `convllava ask` and `chat` say about these arguments, before any model is loaded."""
    monkeypatch.setattr("convllava_hf.inference.load", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    make_image().save(tmp_path / "image.png")

    def run(command: str, *argv: str) -> str:
        before = [str(tmp_path / "image.png")] if command == "ask" else []
        assert cli.main([command, str(checkpoint), *before, *argv]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1
        return captured.err

    return run


def test_arguments_are_named(refused):
    for text in HALVES:
        assert "The argument question has half a surrogate pair" in refused("ask", text)
        assert "The argument system has half a surrogate pair" in refused("ask", "What?", "--system", text)
        assert "The argument system has half a surrogate pair" in refused("chat", "--system", text)


def test_chat_goes_on_after_a_line_that_is_not_utf8(checkpoint, capsys, monkeypatch):
    asked = []

    class Assistant:
        def with_prompt_cache(self):
            return self

        def answer(self, messages, **kwargs):
            asked.append(messages[-1]["content"][0]["text"])
            return SimpleNamespace(text="It.")

    monkeypatch.setattr(chat, "load_assistant", lambda args: Assistant())
    typed = b"What?\ncaf\xe9?\n/image caf\xe9.png\n/caf\xe9\n" + f"{EMOJI}?\n".encode()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8"))
    assert cli.main(["chat", str(checkpoint)]) == 0
    assert asked == ["What?", f"{EMOJI}?"]
    question, image, command = capsys.readouterr().err.splitlines()
    assert "The question has half a surrogate pair (\\udce9) at character 3" in question
    assert "There is no image" in image and "Unknown command" in command
