"""Training with images in their own shapes: the same whichever are together, reproducible, kept for later."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


pytest.importorskip("trl")
pytest.importorskip("datasets")

from helpers.paths import GOLDEN  # noqa: E402
from helpers.tiny_models import make_image, make_processor  # noqa: E402
from helpers.training_runs import (  # noqa: E402
    RECIPES,
    STAGES,
    arguments_of,
    assert_same_updates,
    assert_same_weights,
    logged,
    run,
    some_samples,
    with_images_inside,
)

from convllava_hf import ConvLlavaProcessor  # noqa: E402
from convllava_hf.cli import main as command  # noqa: E402
from convllava_hf.data import load_training_data  # noqa: E402
from convllava_hf.errors import ConvLlavaError  # noqa: E402
from convllava_hf.modeling.image_processing_convllava import ConvLlavaImageProcessor  # noqa: E402
from convllava_hf.training.arguments import check_arguments, make_parser  # noqa: E402
from convllava_hf.training.shapes import image_shapes, max_grid  # noqa: E402
from convllava_hf.training.trainer import sample_lengths  # noqa: E402


STAGE_2 = RECIPES / f"{STAGES[2]}.yaml"
NATIVE = {"preset": "large", "group_by_image_shape": "true"}  # as recipes/README.md has it
# At stride 64 the golden images become 2 x 6, 6 x 2, 3 x 4 and 4 x 3 tokens, and small ones.
IMAGES = {"image_aspect_ratio": "native", "min_pixels": 2 * 64**2, "max_pixels": 14 * 64**2}
WHOLE = {
    "max_steps": 3,
    "warmup_steps": 0,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-3,
    "save_strategy": "no",
    **IMAGES,
}
PAIRS = {**WHOLE, "max_steps": 6, "per_device_train_batch_size": 2, "group_by_image_shape": "true"}


@pytest.fixture(scope="module")
def start(converted_checkpoint) -> Path:
    return converted_checkpoint("stage1")


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    return run(STAGE_2, start, tmp_path_factory.mktemp("whole") / "out", **WHOLE)


@pytest.fixture
def data():
    return load_training_data(GOLDEN / "conversations.json", image_folder=GOLDEN / "images")


def seen_batches(trainer) -> list[list[list[int]]]:
    """The sizes of the images of each of the trainer's batches, in pixels."""
    return [batch["image_sizes"].tolist() for batch in trainer.get_train_dataloader() if "image_sizes" in batch]


# --- the same, however images are put together


@pytest.mark.parametrize("size, steps", [(2, 4), pytest.param(1, 8, marks=pytest.mark.slow)])
def test_what_is_padded_in_a_batch_changes_nothing(size, steps, whole, start, tmp_path):
    """All shapes in one batch, in several, and each alone: losses, gradients and updates."""
    sizes = {tuple(size) for batch in seen_batches(whole) for size in batch}
    assert len(sizes) >= 5
    more = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
    apart = run(STAGE_2, start, tmp_path / "out", **{**WHOLE, **more})
    np.testing.assert_allclose(logged(apart, "loss"), logged(whole, "loss"), rtol=1e-5)
    np.testing.assert_allclose(logged(apart, "grad_norm"), logged(whole, "grad_norm"), rtol=1e-4)
    assert_same_updates(tmp_path / "out", Path(whole.args.output_dir), start, 1e-2)


@pytest.mark.slow
def test_squares_are_another_training(whole, start, tmp_path):
    """So the keys of the recipe reach the images."""
    squares = run(STAGE_2, start, tmp_path / "out", **{key: WHOLE[key] for key in WHOLE if key not in IMAGES})
    assert {tuple(size) for batch in seen_batches(squares) for size in batch} == {(320, 320)}
    assert not np.allclose(logged(squares, "loss"), logged(whole, "loss"), rtol=1e-3)


# --- by shape


