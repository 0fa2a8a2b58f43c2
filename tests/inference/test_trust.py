"""A stranger's checkpoint: no command runs its code, and none asks whether to, unless --trust-remote-code is given."""

import builtins
import contextlib
import json
import sys
from pathlib import Path

import pytest
from helpers.hostile import PLACES, Hostile, generation, tokenizer


for name in ("trl", "datasets", "rapidfuzz", "scipy"):
    pytest.importorskip(name)

from helpers.benchmark_data import make  # noqa: E402
from helpers.paths import GOLDEN  # noqa: E402
from helpers.tiny_models import make_image  # noqa: E402
from helpers.training_runs import RECIPES, arguments_of, run  # noqa: E402

from convllava_hf import cli  # noqa: E402
from convllava_hf.convert import assemble  # noqa: E402
from convllava_hf.errors import ConvLlavaError  # noqa: E402
from convllava_hf.inference import load, user_turn  # noqa: E402
from convllava_hf.inference.trust import foreign_code  # noqa: E402


ANSWER = ["--max-new-tokens", "1", "--device", "cpu", "--dtype", "float32"]
TRAIN = {"max_steps": 1, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "save_strategy": "no"}


@pytest.fixture
def terminal(monkeypatch, tmp_path) -> list[str]:
    """A terminal at which somebody says yes to whatever is asked; the questions. `chat` gets one line."""
    asked: list[str] = []

    def answer(prompt: str = "") -> str:
        asked.append(prompt)
        if prompt == "> ":
            if asked.count("> ") > 1:
                raise EOFError
            return "What is this?"
        return "y"

    monkeypatch.setattr(builtins, "input", answer)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    loaded = _dynamic_modules()
    for name in loaded:
        del sys.modules[name]
    yield asked
    for name in _dynamic_modules():
        del sys.modules[name]
    sys.modules.update(loaded)


def _dynamic_modules() -> dict:
    """The modules that came with checkpoints: what other tests load is not to come from a folder of this one."""
    return {name: one for name, one in sys.modules.items() if name.partition(".")[0] == "transformers_modules"}


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("benchmark")
    make("pope", folder / "pope")
    return folder / "pope"


@pytest.fixture
def served(monkeypatch) -> list[str]:
    """The demo, as far as its page: the models that were loaded for it."""
    loaded: list[str] = []

    @contextlib.contextmanager
    def page_of(assistant, name, **settings):
        loaded.append(name)
        yield "http://127.0.0.1/"

    monkeypatch.setattr("convllava_hf.demo.serving.page_of", page_of)
    monkeypatch.setattr("convllava_hf.demo.serving.require_gradio", lambda: None)
    monkeypatch.setattr("convllava_hf.demo.serving._wait_for_the_end", lambda: None)
    return loaded


def commands(model: Path, folder: Path, benchmark: Path) -> dict[str, list]:
    """Every command that takes a checkpoint, but `push`, which loads it in a process of its own."""
    data = [GOLDEN / "conversations.json", "--images", GOLDEN / "images", "--model", model]
    photo = GOLDEN / "images" / "photo.jpg"
    output = folder / "evaluation"
    return {
        "ask": ["ask", model, photo, "What is this?", *ANSWER],
        "chat": ["chat", model, "--image", photo, *ANSWER],
        "demo": ["demo", model, *ANSWER],
        "eval": ["eval", model, "--benchmark", "pope", "--data", benchmark, "--limit", "1", "--output", output],
        "data check": ["data", "check", *data, "--workers", "1"],
        "data inspect": ["data", "inspect", *data, "--index", "0"],
        "profile": ["profile", model, "--sizes", "64x64", "--new-tokens", "1", "--repeats", "1", "--device", "cpu"],
        "train": ["train", *arguments_of(RECIPES / "stage1_projector.yaml", model, folder / "trained", **TRAIN)],
        "lora": ["train", *arguments_of(RECIPES / "lora.yaml", model, folder / "adapted", **TRAIN)],
        "convert": ["convert", model, folder / "converted"],
        "assemble": ["assemble", folder / "assembled", "--text", model, "--vision", model],
    }


# Those that every command loads nevertheless, which takes ten seconds.
LOADED = ("own_code", "processor", "auto_maps")


@pytest.mark.parametrize(
    "place", [pytest.param(place, marks=pytest.mark.slow if place in LOADED else ()) for place in PLACES]
)
def test_no_command_runs_a_checkpoint_s_code(
    place, converted_checkpoint, benchmark, served, terminal, tmp_path, capsys
):
    one = Hostile(tmp_path / "model", converted_checkpoint("stage3"), tmp_path / "RAN")
    PLACES[place](one)
    for name, words in commands(one.folder, tmp_path, benchmark).items():
        code = cli.main(list(map(str, words)))  # whatever it raises fails the test: that would be a traceback
        said = capsys.readouterr().err.strip().splitlines()
        assert one.ran == "", name
        assert code in (0, 1, 2), name
        assert code != 2 or said[-1].startswith("convllava: error: "), name
    assert set(terminal) <= {"> "}


