"""Absurd values of every option of every command: one line, exit code 2, and nothing large is loaded for it."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.tiny_models import make_image

from convllava_hf import cli
from convllava_hf.convert.writing import parse_size
from convllava_hf.errors import ConvLlavaError
from convllava_hf.inference.loading import choose_device
from convllava_hf.options import shortened
from convllava_hf.utils import interrupts


NINES = "9" * 400
HUGE = "1000000000000"
LONG = "x" * 5000
BYTES = os.fsdecode(b"caf\xe9")  # Latin-1, which is not UTF-8


def refused(capsys, *argv: str) -> str:
    """Runs a command that must refuse; the one line that it says."""
    try:
        code = cli.main([str(argument) for argument in argv])
    except SystemExit as end:
        code = end.code
    captured = capsys.readouterr()
    assert code == 2, argv
    assert "Traceback" not in captured.err and captured.out == ""
    last = captured.err.strip().splitlines()[-1]
    assert "error: " in last and len(last) < 2500
    last.encode()
    return last


@pytest.fixture
def image(tmp_path) -> Path:
    path = tmp_path / "photo.jpg"
    make_image().save(path)
    return path


def options_of(parser: argparse.ArgumentParser) -> list[tuple[list[str], argparse.Action]]:
    """All options of all commands, each with the words that lead to it."""
    found = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                found += [([name, *words], option) for words, option in options_of(command)]
        else:
            found.append(([], action))
    return found


ALL = options_of(cli.build_parser())
NUMBERS = [(words, action) for words, action in ALL if action.type not in (None, Path)]
# What each command cannot do without, so that argparse gets to the option.
NEEDED = {
    "ask": ["m", "i", "q"],
    "chat": ["m"],
    "demo": ["m"],
    "convert": ["s", "o"],
    "assemble": ["o", "--vision", "v", "--text", "t"],
    "check": ["f"],
    "inspect": ["f", "--index", "0", "--model", "m"],
    "eval": ["m", "--benchmark", "pope"],
    "push": ["m", "a/b"],
    "profile": [],
    "quickstart": [],
}


@pytest.mark.parametrize(
    ("words", "action"), NUMBERS, ids=[f"{'-'.join(words)}{action.option_strings[0]}" for words, action in NUMBERS]
)
def test_no_number_is_absurd(capsys, words, action):
    for value in (NINES, "9" * 5000, "-1", "nan", "inf", "1e400", "0x10", "", "\0", BYTES, "½"):
        said = refused(capsys, *words, *NEEDED[words[-1]], f"{action.option_strings[-1]}={value}")
        assert action.option_strings[-1] in said, value


@pytest.mark.parametrize(
    "argv",
    [
        ["ask", "m", "i", "q", "--size", "64000000"],
        ["ask", "m", "i", "q", "--min-pixels", HUGE, "--max-pixels", HUGE],
        ["ask", "m", "i", "q", "--temperature", "1e300"],
        ["ask", "m", "i", "q", "--temperature", "1e-300"],
        ["ask", "m", "i", "q", "--max-new-tokens", HUGE],
        ["ask", "m", "i", "q", "--dtype", "float8_e5m2"],
        ["assemble", "o", "--vision", "v", "--text", "t", "--resolution", HUGE],
        ["assemble", "o", "--vision", "v", "--text", "t", "--extra-stage-depth", HUGE],
        ["assemble", "o", "--vision", "v", "--text", "t", "--extra-stage-width", HUGE],
        ["profile", "--sizes", f"{HUGE}x64"],
        ["profile", "--sizes", "²x64"],
        ["profile", "--batch", HUGE],
        ["data", "check", "f", "--workers", "1000000"],
        ["data", "inspect", "f", "--model", "m", "--index", "-1"],
        ["demo", "m", "--port", "65536"],
        ["demo", "m", "--queue", HUGE],
        ["eval", "m", "--benchmark", "pope", "--batch-size", HUGE],
        ["quickstart", "--seed", "-1"],
    ],
)
def test_bounds(capsys, argv):
    assert ascii(argv[-1]).strip("'") in refused(capsys, *argv)


TEXTS = [(words, action) for words, action in ALL if action.nargs != 0 and action.type in (None, Path)]
TEXTS = [(words, action) for words, action in TEXTS if not action.choices and words[-1:] != ["train"]]


def with_value(words: list[str], action: argparse.Action, value: str) -> list[str]:
    needed = list(NEEDED[words[-1]])
    if not action.option_strings:
        names = [one.dest for parts, one in ALL if parts == words and not one.option_strings]
        place = names.index(action.dest)
        return [*words, *needed[:place], value, *needed[place + 1 :]]
    count = action.nargs if isinstance(action.nargs, int) else 1
    return [*words, *needed, action.option_strings[-1], *[value] * count]


@pytest.mark.parametrize(
    ("words", "action"), TEXTS, ids=[f"{'-'.join(words)}-{action.dest}" for words, action in TEXTS]
)
def test_no_text_holds_what_is_no_character(capsys, words, action):
    for value in ("a\0b", BYTES, "\ud800"):
        said = refused(capsys, *with_value(words, action, value))
        assert "NUL" in said or "UTF-8" in said, value
        assert action.dest.replace("_", "-") in said
    if action.dest not in ("question", "system", "space", "example"):
        assert "must not be empty" in refused(capsys, *with_value(words, action, " "))


def test_train_takes_none_of_it_either(capsys):
    for value in ("a\0b", BYTES):
        assert "arguments" in refused(capsys, "train", "--config", value)


@pytest.mark.parametrize(
    "argv",
    [
        ["ask", LONG, "{image}", "q"],
        ["ask", "{model}", LONG, "q"],
        ["chat", LONG],
        ["convert", LONG, "{tmp}/o"],
        ["convert", "{source}", LONG],
        ["convert", "{source}", f"{{tmp}}/{'x' * 300}"],
        ["convert", "{source}", "{tmp}/o", "--vision-tower", LONG],
        ["convert", "{source}", "{tmp}/o", "--max-shard-size", f"{NINES}GB"],
        ["convert", "{source}", "/dev/null"],
        ["convert", "{source}", "{tmp}/loop"],
        ["convert", "{tmp}/loop", "{tmp}/o"],
        ["convert", "~nobody-of-this-name/model", "{tmp}/o"],
        ["push", "~nobody-of-this-name/model", "a/b", "--license", "mit", "--dry-run"],
        ["push", "{tmp}/loop", "a/b", "--license", "mit", "--dry-run"],
        ["convert", "{source}", "/proc/out", "--overwrite"],
        ["assemble", LONG, "--vision", "v", "--text", "t"],
        ["assemble", "{tmp}/o", "--vision", LONG, "--text", "t"],
        ["profile", LONG],
        ["profile", "--output", "/dev/null"],
        ["profile", "--output", "{image}"],
        ["profile", "--output", "{tmp}"],
        ["profile", "{model}", "--device", "meta"],
        ["ask", "{model}", "{image}", "q", "--device", "meta"],
        ["ask", "{model}", "{image}", "q", "--device", "hpu"],
        ["ask", "{model}", "{image}", "q", "--device", f"cuda:{NINES}"],
        ["data", "check", LONG],
        ["data", "check", "{image}"],
        ["data", "check", "{tmp}/loop"],
        ["data", "inspect", LONG, "--index", "0", "--model", "{model}"],
        ["data", "inspect", "{tmp}", "--index", "0", "--model", "{model}", "--save", "/dev/null"],
        ["quickstart", "--output", "/proc/quickstart"],
        ["demo", LONG],
        ["demo", "{model}", "--host", LONG],
        ["demo", "{model}", "--host", "no such host"],
        ["eval", "{model}", "--benchmark", ","],
        ["eval", "{model}", "--benchmark", "pope,"],
        ["eval", "{model}", "--benchmark", LONG],
        ["eval", "{model}", "--benchmark", "pope", "--output", "/dev/null"],
        ["eval", "{model}", "--benchmark", "pope", "--output", "/etc"],
        ["eval", "{model}", "--benchmark", "pope", "--output", "{image}"],
        ["eval", "--compare", LONG, "{tmp}"],
        ["eval", "--compare", "{image}", "{image}"],
        ["push", LONG, "a/b", "--license", "mit", "--dry-run"],
        ["push", "{model}", LONG, "--license", "mit", "--dry-run"],
        ["push", "{model}", "a/b", "--license", "mit", "--dry-run", "--max-shard-size", f"{NINES}GB"],
        ["push", "{model}", "a/b", "--about", "{image}", "--dry-run"],
        ["push", "{model}", "a/b", "--about", LONG, "--dry-run"],
        ["push", "{model}", "a/b", "--license", "mit", "--results", "{image}", "--dry-run"],
        ["push", "{model}", "a/b", "--license", "mit", "--results", LONG, "--dry-run"],
        ["push", "{model}", "a/b", "--license", "mit", "--example", LONG, "q", "--dry-run"],
        ["push", "{model}", "a/b", "--license", LONG, "--dry-run"],
        ["train", "--config", "{image}"],
        ["train", "--config", LONG],
    ],
    ids=lambda argv: " ".join(argv)[:60],
)
def test_absurd_places_are_refused(capsys, monkeypatch, checkpoint, golden, tmp_path, image, argv):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    (tmp_path / "loop").symlink_to("loop")
    if argv[0] == "demo":
        pytest.importorskip("gradio")
    if argv[0] == "eval":
        pytest.importorskip("datasets")
        pytest.importorskip("rapidfuzz")
    if argv[0] in ("train", "quickstart"):
        pytest.importorskip("trl")
    names = {"model": checkpoint, "source": golden / "checkpoint-stage3", "tmp": tmp_path, "image": image}
    before = image.read_bytes()
    refused(capsys, *(argument.format(**names) for argument in argv))
    assert image.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loop", "photo.jpg"]


def test_figures_of_an_earlier_run_may_be_written_over(tmp_path):
    from convllava_hf.profiling.tables import check_output_file, write_json

    write_json(tmp_path / "new" / "profile.json", {"model": "m"})
    check_output_file(tmp_path / "new" / "profile.json")
    write_json(tmp_path / "new" / "profile.json", {"model": "n"})
    assert json.loads((tmp_path / "new" / "profile.json").read_text()) == {"model": "n"}


@pytest.mark.parametrize("size", [f"{NINES}GB", NINES, "0", "0.5", "-1", "1e9", "GB", "", "9223372036854775808"])
def test_sizes(size):
    with pytest.raises(ConvLlavaError, match="max_shard_size is"):
        parse_size(size)


def test_devices_that_compute_nothing():
    for device in ("meta", "hpu", "privateuseone", "cpu:-1", "x"):
        with pytest.raises(ConvLlavaError, match="cannot be used"):
            choose_device(device)


def test_texts_in_messages():
    assert shortened("a\0\ud800") == r"'a\x00\ud800'"
    assert len(shortened(LONG)) < 100


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 3.64 TiB for an array"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_memory_that_is_not_there_is_no_fault_of_the_program(capsys, monkeypatch, error):
    def fail(args):
        raise error

    monkeypatch.setattr(cli.quickstart, "run", fail)
    assert "not enough memory" in refused(capsys, "quickstart")


# --- interrupted


_WAITS = """
import sys, time, types
from pathlib import Path
package = types.ModuleType("convllava_hf")  # without its __init__, which imports torch
package.__path__ = [{package!r}]
sys.modules["convllava_hf"] = package
from convllava_hf.utils import atomic
from convllava_hf.utils import interrupts
interrupts.exit_quietly()
if sys.argv[2] == "importing":
    print("ready", flush=True)
    time.sleep(60)
try:
    with interrupts.cleanup_on_signals(), atomic.replacing_folder(Path(sys.argv[1]) / "out"):
        with atomic.temporary_folder("convllava-test-"):
            print("ready", flush=True)
            time.sleep(60)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize(
    ("moment", "number", "code"),
    [("importing", signal.SIGINT, 130), ("writing", signal.SIGINT, 130), ("writing", signal.SIGTERM, 143)],
)
def test_a_signal_leaves_nothing_behind_and_says_nothing(tmp_path, moment, number, code):
    source = _WAITS.format(package=str(Path(interrupts.__file__).parents[1]))
    process = subprocess.Popen(
        [sys.executable, "-c", source, str(tmp_path), moment],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (code, "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.2, 1.0, 2.5])
def test_ctrl_c_in_the_first_moments(seconds, tmp_path, image):
    process = subprocess.Popen(
        [sys.executable, "-m", "convllava_hf", "ask", str(tmp_path), str(image), "What?"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert "Traceback" not in errors
    assert process.returncode in (130, 2)  # 2: it had already seen that there is no checkpoint
