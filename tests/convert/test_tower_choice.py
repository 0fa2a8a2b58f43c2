"""Which of two vision towers a converted checkpoint gets: the one that the original runs, by its own figures."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import golden_variants
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file

from convllava_hf import ConvLlavaForConditionalGeneration, ConvLlavaProcessor, cli
from convllava_hf.convert import convert_checkpoint
from convllava_hf.convert.checkpoint_files import Weights
from convllava_hf.convert.keys import CONVNEXT_TABLE, SHARDS_TOWER_TABLE
from convllava_hf.convert.tower_comparison import compare_weights
from convllava_hf.errors import ConvLlavaError
from convllava_hf.training_record import read_record


TENSORS = 83  # of the golden tower
IDENTICAL = {"tensors": TENSORS, "differing": 0, "largest": 0.0, "where": None, "lacking": 0, "rounded_to": None}


@pytest.fixture
def source(golden, tmp_path) -> Path:
    return Path(shutil.copytree(golden / "checkpoint-stage3", tmp_path / "source"))


@pytest.fixture
def hub_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def released(source, hub_cache, tmp_path) -> Path:
    """A checkpoint as released, and its tower's repository in the cache."""
    golden_variants.as_released(source, tmp_path / "tower")
    golden_variants.into_hub_cache(hub_cache, golden_variants.RELEASED_TOWER, tmp_path / "tower")
    return source


def convert(source, out, **options) -> Path:
    return convert_checkpoint(source, out, progress=False, **options)


def choice_of(folder: Path) -> dict:
    return read_record(folder)["origin"]["vision_tower_choice"]


