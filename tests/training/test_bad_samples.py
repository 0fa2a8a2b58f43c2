"""Trainings over files with samples of every bad kind: what is left out, what stands in, and what the record says."""

import json
import shutil

import pytest


pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

from helpers import bad_samples  # noqa: E402
from helpers.bad_samples import BAD, conversation, in_file  # noqa: E402
from helpers.paths import GOLDEN  # noqa: E402
from helpers.tiny_models import make_image, make_processor  # noqa: E402
from helpers.training_runs import RECIPES, arguments_of, logged, run  # noqa: E402

from convllava_hf.cli import main as command  # noqa: E402
from convllava_hf.data.checking import check_data  # noqa: E402
from convllava_hf.data.collator import SafeImageCollator  # noqa: E402
from convllava_hf.data.columns import IMAGES  # noqa: E402
from convllava_hf.training import shapes  # noqa: E402
from convllava_hf.training_record import read_record  # noqa: E402


pytestmark = pytest.mark.slow


RECIPE = RECIPES / "stage3_instruct.yaml"  # says skip to both
SHORT = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "save_strategy": "no",
    "max_length": 400,
}
# Kinds that training can do nothing with; the others are found as well, and seen.
UNUSABLE = {*bad_samples.counts(), "missing image", "truncated image", "unreadable image", "empty image"}
UNUSABLE.add("too many visual tokens")


