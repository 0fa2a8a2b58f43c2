"""TRL's own collator and trainer over our model and processor: the original's ids and labels, and steps that train."""

import json

import pytest
import torch
import transformers
from helpers.fresh_process import run_fresh
from helpers.paths import GOLDEN
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor


pytest.importorskip("trl")
if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 18):
    pytest.skip("training needs transformers >= 5.18", allow_module_level=True)

from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling  # noqa: E402


LABELS = json.loads((GOLDEN / "labels.json").read_text())
SAMPLES = {sample["id"]: sample for sample in json.loads((GOLDEN / "conversations.json").read_text())}
TOKENS = 25  # visual tokens of an image
IMAGE = -200  # the original's single id for an image


def as_example(sample: dict) -> dict:
    """LLaVA's JSON as TRL takes it, read as the original reads it.

    A turn of the model's before the first of a human's is dropped. Of a text with an image, the image goes to the
    front on a line of its own, wherever it stood, and the rest is stripped.
    """
    roles = {"human": "user", "gpt": "assistant"}
    turns = sample["conversations"]
    if turns[0]["from"] != "human":
        turns = turns[1:]
    messages = []
    for turn in turns:
        text, places = turn["value"], turn["value"].count("<image>")
        if places:
            text = text.replace("<image>", "").strip()
        content = [{"type": "image"}] * places + [{"type": "text", "text": text}]
        messages.append({"role": roles[turn["from"]], "content": content})
    images = [Image.open(GOLDEN / "images" / sample["image"])] if "image" in sample else []
    return {"messages": messages, "images": images}


def expand(row: list[int], ids: list[int], placeholder: int) -> list[int]:
    """A row of the original's with an image's single place made as many as the image has visual tokens."""
    return [
        one
        for token, value in zip(ids, row, strict=True)
        for one in ([placeholder] * TOKENS if token == IMAGE else [value])
    ]


@pytest.fixture(scope="module")
def folder(converted_checkpoint):
    return converted_checkpoint("stage3")


@pytest.fixture(scope="module")
def processor(folder):
    return AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def collator(processor):
    return DataCollatorForVisionLanguageModeling(processor, assistant_only_loss=True)


@pytest.mark.parametrize("name", LABELS)
def test_ids_and_labels_are_the_originals(collator, processor, name):
    batch = collator([as_example(SAMPLES[name])])
    figures = LABELS[name]
    ids, labels = figures["input_ids"], figures["labels"]
    assert batch["input_ids"].tolist() == [expand(ids, ids, processor.image_token_id)]
    assert batch["labels"].tolist() == [expand(labels, ids, -100)]
    assert ("pixel_values" in batch) == ("image" in SAMPLES[name])


def test_a_batch_of_samples_with_and_without_images(collator, processor):
    """All samples at once, padded right: each row is what the sample gives alone."""
    batch = collator([as_example(sample) for sample in SAMPLES.values()])
    assert len(batch["pixel_values"]) == len(batch["image_sizes"]) == 7
    for index, name in enumerate(SAMPLES):
        ids, labels = LABELS[name]["input_ids"], LABELS[name]["labels"]
        expected = expand(ids, ids, processor.image_token_id)
        length = len(expected)
        assert batch["attention_mask"][index].tolist() == [1] * length + [0] * (batch["input_ids"].shape[1] - length)
        assert batch["input_ids"][index, :length].tolist() == expected
        assert batch["labels"][index, :length].tolist() == expand(labels, ids, -100)
        assert (batch["labels"][index, length:] == -100).all()


@pytest.mark.parametrize("names", [["text-only", "three-turns"], ["text-only"], list(SAMPLES)], ids=len)
def test_a_batch_trains(collator, folder, names):
    model = AutoModelForImageTextToText.from_pretrained(folder).train()
    batch = collator([as_example(SAMPLES[name]) for name in names])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        loss = model(**batch).loss
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]


