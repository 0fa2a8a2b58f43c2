"""Files, folders and mixtures become one data set, and TRL makes of it what the original code made."""

import functools
import json
import logging
import pickle

import pytest
from helpers.tiny_models import make_image

from convllava_hf.data import load_training_data
from convllava_hf.data.conversations import SampleError
from convllava_hf.errors import ConvLlavaError


hf = pytest.importorskip("datasets")

from convllava_hf.data import columns  # noqa: E402


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(hf.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    hf.disable_progress_bars()


@pytest.fixture
def records(golden) -> list[dict]:
    return json.loads((golden / "conversations.json").read_text())


@pytest.fixture
def load(golden):
    """Loads a data set whose images are the golden ones."""
    return functools.partial(load_training_data, image_folder=golden / "images")


@pytest.fixture
def rows(load, golden) -> list[dict]:
    return list(load(golden / "conversations.json"))


def write_lines(path, records) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def with_images_inside(rows: list[dict]) -> list[dict]:
    """The rows as people publish them: with the images' bytes."""
    inside = []
    for row in rows:
        images = []
        for image in row["images"]:
            with open(image["path"], "rb") as file:
                images.append({"bytes": file.read(), "path": None})
        inside.append({"messages": row["messages"], "images": images})
    return inside


def hub_dataset(rows: list[dict], **features) -> "hf.Dataset":
    features = {"messages": columns.FEATURES["messages"], "images": hf.List(hf.Image()), **features}
    names = list(rows[0])
    return hf.Dataset.from_list(rows, features=hf.Features({name: features[name] for name in names}))


# --- the main thing


def test_labels_are_the_originals(load, golden, tmp_path):
    """Ids and labels of every golden sample, from the JSON file through TRL's own collator."""
    pytest.importorskip("trl")
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    from convllava_hf import ConvLlavaProcessor
    from convllava_hf.convert import convert_checkpoint
    from convllava_hf.data.collator import SafeImageCollator

    convert_checkpoint(golden / "checkpoint-init", tmp_path / "model", progress=False)
    processor = ConvLlavaProcessor.from_pretrained(tmp_path / "model")
    dataset = load(golden / "conversations.json")
    trl_collator = DataCollatorForVisionLanguageModeling(processor, max_length=2048, assistant_only_loss=True)
    batch = SafeImageCollator(trl_collator, dataset)([dataset[index] for index in range(len(dataset))])

    expected = json.loads((golden / "labels.json").read_text())
    assert len(dataset) == len(expected) == 8
    assert batch["pixel_values"].shape == (7, 3, 320, 320)
    for row, sample in enumerate(expected.values()):
        ids, labels = [], []
        for token, label in zip(sample["input_ids"], sample["labels"], strict=True):
            count = 25 if token == -200 else 1
            ids += [processor.image_token_id if token == -200 else token] * count
            labels += [label] * count
        length = len(ids)
        assert batch["attention_mask"][row].sum() == length
        assert batch["input_ids"][row, :length].tolist() == ids
        assert batch["labels"][row, :length].tolist() == labels
        assert (batch["labels"][row, length:] == -100).all()


def test_rows_have_the_columns_that_trl_takes(rows, golden):
    assert [list(row) for row in rows] == [["messages", "images", "sample"]] * 8
    assert [row["sample"] for row in rows] == list(range(8))
    assert rows[5]["images"] == []
    assert rows[2]["images"] == [{"bytes": None, "path": str(golden / "images" / "photo.jpg")}]
    assert [message["role"] for message in rows[2]["messages"]] == ["user", "assistant"] * 3


# --- every kind of source gives the same


def test_json_lines_and_folders_of_them(load, records, rows, tmp_path):
    assert list(load(write_lines(tmp_path / "data.jsonl", records))) == rows
    assert list(load(write_lines(tmp_path / "lines.json", records))) == rows
    folder = tmp_path / "parts"
    folder.mkdir()
    write_lines(folder / "a.jsonl", records[:3])
    (folder / "b.json").write_text(json.dumps(records[3:]))
    for streaming in (False, True):
        parts = list(load(folder, streaming=streaming))
        assert [row["sample"] for row in parts] == [0, 1, 2, 0, 1, 2, 3, 4]
        assert [row["messages"] for row in parts] == [row["messages"] for row in rows]


def test_hub_form_in_json(load, rows, golden, tmp_path):
    hub = [{**row, "images": [image["path"] for image in row["images"]]} for row in rows]
    assert list(load(write_lines(tmp_path / "data.jsonl", hub))) == rows


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_and_saved_folders_with_images_inside(rows, tmp_path, streaming):
    inside = with_images_inside(rows)
    dataset = hub_dataset(inside)
    (tmp_path / "folder").mkdir()
    dataset.to_parquet(tmp_path / "folder" / "train-00000-of-00001.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    hf.DatasetDict({"train": dataset, "few": dataset.select(range(2))}).save_to_disk(tmp_path / "splits")
    expected = [{**row, "sample": index} for index, row in enumerate(inside)]
    sources = ["folder", "folder/train-00000-of-00001.parquet", "saved", "splits"]
    for source in sources:
        loaded = load_training_data(tmp_path / source, streaming=streaming)
        assert isinstance(loaded, hf.IterableDataset if streaming else hf.Dataset)
        assert list(loaded.features) == ["messages", "images", "sample"]
        assert list(loaded) == expected, source
    assert len(list(load_training_data(tmp_path / "splits", split="few", streaming=streaming))) == 2


@pytest.mark.parametrize("column", ["images", "image"])
def test_images_in_a_table_are_not_copied(rows, tmp_path, column):
    published = with_images_inside(rows) * 40
    if column == "image":
        published = [{"messages": row["messages"], "image": next(iter(row["images"]), None)} for row in published]
    hub_dataset(published, image=hf.Image()).to_parquet(tmp_path / "data.parquet")
    loaded = load_training_data(tmp_path / "data.parquet")
    assert len(loaded) == 320
    sizes = {file.name: file.stat().st_size for file in (tmp_path / "cache").rglob("*.arrow")}
    written = [size for name, size in sizes.items() if name.startswith("cache-")]
    assert written and sum(written) < max(sizes.values()) / 5  # texts alone
    if column == "images":  # pickled with the names of mapped files and not with what is in them
        assert len(pickle.dumps(loaded)) < 20_000


@pytest.mark.parametrize("streaming", [False, True])
def test_other_columns_of_published_data_sets(rows, records, golden, tmp_path, streaming):
    def check(published: list[dict], features: dict, expected: list[list], **kwargs):
        path = tmp_path / "published.parquet"
        hf.Dataset.from_list(published, features=hf.Features(features)).to_parquet(path)
        loaded = list(load_training_data(path, streaming=streaming, **kwargs))
        assert [row["messages"] for row in loaded] == [row["messages"] for row in rows]
        assert [row["images"] for row in loaded] == expected

    inside = with_images_inside(rows)
    in_bytes, in_files = ([row["images"] for row in source] for source in (inside, rows))
    messages = {"messages": columns.FEATURES["messages"]}
    one = [{"messages": row["messages"], "image": next(iter(row["images"]), None)} for row in inside]
    check(one, {**messages, "image": hf.Image()}, in_bytes)
    missing = [{**row, "images": row["images"] or None, "extra": 1} for row in inside]
    check(missing, {**messages, "images": hf.List(hf.Image()), "extra": hf.Value("int8")}, in_bytes)
    plain = {"path": hf.Value("string"), "bytes": hf.Value("binary")}  # no `datasets` wrote this
    check(inside, {**messages, "images": hf.List(plain)}, in_bytes)
    named = [{**row, "images": [image["path"].split("/")[-1] for image in row["images"]]} for row in rows]
    for row in named:
        del row["sample"]
    check(named, {**messages, "images": hf.List(hf.Value("string"))}, in_files, image_folder=golden / "images")
    llava = [{"id": "x", "image": None, **record} for record in records]
    turns = hf.List({"from": hf.Value("string"), "value": hf.Value("string")})
    features = {"id": hf.Value("string"), "image": hf.Value("string"), "conversations": turns}
    check(llava, features, in_files, image_folder=golden / "images")


@pytest.mark.parametrize("source", ["text only", "no column"])
def test_data_sets_without_images(rows, tmp_path, source):
    features = {"messages": columns.FEATURES["messages"]}
    published = [{"messages": rows[5]["messages"]}] * 3
    if source == "text only":
        features["images"] = hf.List(hf.Image())
        published = [{**row, "images": []} for row in published]
    hf.Dataset.from_list(published, features=hf.Features(features)).to_parquet(tmp_path / "data.parquet")
    for streaming in (False, True):
        loaded = list(load_training_data(tmp_path / "data.parquet", streaming=streaming))
        assert loaded == [{"messages": rows[5]["messages"], "images": [], "sample": index} for index in range(3)]


def test_streaming_is_the_same_and_lazy(load, rows, golden, records, tmp_path):
    assert list(load(golden / "conversations.json", streaming=True)) == rows
    # Samples before a bad one come before anything is said of it.
    stream = iter(load(write_lines(tmp_path / "data.jsonl", [*records, {"id": "bad"}]), streaming=True))
    assert [next(stream) for _ in records] == rows
    with pytest.raises(SampleError, match=r"sample 8 \(bad\)"):
        next(stream)


def test_streams_are_read_by_workers_once_each(load, golden):
    from torch.utils.data import DataLoader

    stream = load(golden / "conversations.json", streaming=True)
    loader = DataLoader(stream, batch_size=None, num_workers=1)
    assert [int(row["sample"]) for row in loader] == list(range(8))


@pytest.mark.slow  # after an error torch waits five seconds for a worker to end
@pytest.mark.parametrize("ending", ['{"id": "bad"}', '{"conversations'])
def test_error_in_a_worker_reads_as_one_line(load, tmp_path, ending):
    from torch.utils.data import DataLoader

    (tmp_path / "data.jsonl").write_text(ending)
    loader = DataLoader(load(tmp_path / "data.jsonl", streaming=True), batch_size=None, num_workers=1)
    with pytest.raises(ConvLlavaError, match=r"^\S*data.jsonl, (sample 0 \(bad\): `conv|line 1, column 2)") as caught:
        list(loader)
    assert "\n" not in str(caught.value)


def test_changed_file_is_read_again(load, records, tmp_path):
    path = tmp_path / "data.jsonl"
    assert len(load(write_lines(path, records))) == 8
    assert len(load(write_lines(path, records[:2]))) == 2


# --- images' folders


def test_images_lie_beside_the_file_by_default(records, tmp_path):
    write_lines(tmp_path / "data.jsonl", records[:1])
    assert load_training_data(tmp_path / "data.jsonl")[0]["images"][0]["path"] == str(tmp_path / "wide.png")


@pytest.mark.parametrize("streaming", [False, True])
def test_images_outside_the_folder_are_refused_by_name(load, records, rows, tmp_path, streaming):
    path = write_lines(tmp_path / "data.jsonl", [records[0], {**records[1], "image": "../labels.json"}])
    with pytest.raises(ConvLlavaError, match=r"sample 1 \(image-last\).*'\.\./labels\.json'.* not inside"):
        list(load(path, streaming=streaming))
    # A table from elsewhere cannot name files of this machine either.
    outside = [{"messages": rows[0]["messages"], "images": [{"bytes": None, "path": "/etc/hostname"}]}]
    plain = {"bytes": hf.Value("binary"), "path": hf.Value("string")}
    hub_dataset(outside, images=hf.List(plain)).to_parquet(tmp_path / "outside.parquet")
    with pytest.raises(ConvLlavaError, match="'/etc/hostname' is not inside"):
        list(load_training_data(tmp_path / "outside.parquet", streaming=streaming))


def test_paths_in_a_table_are_located(rows, tmp_path):
    make_image().save(tmp_path / "a.png")
    table = [{"messages": rows[0]["messages"], "images": [{"bytes": None, "path": "a.png"}]}]
    plain = {"bytes": hf.Value("binary"), "path": hf.Value("string")}
    hub_dataset(table, images=hf.List(plain)).to_parquet(tmp_path / "data.parquet")
    for streaming in (False, True):
        (row,) = load_training_data(tmp_path / "data.parquet", streaming=streaming)
        assert row["images"] == [{"bytes": None, "path": str(tmp_path / "a.png")}]


# --- what is refused


@pytest.mark.parametrize("streaming", [False, True])
def test_sample_is_named(load, records, tmp_path, streaming):
    records[3]["conversations"][1]["value"] = " "
    path = write_lines(tmp_path / "data.jsonl", records)
    with pytest.raises(ConvLlavaError, match=r"data\.jsonl, sample 3 \(grounding\): The answer in turn 1 is empty"):
        list(load(path, streaming=streaming))
    rows = [{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}] * 2, "images": []}]
    hub_dataset(rows).to_parquet(tmp_path / "data.parquet")
    with pytest.raises(ConvLlavaError, match="sample 0: It is the user's turn in turn 1"):
        list(load_training_data(tmp_path / "data.parquet", streaming=streaming))