@pytest.fixture(scope="module")
def start(converted_checkpoint):
    return converted_checkpoint("stage2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images that can be used and some that cannot."""
    folder = tmp_path_factory.mktemp("images")
    shutil.copytree(GOLDEN / "images", folder, dirs_exist_ok=True)
    make_image().save(folder / "good.png")
    content = (folder / "photo.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(content[: len(content) // 3])
    (folder / "empty.jpg").touch()
    (folder / "text.jpg").write_text("no image")
    frames = [make_image(8, 8, seed=seed) for seed in range(3)]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    return folder


@pytest.fixture(scope="module")
def mixed(folder) -> list[str]:
    """Samples as JSON texts: every kind that can be used or not."""
    golden = [json.dumps(sample) for sample in json.loads((GOLDEN / "conversations.json").read_text())]
    images = [conversation(image=name) for name in ("cut.jpg", "empty.jpg", "text.jpg", "nowhere.png", "moving.gif")]
    many = conversation("<image>" * 30 + "\nCompare.", image=["good.png"] * 30)
    long = conversation(answer="word " * 600, image="good.png")
    with_images = [json.dumps(one) for one in (*images, many, long)]
    return [*golden, *(text for _, text in BAD[:20]), *with_images, *(text for _, text in BAD[20:])]


@pytest.fixture
def seen(monkeypatch) -> list[int]:
    """The samples of all batches, in their order."""
    indices: list[int] = []
    batches: list[list[dict]] = []
    call, collated = SafeImageCollator.__call__, SafeImageCollator._collated

    def noted(self, examples):
        batches.append(examples)
        return collated(self, examples)

    def called(self, examples):
        batch = call(self, examples)
        indices.extend(int(example["sample"]) for example in batches[-1])  # earlier ones may have been tries
        return batch

    monkeypatch.setattr(SafeImageCollator, "_collated", noted)
    monkeypatch.setattr(SafeImageCollator, "__call__", called)
    return indices


def test_all_kinds_are_left_out_and_what_is_found_good_is_trained_on(start, folder, mixed, seen, tmp_path, caplog):
    file = tmp_path / "data.json"
    file.write_text(in_file(mixed, "json"))
    report = check_data(file, folder, model=start, max_length=400, examples=1000)
    unusable = {one.sample for kind in UNUSABLE & set(report.counts) for one in report.problems[kind]}
    good = set(range(len(mixed))) - set(report.bad)
    assert {"animated image", "too long"} <= set(report.counts) and len(unusable) == len(BAD) + 5 and len(good) >= 8

    overrides = {**SHORT, "dataset_name": file, "image_folder": folder, "num_train_epochs": 2}
    trainer = run(RECIPE, start, tmp_path / "out", **overrides)
    assert trainer.data_collator.skipped == 2 * 5  # in each of two epochs
    assert good <= set(seen) and not unusable & set(seen)
    assert all(loss == loss for loss in logged(trainer, "loss"))
    (left_out,) = [one.getMessage() for one in caplog.records if "are left out" in one.getMessage()]
    assert f"{len(BAD)} of {len(mixed)} samples cannot be used" in left_out
    stage = read_record(tmp_path / "out")["stages"][-1]
    assert stage["samples_left_out"] == {"count": len(BAD), "kinds": dict(sorted(bad_samples.counts().items()))}
    assert str(folder) not in (tmp_path / "out" / "training_record.json").read_text()

    # Once more, from the cache of rows: the same samples, and the same count.
    first = list(seen)
    seen.clear()
    run(RECIPE, start, tmp_path / "again", **overrides)
    assert seen == first
    assert read_record(tmp_path / "again")["stages"][-1]["samples_left_out"] == stage["samples_left_out"]


@pytest.mark.parametrize("how", ["streaming", "by shape"])
def test_other_ways_to_read_the_same_file(how, start, folder, mixed, seen, tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text(in_file(mixed, "jsonl"))
    overrides = {**SHORT, "dataset_name": file, "image_folder": folder, "max_steps": 8}
    if how == "streaming":
        # accelerate hands out what the first process reads, and takes batches of it apart
        overrides |= {"dataset_streaming": "true", "group_by_modality_length": "false"}
    else:
        overrides |= {"image_aspect_ratio": "native", "group_by_image_shape": "true"}
    trainer = run(RECIPE, start, tmp_path / "out", **overrides)
    assert trainer.state.global_step == 8
    native = {"image_aspect_ratio": "native"} if how == "by shape" else None
    report = check_data(file, folder, model=start, max_length=400, examples=1000, image_options=native)
    unusable = {one.sample for kind in UNUSABLE & set(report.counts) for one in report.problems[kind]}
    assert seen and not unusable & set(seen)


def test_the_first_bad_sample_ends_the_run_and_is_named(start, folder, tmp_path, capfd):
    file = tmp_path / "data.json"
    good = json.dumps(conversation(image="good.png"))
    kinds = {kind: text for kind, text in BAD}
    for kind, text in kinds.items():
        file.write_text(in_file([good, text], "json"))
        overrides = {**SHORT, "dataset_name": file, "image_folder": folder, "on_bad_sample": "error", "max_steps": 1}
        assert command(["train", *arguments_of(RECIPE, start, tmp_path / "out", **overrides)]) == 2, kind
        (line,) = [one for one in capfd.readouterr().err.splitlines() if one.startswith("convllava: error:")]
        assert f"{file}, sample 1" in line and "on_bad_sample: skip" in line, kind
    overrides |= {"on_bad_sample": "skip", "max_bad_samples": 0}
    assert command(["train", *arguments_of(RECIPE, start, tmp_path / "out", **overrides)]) == 2
    assert "max_bad_samples allows 0" in capfd.readouterr().err
    overrides["on_bad_sample"] = "ignore"
    assert command(["train", *arguments_of(RECIPE, start, tmp_path / "out", **overrides)]) == 2
    assert "on_bad_sample is 'ignore'; expected error or skip" in capfd.readouterr().err


def test_sizes_that_cannot_be_told_count_as_squares(monkeypatch, tmp_path):
    """Before the first step, whatever is done about those images later."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    told = {"unreadable": None, "empty": (0, 5), "tall": (128, 64)}
    monkeypatch.setattr(shapes, "stored_size", lambda image: told[image["path"]])
    rows = [{"images": [{"bytes": None, "path": name}]} for name in told]
    dataset = datasets.Dataset.from_list(rows, features=datasets.Features({"images": IMAGES}))
    image_processor = make_processor(image_aspect_ratio="native").image_processor
    assert shapes.image_shapes(dataset, image_processor) == [[(2, 2)], [(2, 2)], [(2, 1)]]
