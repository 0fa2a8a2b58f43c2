"""Stage 0 of the miniature, and its data as training reads it: what the tower learns from, and what training takes."""

import io
import itertools
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers


pytest.importorskip("sklearn")
datasets = pytest.importorskip("datasets")

from helpers.miniature_sight import (  # noqa: E402
    DetectedThing,
    answer_of,
    digits,
    handwriting_in,
    print_in,
    see,
    see_sign,
    see_signs,
)
from PIL import Image  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from convllava_hf.data import load_training_data  # noqa: E402
from convllava_hf.miniature import drawing, language, pretraining, scene_dataset  # noqa: E402
from convllava_hf.miniature.labeled_images import NAMES, labeled_image  # noqa: E402
from convllava_hf.miniature.text_images import text_batches  # noqa: E402
from convllava_hf.miniature.tokenizer import make_tokenizer  # noqa: E402
from convllava_hf.miniature.world import World  # noqa: E402


MIX = language.Mix(captions=0.2, grounded_captions=0.2, boxes=0.3)
trains = pytest.mark.skipif(
    tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 18),
    reason="training needs transformers >= 5.18",
)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.mark.slow
def test_stage_0_sees_the_training_split_alone(tokenizer, monkeypatch):
    splits = []
    whole, pen = World.scenes, drawing.handwritten_digits
    monkeypatch.setattr(World, "scenes", lambda self, split, seed: splits.append(split) or whole(self, split, seed))
    monkeypatch.setattr(drawing, "handwritten_digits", lambda split: splits.append(split) or pen(split))
    make_tokenizer()
    next(text_batches(tokenizer, World(), 0, 4))
    rng = np.random.default_rng(0)
    before = len(splits)
    for _ in range(40):
        labeled_image(rng)
    assert set(splits) == {"train"} and before >= 2 and len(splits) > before + 4


def test_images_show_at_each_place_what_it_is_named():
    """The thing or sign that covers a place's center and how far it reaches, by the pixels.

    Not asked where an edge is next to the center.
    """
    rng, right, found = np.random.default_rng(1), [], Counter()
    for _ in range(80):
        pixels, names, edges = labeled_image(rng)
        image, places = Image.fromarray(pixels), len(names)
        stride = image.width // places
        things, signs = see(image), see_signs(image)
        for row, column in itertools.product(range(places), repeat=2):
            x, y = (column + 0.5) * stride, (row + 0.5) * stride
            covering = [thing for thing in [*things, *signs] if covers(getattr(thing, "box", thing), x, y)]
            if any(covers(box, x, y, 2) != covers(box, x, y, -2) for box in [*(one.box for one in things), *signs]):
                continue
            name = NAMES[names[row, column]]
            if not covering:
                right.append(name == "ground")
            elif isinstance(covering[0], DetectedThing):
                right.append(name == (covering[0].color, covering[0].shape))
            else:
                read = (print_in(image, covering[0]), digits().target[handwriting_in(image, covering[0])])
                right.append(name in read)
            if covering:
                box = getattr(covering[0], "box", covering[0])
                reach = np.array(box) - (x, y, x, y)
                np.testing.assert_allclose(edges[row, column] * stride, reach, atol=1.01)
            found["ground" if name == "ground" else "sign" if isinstance(name, int) else "thing"] += 1
    assert np.mean(right) > 0.99
    assert min(found.values()) > 100 and len(found) == 3


