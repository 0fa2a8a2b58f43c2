"""Boxes of training data come to the model in the frame in which it sees its images and answers are judged."""

import json
import logging
import random
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.tiny_models import make_processor
from PIL import Image

from convllava_hf import cli, convert_boxes
from convllava_hf.data import box_frames as data_boxes
from convllava_hf.data import load_training_data
from convllava_hf.data.box_frames import BoxCounts, in_model_frame
from convllava_hf.data.checking import check_data
from convllava_hf.data.collator import SafeImageCollator
from convllava_hf.data.inspecting import inspect_sample
from convllava_hf.demo.answer_boxes import boxes_in, on_image
from convllava_hf.demo.presets import Preset, view
from convllava_hf.errors import ConvLlavaError
from convllava_hf.evaluation.benchmarks import BENCHMARKS
from convllava_hf.evaluation.metrics import box_iou
from convllava_hf.evaluation.predictor import Predictor
from convllava_hf.options import with_image_options


hf = pytest.importorskip("datasets")

MODES = {
    "pad": {"image_aspect_ratio": "pad"},
    "native": {"image_aspect_ratio": "native", "max_pixels": 256**2},
    "shortest_edge": {"image_aspect_ratio": "shortest_edge", "size": 64},
}
SIZES = {"tall": (3000, 1000), "wide": (1080, 1920), "turned": (640, 480), "square": (500, 500)}  # height, width
BOX = "[0.10, 0.16, 0.40, 0.39]"  # in the square of a 640 x 480 image
IN_IMAGE = "[0.10, 0.05, 0.40, 0.35]"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(hf.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    hf.disable_progress_bars()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of each of the sizes, one of them stored lying on its side, and one of 640 x 480 pixels."""
    folder = tmp_path_factory.mktemp("images")
    for name, (height, width) in {**SIZES, "photo": (480, 640), "double": (960, 1280)}.items():
        exif = Image.Exif()
        if name == "turned":
            exif[0x0112] = 6
            height, width = width, height
        Image.new("RGB", (width, height), "gray").save(folder / f"{name}.jpg", exif=exif)
    return folder


def processor_of(mode: str):
    return with_image_options(make_processor(), MODES[mode])


def written(path, *samples: dict):
    path.write_text(json.dumps(list(samples)))
    return path


def sample(image, *texts: str, **more) -> dict:
    """A sample of LLaVA's form; texts take turns."""
    images = image if isinstance(image, list) else [image] * (image is not None)
    texts = ["<image>\n" * len(images) + texts[0], *texts[1:]]
    turns = [{"from": "gpt" if number % 2 else "human", "value": text} for number, text in enumerate(texts)]
    return {"image": image, "conversations": turns, **more} if images else {"conversations": turns, **more}


def rows_seen(dataset, processor) -> list[list[str]]:
    """The texts of each sample, as the collator hands them on."""
    collator = SafeImageCollator(collator=_Kept(processor), dataset=dataset)
    return [[part["text"] for turn in row["messages"] for part in turn["content"] if part["text"]]
            for row in collator(list(dataset))]  # fmt: skip


class _Kept(SimpleNamespace):
    def __init__(self, processor):
        super().__init__(processor=processor)

    def __call__(self, examples):
        return examples


# --- a student that learns everything, from the data to the score


def grounding(sizes: dict, frame: str, number: int, digits: int | None = 2):
    """Samples of LLaVA's form whose boxes are in a frame; and by answer, image and box in pixels."""
    rng, samples, truths = random.Random(f"{frame} {digits}"), [], []
    for name, (height, width) in sizes.items():
        for _ in range(number):
            # No smaller than that rounding to hundredths of the square leaves most of it.
            w, h = (rng.uniform(0.12, 0.6) * max(height, width) for _ in range(2))
            w, h = min(w, 0.9 * width), min(h, 0.9 * height)
            left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
            box = (left / width, top / height, (left + w) / width, (top + h) / height)
            box = convert_boxes(box, height, width, "image", frame)
            text = ", ".join(f"{1000 * edge:.0f}" if digits is None else f"{edge:.{digits}f}" for edge in box)
            truths.append((name, (left, top, left + w, top + h)))
            samples.append(sample(f"{name}.jpg", "Where is it?", f"[{text}]"))
    return samples, truths


def learned_answers(dataset, processor) -> list[str]:
    """What the real collator, tokenizer and chat template teach a model to answer."""
    pytest.importorskip("trl")
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    theirs = DataCollatorForVisionLanguageModeling(processor, max_length=None, assistant_only_loss=True)
    collator = SafeImageCollator(theirs, dataset)
    answers = []
    for row in dataset:
        batch = collator([row])
        learned = batch["input_ids"][0][batch["labels"][0] != -100]
        answers.append(processor.tokenizer.decode(learned, skip_special_tokens=True).strip())
    return answers


def accuracy(answers, truths, folder, processor, image_options=None) -> float:
    """By the scorer of `convllava eval`, of images as it opens them."""
    seen_by = with_image_options(processor, image_options)
    predictor = Predictor(SimpleNamespace(processor=seen_by), None, 8)
    benchmark = BENCHMARKS["refcoco"]
    right = []
    for answer, (name, (left, top, right_, bottom)) in zip(answers, truths, strict=True):
        row = {"answer": ["thing"], "bbox": [left, top, right_ - left, bottom - top]}
        (question,) = benchmark.samples_of(row, 0, benchmark.prompt)
        seen = predictor._seen(processor.image_processor.fetch_images(str(folder / f"{name}.jpg")))
        right.append(benchmark.scorer(question, answer, seen)["score"])
    return float(np.mean(right))


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("frame", ["square", "image"])
@pytest.mark.parametrize("digits", [2, None], ids=["hundredths", "thousandths"])
def test_a_perfect_student_finds_every_box(mode, frame, digits, folder, tmp_path):
    processor = processor_of("pad")
    trained = with_image_options(processor, MODES[mode])
    samples, truths = grounding(SIZES, frame, 4, digits)
    dataset = load_training_data(written(tmp_path / "data.json", *samples), image_folder=folder, boxes=frame)
    answers = learned_answers(dataset, trained)
    assert accuracy(answers, truths, folder, trained) == 1
    # The same, of a checkpoint that sees squares and is told otherwise for the call alone.
    assert accuracy(answers, truths, folder, processor, MODES[mode]) == 1
    # And as the page draws them.
    for answer, (name, truth) in zip(answers, truths, strict=True):
        height, width = SIZES[name]
        (box,) = boxes_in(answer)
        drawn = on_image(box, view(processor.image_processor, Preset("own", MODES[mode]), width, height))
        drawn = (drawn.left * width, drawn.top * height, drawn.right * width, drawn.bottom * height)
        assert box_iou(drawn, truth) > 0.5


@pytest.mark.parametrize("mode", ["native", "shortest_edge"])
def test_without_rewriting_boxes_would_be_missed(mode, folder, tmp_path):
    """So the test above can fail; the data says that its boxes are what they are not."""
    processor = processor_of(mode)
    samples, truths = grounding({name: SIZES[name] for name in ("tall", "wide")}, "square", 12)
    dataset = load_training_data(written(tmp_path / "data.json", *samples), image_folder=folder, boxes="image")
    answers = learned_answers(dataset, processor)
    assert accuracy(answers[:12], truths[:12], folder, processor) < 0.1
    assert accuracy(answers, truths, folder, processor) < 0.7


# --- what is rewritten


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("streaming", [False, True])
def test_all_turns_are_rewritten(mode, streaming, folder, tmp_path):
    texts = [f"What is in {BOX}?", f"A cup, beside {BOX}.", f"And {BOX}?", "Nothing: [1, 2, 3, 4]."]
    path = written(tmp_path / "data.json", sample("photo.jpg", *texts))
    dataset = load_training_data(path, image_folder=folder, streaming=streaming)
    (seen,) = rows_seen(dataset, processor_of(mode))
    assert seen == (texts if mode == "pad" else [text.replace(BOX, IN_IMAGE) for text in texts])

    dataset = load_training_data(path, image_folder=folder, streaming=streaming, boxes="image")
    (seen,) = rows_seen(dataset, processor_of(mode))
    there = convert_boxes(BOX, 480, 640, "image", "square")
    assert there != BOX and seen == ([text.replace(BOX, there) for text in texts] if mode == "pad" else texts)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("weights", [(None, None, None), (1, 1, 1)])
def test_every_part_of_a_mixture_has_its_own_frame(streaming, weights, folder, tmp_path):
    said = {"square": {"boxes": "square"}, "image": {"boxes": "image"}, "nothing": {}}
    entries = []
    for (name, of_boxes), weight in zip(said.items(), weights, strict=True):
        # Of the Hub's columns as well. `datasets` waits five seconds where a stream of parquet is left before its end.
        rows = [{"messages": [{"role": "user", "content": name}, {"role": "assistant", "content": BOX}],
                 "images": [{"bytes": (folder / "photo.jpg").read_bytes(), "path": None}]}] * 4  # fmt: skip
        path = tmp_path / f"{name}.json"
        if name == "image" and not (streaming and weight):
            path = tmp_path / "image.parquet"
            hf.Dataset.from_list(rows).cast_column("images", hf.List(hf.Image())).to_parquet(path)
        else:
            written(path, *[sample("photo.jpg", name, BOX)] * 4)
        entries.append({"path": str(path), "weight": weight, **of_boxes})
    for default, expected in (("square", IN_IMAGE), ("image", BOX)):
        dataset = load_training_data(datasets=entries, image_folder=folder, streaming=streaming, boxes=default)
        seen = dict(rows_seen(dataset, processor_of("native")))
        assert seen == {"square": IN_IMAGE, "image": BOX, "nothing": expected}


def test_the_cache_of_one_frame_is_not_that_of_the_other(folder, tmp_path):
    path = written(tmp_path / "data.json", sample("photo.jpg", "Where?", BOX))
    for frame, expected in (("square", IN_IMAGE), ("image", BOX), ("square", IN_IMAGE)):
        dataset = load_training_data(path, image_folder=folder, boxes=frame)
        assert rows_seen(dataset, processor_of("native")) == [["Where?", expected]]


def test_boxes_of_turned_images_are_of_the_upright_one(folder, tmp_path):
    """480 x 640 upright, in a file of 640 x 480."""
    path = written(tmp_path / "data.json", sample("turned.jpg", "Where?", "[0.16, 0.10, 0.39, 0.40]"))
    dataset = load_training_data(path, image_folder=folder)
    assert rows_seen(dataset, processor_of("native")) == [["Where?", "[0.05, 0.10, 0.35, 0.40]"]]


def test_several_images_are_rewritten_if_they_have_one_shape(folder, tmp_path, caplog):
    data_boxes._warn_unclear.cache_clear()
    samples = [
        sample(["photo.jpg", "double.jpg"], "Which?", BOX),
        sample(["photo.jpg", "tall.jpg"], "Which?", BOX),
        sample(["photo.jpg", "wide.jpg"], "Which?", BOX),
        sample(None, "No image", BOX),
    ]
    path = written(tmp_path / "data.json", *samples)
    dataset = load_training_data(path, image_folder=folder)
    with caplog.at_level(logging.WARNING, logger="convllava_hf"):
        seen = rows_seen(dataset, processor_of("native"))
    assert [texts[-1] for texts in seen] == [IN_IMAGE, BOX, BOX, BOX]
    assert len([record for record in caplog.records if "different shapes" in record.message]) == 1


def test_rows_of_other_makers_are_taken():
    """Content as one text, no column of the frame, and an image of which nobody knows how high it is."""
    row = {"messages": [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": BOX}]}
    image_processor = processor_of("native").image_processor
    seen = in_model_frame({**row, "images": [Image.new("RGB", (640, 480))]}, image_processor)
    assert seen["messages"][1]["content"] == IN_IMAGE and row["messages"][1]["content"] == BOX
    array = np.zeros((3, 480, 3), np.uint8)
    assert in_model_frame({**row, "images": [array]}, image_processor)["messages"] == row["messages"]
    assert in_model_frame({"prompt": "", "images": [array]}, image_processor)["prompt"] == ""


def test_unknown_frames_are_refused(folder, tmp_path):
    path = written(tmp_path / "data.json", sample("photo.jpg", "Where?", BOX))
    with pytest.raises(ConvLlavaError, match="'pixels'; expected square"):
        load_training_data(path, image_folder=folder, boxes="pixels")
    with pytest.raises(ConvLlavaError, match="'pixels'; expected square"):
        load_training_data(datasets=[{"path": str(path), "boxes": "pixels"}], image_folder=folder)


# --- check and inspect


def run(capsys, *argv) -> tuple[int, str, str]:
    code = cli.main(["data", *map(str, argv)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("frame", ["square", "image"])
@pytest.mark.parametrize("said", ["square", "image"])
def test_check_tells_the_frame_by_the_boxes(frame, said, folder, tmp_path, capsys):
    samples, _ = grounding(SIZES, frame, 12)
    samples += [sample(None, "Text?", "Text."), sample(["photo.jpg", "tall.jpg"], "Which?", f"{BOX}, {BOX}")]
    path = written(tmp_path / "data.json", *samples, sample("square.jpg", "Where?", "[100, 0, 500, 1000]"))
    code, out, err = run(capsys, "check", path, "--images", folder, "--boxes", said, "--json")
    assert (code, err) == (0, "")
    told = json.loads(out)["boxes"]
    assert (told["samples"], told["boxes"], told["thousandths"], told["unclear"]) == (50, 51, 1, 2)
    assert told["telling"] == 36 and told["looks_like"] == frame and told["declared"] == said
    assert (told["warning"] is None) is (frame == said)

    code, out, err = run(capsys, "check", path, "--images", folder, "--boxes", said)
    assert code == 0 and "Nothing wrong was found." in out
    assert f"look like fractions of the {'padded square' if frame == 'square' else 'image'}" in out
    assert ("Warning: " in out and f"set `boxes: {frame}`" in out) is (frame != said)
    assert "2 boxes are in samples with images of different shapes" in out


def test_check_says_when_it_cannot_tell(folder, tmp_path, capsys):
    """Of few boxes, or of images that are squares."""
    samples = [sample("photo.jpg", "Where?", BOX)] + [sample("square.jpg", "Where?", "[0.00, 0.10, 1.00, 0.90]")] * 40
    path = written(tmp_path / "data.json", *samples)
    assert "do not show whether" in run(capsys, "check", path, "--images", folder)[1]
    assert check_data(path, folder).boxes.looks_like is None
    path = written(tmp_path / "data.json", sample("photo.jpg", "Where?", "There. [0, 0, 1, 1]"))
    assert check_data(path, folder).boxes.outside == 0
    path = written(tmp_path / "data.json", sample("photo.jpg", "Where?", "There."))
    out = run(capsys, "check", path, "--images", folder)[1]
    assert "boxes" not in out.lower()


def test_counts_of_parts_add_up(folder, tmp_path):
    samples, _ = grounding(SIZES, "image", 12)
    whole, first, second = BoxCounts(), BoxCounts(), BoxCounts()
    for number, one in enumerate(samples):
        messages = [{"content": turn["value"]} for turn in one["conversations"]]
        for counts in (whole, first if number < 20 else second):
            counts.add_sample(messages, [SIZES[one["image"].removesuffix(".jpg")]])
    first.add(second)
    assert first.as_dict() == whole.as_dict() and first.expected == pytest.approx(whole.expected)


@pytest.mark.parametrize("mode", MODES)
def test_inspect_draws_the_boxes_on_what_is_seen(mode, folder, checkpoint, tmp_path, capsys):
    """A gray image, of which all that has a color is drawn: from pixel (64, 24) to (256, 168) of 640 x 480."""
    path = written(tmp_path / "data.json", sample("photo.jpg", "Where?", BOX))
    argv = ["inspect", path, "--images", folder, "--model", checkpoint, "--index", 0, "--save", tmp_path / "seen.png"]
    options = [word for key, value in MODES[mode].items() for word in (f"--{key.replace('_', '-')}", value)]
    code, out, err = run(capsys, *argv, *options)
    assert (code, err) == (0, "")
    assert (BOX if mode == "pad" else IN_IMAGE) in out and "with the boxes drawn on it" in out
    with Image.open(tmp_path / "seen.png") as saved:
        pixels = np.asarray(saved).astype(int)
    height, width = pixels.shape[:2]
    rows, columns = np.where(np.ptp(pixels, axis=-1) > 100)
    expected = np.array([0.1, 0.1625, 0.4, 0.3875]) if mode == "pad" else np.array([0.1, 0.05, 0.4, 0.35])
    found = np.array([columns.min() / width, rows.min() / height, columns.max() / width, rows.max() / height])
    np.testing.assert_allclose(found, expected, atol=0.02)

    seen = inspect_sample(path, folder, 0, checkpoint, image_options=MODES[mode], boxes="image")
    there = convert_boxes(BOX, 480, 640, "image", "square")
    assert (there if mode == "pad" else BOX) in seen.text


# --- training


@pytest.mark.slow
@pytest.mark.parametrize("frame", ["square", "image"])
def test_batches_of_training_and_of_the_eval_loss_are_rewritten(frame, converted_checkpoint, folder, tmp_path):
    pytest.importorskip("trl")
    from helpers.training_runs import RECIPES
    from helpers.training_runs import run as train

    from convllava_hf.training_record import read_record

    path = written(tmp_path / "data.json", *[sample("photo.jpg", f"In {BOX}?", f"At {BOX}.")] * 2)
    trainer = train(
        RECIPES / "stage1_projector.yaml",
        converted_checkpoint("stage1"),
        tmp_path / "out",
        dataset_name=path,
        eval_dataset_name=path,
        eval_strategy="steps",
        eval_steps=1,
        image_folder=folder,
        boxes=frame,
        image_aspect_ratio="native",
        max_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=1,
        save_strategy="no",
    )
    for loader in (trainer.get_train_dataloader(), trainer.get_eval_dataloader()):
        for batch in loader:
            for text in trainer.processing_class.tokenizer.batch_decode(batch["input_ids"]):
                assert text.count(IN_IMAGE if frame == "square" else BOX) == 2
    (*_, stage) = read_record(tmp_path / "out")["stages"]
    assert stage["boxes"] == frame
