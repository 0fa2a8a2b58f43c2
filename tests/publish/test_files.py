"""What leaves the machine: which files, in what state, and what is refused."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from convllava_hf.errors import ConvLlavaError
from convllava_hf.modeling.modeling_convllava import AUTO_MAP
from convllava_hf.publish.preflight import check_files
from convllava_hf.publish.staging import INDEX, stage


BASE = "user/base"


@pytest.fixture
def model_folder(checkpoint, tmp_path):
    """A copy of the tiny checkpoint, with what a training run leaves beside it."""
    folder = tmp_path / "run" / "stage3"
    shutil.copytree(checkpoint, folder)
    for name in ("optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state.pth", "trainer_state.json", ".env"):
        (folder / name).write_text("{}")
    (folder / "checkpoint-500").mkdir()
    (folder / "checkpoint-500" / "model.safetensors").write_bytes(b"old")
    (folder / "README.md").write_text("# Generic")
    return folder


@pytest.fixture
def adapter_folder(checkpoint, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(checkpoint, folder)
    (folder / "model.safetensors").unlink()
    (folder / "config.json").unlink()
    config = {"base_model_name_or_path": str(checkpoint), "peft_type": "LORA", "r": 4}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({"base_model.model.lora_A.weight": torch.ones(4, 4)}, folder / "adapter_model.safetensors")
    return folder


def staged_in(tmp_path, source, **options):
    folder = tmp_path / "staged"
    folder.mkdir(parents=True)
    return stage(source, folder, **options)


def test_what_a_run_leaves_beside_the_model_stays_here(model_folder, checkpoint, tmp_path):
    staged = staged_in(tmp_path, model_folder)
    assert set(staged.names()) == {path.name for path in checkpoint.iterdir()} | {"handler.py", "requirements.txt"}
    assert {"optimizer.pt", "training_args.bin", ".env", "README.md", "checkpoint-500/"} <= set(staged.left_out)
    assert not set(staged.left_out) & set(staged.names())
    check_files(staged)
    assert (staged.folder / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()


def test_large_files_are_written_anew_in_shards(model_folder, tmp_path):
    staged = staged_in(tmp_path, model_folder, max_shard_size="50KB")
    index = staged.json(INDEX)["weight_map"]
    assert "model.safetensors" not in staged.names() and len(set(index.values())) > 3
    assert all(staged.size(name) < 60_000 for name in set(index.values()))
    before = load_file(model_folder / "model.safetensors")
    assert set(index) == set(before)
    for name, tensor in before.items():
        with safe_open(staged.folder / index[name], framework="pt") as handle:
            assert torch.equal(handle.get_tensor(name), tensor), name


def test_shards_of_an_earlier_save_are_left_out(model_folder, tmp_path):
    (model_folder / "model-00001-of-00009.safetensors").write_bytes(b"old")
    staged = staged_in(tmp_path, model_folder)
    assert "model-00001-of-00009.safetensors" in staged.left_out


def test_configuration_loses_its_sources_and_gains_every_entry(model_folder, tmp_path):
    config = json.loads((model_folder / "config.json").read_text())
    config["_name_or_path"] = "/home/me/checkpoints/stage2"
    config["auto_map"] = {"AutoModel": "me/old--modeling_convllava.ConvLlavaModel"}
    (model_folder / "config.json").write_text(json.dumps(config))
    staged = staged_in(tmp_path, model_folder)
    assert staged.json("config.json")["auto_map"] == AUTO_MAP
    assert "_name_or_path" not in staged.json("config.json")
    check_files(staged)


def test_missing_code_is_completed_from_the_package(model_folder, checkpoint, tmp_path):
    (model_folder / "processing_convllava.py").unlink()
    staged = staged_in(tmp_path, model_folder)
    for path in checkpoint.glob("*.py"):
        assert (staged.folder / path.name).read_bytes() == path.read_bytes()


def test_changed_code_is_replaced_unless_it_is_trusted(model_folder, checkpoint, tmp_path, caplog):
    path = model_folder / "modeling_convllava.py"
    path.write_text(path.read_text() + "\n# Changed.\n")
    ours = staged_in(tmp_path / "ours", model_folder).folder / path.name
    assert ours.read_bytes() == (checkpoint / path.name).read_bytes()
    assert "modeling_convllava.py" in caplog.text and "--trust-remote-code" in caplog.text
    theirs = staged_in(tmp_path / "theirs", model_folder, trust_remote_code=True).folder / path.name
    assert theirs.read_text() == path.read_text()


@pytest.mark.parametrize("name", ["config.json", "processor_config.json", "tokenizer_config.json"])
def test_code_of_others_is_published_only_where_it_is_trusted(name, model_folder, tmp_path):
    (model_folder / "evil.py").write_text("raise SystemExit(3)\n")
    content = json.loads((model_folder / name).read_text())
    reference = [None, "someone/else--evil.Evil"] if name == "tokenizer_config.json" else "someone/else--evil.Evil"
    content["auto_map"] = {**content.get("auto_map", {}), "AutoTokenizer": reference}
    (model_folder / name).write_text(json.dumps(content))
    with pytest.raises(ConvLlavaError, match=r"evil\.py.*--trust-remote-code"):
        staged_in(tmp_path / "refused", model_folder)
    assert "evil.py" in staged_in(tmp_path / "trusted", model_folder, trust_remote_code=True).names()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("LICENSE", "hf_" + "a1B2" * 9, "token of the Hub in line 1"),
        ("NOTICE", "\n\nkey: sk-" + "aB3" * 16, "OpenAI or Anthropic in line 3"),
        ("LICENSE", "-----BEGIN RSA PRIVATE KEY-----", "private key"),
        ("NOTICE", "the token is plainsecret", "the token in use"),
        ("NOTICE", "from /home/someone/data", "absolute path /home/someone"),
        ("generation_config.json", '{"cache": {"folder": "/data/models/cache"}}', "under cache.folder"),
        ("generation_config.json", '{"folder": "C:\\\\models\\\\cache"}', "absolute path"),
        ("LICENSE.html", "\n<!-- /home/someone/data -->", "absolute path /home/someone"),
        ("NOTICE", "", "is empty"),
    ],
)
def test_what_must_not_be_published_is_named_and_never_repeated(model_folder, tmp_path, name, content, message):
    (model_folder / name).write_text(content)
    with pytest.raises(ConvLlavaError, match=message) as error:
        check_files(staged_in(tmp_path, model_folder), token="plainsecret")
    assert name in str(error.value)
    assert not any(secret in str(error.value) for secret in ("a1B2a1B2", "aB3aB3", "plainsecret"))


def test_an_optimizers_state_among_the_weights_is_refused(model_folder, tmp_path):
    weights = load_file(model_folder / "model.safetensors")
    save_file({**weights, "optimizer.exp_avg.0": torch.ones(2)}, model_folder / "model.safetensors")
    with pytest.raises(ConvLlavaError, match="optimizer's state"):
        check_files(staged_in(tmp_path, model_folder))


def test_weights_that_are_cut_off_are_refused(model_folder, tmp_path):
    path = model_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ConvLlavaError, match="is it complete"):
        check_files(staged_in(tmp_path, model_folder))


def test_files_beyond_the_hubs_limits_are_refused(model_folder, tmp_path, monkeypatch):
    from convllava_hf.publish import preflight

    monkeypatch.setattr(preflight, "MAX_FILE_BYTES", 1000)
    monkeypatch.setattr(preflight, "MAX_FILES", 5)
    with pytest.raises(ConvLlavaError, match="larger shards make fewer.*model.safetensors has"):
        check_files(staged_in(tmp_path, model_folder))


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        (["model.safetensors"], "save_pretrained"),
        (["tokenizer.json", "chat_template.jinja"], "tokenizer.json, chat_template.jinja"),
        (["config.json"], "config.json"),
    ],
)
def test_an_incomplete_checkpoint_is_refused(model_folder, tmp_path, remove, message):
    for name in remove:
        (model_folder / name).unlink()
    with pytest.raises(ConvLlavaError, match=message):
        staged_in(tmp_path, model_folder)


def test_a_missing_shard_is_named(model_folder, tmp_path):
    (model_folder / "model.safetensors").unlink()
    (model_folder / INDEX).write_text('{"weight_map": {"a": "model-00001-of-00001.safetensors"}}')
    with pytest.raises(ConvLlavaError, match="model-00001-of-00001.safetensors"):
        staged_in(tmp_path, model_folder)


def test_an_original_checkpoint_is_to_be_converted_first(golden, checkpoint, tmp_path):
    folder = tmp_path / "original"
    shutil.copytree(checkpoint, folder)
    shutil.copy(golden / "checkpoint-stage3" / "config.json", folder)
    with pytest.raises(ConvLlavaError, match="convllava convert"):
        staged_in(tmp_path, folder)
    with pytest.raises(ConvLlavaError, match="no folder"):
        stage(tmp_path / "nothing", tmp_path)


def test_an_adapter_names_its_base_model_by_an_id(adapter_folder, tmp_path):
    with pytest.raises(ConvLlavaError, match="--base-model"):
        stage(adapter_folder, tmp_path)
    staged = staged_in(tmp_path, adapter_folder, base_model=BASE)
    assert staged.base_model == staged.json("adapter_config.json")["base_model_name_or_path"] == BASE
    assert "adapter_model.safetensors" in staged.names() and "config.json" not in staged.names()
    assert "peft" in (staged.folder / "requirements.txt").read_text()
    check_files(staged)
