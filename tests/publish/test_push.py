"""`convllava push` from end to end: checked as a stranger would use it, published, loaded by id in a fresh process."""

import base64
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import types

import pytest
from helpers import fork_server
from helpers.fresh_process import ANSWERS, fresh_environment, run_fresh
from helpers.hostile import Hostile, own_code, tokenizer
from helpers.paths import TESTS
from helpers.publishing import own_hub
from helpers.tiny_models import ask, make_image
from PIL import Image

from convllava_hf import cli
from convllava_hf.errors import ConvLlavaError
from convllava_hf.publish import About, preflight, push


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forked_checks")]

REPO = "user/tiny"
QUESTION = "What is on the sign?"
NAME = "AutoModelForImageTextToText"
MIT = About(license="mit")
OTHER = os.environ.get("CONVLLAVA_OTHER_PYTHON")
# The other python's huggingface_hub is of another major version.
PYTHONS = [sys.executable, pytest.param(OTHER, marks=pytest.mark.skipif(not OTHER, reason="no other python"))]


@pytest.fixture
def forked_checks(monkeypatch):
    """The check before publishing is forked, and not a Python that imports transformers anew."""
    monkeypatch.setattr(preflight, "subprocess", types.SimpleNamespace(run=fork_server.run))


@pytest.fixture
def hub(monkeypatch):
    with own_hub(monkeypatch) as hub:
        yield hub