def error_of_logits(folder: Path, golden: Path, golden_cases: dict, name: str = "one-image") -> float:
    """How far the logits of a case are from those that the original code computed."""
    case = golden_cases[name]
    model = ConvLlavaForConditionalGeneration.from_pretrained(folder).eval()
    images = [Image.open(golden / "images" / file) for file in case["images"]]
    inputs = ConvLlavaProcessor.from_pretrained(folder)(images=images, text=case["prompt"], return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits[0, :, :640]
    return float(np.abs(logits.numpy() - np.load(golden / "inference.npz")[f"{name}.logits"]).max())


def same_tower(folder: Path, source: Path) -> bool:
    """Whether a converted checkpoint has the tower in a folder of the original's."""
    (file,) = [path for path in source.iterdir() if path.name in ("pytorch_model.bin", "model.safetensors")]
    tower = torch.load(file, weights_only=True) if file.suffix == ".bin" else load_file(file)
    weights = load_file(folder / "model.safetensors")
    name = "encoder.stages.4.layers.1.pwconv1.weight"
    return torch.equal(weights[f"model.vision_tower.{name}"], tower[name])


# --- the layout of the released checkpoints -------------------------------------------------------------------------


def test_the_fixture_has_the_released_layout(released):
    assert sorted(path.name for path in released.iterdir()) == [
        *("config.json", "generation_config.json", "pytorch_model-00001-of-00002.bin"),
        *("pytorch_model-00002-of-00002.bin", "pytorch_model.bin.index.json", "special_tokens_map.json"),
        *("tokenizer.model", "tokenizer_config.json"),
    ]
    config = json.loads((released / "config.json").read_text())
    assert config["model_type"] == "llava" and config["tune_vision_tower"] is True
    assert not config.keys() & {"mm_vision_resolution", "mm_patch_merge_type"}
    names = json.loads((released / "pytorch_model.bin.index.json").read_text())["weight_map"]
    tower = [name for name in names if name.startswith("model.vision_tower.vision_tower.")]
    assert len(tower) == TENSORS + 2 and "model.vision_tower.vision_tower.layernorm.bias" in tower


def test_the_originals_figures_come_from_the_named_tower(released, golden, golden_cases, tmp_path, capsys):
    assert cli.main(["convert", str(released), str(tmp_path / "out")]) == 0
    assert error_of_logits(tmp_path / "out", golden, golden_cases) < 1e-4
    said = capsys.readouterr().err
    assert f"differ in {TENSORS} of {TENSORS} tensors, by 1 at most" in said and golden_variants.RELEASED_TOWER in said
    assert "--vision-tower shards takes the other" in said
    assert cli.main(["convert", str(released), str(tmp_path / "other"), "--vision-tower", "shards"]) == 0
    assert error_of_logits(tmp_path / "other", golden, golden_cases) > 0.1
    said = capsys.readouterr().err
    assert "Taking the shards', as asked for" in said and f"differ in {TENSORS} of {TENSORS}" in said


def test_the_command_says_what_it_took_and_of_a_failure_only_that(source, tmp_path, capsys):
    assert cli.main(["convert", str(source), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().err.splitlines() == ["Taking the vision tower in vision_tower/ of the checkpoint."]
    golden_variants.misshape(source)
    assert cli.main(["convert", str(source), str(tmp_path / "out2")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("convllava: error: ")


def test_generation_and_tokenizer_of_the_released_layout(released, golden_cases, tmp_path):
    out = convert(released, tmp_path / "out")
    assert "_from_model_config" not in json.loads((out / "generation_config.json").read_text())
    tokenizer = ConvLlavaProcessor.from_pretrained(out).tokenizer
    case = golden_cases["text-only"]
    assert tokenizer(case["prompt"]).input_ids == case["input_ids"]
    assert [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token] == ["<s>", "</s>", "<unk>"]


def test_record_and_card_say_which_tower_was_taken(released, tmp_path):
    from helpers.publishing import card_of

    out = convert(released, tmp_path / "named")
    assert read_record(out)["origin"]["vision_tower"] == golden_variants.RELEASED_TOWER
    choice = choice_of(out)
    assert choice["taken"] == "named" and choice["compared_with"] == "shards" and choice["asked_for"] is False
    assert choice["differing"] == choice["tensors"] == TENSORS and choice["largest"] == pytest.approx(1)
    link = f"[{golden_variants.RELEASED_TOWER}](https://huggingface.co/{golden_variants.RELEASED_TOWER})"
    row = f"the tower that the original runs; {TENSORS} of {TENSORS} tensors differ from that of the original's shards"
    assert f"| vision tower | {link}: {row}, by 1 at most |" in card_of(out, tmp_path / "card")
    out = convert(released, tmp_path / "shards", vision_tower="shards")
    assert "vision_tower" not in read_record(out)["origin"]
    assert choice_of(out)["taken"] == "shards" and choice_of(out)["compared_with"] == golden_variants.RELEASED_TOWER
    card = card_of(out, tmp_path / "card2")
    assert "| vision tower | the tower in the original's shards, which the original does not run; " in card


@pytest.mark.parametrize(
    "choice",
    [5, [], {"taken": "<b>"}, {"taken": ["named"]}, {"taken": "named", "tensors": "<b>", "differing": 1},
     {"taken": "shards", "tensors": 3, "differing": 1, "largest": "<b>", "rounded_to": "<b>", "compared_with": "<b>"}],
)  # fmt: skip
def test_the_card_takes_nothing_else_from_a_strangers_record(checkpoint, tmp_path, choice):
    from helpers.publishing import card_of

    folder = shutil.copytree(checkpoint, tmp_path / "model")
    record = {"format": 1, "origin": {"vision_tower_choice": choice}, "stages": []}
    (folder / "training_record.json").write_text(json.dumps(record))
    assert "<b>" not in card_of(folder, tmp_path)


# --- the order of choice --------------------------------------------------------------------------------------------


def shifted_tower(tower: Path, folder: Path) -> Path:
    """Another tower of the same shape."""
    folder = Path(shutil.copytree(tower, folder))
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    torch.save({name: tensor + 2 for name, tensor in weights.items()}, folder / "pytorch_model.bin")
    return folder


def test_a_given_tower_goes_before_all_others(source, tmp_path, caplog):
    tower = shifted_tower(source / "vision_tower", tmp_path / "mine")
    golden_variants.tower_in_the_main_shards(source)
    out = convert(source, tmp_path / "out", vision_tower=tower)
    assert same_tower(out, tower) and read_record(out)["origin"]["vision_tower"] == "mine"
    assert choice_of(out)["taken"] == "given" and choice_of(out)["largest"] == pytest.approx(2)
    assert "as asked for; --vision-tower shards takes the other" in caplog.text


def test_the_checkpoints_folder_goes_before_the_named_id(source, hub_cache, tmp_path):
    tower = shifted_tower(source / "vision_tower", tmp_path / "elsewhere")
    golden_variants.into_hub_cache(hub_cache, "example/convnext-tiny-320", tower)
    golden_variants.another_tower_in_the_main_shards(source)
    out = convert(source, tmp_path / "out")
    assert same_tower(out, source / "vision_tower") and "vision_tower" not in read_record(out)["origin"]


@pytest.mark.parametrize("name", ["towers/mine", "./towers/mine", "../mine", "absolute"])
def test_a_path_in_the_config_is_taken_before_the_shards(source, tmp_path, name):
    tower = tmp_path / "mine" if name == "absolute" else (source / name).resolve()
    tower.parent.mkdir(exist_ok=True)
    (source / "vision_tower").rename(tower)
    (tower / "pytorch_model.bin").rename(tmp_path / "weights.bin")
    shutil.copytree(tower, source / "vision_tower")  # which has no weights, and so is not taken
    (tmp_path / "weights.bin").rename(tower / "pytorch_model.bin")
    save_file(
        load_file(source / "model.safetensors")
        | {
            golden_variants.PREFIX + key: value + 1
            for key, value in torch.load(tower / "pytorch_model.bin", weights_only=True).items()
        },
        source / "model.safetensors",
    )
    golden_variants.edit_json(source / "config.json", mm_vision_tower=str(tower) if name == "absolute" else name)
    assert same_tower(convert(source, tmp_path / "out"), tower)


def test_the_shards_are_taken_with_a_warning_where_nothing_else_has_weights(source, tmp_path, caplog):
    tower = torch.load(source / "vision_tower" / "pytorch_model.bin", weights_only=True)
    golden_variants.tower_in_the_main_shards(source)
    (source / "vision_tower" / "pytorch_model.bin").unlink()
    out = convert(source, tmp_path / "out")
    weights = load_file(out / "model.safetensors")
    assert all(torch.equal(weights[f"model.vision_tower.{name}"], tensor) for name, tensor in tower.items())
    assert choice_of(out) == {"taken": "shards", "asked_for": False}
    (warning,) = [record.getMessage() for record in caplog.records if "which the original would not use" in record.msg]
    assert "holds no weights" in warning and "'example/convnext-tiny-320'" in warning
    assert "--vision-tower shards" in warning and "\n" not in warning


@pytest.mark.parametrize(
    "name", [None, "", " ", 5, [], "no such id", "x" * 5000, "a\0b", "~nobody/tower", ".", "/dev/zero"]
)
def test_odd_names_of_towers(source, tmp_path, name):
    (source / "vision_tower" / "pytorch_model.bin").unlink()
    values = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**values, "mm_vision_tower": name}))
    with pytest.raises(ConvLlavaError, match="vision tower"):
        convert(source, tmp_path / "out")


def test_a_tower_that_is_there_and_cannot_be_read_is_not_replaced(released, hub_cache, tmp_path, caplog):
    """Offline, after its two JSON files had been downloaded alone, as `--vision-tower shards` downloads them."""
    (weights,) = hub_cache.rglob("pytorch_model.bin")
    weights.unlink()
    with pytest.raises(
        ConvLlavaError, match=f"{golden_variants.RELEASED_TOWER}.*--vision-tower shards takes that one"
    ):
        convert(released, tmp_path / "out")
    out = convert(released, tmp_path / "out", vision_tower="shards")
    assert choice_of(out) == {"taken": "shards", "asked_for": True}
    assert "whether both are equal was not looked at" in caplog.text


def test_asking_for_shards_without_a_tower(source, tmp_path):
    for change in (lambda folder: None, golden_variants.as_sharded_bin):
        change(source)
        with pytest.raises(ConvLlavaError, match="hold n"):
            convert(source, tmp_path / "out", vision_tower="shards")


def test_a_folder_called_shards_can_be_given(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tower = shifted_tower(source / "vision_tower", tmp_path / "shards")
    assert same_tower(convert(source, tmp_path / "out", vision_tower="./shards"), tower)


def test_the_resolution_is_never_guessed(source, tmp_path, caplog):
    golden_variants.tower_in_the_main_shards(source)
    shutil.rmtree(source / "vision_tower")
    for options in ({}, {"vision_tower": "shards"}):
        with pytest.raises(ConvLlavaError, match="resolution of the vision tower is not known.*vision_tower/"):
            convert(source, tmp_path / "out", **options)
    golden_variants.edit_json(source / "config.json", mm_vision_resolution=320)
    config = ConvLlavaProcessor.from_pretrained(convert(source, tmp_path / "out")).image_processor
    assert config.size == {"height": 320, "width": 320}
    assert "deduced from its weights" in caplog.text and "CLIP's mean and std" in caplog.text


def test_a_config_without_a_size_is_no_answer(source, tmp_path):
    (source / "vision_tower" / "preprocessor_config.json").unlink()
    out = convert(source, tmp_path / "out")  # by image_size in the tower's config.json
    assert json.loads((out / "config.json").read_text())["vision_config"]["image_size"] == 320
    golden_variants.edit_json(source / "vision_tower" / "config.json", image_size=None)
    with pytest.raises(ConvLlavaError, match="resolution of the vision tower is not known"):
        convert(source, tmp_path / "out2")


def test_the_shards_can_be_asked_for_where_the_named_tower_is_no_convnext(source, tmp_path, caplog):
    golden_variants.tower_in_the_main_shards(source)
    golden_variants.swap_tower(source)
    golden_variants.edit_json(source / "config.json", mm_vision_resolution=320)
    with pytest.raises(ConvLlavaError, match="'clip_vision_model'.*--vision-tower shards"):
        convert(source, tmp_path / "out")
    assert choice_of(convert(source, tmp_path / "out", vision_tower="shards"))["taken"] == "shards"
    assert "Its configuration is not used" in caplog.text


def test_a_deduced_configuration_is_the_towers_own(source, tmp_path):
    named = convert(source, tmp_path / "named")
    golden_variants.with_timm_names_in_the_shards(source)
    deduced = convert(source, tmp_path / "deduced")
    ours, theirs = (json.loads((folder / "config.json").read_text())["vision_config"] for folder in (deduced, named))
    assert {key: ours[key] for key in ("depths", "hidden_sizes", "num_channels", "patch_size", "image_size")} == {
        key: theirs[key] for key in ("depths", "hidden_sizes", "num_channels", "patch_size", "image_size")
    }


# --- the comparison -------------------------------------------------------------------------------------------------


def compare(source: Path):
    return compare_weights(
        Weights(source, "one"), SHARDS_TOWER_TABLE, Weights(source / "vision_tower", "other"), CONVNEXT_TABLE
    )


def change_shards(source: Path, change) -> None:
    weights = load_file(source / "model.safetensors")
    tower = {name: change(name, tensor) for name, tensor in weights.items() if name.startswith(golden_variants.PREFIX)}
    rest = {name: tensor for name, tensor in weights.items() if not name.startswith(golden_variants.PREFIX)}
    save_file(
        rest | {name: tensor for name, tensor in tower.items() if tensor is not None}, source / "model.safetensors"
    )


def test_identical_towers(source, tmp_path, caplog):
    golden_variants.tower_in_the_main_shards(source)
    with caplog.at_level(logging.INFO, logger="convllava_hf.convert"):
        out = convert(source, tmp_path / "out")
    assert f"are identical, all {TENSORS} tensors" in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert choice_of(out) == {"taken": "named", "asked_for": False, "compared_with": "shards", **IDENTICAL}


def test_bfloat16_is_not_taken_for_a_difference(source):
    golden_variants.tower_in_the_main_shards(source)
    change_shards(source, lambda name, tensor: tensor.bfloat16())
    comparison = compare(source)
    assert comparison.as_dict() == {**IDENTICAL, "rounded_to": "bfloat16"}
    assert str(comparison) == f"are identical after rounding to bfloat16, all {TENSORS} tensors"
    change_shards(source, lambda name, tensor: tensor + 1 if "stages.3.layers.0.dwconv" in name else tensor)
    assert compare(source).differing == 2 and "differ in 2 of" in str(compare(source))


@pytest.mark.parametrize("layout", [None, golden_variants.as_sharded_bin, golden_variants.as_sharded_safetensors])
def test_differences_are_counted_and_measured(source, layout):
    golden_variants.tower_in_the_main_shards(source)
    places = {"stages.0.layers.0.dwconv.bias": 0.25, "stages.2.layers.1.pwconv2.weight": 0.5}

    def change(name, tensor):
        by = next((by for place, by in places.items() if name.endswith(place)), 0)
        tensor.view(-1)[-1] += by
        return tensor

    change_shards(source, change)
    if layout is not None:
        layout(source)
    comparison = compare(source)
    assert comparison.differing == 2 and comparison.tensors == TENSORS and comparison.lacking == 0
    assert comparison.largest == pytest.approx(0.5) and comparison.where == "encoder.stages.2.layers.1.pwconv2.weight"


def test_old_pickles_are_compared(source):
    golden_variants.tower_in_the_main_shards(source)
    golden_variants.as_old_pickle(source)
    assert compare(source).as_dict() == IDENTICAL


def test_lacking_and_misshapen_tensors_differ(source):
    golden_variants.tower_in_the_main_shards(source)

    def change(name, tensor):
        if name.endswith("stages.0.layers.0.dwconv.bias"):
            return None
        return tensor[:-1].contiguous() if name.endswith("stages.1.layers.0.dwconv.bias") else tensor

    change_shards(source, change)
    comparison = compare(source)
    assert (comparison.differing, comparison.lacking, comparison.tensors) == (2, 2, TENSORS)
    assert "2 are in one of them only or of another shape" in str(comparison)


def test_what_is_no_number_differs(source):
    golden_variants.tower_in_the_main_shards(source)
    change_shards(source, lambda name, tensor: tensor * float("nan") if name.endswith("stem.1.bias") else tensor)
    assert compare(source).identical
    change_shards(
        source, lambda name, tensor: tensor * float("nan") if name.endswith("embeddings.layernorm.bias") else tensor
    )
    assert compare(source).differing == 1