def test_broken_and_missing_files(load, tmp_path):
    def refused(*args, **kwargs) -> str:
        with pytest.raises(ConvLlavaError) as caught:
            list(load_training_data(*args, **kwargs))
        return str(caught.value)

    (tmp_path / "broken.json").write_text('[{"conversations": [')
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    hf.Dataset.from_dict({"prompt": ["a"]}).to_parquet(tmp_path / "other.parquet")
    hub = hf.DatasetDict({"few": hf.Dataset.from_dict({"messages": [[]]})})
    hub.save_to_disk(tmp_path / "splits")
    assert "broken.json, line 1, column 21" in refused(tmp_path / "broken.json")
    assert "expected .json, .jsonl or .parquet" in refused(tmp_path / "text.txt")
    assert "broken.parquet" in refused(tmp_path / "broken.parquet")
    assert "has the columns prompt" in refused(tmp_path / "other.parquet")
    assert "has the columns prompt" in refused(tmp_path / "other.parquet", streaming=True)
    assert "no split 'train'; it has few" in refused(tmp_path / "splits")
    assert "no such file or folder" in refused(tmp_path / "missing.json")
    assert "no such file or folder" in refused("data/missing.json")
    assert "'nobody/nothing'" in refused("nobody/nothing")  # an id; the Hub cannot be reached
    assert "image folder" in refused(tmp_path / "broken.json", image_folder=tmp_path / "nowhere")


