"""What a run writes down for the model card, compared with the recipe and with the trainer itself."""

import json

import pytest
import yaml
from helpers.publishing import own_hub
from huggingface_hub import constants


pytest.importorskip("trl")
pytest.importorskip("datasets")

from helpers.paths import GOLDEN  # noqa: E402
from helpers.training_runs import RECIPES, STAGES, logged, run  # noqa: E402
from trl import ModelConfig  # noqa: E402

from convllava_hf.publish import About  # noqa: E402
from convllava_hf.publish.card import CardInput, render_card  # noqa: E402
from convllava_hf.publish.preflight import check_files  # noqa: E402
from convllava_hf.publish.staging import stage  # noqa: E402
from convllava_hf.training.recording import record_before  # noqa: E402
from convllava_hf.training_record import read_record  # noqa: E402


pytestmark = pytest.mark.slow


FEW = {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "save_strategy": "no"}


def test_stages_are_written_one_after_the_other(converted_checkpoint, tmp_path):
    start, trainers = converted_checkpoint("init"), []
    for number in (1, 2):
        output = tmp_path / STAGES[number]
        trainers.append(run(RECIPES / f"{STAGES[number]}.yaml", start, output, **FEW))
        start = output
    origin = read_record(start)["origin"]  # of the conversion
    assert origin == {
        "checkpoint": "checkpoint-init",
        "vision_tower_choice": {"taken": "named", "asked_for": False},
    }
    stages = read_record(start)["stages"]
    assert [one["name"] for one in stages] == [STAGES[1], STAGES[2]]
    for number, (told, trainer) in enumerate(zip(stages, trainers, strict=True), 1):
        recipe = yaml.safe_load((RECIPES / f"{STAGES[number]}.yaml").read_text())
        assert told["trainable"] == recipe["trainable"] and told["method"] == "full"
        for key in ("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_length"):
            assert told["hyperparameters"][key] == recipe[key], key
        assert told["global_batch_size"] == 4 and told["devices"] == 1 and told["steps"] == 2
        assert told["train_loss"] == logged(trainer, "train_loss")[0]
        assert told["data"] == [{"name": "conversations.json"}]  # no more of the path on this machine
        assert told["boxes"] == "square"
    assert stages[1]["started_from"] == STAGES[1]
    text = (start / "training_record.json").read_text()
    assert str(tmp_path) not in text and str(GOLDEN) not in text

    folder = tmp_path / "staged"
    folder.mkdir()
    staged = stage(start, folder)
    card = render_card(staged, CardInput("user/tiny", About(license="mit")))
    check_files(staged)
    assert {"training_record.json", "loss.png"} <= set(staged.names())
    assert "| converted from | checkpoint-init |" in card
    assert "| | stage1_projector | stage2_pretrain |" in card and "![Loss over the steps" in card
    assert {"training_args.bin", "trainer_state.json"} & set(staged.names()) == set()


def test_the_record_of_a_model_on_the_hub_is_gone_on_with(monkeypatch, tmp_path):
    told = {"format": 1, "origin": {"checkpoint": "org/original"}, "stages": [{"name": "stage3_instruct"}]}
    with own_hub(monkeypatch) as hub:
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        for name, files in {"with": {"training_record.json": json.dumps(told).encode()}, "without": {}}.items():
            hub.create(f"user/{name}")
            hub.commit(f"user/{name}", "main", {"config.json": b"{}", **files}, [])
        assert record_before(ModelConfig("user/with")) == told
        assert record_before(ModelConfig("user/without")) == {"format": 1, "origin": {}, "stages": []}
    assert record_before(ModelConfig(str(tmp_path))) == {"format": 1, "origin": {}, "stages": []}


def test_an_adapters_run_and_its_merged_model_are_recorded(converted_checkpoint, tmp_path):
    few = {**FEW, "dataset_name": GOLDEN / "conversations.json"}
    run(RECIPES / "lora.yaml", converted_checkpoint("stage3"), tmp_path / "lora", **few, merge_adapter="true")
    (told,) = read_record(tmp_path / "lora")["stages"]
    assert told["method"] == "lora" and told["trainable"] is None
    assert told["lora"]["r"] == 64 and told["lora"]["modules_to_save"] == ["multi_modal_projector"]
    assert read_record(tmp_path / "lora" / "merged")["stages"] == [told]