@pytest.mark.slow
def test_runs_by_shape_are_the_same_again_and_resumed(start, tmp_path):
    first = run(STAGE_2, start, tmp_path / "first", **PAIRS)
    again = run(STAGE_2, start, tmp_path / "again", **{**PAIRS, "dataset_num_proc": 2})
    assert logged(again, "loss") == logged(first, "loss")
    assert_same_weights(tmp_path / "again", tmp_path / "first")
    saved = {**PAIRS, "save_strategy": "steps", "save_steps": 3}
    run(STAGE_2, start, tmp_path / "cut", **saved)
    (tmp_path / "cut" / "checkpoint-6" / "trainer_state.json").unlink()
    resumed = run(STAGE_2, start, tmp_path / "cut", **saved, resume_from_checkpoint="true")
    assert logged(resumed, "loss") == logged(first, "loss")
    assert_same_weights(tmp_path / "cut", tmp_path / "first")


@pytest.mark.slow
def test_images_of_a_batch_are_alike(start, tmp_path):
    """Tall and wide ones: of the sixteen samples that are looked at together, one batch at most has both."""
    file = some_samples(tmp_path, ["one-turn", "image-last"] * 32)
    options = {**PAIRS, "dataset_name": file, "max_steps": 1, "per_device_train_batch_size": 4}
    alike = run(STAGE_2, start, tmp_path / "alike", **options)
    assert sum(len({tuple(size) for size in batch}) == 2 for batch in seen_batches(alike)) <= 4
    chance = {"group_by_image_shape": "false", "group_by_modality_length": "false"}
    mixed = run(STAGE_2, start, tmp_path / "mixed", **{**options, **chance})
    assert sum(len({tuple(size) for size in batch}) == 2 for batch in seen_batches(mixed)) > 4


