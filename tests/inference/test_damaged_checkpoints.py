"""Checkpoints whose files are damaged or edited: each is used, or refused in one sentence; never a traceback."""

import json
import random
import shutil
from pathlib import Path

import pytest
from helpers.tiny_models import ask, make_image

from convllava_hf import cli
from convllava_hf.errors import ConvLlavaError
from convllava_hf.inference import load


FILES = (
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
)
WRONG = (None, "x", -1, 0, 2.5, [], {}, [None], {"a": 1}, True, "\ud800", 1e308)


@pytest.fixture
def copy(checkpoint, tmp_path) -> Path:
    return shutil.copytree(checkpoint, tmp_path / "checkpoint")


def outcome(folder: Path) -> str:
    """Loads a checkpoint and asks it something."""
    try:
        assistant = load(folder, device="cpu", dtype="float32")
        return assistant.answer(ask("What?", make_image()), max_new_tokens=1).text
    except ConvLlavaError as error:
        assert "\n" not in str(error) and len(str(error)) < 1500
        return f"refused: {error}"


def places(value, path=()) -> list[tuple]:
    """The paths to all entries of a JSON value, those of long lists and vocabularies by a few examples."""
    found = [path] if path else []
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in list(entries)[:40]:
        found += places(entry, (*path, key))
    return found


def replaced(value, path: tuple, chance: random.Random):
    """A copy with one entry taken out or of another type; not a size, which would only take all memory."""
    value = json.loads(json.dumps(value))
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    if chance.random() < 0.25:
        del parent[path[-1]]
    else:
        parent[path[-1]] = chance.choice(WRONG)
    return value


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_edited_settings(copy, name):
    chance = random.Random(name)
    path = copy / name
    if not path.exists():
        pytest.skip(f"this version of transformers writes no {name}")
    before = path.read_text()
    value = json.loads(before)
    for place in chance.sample(places(value), min(12, len(places(value)))):
        path.write_text(json.dumps(replaced(value, place, chance)))
        outcome(copy)
    path.write_text(before)
    assert not outcome(copy).startswith("refused")


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FILES, "chat_template.jinja", "model.safetensors"])
def test_damaged_files(copy, name):
    chance = random.Random(name)
    path = copy / name
    if not path.exists():
        pytest.skip(f"this version of transformers writes no {name}")
    before = path.read_bytes()
    damaged = [b"", b"\0" * 64, before[: len(before) // 2], b"[" * 100_000, b"[]", b"5", b"\xff\xd8\xff\xe0", b"{}"]
    flipped = bytearray(before)
    for _ in range(20):
        flipped[chance.randrange(min(len(before), 3000))] = chance.randrange(256)
    for content in [*damaged, bytes(flipped)]:
        path.write_bytes(content)
        outcome(copy)


@pytest.mark.parametrize(
    "template",
    [
        "{% if %}",
        "{{ 1 / 0 }}",
        "{{ messages.x.y }}",
        "{% for m in messages %}",
        "{{ raise_exception('no') }}",
        "{{ [] + 1 }}",
    ],
)
def test_a_template_that_cannot_be_used_is_refused_before_the_weights_are_read(copy, template, monkeypatch):
    (copy / "chat_template.jinja").write_text(template)
    (copy / "model.safetensors").unlink()
    assert outcome(copy).startswith("refused: Cannot use the chat template of the checkpoint")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"eos_token_id": "x"}, "eos_token_id='x'; expected a token below"),
        ({"eos_token_id": 10**9}, "eos_token_id=1000000000; expected a token below"),
        ({"suppress_tokens": [5, "x"]}, "suppress_tokens=[5, 'x']; expected a list"),
        ({"repetition_penalty": "x"}, "repetition_penalty"),
    ],
)
def test_generation_settings_are_named(copy, values, said):
    path = copy / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    assert said in outcome(copy)


def test_the_command_says_it_in_one_line(copy, tmp_path, capsys):
    (copy / "tokenizer.json").write_text('{"model": 5}')
    make_image().save(tmp_path / "a.png")
    assert cli.main(["ask", str(copy), str(tmp_path / "a.png"), "What?"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("convllava: error: Cannot load the checkpoint") and "get it again" in line


def test_faults_of_the_program_are_not_blamed_on_the_files(checkpoint, monkeypatch):
    def broken(*args, **kwargs):
        raise NameError("name 'x' is not defined")

    monkeypatch.setattr("convllava_hf.inference.loading.ConvLlavaProcessor.from_pretrained", broken)
    with pytest.raises(NameError):
        load(checkpoint)
