"""What a model was made from: written where it is made, and told on its card."""

import shutil

import yaml
from helpers.publishing import card_of
from helpers.tiny_models import SMALL, make_language_model, make_tower

from convllava_hf.convert import assemble, convert_checkpoint
from convllava_hf.training_record import read_record, write_record


def test_a_converted_checkpoint_names_the_original(golden, tmp_path):
    out = convert_checkpoint(golden / "checkpoint-stage3", tmp_path / "out", progress=False)
    origin = {"checkpoint": "checkpoint-stage3", "vision_tower_choice": {"taken": "named", "asked_for": False}}
    assert read_record(out) == {"format": 1, "origin": origin, "stages": []}
    card = card_of(out, tmp_path)
    assert "| converted from | checkpoint-stage3 |" in card
    assert (
        "| vision tower | the tower that the original runs |" in card and "| language model | *not recorded*" in card
    )
    assert "base_model" not in yaml.safe_load(card.split("---\n")[1])  # a folder's name is no id


def test_a_tower_from_elsewhere_is_named_and_no_folder_is_taken_for_an_id(golden, tmp_path, monkeypatch):
    source = shutil.copytree(golden / "checkpoint-stage3", tmp_path / "org" / "original")
    (source / "vision_tower").rename(tmp_path / "tower")
    monkeypatch.chdir(tmp_path)
    out = convert_checkpoint("org/original", "out", vision_tower=tmp_path / "tower", progress=False)
    origin = read_record(out)["origin"]
    assert (origin["checkpoint"], origin["vision_tower"]) == ("original", "tower")
    assert origin["vision_tower_choice"] == {"taken": "given", "asked_for": True}


def test_an_assembled_model_names_its_parts(tmp_path):
    tower, text = make_tower(tmp_path / "my-convnext"), make_language_model(tmp_path / "my-llama")
    out = assemble(tmp_path / "out", vision=tower, text=text, **SMALL)
    assert read_record(out)["origin"] == {"vision_tower": "my-convnext", "language_model": "my-llama"}
    card = card_of(out, tmp_path)
    assert "| vision tower | my-convnext |" in card and "| language model | my-llama |" in card


def test_parts_from_the_hub_are_linked_and_base_models(checkpoint, tmp_path):
    source = shutil.copytree(checkpoint, tmp_path / "model")
    origin = {"vision_tower": "timm/convnext_large_mlp.clip_laion2b_ft_soup_320", "language_model": "a/llm"}
    write_record(source, origin=origin)
    card = card_of(source, tmp_path)
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == list(origin.values())
    for part, name in origin.items():
        assert f"| {part.replace('_', ' ')} | [{name}](https://huggingface.co/{name}) |" in card


def test_converting_is_no_finetuning(checkpoint, tmp_path):
    source = shutil.copytree(checkpoint, tmp_path / "model")
    for stages, relation in (([], None), ([{"name": "stage3_instruct"}], "finetune")):
        write_record(source, origin={"checkpoint": "org/original"}, stages=stages)
        told = yaml.safe_load(card_of(source, tmp_path / str(relation)).split("---\n")[1])
        assert told["base_model"] == ["org/original"] and told.get("base_model_relation") == relation
