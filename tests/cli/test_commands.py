"""The command line: what it prints, what it refuses, and with which exit code."""

import errno
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import fork_server
from helpers.tiny_models import image_with_broken_exif, make_image
from PIL import Image

from convllava_hf import cli
from convllava_hf.errors import ConvLlavaError


EXACT = ["--device", "cpu", "--dtype", "float32", "--max-new-tokens", "24"]
QUESTION = "What number is on the sign?\nAnswer the question using a single word or phrase."


@pytest.fixture(scope="module")
def converted(golden, tmp_path_factory):
    """The golden checkpoint, converted by the command that users call."""
    folder = tmp_path_factory.mktemp("cli") / "model"
    assert cli.main(["convert", str(golden / "checkpoint-stage3"), str(folder)]) == 0
    return folder


@pytest.fixture
def image(tmp_path):
    make_image().save(tmp_path / "image.png")
    return tmp_path / "image.png"


def refusal(capsys, *argv: str) -> str:
    """The one line that a command says before it exits with code 2."""
    assert cli.main(list(argv)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("convllava: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


# --- asking


def test_ask_prints_what_the_original_answered(converted, golden, golden_cases, capsys):
    argv = ["ask", str(converted), str(golden / "images" / "tall.png"), QUESTION]
    assert cli.main([*argv, *EXACT]) == 0
    assert capsys.readouterr().out == golden_cases["tall-ocr"]["text"] + "\n"


def test_ask_json(converted, golden, golden_cases, capsys):
    image = str(golden / "images" / "tall.png")
    assert cli.main(["ask", str(converted), image, QUESTION, "--json", *EXACT]) == 0
    report = json.loads(capsys.readouterr().out)
    seconds = report.pop("total_seconds")
    assert 0 < report.pop("first_token_seconds") <= seconds
    case = golden_cases["tall-ocr"]
    assert report == {
        "model": str(converted),
        "image": image,
        "question": QUESTION,
        "answer": case["text"],
        "visual_tokens": 25,
        "prompt_tokens": len(case["input_ids"]) - 1 + 25,
        "new_tokens": len(case["generated"]),
        "device": "cpu",
        "dtype": "float32",
    }


def test_ask_places_the_image_where_the_question_says(converted, golden, golden_cases, capsys):
    question = "Look at <image> and say what it is."
    assert cli.main(["ask", str(converted), str(golden / "images" / "rgba.png"), question, *EXACT]) == 0
    assert capsys.readouterr().out == golden_cases["inline"]["text"] + "\n"


def test_ask_with_a_system_message(checkpoint, image, capsys):
    outputs = []
    for system in ([], ["--system", "Be brief."]):
        assert cli.main(["ask", str(checkpoint), str(image), "What?", "--json", *EXACT, *system]) == 0
        outputs.append(json.loads(capsys.readouterr().out)["prompt_tokens"])
    assert outputs[0] > outputs[1]


def test_mistakes_in_ask(checkpoint, image, tmp_path, capsys):
    (tmp_path / "text.jpg").write_text("no image")
    asked = [str(image), "What?"]
    assert "missing.png" in refusal(capsys, "ask", str(checkpoint), "missing.png", "What?")
    assert "text.jpg" in refusal(capsys, "ask", str(checkpoint), str(tmp_path / "text.jpg"), "What?")
    assert "no config.json" in refusal(capsys, "ask", str(tmp_path), *asked)
    assert "no folder 'nowhere'" in refusal(capsys, "ask", "nowhere", *asked)
    assert "2 times" in refusal(capsys, "ask", str(checkpoint), str(image), "<image> <image>")
    assert "'toaster'" in refusal(capsys, "ask", str(checkpoint), *asked, "--device", "toaster")


def test_image_is_read_before_the_model(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("convllava_hf.inference.load", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    refusal(capsys, "ask", str(checkpoint), "missing.png", "What?")
    refusal(capsys, "chat", str(checkpoint), "--image", "missing.png")


# --- chatting


def chat(capsys, monkeypatch, lines: list[str], *argv: str) -> tuple[list[str], str]:
    """Lines of standard output and the whole of standard error after these lines of input."""
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
    assert cli.main(["chat", *argv, *EXACT]) == 0
    captured = capsys.readouterr()
    return captured.out.splitlines(), captured.err


def test_chat_remembers(checkpoint, image, capsys, monkeypatch):
    from convllava_hf.inference import Assistant, assistant_turn, open_image, system_turn, user_turn

    answer, asked, answered = Assistant.answer, [], []

    def recording(self, messages, **kwargs):
        asked.append(messages)
        answered.append(answer(self, messages, **kwargs).text)
        return answer(self, messages, max_new_tokens=24)

    monkeypatch.setattr(Assistant, "answer", recording)
    argv = [str(checkpoint), "--image", str(image), "--system", "Be brief."]
    output, _ = chat(capsys, monkeypatch, ["Describe it.", f"/image {image}", "And this?", "Why?"], *argv)
    shown = open_image(image)
    expected = [
        system_turn("Be brief."),
        user_turn("Describe it.", [shown]),
        assistant_turn(answered[0]),
        user_turn("And this?", [shown]),
        assistant_turn(answered[1]),
        user_turn("Why?"),
    ]
    assert asked == [expected[:2], expected[:4], expected]
    assert output == "".join(text + "\n" for text in answered).splitlines()


def test_chat_commands(checkpoint, image, capsys, monkeypatch):
    answers = {}
    for name, lines in {
        "image": [f"/image {image}", "What?"],
        "text": ["What?"],
        "reset": [f"/image {image}", "What?", "/reset", "What?"],
        "reset before asking": [f"/image {image}", "/reset", "What?"],
        "quit": ["What?", "/quit", "What?"],
        "blank lines": ["", "  ", "What?"],
        "typo": ["/imagine", "What?"],
        "bad images": ["/image missing.png", "/image", "What?"],
        "wrong number": ["What is <image>?", "What?"],
    }.items():
        answers[name], errors = chat(capsys, monkeypatch, lines, str(checkpoint))
        expected = {"typo": "/imagine", "bad images": "missing.png", "wrong number": "1 times"}.get(name, "")
        assert expected in errors
        assert errors.count("\n") == {"bad images": 2, "typo": 1, "wrong number": 1}.get(name, 0)
    text = answers["text"]
    assert answers["image"] != text
    assert answers["reset"] == answers["image"] + text
    for name in ("reset before asking", "quit", "blank lines", "typo", "bad images", "wrong number"):
        assert answers[name] == text
    output, _ = chat(capsys, monkeypatch, ["/help"], str(checkpoint))
    assert "/image PATH" in output[0]


def test_chat_goes_on_after_images_of_every_broken_kind(checkpoint, capsys, monkeypatch, tmp_path):
    """Also after those that only turning or converting finds; EXIF that is broken hides no image."""
    os.mkfifo(tmp_path / "pipe.png")
    Image.fromarray(np.linspace(0, 3, 64**2, dtype=np.float32).reshape(64, 64)).save(tmp_path / "bright.tif")
    (tmp_path / "drawing.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    (tmp_path / "exif.jpg").write_bytes(image_with_broken_exif())
    bad = [f"/image {tmp_path / name}" for name in ("pipe.png", "bright.tif", "drawing.jpg")]
    text, _ = chat(capsys, monkeypatch, ["What?"], str(checkpoint))
    output, errors = chat(capsys, monkeypatch, [*bad, "What?"], str(checkpoint))
    assert output == text and errors.count("\n") == 3
    shown, errors = chat(capsys, monkeypatch, [f"/image {tmp_path / 'exif.jpg'}", "What?"], str(checkpoint))
    assert shown != text and not errors


def test_interrupted_answer_is_forgotten_and_the_chat_goes_on(checkpoint, capsys, monkeypatch):
    from convllava_hf.inference import Assistant

    alone, _ = chat(capsys, monkeypatch, ["What?"], str(checkpoint))
    answer, calls = Assistant.answer, []

    def interrupt_the_first(self, messages, **kwargs):
        calls.append(messages)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return answer(self, messages, **kwargs)

    monkeypatch.setattr(Assistant, "answer", interrupt_the_first)
    output, errors = chat(capsys, monkeypatch, ["Who?", "What?"], str(checkpoint))
    assert output == ["", *alone]
    assert "Interrupted" in errors


# --- converting and assembling


def test_convert_refuses_what_is_there_and_overwrites_when_told(golden, tmp_path, capsys):
    source, output = str(golden / "checkpoint-init"), str(tmp_path / "model")
    assert cli.main(["convert", source, output, "--dtype", "bfloat16"]) == 0
    assert output in capsys.readouterr().out
    assert output in refusal(capsys, "convert", source, output)
    assert cli.main(["convert", source, output, "--overwrite"]) == 0


def test_convert_refuses_what_is_no_original_checkpoint(checkpoint, tmp_path, capsys):
    output = str(tmp_path / "model")
    refusal(capsys, "convert", str(tmp_path / "nowhere"), output)
    refusal(capsys, "convert", str(checkpoint), output)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("name", ["convert_checkpoint", "assemble"])
def test_options_reach_the_functions(name, monkeypatch, tmp_path):
    """Every option of the two commands, at a value that is not its default."""
    seen = {}
    monkeypatch.setattr(f"convllava_hf.convert.{name}", lambda *args, **kwargs: seen.update(args=args, **kwargs))
    if name == "assemble":
        options = {"resolution": 768, "extra_stage_depth": 0, "extra_stage_width": 96, "dtype": "float32", "seed": 7}
        options |= {"vision": "tower", "text": "llm", "chat_template": "chat.jinja"}
        argv, positional = ["assemble", "out"], ("out",)
    else:
        options = {"vision_tower": "tower", "dtype": "float16", "max_shard_size": "1GB"}
        argv, positional = ["convert", "in", "out"], ("in", "out")
    for option, value in options.items():
        argv += ["--" + option.replace("_", "-"), str(value)]
    assert cli.main([*argv, "--overwrite"]) == 0
    assert seen.pop("progress") == sys.stderr.isatty()
    assert seen == {"args": positional, "overwrite": True, **options}


# --- quickstart


def test_quickstart_needs_its_extra(capsys, monkeypatch, tmp_path):
    pytest.importorskip("trl")
    find = cli.quickstart.find_spec
    monkeypatch.setattr(cli.quickstart, "find_spec", lambda name: None if name == "sklearn" else find(name))
    assert "pip install 'convllava-hf[quickstart]'" in refusal(capsys, "quickstart", "--output", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_quickstart_leaves_other_folders_alone(capsys, tmp_path):
    pytest.importorskip("trl")
    pytest.importorskip("sklearn")
    (tmp_path / "mine.txt").write_text("mine")
    assert "is not empty" in refusal(capsys, "quickstart", "--output", str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_the_quickstart_refuses_a_gpu_that_is_not_there_or_not_used(capsys, monkeypatch, tmp_path):
    pytest.importorskip("trl")
    pytest.importorskip("sklearn")
    monkeypatch.setattr("torch.empty", _no_gpu)
    message = refusal(capsys, "quickstart", "--device", "cuda", "--output", str(tmp_path / "run"))
    assert "The device 'cuda' cannot be used: no GPU" in message and not (tmp_path / "run").exists()
    message = refusal(capsys, "quickstart", "--findings", "--device", "cuda", "--output", str(tmp_path / "run"))
    assert "--device cuda does not go with --findings" in message


def _no_gpu(*args, **kwargs):
    raise RuntimeError("no GPU")


def test_findings_and_the_quickstart_stay_apart(capsys, tmp_path):
    """A folder with a run of the one is refused by the other, with what it holds."""
    pytest.importorskip("trl")
    pytest.importorskip("sklearn")
    from convllava_hf.miniature.findings import open_findings

    open_findings(tmp_path / "run", seed=3)
    message = refusal(capsys, "quickstart", "--seed", "3", "--output", str(tmp_path / "run"))
    assert "holds a run with" in message and "'findings': True" in message
    message = refusal(capsys, "quickstart", "--findings", "--seed", "4", "--output", str(tmp_path / "run"))
    assert "'seed': 3" in message and "'seed': 4" in message


@pytest.mark.parametrize("gradio", [True, False])
def test_quickstart_ends_with_commands_that_can_be_typed(monkeypatch, tmp_path, gradio):
    """In a fresh environment too, where its own extra brings no web page."""
    monkeypatch.setattr(sys, "argv", [".venv/bin/convllava", "quickstart"])
    monkeypatch.setattr(cli.quickstart, "find_spec", lambda name: gradio or None)
    results = {"samples": [{"image": "samples/00.png", "question": "What is it?"}]}
    ask, *install, demo = map(shlex.split, cli.quickstart._next_commands(tmp_path, results))
    for command in (ask, demo):
        assert command.pop(0) == ".venv/bin/convllava"
        assert cli.build_parser().parse_args(command).command == command[0]
    assert ask[1:] == [f"{tmp_path}/model", f"{tmp_path}/samples/00.png", "What is it?"]
    assert install == ([] if gradio else [[sys.executable, "-m", "pip", "install", "convllava-hf[demo]"]])


SPEAKS_FIRST = """
import sys

sys.argv = ["convllava", *sys.argv[1:]]
from convllava_hf import cli
from convllava_hf.miniature import findings, quickstart

large = {"torch", "transformers.modeling_utils"}
findings.run_ablations = quickstart.quickstart = lambda run, **options: sys.exit(str(large & set(sys.modules)))
cli.main(["quickstart", *sys.argv[1:]])
"""


@pytest.mark.parametrize("options", [[], ["--findings"]])
def test_quickstart_speaks_before_it_imports_anything_large(tmp_path, options):
    pytest.importorskip("trl")
    pytest.importorskip("sklearn")
    command = [sys.executable, "-c", SPEAKS_FIRST, "--output", tmp_path / "run", *options]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert process.stdout.rstrip().endswith("the same command resumes it.") and process.stderr.strip() == "set()"


# --- the frame


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConvLlavaError("one\nand two"), "one and two"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.txt"), "No such file or directory: a.txt"),
        (FileExistsError("out exists"), "out exists"),
        (PermissionError(errno.EACCES, "Permission denied", "a.txt"), "Permission denied: a.txt"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(error, said, capsys, monkeypatch):
    assert said in refusal_of(error, capsys, monkeypatch)


@pytest.mark.parametrize("error", [ValueError("x"), RuntimeError("x"), KeyError("x"), OSError("x"), TypeError("x")])
def test_faults_of_the_program_keep_their_traceback(error, capsys, monkeypatch):
    with pytest.raises(type(error)):
        refusal_of(error, capsys, monkeypatch)


def refusal_of(error: Exception, capsys, monkeypatch) -> str:
    def fail(args):
        raise error

    monkeypatch.setattr(cli.quickstart, "run", fail)
    return refusal(capsys, "quickstart")


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["sing"],
        ["ask", "model"],
        ["ask", "m", "i", "q", "--max-new-tokens", "0"],
        ["ask", "m", "i", "q", "--temperature", "-1"],
        ["ask", "m", "i", "q", "--temperature", "nan"],
        ["ask", "m", "i", "q", "--dtype", "int3"],
        ["assemble", "out", "--vision", "v", "--text", "t", "--extra-stage-depth", "-1"],
    ],
)
def test_arguments_that_argparse_refuses(argv, capsys):
    with pytest.raises(SystemExit) as exited:
        cli.main(argv)
    assert exited.value.code == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize("command", cli.COMMANDS, ids=lambda command: command.__name__.rsplit(".", 1)[-1])
def test_every_command_has_help(command, capsys):
    name = command.__name__.rsplit(".", 1)[-1]
    if name == "train":  # its help is made by the libraries that it needs
        for library in ("trl", "peft", "datasets", "matplotlib"):
            pytest.importorskip(library)
    with pytest.raises(SystemExit) as exited:
        cli.main([name, "--help"])
    assert exited.value.code == 0
    assert f"convllava {name}" in capsys.readouterr().out


def test_help_and_version_do_not_wait_for_torch():
    code = "import sys; sys.argv[0] = 'convllava'; from convllava_hf.cli import main; main()"
    for starter in ([sys.executable, "-m", "convllava_hf"], [sys.executable, "-c", code]):
        imports = subprocess.run(
            [starter[0], "-X", "importtime", *starter[1:], "--help"], capture_output=True, text=True, check=True
        )
        assert "usage: convllava" in imports.stdout
        loaded = {line.rsplit("|", 1)[-1].strip() for line in imports.stderr.splitlines()}
        assert "argparse" in loaded
        assert not {"torch", "transformers", "PIL", "numpy"} & loaded


def test_version():
    from convllava_hf import __version__

    process = subprocess.run([sys.executable, "-m", "convllava_hf", "--version"], capture_output=True, text=True)
    assert process.stdout == f"convllava {__version__}\n"


@pytest.mark.slow
def test_process_says_one_line_and_exits_2(tmp_path):
    process = fork_server.run([sys.executable, "-m", "convllava_hf", "ask", tmp_path, "missing.png", "What?"])
    assert process.returncode == 2
    assert process.stdout == ""
    assert [line for line in process.stderr.splitlines() if "convllava" in line] == [
        f"convllava: error: '{tmp_path}' is not a checkpoint: the folder has no config.json."
    ]
    assert "Traceback" not in process.stderr


@pytest.mark.slow
def test_ctrl_c_at_the_prompt_ends_without_a_traceback(checkpoint):
    process = fork_server.start(
        [sys.executable, "-m", "convllava_hf", "chat", checkpoint, *EXACT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdin.write("/help\n")
    process.stdin.flush()
    assert process.stdout.readline().startswith("/image")  # it is up and reading
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors


@pytest.mark.slow
def test_reader_that_goes_away_is_no_error(checkpoint, image):
    read, write = os.pipe()
    os.close(read)
    process = fork_server.start(
        [sys.executable, "-m", "convllava_hf", "ask", checkpoint, image, "What?", *EXACT],
        stdout=write,
        stderr=subprocess.PIPE,
    )
    os.close(write)
    _, errors = process.communicate()
    assert process.returncode == 141
    assert "Traceback" not in errors
    assert "Exception ignored" not in errors
