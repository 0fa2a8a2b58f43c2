"""Links in a checkpoint's folder: those that leave it are refused wherever the folder is copied or published."""

import contextlib
import json
import os
import shutil
import socket

import pytest
from helpers.tiny_models import make_language_model, make_tower

from convllava_hf.convert import assemble, convert_checkpoint
from convllava_hf.errors import ConvLlavaError
from convllava_hf.publish import About, push
from convllava_hf.publish.staging import INDEX, stage
from convllava_hf.utils.links import check_links


SECRET = "my pin is 1234"


@pytest.fixture
def cloned(checkpoint, tmp_path):
    """A checkpoint in a folder beside which a diary lies."""
    folder = tmp_path / "cloned"
    shutil.copytree(checkpoint, folder)
    (tmp_path / "diary.txt").write_text(SECRET)
    return folder


def staged(source, tmp_path, **options):
    folder = tmp_path / "staged"
    folder.mkdir()
    return stage(source, folder, **options)


def _plain(folder, name):
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("../diary.txt")


def _absolute(folder, name):
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(folder.parent / "diary.txt")


def _chain(folder, name):
    """A link to a link in a subfolder, which leads out."""
    (folder / name).unlink(missing_ok=True)
    (folder / "sub").mkdir()
    (folder / "sub" / "step").symlink_to("../../diary.txt")
    (folder / name).symlink_to("sub/step")


def _through_a_linked_folder(folder, name):
    (folder / name).unlink(missing_ok=True)
    (folder / "linked").symlink_to("..")
    (folder / name).symlink_to("linked/diary.txt")


@pytest.mark.parametrize("make", [_plain, _absolute, _chain, _through_a_linked_folder])
@pytest.mark.parametrize("name", ["LICENSE", "NOTICE.md", "chat_template.jinja", "training_record.json", "loss.png"])
def test_a_link_out_of_the_folder_is_not_published(cloned, tmp_path, make, name):
    make(cloned, name)
    with pytest.raises(ConvLlavaError, match=f"{name} in .*is a link out of that folder.*remove the link"):
        push(cloned, "user/model", about=About(license="mit"), dry_run=True)
    with contextlib.suppress(ConvLlavaError):
        assert name in staged(cloned, tmp_path).left_out
    assert all(SECRET not in path.read_text(errors="replace") for path in (tmp_path / "staged").iterdir())


@pytest.mark.parametrize("name", ["model.safetensors", "modeling_convllava.py", "config.json", "tokenizer.json"])
def test_weights_code_and_settings_from_elsewhere_are_not_published(cloned, tmp_path, name):
    (cloned / name).rename(tmp_path / name)
    (cloned / name).symlink_to(tmp_path / name)
    with pytest.raises(ConvLlavaError, match=f"{name} in .*link out"):
        staged(cloned, tmp_path)


def test_a_shard_and_an_adapter_from_elsewhere_are_not_published(cloned, tmp_path):
    (cloned / "model.safetensors").rename(tmp_path / "other.safetensors")
    (cloned / "model-00001-of-00001.safetensors").symlink_to("../other.safetensors")
    (cloned / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}))
    for options in ({}, {"max_shard_size": "10KB"}):  # linked into the staged folder, and written anew
        with pytest.raises(ConvLlavaError, match="model-00001-of-00001.safetensors in .*link out"):
            staged(cloned, tmp_path, **options)
        (tmp_path / "staged").rmdir()
    (cloned / "model-00001-of-00001.safetensors").unlink()
    (cloned / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "user/base"}))
    (cloned / "adapter_model.safetensors").symlink_to("../other.safetensors")
    with pytest.raises(ConvLlavaError, match="adapter_model.safetensors in .*link out"):
        staged(cloned, tmp_path)