@pytest.fixture
def command(capsys):
    """Runs the command line; returns exit code, stdout and stderr."""

    def run(*arguments):
        code = cli.main(["push", *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def unasked(monkeypatch):
    """The model is not loaded for the check: for tests of what happens around it."""
    module = sys.modules["convllava_hf.publish.push"]
    monkeypatch.setattr(
        module, "run_smoke_test", lambda staged, shown, token=None, trust=False: ["A sign."] * max(1, len(shown))
    )


# The command line, without asking the model first.
UNASKED = """
import sys
from convllava_hf.cli import main
from convllava_hf.publish import push
sys.modules[push.__module__].run_smoke_test = lambda *_: ["A sign."]
sys.exit(main())
"""


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("image") / "my-holiday.jpg"
    exif = Image.Exif()
    exif[0x010E] = "taken at home"
    make_image(seed=3).save(path, exif=exif)
    return path


@pytest.fixture(scope="module")
def expected(model, processor, image):
    inputs = processor.apply_chat_template(
        ask(QUESTION, str(image)), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    return ids[0, inputs["input_ids"].shape[1] :].tolist()


def fresh_hub_environment(hub) -> dict:
    return {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": None, "HF_TOKEN": None}


@pytest.mark.parametrize("python", PYTHONS)
def test_what_is_pushed_is_loaded_by_id_without_the_package(
    hub, command, checkpoint, image, expected, tmp_path, python, monkeypatch
):
    monkeypatch.setattr(preflight, "subprocess", subprocess)  # as it is for those who publish
    results = tmp_path / "textvqa.json"
    results.write_text(json.dumps({"benchmark": "TextVQA", "metric": "accuracy", "score": 1.5, "dataset": "a/b"}))
    arguments = (checkpoint, REPO, "--license", "mit", "--results", results, "--example", image, QUESTION)
    code, out, _ = command(*arguments)
    # Beside the checkpoint's own: README.md, handler.py, requirements.txt and the image.
    assert code == 0 and f"Published {len(list(checkpoint.iterdir())) + 4} files" in out, out
    files = hub.files(REPO)
    assert hub.titles(REPO) == [f"Publish {checkpoint.name} (convllava push)", "initial commit"]
    assert {"README.md", "handler.py", "requirements.txt", "examples/example-1.jpg"} <= set(files)
    assert b"taken at home" not in files["examples/example-1.jpg"] and b"holiday" not in files["README.md"]
    assert b"| TextVQA | accuracy | 1.5 | a/b |" in files["README.md"]
    for path in checkpoint.iterdir():
        if path.suffix in (".safetensors", ".py", ".jinja"):
            assert files[path.name] == path.read_bytes()
    found = run_fresh(
        ANSWERS + "result = answers('user/tiny', [values['name'], 'AutoModel'], trust_remote_code=True)",
        env=fresh_hub_environment(hub),
        python=python,
        image=image,
        question=QUESTION,
        name=NAME,
    )
    assert found[NAME]["ids"] == expected
    assert found[NAME]["module"].startswith("transformers_modules.user.tiny.")
    assert command(*arguments)[1] == f"{REPO} holds all of it already.\n"


@pytest.mark.parametrize("python", PYTHONS)
def test_the_cards_own_code_runs(hub, checkpoint, image, tmp_path, python):
    card = push(checkpoint, REPO, about=MIT).card
    blocks = re.findall(r"```python\n(.*?)```", card, re.S)
    script = "import os, contextlib, io\nresult = []\nos.chdir(values['folder'])\n"
    for number in range(len(blocks)):
        script += f"with contextlib.redirect_stdout(io.StringIO()) as out:\n    exec(values['block{number}'], {{}})\n"
        script += "result.append(out.getvalue())\n"
    shutil.copy(image, tmp_path / "photo.jpg")
    values = {f"block{number}": block.replace("200", "8") for number, block in enumerate(blocks)}
    printed = run_fresh(script, env=fresh_hub_environment(hub), python=python, folder=tmp_path, **values)
    assert len(printed) == 2 and all(text.strip() for text in printed)


def test_a_lora_adapter_is_pushed_and_loaded_by_id(hub, checkpoint, image, tmp_path, processor, expected):
    peft = pytest.importorskip("peft")
    import torch
    from transformers import AutoModelForImageTextToText

    push(checkpoint, "user/base", about=MIT)
    code = hub.files("user/base")["modeling_convllava.py"]
    traced = f"open({str(tmp_path / 'RAN')!r}, 'a').write('base')\n".encode() + code
    hub.commit("user/base", "main", {"modeling_convllava.py": traced}, [], title="By somebody else")
    config = peft.LoraConfig(
        r=4,
        target_modules=r".*language_model.*\.(q|v)_proj",
        modules_to_save=["multi_modal_projector"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(1)
    adapted = peft.get_peft_model(AutoModelForImageTextToText.from_pretrained(checkpoint), config).eval()
    adapted.base_model.model.model.multi_modal_projector.modules_to_save["default"].linear_2.weight.data *= 1.5
    folder = tmp_path / "adapter"
    adapted.save_pretrained(folder)
    processor.save_pretrained(folder)
    with pytest.raises(ConvLlavaError, match="--base-model"):
        push(folder, REPO, about=MIT)
    pushed = push(folder, REPO, about=MIT, base_model="user/base", examples=[(image, QUESTION)])
    assert "adapter_model.safetensors" in pushed.files and "model.safetensors" not in pushed.files
    assert not (tmp_path / "RAN").exists()  # the base model's repository is not ours
    inputs = processor.apply_chat_template(
        ask(QUESTION, str(image)), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids = adapted.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
    assert ids != expected
    code = re.search(r"```python\n(.*?)```", pushed.card, re.S)[1]
    shutil.copy(image, tmp_path / "photo.jpg")
    found = run_fresh(
        "import os\nos.chdir(values['folder'])\nspace = {}\nexec(values['code'], space)\n"
        "result = space['output'][0, space['inputs']['input_ids'].shape[1] :].tolist()",
        env=fresh_hub_environment(hub),
        folder=tmp_path,
        code=code.replace("max_new_tokens=200", "max_new_tokens=16, do_sample=False").replace(
            "What is in the image?", QUESTION
        ),
    )
    assert found == ids
    published = tmp_path / "published"
    published.mkdir()
    for name, content in hub.files(REPO).items():
        (published / name).parent.mkdir(exist_ok=True)
        (published / name).write_bytes(content)
    encoded = base64.b64encode(image.read_bytes()).decode()
    answer = run_fresh(
        "sys.path.append(values['tests'])\nfrom helpers.handler_loading import load_handler\n"
        "result = load_handler(values['folder'])(values['request'])",
        env=fresh_hub_environment(hub),
        folder=published,
        tests=TESTS,
        request={"inputs": {"image": encoded, "question": QUESTION}, "parameters": {"max_new_tokens": 16}},
    )
    assert answer.get("generated_text") == processor.decode(ids, skip_special_tokens=True), answer


def test_an_upload_that_was_killed_is_repeated(hub, wide_checkpoint, checkpoint, tmp_path):
    """Killed when one of the large files has arrived: nothing is visible, and that one is not sent again."""
    source = tmp_path / "wide"
    shutil.copytree(wide_checkpoint, source)
    for path in checkpoint.iterdir():
        if not (source / path.name).exists():
            shutil.copy(path, source)
    reached, killed, sent = threading.Event(), threading.Event(), itertools.count()

    def hang(method, path):
        if method == "PUT" and next(sent):  # not the first, however many are sent at the same time
            while not hub.uploads and not killed.wait(0.01):
                pass
            reached.set()
            killed.wait(120)

    hub.fault = hang
    command = [sys.executable, "-c", UNASKED, "push", str(source), REPO, "--license", "mit", "--max-shard-size", "1MB"]
    environment = fresh_environment(tmp_path / "home", **{**fresh_hub_environment(hub), "HF_TOKEN": "hf_writer"})
    process = fork_server.start(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    came_so_far = reached.wait(120)
    process.send_signal(signal.SIGKILL)
    said = process.communicate()[0]
    arrived = list(hub.uploads)
    killed.set()
    assert came_so_far, said
    hub.fault = lambda method, path: None
    assert hub.files(REPO) == {} and arrived
    again = fork_server.run(command, env=environment, timeout=240)
    assert again.returncode == 0, again.stderr[-2000:]
    shards = [name for name in hub.files(REPO) if name.endswith(".safetensors")]
    assert len(shards) > len(arrived) and len(hub.uploads) == len(set(hub.uploads)) == len(shards)


def test_a_checkpoint_s_own_code_is_not_run(hub, checkpoint, tmp_path):
    one = Hostile(tmp_path / "model", checkpoint, tmp_path / "RAN")
    own_code(one)
    pushed = push(one.folder, REPO, about=MIT, dry_run=True)
    assert one.ran == "" and pushed.files
    push(one.folder, REPO, about=MIT, dry_run=True, trust_remote_code=True)
    assert "modeling_convllava" in one.ran
    tokenizer(one)
    with pytest.raises(ConvLlavaError, match=r"evil_tokenizer\.py.*--trust-remote-code"):
        push(one.folder, REPO, about=MIT, dry_run=True)


def _break(folder, name, old, new):
    text = (folder / name).read_text()
    assert old in text
    (folder / name).write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: _break(folder, "modeling_convllava.py", "import copy", "import convllava_hf"), "convllava_hf"),
        (lambda folder: _break(folder, "chat_template.jinja", "{%", "{% nonsense %}{%"), "nonsense"),
        (lambda folder: _drop_weight(folder), "missing_keys"),
    ],
)
def test_a_model_that_a_stranger_cannot_use_is_not_published(hub, checkpoint, tmp_path, damage, message):
    folder = tmp_path / "broken"
    shutil.copytree(checkpoint, folder)
    damage(folder)
    with pytest.raises(ConvLlavaError, match=f"Not published, since in a fresh process.*{message}"):
        push(folder, REPO, about=MIT, trust_remote_code=True)  # so that changed code is not replaced
    assert REPO not in hub.commits and not hub.uploads


def _drop_weight(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights.pop("model.multi_modal_projector.linear_1.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_the_stranger_has_no_token_and_no_hub(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    environment = preflight._smoke_test_environment(tmp_path, online=False, token="hf_secret")
    assert "hf_secret" not in environment.values() and environment["HF_HUB_OFFLINE"] == "1"
    assert preflight._smoke_test_environment(tmp_path, online=True, token="hf_secret")["HF_TOKEN"] == "hf_secret"


def test_a_dry_run_shows_everything_and_asks_the_hub_nothing(hub, command, checkpoint, image, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    asked = []
    hub.fault = lambda method, path: asked.append(path)
    code, out, _ = command(checkpoint, REPO, "--license", "mit", "--dry-run", "--example", image, QUESTION)
    assert code == 0 and not asked and REPO not in hub.commits
    assert re.search(r"[\d.]+ kB  model.safetensors", out) and "pipeline_tag: image-text-to-text" in out
    assert f"**{QUESTION}**" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "needs a license"),
        (("--license", "mit", "--token", "hf_typed"), "environment or login"),
        (("--license", "mit", "--create-pr", "--revision", "v2"), "leave out"),
        (("--license", "mit", "--results", "missing.json"), "missing.json"),
        (("--license", "mit", "--example", "missing.jpg", "What?"), "missing.jpg"),
        (("--license", "mit", "--max-shard-size", "big"), "max_shard_size"),
    ],
)
def test_mistakes_are_one_line(hub, command, checkpoint, arguments, message):
    code, _, err = command(checkpoint, REPO, *arguments)
    assert code == 2 and message in err and "hf_typed" not in err
    assert err.count("convllava: error:") == 1 and REPO not in hub.commits


def test_without_a_token_nothing_is_loaded(hub, command, checkpoint, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    module = sys.modules["convllava_hf.publish.push"]
    monkeypatch.setattr(module, "run_smoke_test", lambda *_: pytest.fail("The model was loaded"))
    code, _, err = command(checkpoint, REPO, "--license", "mit")
    assert code == 2 and "hf auth login" in err and REPO not in hub.commits


def test_a_conflict_and_force_from_the_command_line(hub, command, checkpoint, unasked):
    assert command(checkpoint, REPO, "--license", "mit")[0] == 0
    hub.commit(REPO, "main", {"README.md": b"By hand."}, [], title="Update README.md")
    code, _, err = command(checkpoint, REPO, "--license", "mit")
    assert code == 2 and "README.md" in err and "--force" in err
    assert hub.files(REPO)["README.md"] == b"By hand."
    assert command(checkpoint, REPO, "--license", "mit", "--force")[0] == 0
    assert hub.files(REPO)["README.md"].startswith(b"---\n")


def test_a_branch_and_a_pull_request_leave_main_alone(hub, command, checkpoint, unasked):
    assert command(checkpoint, REPO, "--license", "mit")[0] == 0
    before = hub.files(REPO)
    assert command(checkpoint, REPO, "--license", "apache-2.0", "--revision", "v2")[0] == 0
    assert command(checkpoint, REPO, "--license", "gpl", "--create-pr")[1].strip().endswith("/discussions/1")
    assert hub.files(REPO) == before
    for revision, license in {"v2": b"apache-2.0", "refs/pr/1": b"gpl"}.items():
        assert b"license: " + license in hub.files(REPO, revision)["README.md"]


def test_an_adapter_in_place_of_a_model_takes_the_model_away(hub, checkpoint, unasked, tmp_path):
    from safetensors.torch import save_file
    from torch import ones

    push(checkpoint, REPO, about=MIT)
    folder = tmp_path / "adapter"
    shutil.copytree(checkpoint, folder)
    for name in ("model.safetensors", "config.json"):
        (folder / name).unlink()
    save_file({"base_model.model.lora_A.weight": ones(4, 4)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "user/base", "r": 4}))
    with pytest.raises(ConvLlavaError, match="no adapter"):
        push(folder, REPO, about=MIT, space=REPO)
    pushed = push(folder, REPO, about=MIT)
    assert {"model.safetensors", "config.json"} <= set(pushed.removed)
    assert "model.safetensors" not in hub.files(REPO)


def test_a_space_with_the_demo(hub, command, checkpoint, unasked):
    from convllava_hf.demo import space_files

    code, out, _ = command(checkpoint, REPO, "--license", "mit", "--space", "--private")
    assert code == 0 and f"{hub.url}/spaces/{REPO}" in out
    wanted = {name: content.encode() for name, content in space_files(REPO).items()}
    assert hub.files(f"spaces/{REPO}") == wanted and b"sdk: gradio" in wanted["README.md"]
    assert hub.private == {REPO, f"spaces/{REPO}"}
    hub.commit(f"spaces/{REPO}", "main", {"app.py": b"By hand."}, [], title="Update app.py")
    code, _, err = command(checkpoint, REPO, "--license", "mit", "--space")
    assert code == 2 and "The model is published, its Space is not" in err and "app.py" in err
    assert hub.files(f"spaces/{REPO}")["app.py"] == b"By hand."
