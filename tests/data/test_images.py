"""Bad images in training: named, or replaced by the same other sample on every rank."""

import logging
import pickle

import pytest
import torch
from helpers.tiny_models import make_image, make_processor
from jinja2 import TemplateError
from PIL import Image
from torch.utils.data import DataLoader

from convllava_hf.data.collator import SafeImageCollator, TrainingImageError
from convllava_hf.data.conversations import SampleError
from convllava_hf.errors import ConvLlavaError
from convllava_hf.modeling.image_utils_convllava import ImageError


class Images:
    """In place of TRL's collator: shows what it would be given."""

    def __init__(self, processor):
        self.processor = processor

    def __call__(self, examples):
        return [(example["sample"], example["images"]) for example in examples]


@pytest.fixture
def dataset(tmp_path) -> list[dict]:
    """Twenty samples: 3 and 7 have bad images, every fifth none at all."""
    rows = []
    for index in range(20):
        path = tmp_path / f"{index}.png"
        make_image(20 + index, 30, seed=index).save(path)
        images = [] if index % 5 == 0 else [{"bytes": None, "path": str(path)}]
        rows.append({"sample": index, "messages": [{"role": "user", "content": []}], "images": images})
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes()[:200])
    (tmp_path / "7.png").unlink()
    return rows


@pytest.fixture
def collate(processor, dataset):
    return lambda **kwargs: SafeImageCollator(Images(processor), dataset, **kwargs)


def samples(batch) -> list[int]:
    return [sample for sample, _ in batch]


def test_good_images_are_opened(collate, dataset, tmp_path):
    dataset[2]["images"] = [dataset[1]["images"][0], {"bytes": (tmp_path / "2.png").read_bytes(), "path": None}]
    dataset[4]["images"] = None  # as a table may have it
    before = [dict(row) for row in dataset]
    batch = collate()(dataset[:3] + dataset[4:5])
    assert samples(batch) == [0, 1, 2, 4]
    assert [[image.size for image in images] for _, images in batch] == [
        [], [(30, 21)], [(30, 21), (30, 22)], []
    ]  # fmt: skip
    assert all(isinstance(image, Image.Image) for _, images in batch for image in images)
    assert dataset == before


def test_error_names_file_and_sample(collate, dataset, tmp_path):
    with pytest.raises(TrainingImageError, match="Sample 7 has.*'?" + str(tmp_path / "7.png")) as caught:
        collate()(dataset[5:9])
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    assert "convllava data check" in str(caught.value) and "on_bad_image: skip" in str(caught.value)
    with pytest.raises(TrainingImageError, match="Sample 3 has.*3.png.*decoded"):
        collate()(dataset[3:4])
    in_bytes = {**dataset[0], "images": [{"bytes": b"no image", "path": None}]}
    with pytest.raises(TrainingImageError, match="Sample 0 has.*image in a data set"):
        collate()([in_bytes])


@pytest.mark.slow  # after an error torch waits five seconds for each worker to end
def test_error_in_a_worker_reads_as_one_line(collate, dataset):
    loader = DataLoader(dataset, batch_size=4, collate_fn=collate(), num_workers=1)
    with pytest.raises(TrainingImageError) as caught:
        list(loader)
    assert str(caught.value).startswith("Sample 3 has an image that cannot be read:")
    assert "\n" not in str(caught.value)


def test_skipping_replaces_alike_everywhere(collate, dataset, caplog):
    caplog.set_level(logging.WARNING, logger="convllava_hf.data.collator")
    collator = collate(policy="skip")
    batch = collator(dataset[:10])
    assert len(batch) == 10
    kept = [sample for sample in range(10) if sample not in (3, 7)]
    assert [sample for index, sample in enumerate(samples(batch)) if index in kept] == kept
    replaced = {index: samples(batch)[index] for index in (3, 7)}
    assert all(other not in (3, 7) and other % 5 for other in replaced.values())  # good ones, with images
    assert collator.skipped == 2
    assert "Sample 3 has" in caplog.text and "7.png" in caplog.text and "2 skipped so far" in caplog.text
    # Another process, another order, other neighbors: the same choice.
    for index, other in replaced.items():
        assert samples(collate(policy="skip")([dataset[index], dataset[1]])) == [other, 1]