def covers(box, x: float, y: float, margin: float = 0) -> bool:
    left, top, right, bottom = box
    return left - margin <= x <= right + margin and top - margin <= y <= bottom + margin


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A data set of 24 scenes on disk."""
    folder = tmp_path_factory.mktemp("data") / "stage"
    return scene_dataset.write_samples(folder, World(), size=24, seed=3, mix=MIX)


def said_in(row: dict) -> list[str]:
    return [part["text"] for message in row["messages"] for part in message["content"] if part["type"] == "text"]


@pytest.mark.parametrize("form", ["folder", "parquet"])
def test_a_data_set_is_read_as_training_reads_it(written, tmp_path, form):
    """Images pixel by pixel those of the scenes, and every answer what is seen in them."""
    if form == "parquet":
        datasets.load_from_disk(written).to_parquet(tmp_path / "stage.parquet")
    loaded = load_training_data(written if form == "folder" else tmp_path / "stage.parquet")
    assert len(loaded) == 24
    captions = 0
    for row, scene in zip(loaded, World().scenes("train", 3), strict=False):
        (image,) = row["images"]
        image = Image.open(io.BytesIO(image["bytes"]))
        assert image.size == (256, 256) and image.mode == "RGB"
        assert np.array_equal(np.asarray(image), np.asarray(drawing.draw(scene)))
        things = [*see(image), DetectedThing("", "sign", see_sign(image))]
        roles = [message["role"] for message in row["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        kinds = [part["type"] for message in row["messages"] for part in message["content"]]
        assert kinds == ["image"] + ["text"] * len(roles)
        said = said_in(row)
        for prompt, answer in zip(said[::2], said[1::2], strict=True):
            seen = things if prompt.startswith("Describe") else things[:-1]
            assert answer_of(prompt, seen, scene.sign.digit) == answer
        captions += said[0].startswith("Describe")
    assert 0 < captions < 15


def test_data_sets_by_seed_and_size(written, tmp_path):
    """The same seed writes the same again, over what was there; another one writes other scenes."""
    first, counts = load_training_data(written), []
    kwargs = {"mix": MIX, "on_scene": counts.append}
    for seed, same in ((4, False), (3, True), ([3, 1], False)):
        scene_dataset.write_samples(tmp_path / "again", World(), size=24, seed=seed, **kwargs)
        again = load_training_data(tmp_path / "again")
        assert (again["messages"][:] == first["messages"][:]) == same
        assert ([row[0]["bytes"] for row in again["images"]] == [row[0]["bytes"] for row in first["images"]]) == same
    assert counts == sorted(counts[:1] * 3) and counts[0] == 24
    assert [path.name for path in tmp_path.iterdir()] == ["again"]
    (row,) = scene_dataset.sample_rows(World(), size=1, seed=4, mix=language.Mix(1, 0, 0), side=128)
    assert Image.open(io.BytesIO(row["images"][0]["bytes"])).size == (128, 128) and len(row["messages"]) == 2


@pytest.fixture(scope="module")
def stage_0(tmp_path_factory):
    """Tower and language model after two steps, and the losses that were told."""
    folder, told = tmp_path_factory.mktemp("stage0"), {}

    def listen(name):
        told[name] = []
        return lambda *values: told[name].append(values)

    pretraining.train_tower(folder / "tower", steps=2, seed=0, on_step=listen("tower"))
    pretraining.train_language_model(folder / "language", steps=2, seed=0, on_step=listen("language"))
    return folder, told


@pytest.fixture(scope="module")
def assembled(stage_0, tmp_path_factory):
    from convllava_hf.convert import assemble

    folder, _ = stage_0
    return assemble(
        tmp_path_factory.mktemp("assembled") / "model",
        vision=folder / "tower",
        text=folder / "language",
        resolution=256,
        extra_stage_depth=1,
        extra_stage_width=192,
        progress=False,
    )


@pytest.mark.slow
def test_stage_0_tells_steps_and_losses(stage_0):
    _, told = stage_0
    for name, classes in (("tower", 40), ("language", 500)):
        assert [values[:2] for values in told[name]] == [(1, 2), (2, 2)]
        assert all(0.5 * math.log(classes) < loss < 2.5 * math.log(classes) for _, _, loss in told[name])


@pytest.mark.slow
def test_stage_0_is_the_same_for_a_seed(stage_0, tmp_path):
    folder, _ = stage_0
    for seed in (0, 1):
        pretraining.train_tower(tmp_path / f"tower{seed}", steps=2, seed=seed)
        pretraining.train_language_model(tmp_path / f"language{seed}", steps=2, seed=seed)
    for name in ("tower", "language"):
        first, same, other = (
            load_file(path / "model.safetensors")
            for path in (folder / name, tmp_path / f"{name}0", tmp_path / f"{name}1")
        )
        assert all(torch.equal(first[key], same[key]) for key in first)
        assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.slow
def test_images_stand_where_text_images_stood(assembled, tokenizer):
    """What follows the image is tokenized as in stage 0, an image has as many tokens as a text one cells."""
    processor = transformers.AutoProcessor.from_pretrained(assembled)
    scene = next(World().scenes("train", 5))
    content = [{"type": "image", "image": drawing.draw(scene)}, {"type": "text", "text": "What does the sign say?"}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": str(scene.sign.digit)}]}
    ids = processor.apply_chat_template(
        [{"role": "user", "content": content}, answer], tokenize=True, return_dict=True
    )["input_ids"][0]
    first_words = " ".join(words[0] for words in language.text_image(scene))
    asked = {"role": "user", "content": f"{first_words}\nWhat does the sign say?"}
    answered = {"role": "assistant", "content": str(scene.sign.digit)}
    told = tokenizer.apply_chat_template([asked, answered], tokenize=True, return_dict=True)["input_ids"]
    last = len(ids) - ids[::-1].index(processor.image_token_id)
    assert ids.count(processor.image_token_id) == 16
    end_of_line = told.index(tokenizer.encode("\n", add_special_tokens=False)[0])
    assert ids[last:] == told[end_of_line:]
    names = [processor.tokenizer.decode(part[:3]) for part in (ids, told)]
    assert names == ["<s>USER:"] * 2


@trains
@pytest.mark.slow
def test_a_data_set_trains_through_the_trainer(written, assembled, tmp_path):
    pytest.importorskip("trl")
    from helpers.training_runs import ON_CPU, logged, options

    from convllava_hf.train import main

    arguments = {
        "model_name_or_path": assembled,
        "output_dir": tmp_path / "out",
        "dataset_name": written,
        "trainable": ["projector", "vision_tower", "language_model", "lm_head"],
        "assistant_only_loss": "true",
        "max_length": 1024,
        "max_steps": 1,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        **ON_CPU,
    }
    trainer = main(options(**arguments))
    (loss,) = logged(trainer, "loss")
    assert 1 < loss < 2 * math.log(len(trainer.processing_class.tokenizer))
    before, after = load_file(assembled / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    assert [name for name in before if torch.equal(before[name], after[name])] == []

    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(8)])
    decode = trainer.processing_class.tokenizer.decode
    for index, (ids, labels) in enumerate(zip(batch["input_ids"], batch["labels"], strict=True)):
        answers = said_in(trainer.train_dataset[index])[1::2]
        assert decode(labels[labels != -100]) == "".join(f" {answer}</s>" for answer in answers)
        assert (ids == trainer.processing_class.image_token_id).sum() == 16
    assert batch["pixel_values"].shape == (8, 3, 256, 256)