@pytest.mark.parametrize("inside", [False, True])
def test_shapes_from_headers_are_those_that_the_tower_sees(inside, data, tmp_path):
    if inside:
        data = load_training_data(with_images_inside(tmp_path / "parquet", "train"))
    processor = make_processor(**IMAGES)
    shapes = image_shapes(data, processor.image_processor)
    for sample, grids in zip(data, shapes, strict=True):
        sizes = processor.image_processor(sample["images"])["image_sizes"] if sample["images"] else []
        assert grids == [(height // 64, width // 64) for height, width in sizes]
    lengths, has_image = sample_lengths(data, processor, shapes)
    plain, _ = sample_lengths(data, make_processor(64))  # one token for each image
    expected = [one - len(grids) + sum(r * c for r, c in grids) for one, grids in zip(plain, shapes, strict=True)]
    assert lengths == expected and has_image == [bool(grids) for grids in shapes]
    assert [max_grid(grids) for grids in shapes] == [grids[0] if grids else (0, 0) for grids in shapes]
    assert max_grid([(2, 6), (5, 1)]) == (5, 6)


def test_images_are_measured_as_they_are_turned_and_broken_ones_count_as_squares(tmp_path, caplog):
    from datasets import Dataset, Features, List
    from datasets import Image as ImageFeature

    def encoded(image: Image.Image, kind: str, orientation: int = 1) -> dict:
        exif, buffer = Image.Exif(), io.BytesIO()
        exif[0x0112] = orientation
        image.save(buffer, kind, exif=exif)
        return {"bytes": buffer.getvalue(), "path": None}

    wide = make_image(64, 256)
    rows = [
        [encoded(wide, "JPEG"), encoded(wide, "JPEG", 6)],
        [encoded(wide, "PNG", 8), encoded(wide, "WEBP", 5)],
        [{"bytes": b"no image", "path": None}, {"bytes": None, "path": str(tmp_path / "missing.png")}],
        [],
    ]
    data = Dataset.from_dict({"images": rows}, features=Features({"images": List(ImageFeature(decode=False))}))
    processor = ConvLlavaImageProcessor(**IMAGES, size=128)
    shapes = image_shapes(data, processor)
    assert shapes == [[(1, 4), (4, 1)], [(4, 1), (4, 1)], [(2, 2), (2, 2)], []]
    assert "sizes of 2 images could not be read" in caplog.text


# --- what is kept


def test_the_checkpoint_keeps_how_it_saw_images(whole, start, tmp_path, capsys):
    folder = Path(whole.args.output_dir)
    processor = ConvLlavaProcessor.from_pretrained(folder)
    assert {key: getattr(processor.image_processor, key) for key in IMAGES} == IMAGES
    assert json.loads((folder / "training_record.json").read_text())["stages"][-1]["images"] == IMAGES
    argv = ["ask", str(folder), str(GOLDEN / "images" / "wide.png"), "What?", "--json", "--max-new-tokens", "2"]
    assert command(argv) == 0
    assert json.loads(capsys.readouterr().out)["visual_tokens"] == 12
    # The next stage goes on with them, unless its recipe says otherwise.
    following = run(STAGE_2, folder, tmp_path / "next", **{key: WHOLE[key] for key in WHOLE if key not in IMAGES})
    assert [sorted(batch) for batch in seen_batches(following)] == [sorted(batch) for batch in seen_batches(whole)]


def test_trl_s_own_trainer_finds_them_in_the_checkpoint(whole, start):
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    folder = Path(whole.args.output_dir)
    collator = DataCollatorForVisionLanguageModeling(AutoProcessor.from_pretrained(folder), assistant_only_loss=True)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    data = load_training_data(GOLDEN / "conversations.json", image_folder=GOLDEN / "images")
    examples = [
        {**sample, "images": [Image.open(one["path"]) for one in sample["images"]]}
        for sample in data
        if sample["images"]
    ]
    batch = collator(examples)
    assert len({tuple(size) for size in batch["image_sizes"].tolist()}) >= 5
    loss = model(**batch).loss.item()
    tokens = [int((collator([example])["labels"][:, 1:] != -100).sum()) for example in examples]
    alone = [model(**collator([example])).loss.item() for example in examples]
    assert loss == pytest.approx(np.average(alone, weights=tokens), rel=1e-5)


# --- what cannot work


@pytest.mark.parametrize(
    "values, message",
    [
        ({"dataset_streaming": "true", "max_steps": 2}, "does not stream"),
        ({"group_by_modality_length": "false"}, "needs group_by_modality_length"),
    ],
)
def test_shapes_must_be_known_before_the_first_step(values, message, tmp_path):
    arguments = arguments_of(STAGE_2, tmp_path, tmp_path / "out", **{**NATIVE, **values})
    with pytest.raises(ConvLlavaError, match=message):
        check_arguments(*make_parser().parse_args_and_config(arguments))


def test_images_that_cannot_be_are_refused_before_the_model_is_loaded(start, tmp_path, monkeypatch):
    monkeypatch.setattr("convllava_hf.train._load_model", lambda *args: pytest.fail("the model was loaded"))
    with pytest.raises(ConvLlavaError, match="preset: invalid choice: 'huge' .choose from '?tiny"):
        run(STAGE_2, start, tmp_path / "out", preset="huge", max_steps=1)
    with pytest.raises(ConvLlavaError, match="preset='tiny' stands for .* leave one of them out"):
        run(STAGE_2, start, tmp_path / "out", preset="tiny", max_pixels=90_000, max_steps=1)


@pytest.mark.slow
def test_the_recipes_train(start, tmp_path):
    """Stages 2 and 3 with native images on the golden data, as recipes/README.md has them."""
    options = {
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "save_strategy": "no",
    }
    second = run(STAGE_2, start, tmp_path / "second", **NATIVE, **options)
    third = run(RECIPES / f"{STAGES[3]}.yaml", tmp_path / "second", tmp_path / "third", **NATIVE, **options)
    for trainer in (second, third):
        assert trainer.processing_class.image_processor.max_pixels == 1536**2
        assert np.isfinite(logged(trainer, "loss")).all()
        assert [512, 640] in [size for batch in seen_batches(trainer) for size in batch]  # the photograph of 480 x 640