def test_prompts_and_completions(processor, folder):
    """TRL's other kind of data: the loss is on the completion alone."""
    collator = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
    examples = []
    for name in ("one-turn", "text-only"):
        example = as_example(SAMPLES[name])
        examples.append(
            {"prompt": example["messages"][:1], "completion": example["messages"][1:2], "images": example["images"]}
        )
    batch = collator(examples)
    assert len(batch["pixel_values"]) == 1
    for row, name in zip(batch["labels"], ("one-turn", "text-only"), strict=True):
        answer = SAMPLES[name]["conversations"][1]["value"]
        assert processor.tokenizer.decode(row[row != -100], skip_special_tokens=True).strip() == answer
    loss = AutoModelForImageTextToText.from_pretrained(folder)(**batch).loss
    assert torch.isfinite(loss)


def test_a_limit_that_would_cut_an_image_is_refused(processor):
    """TRL's max_length truncates; it may not leave an image with some of its places."""
    example = as_example(SAMPLES["one-turn"])
    first = LABELS["one-turn"]["input_ids"].index(IMAGE)
    with pytest.raises(ValueError, match="visual tokens"):
        DataCollatorForVisionLanguageModeling(processor, max_length=first + 10, assistant_only_loss=True)([example])
    batch = DataCollatorForVisionLanguageModeling(processor, max_length=first + 30, assistant_only_loss=True)(
        [as_example(SAMPLES["one-turn"])]
    )
    assert batch["input_ids"].shape == (1, first + 30)


@pytest.mark.slow
def test_the_trainer_takes_a_path_and_the_checkpoints_own_code(folder, tmp_path):
    """As `trl sft --model_name_or_path PATH --trust_remote_code true` does it, without the package."""
    pytest.importorskip("datasets")
    found = run_fresh(
        """
        import torch
        from datasets import Dataset, Image, Sequence
        from trl import SFTConfig, SFTTrainer

        rows = [
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]},
                    {"role": "assistant", "content": [{"type": "text", "text": f"A sign {number}."}]},
                ],
                "images": [values["image"]],
            }
            for number in range(4)
        ]
        dataset = Dataset.from_list(rows).cast_column("images", Sequence(Image()))
        arguments = SFTConfig(
            output_dir=values["output"],
            model_init_kwargs={"trust_remote_code": True, "dtype": "float32"},
            trust_remote_code=True,
            assistant_only_loss=True,
            max_length=None,
            max_steps=2,
            per_device_train_batch_size=2,
            learning_rate=1e-3,
            logging_steps=1,
            report_to="none",
            use_cpu=True,
            bf16=False,
            save_steps=2,
        )
        trainer = SFTTrainer(model=values["folder"], args=arguments, train_dataset=dataset)
        before = {name: one.detach().clone() for name, one in trainer.model.named_parameters()}
        trainer.train()
        trainer.save_model(values["saved"])
        result = {
            "model": type(trainer.model).__module__,
            "processor": type(trainer.processing_class).__module__,
            "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
            "still": [
                name for name, one in trainer.model.named_parameters() if torch.equal(before[name], one.detach())
            ],
            "files": sorted(path.name for path in Path(values["saved"]).iterdir()),
            "checkpoint": sorted(path.name for path in (Path(values["output"]) / "checkpoint-2").iterdir()),
            "package": "convllava_hf" in sys.modules,
        }
        """,
        env={"CUDA_VISIBLE_DEVICES": ""},
        folder=folder,
        output=tmp_path / "output",
        saved=tmp_path / "saved",
        image=GOLDEN / "images" / "square.png",
    )
    assert not found["package"]
    assert found["model"].startswith("transformers_modules.") and found["processor"].startswith(
        "transformers_modules."
    )
    assert len(found["losses"]) == 2 and all(loss > 0 for loss in found["losses"])
    assert not found["still"]
    for files in (found["files"], found["checkpoint"]):
        # What it was made from, only our own trainer hands on.
        assert {path.name for path in folder.iterdir()} - {"training_record.json"} <= set(files)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved")
    assert AutoProcessor.from_pretrained(tmp_path / "saved").image_token_id == again.config.image_token_id