@pytest.mark.parametrize("name", ["ask", "train", "data inspect"])
def test_the_flag_runs_it(name, converted_checkpoint, benchmark, served, terminal, tmp_path, capsys):
    one = Hostile(tmp_path / "model", converted_checkpoint("stage3"), tmp_path / "RAN")
    tokenizer(one)
    words = list(map(str, commands(one.folder, tmp_path, benchmark)[name]))
    assert cli.main(words) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "evil_tokenizer.Evil in tokenizer_config.json" in message and "--trust-remote-code" in message
    assert cli.main([*words, "--trust-remote-code"]) == 0
    assert "evil_tokenizer" in one.ran
    assert set(terminal) <= {"> "}


def test_the_flag_takes_the_checkpoint_s_generate(converted_checkpoint, terminal, tmp_path):
    one = Hostile(tmp_path / "model", converted_checkpoint("stage3"), tmp_path / "RAN")
    generation(one)
    messages = [user_turn("What is this?", [make_image()])]
    with pytest.raises(ConvLlavaError, match="custom_generate/generate.py"):
        load(one.folder, device="cpu", dtype="float32")
    assert one.ran == ""
    trusting = load(one.folder, device="cpu", dtype="float32", trust_remote_code=True)
    with pytest.raises(SystemExit):
        trusting.answer(messages, max_new_tokens=1)
    assert "custom_generate" in one.ran


def test_with_the_flag_an_ordinary_checkpoint_answers_as_without(checkpoint):
    messages = [user_turn("What is this?", [make_image()])]
    answers = [
        load(checkpoint, device="cpu", dtype="float32", trust_remote_code=trust).answer(messages, max_new_tokens=8)
        for trust in (False, True)
    ]
    assert answers[0].token_ids == answers[1].token_ids


def test_what_was_left_aside_is_named(converted_checkpoint, tmp_path, caplog):
    one = Hostile(tmp_path / "model", converted_checkpoint("stage3"), tmp_path / "RAN")
    assert foreign_code(one.folder) == []
    PLACES["processor"](one)
    load(one.folder, device="cpu", dtype="float32")
    assert "evil_processor.Evil in processor_config.json" in caplog.text and "--trust-remote-code" in caplog.text


@pytest.mark.parametrize("place", ["generate", "attention"])
def test_what_transformers_runs_unasked_is_refused_of_a_language_model_too(place, tmp_path):
    from helpers.tiny_models import make_language_model, make_tower

    folder, tower = make_language_model(tmp_path / "text"), make_tower(tmp_path / "tower")
    if place == "generate":
        (folder / "custom_generate").mkdir()
        (folder / "custom_generate" / "generate.py").write_text("raise SystemExit(3)\n")
    else:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "attn_implementation": "evil/kernel"}))
    with pytest.raises(ConvLlavaError, match="which is (code on the Hub and is )?not run"):
        assemble(tmp_path / "out", vision=tower, text=folder, progress=False)


@pytest.mark.parametrize("part", ["model", "tokenizer"])
def test_a_language_model_with_code_of_its_own_is_not_assembled(part, tmp_path, terminal):
    from helpers.tiny_models import make_language_model, make_tower

    folder, tower = tmp_path / "text", tmp_path / "tower"
    make_language_model(folder)
    make_tower(tower)
    marker = tmp_path / "RAN"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'a').write('evil')\n")
    name = "config.json" if part == "model" else "tokenizer_config.json"
    values = json.loads((folder / name).read_text())
    if part == "model":
        values |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}
    else:
        values |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": [None, "evil.Evil"]}}
    (folder / name).write_text(json.dumps(values))
    with pytest.raises(ConvLlavaError, match="evil.Evil in .*not run"):
        assemble(tmp_path / "out", vision=tower, text=folder, progress=False)
    assert not marker.exists() and terminal == []


# --- recipes


def test_no_recipe_trusts_by_itself():
    for path in RECIPES.parent.rglob("*.yaml"):
        assert "\ntrust_remote_code: true" not in path.read_text(), path


@pytest.mark.slow
def test_states_that_run_code_are_not_resumed_from(converted_checkpoint, tmp_path, terminal):
    start, recipe = converted_checkpoint("stage3"), RECIPES / "stage1_projector.yaml"
    run(recipe, start, tmp_path / "out", **{**TRAIN, "save_strategy": "steps", "save_steps": 1})
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        one = Hostile(tmp_path / name / "checkpoint-1", tmp_path / "out" / "checkpoint-1", tmp_path / "RAN")
        one.pickle(name)
        one.pickle("training_args.bin")
        with pytest.raises(ConvLlavaError, match="holds more than tensors and numbers"):
            run(recipe, start, tmp_path / "more", **{**TRAIN, "max_steps": 2}, resume_from_checkpoint=one.folder)
        assert one.ran == "", name


@pytest.mark.parametrize("name", ["pytorch_model_fsdp_0/.metadata", "global_step1/mp_rank_00_model_states.pt"])
def test_sharded_states_of_another_run_are_not_read(name, tmp_path):
    from convllava_hf.training.resuming import check_pickles

    state = tmp_path / "out" / "checkpoint-1" / name
    state.parent.mkdir(parents=True)
    state.write_bytes(b"")
    check_pickles(tmp_path / "out" / "checkpoint-1", tmp_path / "out")
    with pytest.raises(ConvLlavaError, match=f"holds {name.partition('/')[0]}.*--trust_remote_code"):
        check_pickles(tmp_path / "out" / "checkpoint-1", tmp_path / "other")