def test_choices_differ_between_samples(processor, dataset):
    bad = [{**dataset[3], "sample": index} for index in range(200)]
    chosen = samples(SafeImageCollator(Images(processor), dataset, policy="skip", max_skipped=200)(bad))
    counts = {sample: chosen.count(sample) for sample in set(chosen)}
    assert len(counts) == 14  # all that are good and have images
    assert max(counts.values()) < 40


def test_bound(collate, dataset):
    collator = collate(policy="skip", max_skipped=2)
    collator(dataset[:10])
    with pytest.raises(TrainingImageError, match="3 samples have images.*allows 2.*max_bad_images.*Sample 3 has"):
        collator(dataset[3:4])
    with pytest.raises(TrainingImageError, match="1 samples"):
        collate(policy="skip", max_skipped=0)(dataset[3:4])


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_count_together(collate, dataset, context):
    collator = collate(policy="skip")
    loader = DataLoader(dataset * 3, batch_size=5, collate_fn=collator, num_workers=2, multiprocessing_context=context)
    assert sum(len(batch) for batch in loader) == 60
    assert collator.skipped == 6


@pytest.mark.slow
def test_bound_holds_for_workers_together(collate, dataset):
    loader = DataLoader(dataset * 3, 5, collate_fn=collate(policy="skip", max_skipped=3), num_workers=2)
    # Each of the two workers may count one more before it sees what the other has counted.
    with pytest.raises(TrainingImageError, match="^[45] samples have.*allows 3"):
        list(loader)


def test_stream(processor, dataset):
    """A data set without an index: its first good samples stand in, the same in every copy."""

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(dataset)

    collators = [SafeImageCollator(Images(processor), Stream(), policy="skip") for _ in range(2)]
    first, second = (samples(collator(dataset[3:8])) for collator in collators)
    assert first == second and first[1:4] == [4, 5, 6] and first[0] not in (3, 7)
    again = samples(pickle.loads(pickle.dumps(collators[0]))(dataset[7:8]))
    assert again == first[4:]


def test_without_the_column_sample(processor, dataset):
    """Trainers may drop it; the conversation then decides."""
    bare = [
        {**row, "sample": None, "messages": [{"role": "user", "content": str(index)}]}
        for index, row in enumerate(dataset)
    ]
    collators = [SafeImageCollator(Images(processor), dataset, policy="skip") for _ in range(2)]
    assert samples(collators[0](bare[3:4])) == samples(collators[1](bare[3:4]))


def test_nothing_to_replace_with(processor, dataset):
    for others in ([dataset[3], dataset[0]], []):
        with pytest.raises(TrainingImageError, match="can replace sample 3"):
            SafeImageCollator(Images(processor), others, policy="skip")(dataset[3:4])


def test_policies(collate):
    with pytest.raises(ConvLlavaError, match="'ignore'; expected error or skip"):
        collate(policy="ignore")
    for bound in (-1, 0.5, True, None):
        with pytest.raises(ConvLlavaError, match="expected a number from 0 up"):
            collate(policy="skip", max_skipped=bound)


def test_with_trls_collator(processor, dataset):
    """Batches with images, without, and with both, through the real one."""
    pytest.importorskip("trl")
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    for row in dataset:
        question = [{"type": "image", "text": None}] * len(row["images"]) + [{"type": "text", "text": "What?"}]
        answer = [{"type": "text", "text": "It."}]
        row["messages"] = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    trl_collator = DataCollatorForVisionLanguageModeling(processor, max_length=2048, assistant_only_loss=True)
    collator = SafeImageCollator(trl_collator, dataset, policy="skip")
    assert collator(dataset[0:5])["pixel_values"].shape[0] == 4  # one replaced, one of text
    assert collator(dataset[1:3])["pixel_values"].shape[0] == 2
    text_only = collator([dataset[0], dataset[5]])
    assert "pixel_values" not in text_only
    labels = text_only["labels"][0]
    assert processor.tokenizer.decode(labels[labels != -100]) == " It.</s>"