def test_auto_map_cannot_name_code_elsewhere(cloned, tmp_path):
    (tmp_path / "mine.py").write_text("password = 1234\n")
    config = json.loads((cloned / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": f"{tmp_path / 'mine'}.Config"}
    (cloned / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConvLlavaError, match="mine.py"):
        staged(cloned, tmp_path)


@pytest.mark.parametrize("kind", ["a FIFO", "a socket", "a folder", "nowhere", "loop"])
def test_what_is_no_file_is_refused_without_being_opened(cloned, tmp_path, kind, monkeypatch):
    path = cloned / "LICENSE"
    if kind == "a FIFO":
        os.mkfifo(path)  # reading it would wait for ever
    elif kind == "a socket":
        monkeypatch.chdir(cloned)  # a socket's path is short
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("LICENSE")
    elif kind == "a folder":
        (cloned / "texts").mkdir()
        path.symlink_to("texts")
    else:
        path.symlink_to("LICENSE" if kind == "loop" else "missing.txt")
    said = kind if kind.startswith("a ") else "a broken link"
    with pytest.raises(ConvLlavaError, match=f"LICENSE in .*{said}"):
        push(cloned, "user/model", about=About(license="mit"), dry_run=True)


def test_links_that_stay_inside_are_published(cloned, tmp_path):
    (cloned / "texts").mkdir()
    (cloned / "texts" / "mit.txt").write_text("MIT")
    (cloned / "LICENSE").symlink_to("texts/mit.txt")
    (cloned / "NOTICE").symlink_to("LICENSE")
    (cloned / "notes.txt").symlink_to("../diary.txt")  # is not published under any name, so it may lead anywhere
    (tmp_path / "latest").symlink_to(cloned)
    result = staged(tmp_path / "latest", tmp_path)
    assert (result.folder / "NOTICE").read_text() == "MIT"
    assert "notes.txt" in result.left_out


def _cache(checkpoint, root):
    """A snapshot as huggingface_hub lays it out: links into the repository's `blobs`."""
    repository = root / "models--user--model"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / ("0" * 40)
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(checkpoint.iterdir())):
        shutil.copyfile(path, blobs / f"{number:040}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:040}")
    return snapshot


def test_a_snapshot_of_the_hubs_cache_is_published(checkpoint, tmp_path):
    result = staged(_cache(checkpoint, tmp_path), tmp_path)
    assert (result.folder / "tokenizer.json").read_bytes() == (checkpoint / "tokenizer.json").read_bytes()


def test_what_looks_like_the_hubs_cache_opens_nothing_else(checkpoint, tmp_path):
    snapshot = _cache(checkpoint, tmp_path)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "diary").write_text(SECRET)
    (snapshot / "LICENSE").symlink_to("../../../blobs/diary")  # of another repository
    with pytest.raises(ConvLlavaError, match="LICENSE in .*link out"):
        check_links(snapshot)
    (snapshot / "LICENSE").unlink()
    blobs = snapshot.parents[1] / "blobs"
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to("../elsewhere")  # a whole folder of somebody's, as the cache of this repository
    with pytest.raises(ConvLlavaError, match="link out"):
        check_links(snapshot)


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer.model"])
def test_convert_copies_nothing_from_elsewhere(golden, tmp_path, name):
    source = tmp_path / "source"
    shutil.copytree(golden / "checkpoint-stage3", source)
    (source / name).rename(tmp_path / name)
    (source / name).symlink_to(tmp_path / name)
    with pytest.raises(ConvLlavaError, match=f"{name} in .*link out"):
        convert_checkpoint(source, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_assemble_copies_nothing_from_elsewhere(tmp_path):
    text = make_language_model(tmp_path / "text")
    (tmp_path / "diary.txt").write_text(SECRET)
    (text / "chat_template.jinja").unlink(missing_ok=True)
    (text / "chat_template.jinja").symlink_to("../diary.txt")
    tower = make_tower(tmp_path / "tower")
    with pytest.raises(ConvLlavaError, match="chat_template.jinja in .*link out"):
        assemble(tmp_path / "out", vision=tower, text=text, resolution=128, extra_stage_width=32, progress=False)