def test_arguments_that_do_not_go_together(tmp_path):
    for arguments in ({}, {"dataset_name": "a/b", "datasets": [{"path": "a/b"}]}, {"datasets": []}):
        with pytest.raises(ConvLlavaError, match="either `dataset_name` or `datasets`"):
            load_training_data(**arguments)


# --- mixtures


def text_file(tmp_path, letter: str, count: int) -> str:
    turns = [{"from": "human", "value": letter}, {"from": "gpt", "value": "answer"}]
    return write_lines(tmp_path / f"{letter}.jsonl", [{"id": str(i), "conversations": turns} for i in range(count)])


def letters(dataset) -> list[tuple[str, int]]:
    return [(row["messages"][0]["content"][0]["text"], row["sample"]) for row in dataset]


@pytest.mark.parametrize("streaming", [False, True])
def test_mixture_without_weights_takes_everything(tmp_path, load, golden, rows, streaming):
    mixture = [
        {"path": text_file(tmp_path, "a", 3)},
        {"path": str(golden / "conversations.json"), "image_folder": str(golden / "images"), "weight": None},
        {"path": text_file(tmp_path, "b", 2), "split": "train"},
    ]
    mixed = list(load_training_data(datasets=mixture, streaming=streaming))
    assert letters(mixed[:3] + mixed[11:]) == [("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 1)]
    assert mixed[3:11] == rows


@pytest.mark.parametrize("streaming", [False, True])
def test_weights_are_shares(tmp_path, caplog, streaming):
    caplog.set_level(logging.INFO, logger="convllava_hf.data.mixture")
    weights = {"a": 1, "b": 3, "c": 6, "d": 0}  # of any sum
    sizes = {"a": 1000, "b": 3000, "c": 900, "d": 5}  # `c` is used up first
    mixture = [{"path": text_file(tmp_path, name, sizes[name]), "weight": weights[name]} for name in weights]
    mixed = letters(load_training_data(datasets=mixture, seed=3, streaming=streaming))
    assert len(set(mixed)) == len(mixed)  # nothing twice
    counts = {name: sum(letter == name for letter, _ in mixed) for name in weights}
    assert counts["c"] == sizes["c"] and counts["d"] == 0
    for name in "abc":  # five standard deviations
        assert abs(counts[name] / len(mixed) - weights[name] / 10) < 5 * (0.25 / len(mixed)) ** 0.5
    # In every part of it, and not one data set after the other.
    for part in (mixed[: len(mixed) // 2], mixed[len(mixed) // 2 :]):
        assert abs(sum(letter == "c" for letter, _ in part) / len(part) - 0.6) < 0.1
    again, other = (letters(load_training_data(datasets=mixture, seed=s, streaming=streaming)) for s in (3, 4))
    assert again == mixed != other
    if not streaming:
        assert max(sample for letter, sample in mixed if letter == "b") > 2900  # not only its beginning
        assert f"{len(mixed)} of 4900 samples" in caplog.text


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ([{"name": "x"}], "at least a `path`"),
        (["a"], "at least a `path`"),
        ([{"path": "P", "fraction": 0.5}], "has 'fraction'; known are path, name, split, image_folder, weight"),
        ([{"path": "P", "weight": 1}, {"path": "P"}], "no `weight`"),
        ([{"path": "P", "weight": -1}], "is -1; expected"),
        ([{"path": "P", "weight": "1"}], "is '1'; expected"),
        ([{"path": "P", "weight": float("nan")}], "is nan; expected"),
        ([{"path": "P", "weight": 0}], "All weights"),
        ([{"path": "missing.json"}], "'missing.json'"),
    ],
)
def test_mixtures_that_cannot_be(tmp_path, entries, says):
    path = text_file(tmp_path, "a", 2)
    entries = [{**e, "path": path} if isinstance(e, dict) and e.get("path") == "P" else e for e in entries]
    with pytest.raises(ConvLlavaError, match=says):
        load_training_data(datasets=entries)