# --- faults that show only after images are opened


class Demanding(Images):
    """Has a fault of its own for some samples, wherever they stand, and counts how often it is called."""

    def __init__(self, processor, faults: dict[int, Exception]):
        super().__init__(processor)
        self.faults = faults
        self.calls = 0

    def __call__(self, examples):
        self.calls += 1
        for example in examples:
            if example["sample"] in self.faults:
                raise self.faults[example["sample"]]
        assert all(set(example) == {"sample", "messages", "images"} for example in examples)
        return super().__call__(examples)


FAULTS = {
    "too long": (
        ValueError("Prompt 2 is 9000 tokens long, and it would keep only 3 visual tokens."),
        TrainingImageError,
    ),
    "memory": (MemoryError(), TrainingImageError),
    "template": (TemplateError("System role\nnot supported"), SampleError),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_one_sample_is_found_in_its_batch(processor, dataset, name, caplog):
    fault, kind = FAULTS[name]
    key = "on_bad_sample" if kind is SampleError else "on_bad_image"
    with pytest.raises(kind, match=f"Sample 2 .*{key}: skip") as caught:
        SafeImageCollator(Demanding(processor, {2: fault}), dataset)(dataset[:3])
    assert "\n" not in str(caught.value) and (kind is SampleError or "2.png" in str(caught.value))
    policies = {"policy": "error", "sample_policy": "skip"} if kind is SampleError else {"policy": "skip"}
    demanding = Demanding(processor, {2: fault, 4: fault})
    collator = SafeImageCollator(demanding, dataset, **policies)
    chosen = samples(collator([dataset[index] for index in (0, 1, 2, 4, 6)]))
    assert (chosen[:2], chosen[4]) == ([0, 1], 6)
    assert all(other % 5 and other not in (2, 3, 4, 7) for other in chosen[2:4])
    assert collator.skipped == 2 and sum("Sample 2 " in record.getMessage() for record in caplog.records) == 1
    # Wherever it stands and beside whatever: the same choice.
    other = SafeImageCollator(Demanding(processor, {2: fault, 4: fault}), dataset, **policies)
    assert samples(other([dataset[2]])) == chosen[2:3]
    # Nothing is tried where nothing is wrong.
    demanding.calls = 0
    collator(dataset[8:10])
    assert demanding.calls == 1


def test_the_bound_of_refused_samples(processor, dataset):
    fault = TemplateError("no")
    demanding = Demanding(processor, dict.fromkeys((1, 2, 4), fault))
    collator = SafeImageCollator(demanding, dataset, sample_policy="skip", max_bad_samples=2)
    collator(dataset[1:3])
    with pytest.raises(SampleError, match="3 samples cannot be used.*allows 2.*max_bad_samples.*Sample 4 "):
        collator(dataset[4:5])


def test_a_fault_of_the_program_is_raised_as_it_is(processor, dataset):
    """Nobody is skipped for it."""
    for row in dataset:
        row["messages"] = [{"role": "user", "content": [{"type": "text", "text": "What?"}]}]
    for error in (KeyError("labels"), TypeError("unexpected keyword"), AssertionError()):
        collator = SafeImageCollator(Demanding(processor, {1: error, 2: error}), dataset, "skip", 100, "skip")
        with pytest.raises(type(error)):
            collator(dataset[:3])
        assert collator.skipped == 0


def test_a_fault_of_the_image_processor_is_raised_as_it_is(processor, dataset, monkeypatch):
    """Whatever is wrong with an image it says by an `ImageError`."""

    def fetching(self, image):
        raise TypeError("unexpected keyword")

    monkeypatch.setattr(type(processor.image_processor), "fetch_images", fetching)
    collator = SafeImageCollator(Images(processor), dataset, policy="skip")
    with pytest.raises(TypeError, match="unexpected keyword"):
        collator(dataset[:3])
    assert collator.skipped == 0


def test_what_opening_or_preparing_an_image_raises(processor, dataset, tmp_path, monkeypatch):
    """Of one image while it is opened, of another while it is prepared."""
    fetch, prepare = type(processor.image_processor).fetch_images, type(processor.image_processor).preprocess

    def fetching(self, image):
        if isinstance(image, dict) and str(image["path"]).endswith("/1.png"):
            raise ImageError("index out of range")
        return fetch(self, image)

    def preparing(self, images, **kwargs):
        if any(getattr(image, "height", 0) == 22 for image in images):  # that of sample 2
            raise MemoryError("an integer is required")
        return prepare(self, images, **kwargs)

    monkeypatch.setattr(type(processor.image_processor), "fetch_images", fetching)
    monkeypatch.setattr(type(processor.image_processor), "preprocess", preparing)

    class Preparing(Images):
        def __call__(self, examples):
            for example in examples:
                if example["images"]:
                    self.processor.image_processor(example["images"])
            return super().__call__(examples)

    collator = SafeImageCollator(Preparing(processor), dataset, policy="skip")
    assert not set(samples(collator(dataset[:4]))) & {1, 2, 3} and collator.skipped == 3
    for index, says in ((1, "cannot be read: index"), (2, "cannot be prepared .*2.png.*: an integer")):
        with pytest.raises(TrainingImageError, match=f"Sample {index} has an image that {says}"):
            SafeImageCollator(Preparing(processor), dataset)(dataset[index : index + 1])


def test_images_too_different_for_one_batch(dataset):
    """Each is good alone. The one that makes the batch enormous is left out of it, and no other."""
    processor = make_processor(image_aspect_ratio="native", max_pixels=64 * 64 * 600)
    for index, size in ((1, (64, 64 * 400)), (2, (64 * 300, 64))):
        Image.new("RGB", size[::-1]).save(dataset[index]["images"][0]["path"])

    class Preparing(Images):
        def __call__(self, examples):
            if images := [image for example in examples for image in example["images"]]:
                self.processor.image_processor(images)
            return super().__call__(examples)

    collator = SafeImageCollator(Preparing(processor), dataset[:10], policy="skip")
    chosen = samples(collator([dataset[index] for index in (4, 1, 2, 6)]))
    assert chosen[0] == 4 and chosen[2:] == [2, 6] and chosen[1] != 1
    assert collator.skipped == 1
    assert samples(collator([dataset[1], dataset[0]])) == [1, 0]
    with pytest.raises(ValueError, match="padded to"):
        SafeImageCollator(Preparing(processor), dataset)(dataset[1:3])


def test_too_many_visual_tokens_through_trls_collator(processor, dataset):
    pytest.importorskip("trl")
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    for row in dataset:
        if row["sample"] == 2:
            row["images"] = row["images"] * 30
        question = [{"type": "image", "text": None}] * len(row["images"]) + [{"type": "text", "text": "What?"}]
        answer = [{"type": "text", "text": "It. " * 100}]
        row["messages"] = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    trl_collator = DataCollatorForVisionLanguageModeling(processor, max_length=100, assistant_only_loss=True)
    collator = SafeImageCollator(trl_collator, dataset, policy="skip")
    batch = collator(dataset[0:3])
    assert batch["input_ids"].shape == (3, 100) and batch["pixel_values"].shape[0] == 2
    assert collator.skipped == 1
    with pytest.raises(TrainingImageError, match="Sample 2 has 30 images.*visual tokens.*on_bad_image"):
        SafeImageCollator(trl_collator, dataset)(dataset[0:3])
