"""Samples that cannot be used: named by default, and left out and counted where the recipe says so."""

import json
import logging
import os
import pickle
import subprocess
import sys

import pytest
from helpers import bad_samples
from helpers.bad_samples import BAD, conversation, in_file
from helpers.tiny_models import make_image
from torch.utils.data import DataLoader

from convllava_hf import cli
from convllava_hf.data import json_reader, load_training_data
from convllava_hf.data.bad_samples import BadSamples
from convllava_hf.data.checking import check_data
from convllava_hf.data.conversations import SampleError, UnreadableRecord, sample_of
from convllava_hf.data.json_reader import BrokenFileError, SampleFile
from convllava_hf.errors import ConvLlavaError


hf = pytest.importorskip("datasets")

from convllava_hf.data import columns  # noqa: E402


GOOD = [
    conversation(image="good.png", id="first"),
    conversation("Is <video> an element of HTML?", "It is: <video></video>.", video=None, audio=""),
    conversation("<video>\n<source></video>\nWhat does this play?", "Nothing yet."),
    conversation("What?", "It.", id="\ud83d", extra={"not": ["read"] * 150}),
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(hf.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    hf.disable_progress_bars()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data").mkdir()
    make_image().save(tmp_path / "data" / "good.png")
    return tmp_path / "data"


def write(path, samples: list[str], form: str = "json") -> str:
    path.write_text(in_file(samples, form))
    return str(path)


def spread() -> list[str]:
    """All bad samples with the good ones between them."""
    good = [json.dumps(record) for record in GOOD]
    bad = [text for _, text in BAD]
    return [*good[:1], *bad[:9], *good[1:3], *bad[9:], *good[3:]]


# --- each by itself


@pytest.mark.parametrize(("kind", "text"), BAD, ids=[f"{kind} {number}" for number, (kind, _) in enumerate(BAD)])
def test_each_is_named_left_out_and_found(kind, text, folder):
    """What ends a run, what is left out of one and what the check finds are the same."""
    path = write(folder / "data.json", [json.dumps(GOOD[0]), text])
    with pytest.raises(SampleError, match="sample 1.*on_bad_sample: skip") as caught:
        load_training_data(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 900
    assert caught.value.kind == kind
    assert "data check" in str(caught.value)
    str(caught.value).encode()
    bad = BadSamples("skip")
    assert [row["sample"] for row in load_training_data(path, bad_samples=bad)] == [0]
    assert bad.counts == {kind: 1}
    report = check_data(path)
    assert report.counts == {kind: 1} and report.bad == [1]
    json.dumps(report.as_dict(), ensure_ascii=False).encode()


@pytest.mark.parametrize("record", GOOD)
def test_good_ones_are_left_alone(record, folder):
    path = write(folder / "data.json", [json.dumps(record)])
    assert len(load_training_data(path)) == 1
    assert check_data(path).clean


def test_python_values_that_no_file_holds():
    deep: list = []
    for _ in range(5000):
        deep = [deep]
    for value in (deep, 10**5000, object(), b"bytes", {"a": deep}):
        for record in ({"conversations": value}, {"messages": value}, conversation(image=value), value):
            with pytest.raises(SampleError):
                sample_of(record)
    error = SampleError("broken text", "said")
    assert pickle.loads(pickle.dumps(error)).kind == "broken text"


# --- together


@pytest.mark.parametrize("form", ["json", "jsonl"])
def test_all_are_left_out_and_counted(form, folder, caplog):
    path = write(folder / f"data.{form}", spread(), form)
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        bad = BadSamples("skip", len(BAD))
        dataset = load_training_data(path, bad_samples=bad)
        assert [row["sample"] for row in dataset] == [0, 10, 11, len(BAD) + 3]
        assert list(dataset.features) == ["messages", "images", "sample"]
        assert bad.counts == bad_samples.counts() and bad.total == len(BAD)
        (told,) = [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING]
        assert f"{len(BAD)} of {len(BAD) + len(GOOD)} samples cannot be used" in told
        assert f"{bad.counts['malformed']} malformed" in told
        assert f"{path}, sample 1: The answer in turn 1 is empty" in told
    # The file read as the other policy has it does not come from that cache.
    with pytest.raises(SampleError, match="sample 1: The answer"):
        load_training_data(path)


def test_the_bound(folder):
    path = write(folder / "data.json", spread())
    with pytest.raises(
        ConvLlavaError, match=f"{len(BAD)} samples cannot be used.*max_bad_samples allows 3.*data check"
    ):
        load_training_data(path, on_bad_sample="skip", max_bad_samples=3)
    other = write(folder / "other.json", [json.dumps(GOOD[0]), BAD[0][1]])
    mixture = [{"path": write(folder / "one.json", [json.dumps(GOOD[0]), BAD[1][1]])}, {"path": other}]
    assert len(load_training_data(datasets=mixture, on_bad_sample="skip", max_bad_samples=2)) == 2
    with pytest.raises(ConvLlavaError, match="2 samples"):
        load_training_data(datasets=mixture, on_bad_sample="skip", max_bad_samples=1)
    none = write(folder / "none.json", [text for _, text in BAD[:2]])
    with pytest.raises(ConvLlavaError, match="has 2 samples, and none that can be used"):
        load_training_data(none, on_bad_sample="skip")
    for policy, bound in (("ignore", 1), ("skip", -1), ("skip", True), ("skip", 0.5)):
        with pytest.raises(ConvLlavaError, match="expected"):
            load_training_data(path, on_bad_sample=policy, max_bad_samples=bound)


def test_streams_leave_them_out_as_they_come(folder, caplog):
    path = write(folder / "data.jsonl", spread(), "jsonl")
    bad = BadSamples("skip", len(BAD))
    stream = load_training_data(path, streaming=True, bad_samples=bad)
    assert list(stream.features) == ["messages", "images", "sample"]
    assert bad.total == 0
    for _ in range(2):  # another epoch counts nothing twice
        assert [row["sample"] for row in stream] == [0, 10, 11, len(BAD) + 3]
        assert bad.counts == bad_samples.counts()
    assert sum("It is left out" in record.getMessage() for record in caplog.records) == 20
    with pytest.raises(SampleError, match="3 samples cannot be used"):
        list(load_training_data(path, streaming=True, on_bad_sample="skip", max_bad_samples=2))


def test_every_process_leaves_out_the_same(folder, monkeypatch, caplog):
    """The first one says so; workers of a data loader and mixtures leave out no others."""
    path = write(folder / "data.jsonl", spread(), "jsonl")
    first = list(load_training_data(path, on_bad_sample="skip"))
    caplog.clear()
    monkeypatch.setenv("RANK", "1")
    assert list(load_training_data(path, on_bad_sample="skip")) == first
    assert not caplog.records
    stream = load_training_data(path, streaming=True, on_bad_sample="skip")
    loader = DataLoader(stream, batch_size=None, num_workers=1)
    assert [int(row["sample"]) for row in loader] == [row["sample"] for row in first]
    other = write(folder / "other.json", [json.dumps(one) for one in GOOD[:2]] * 20)
    for weights in ({}, {"weight": 1}):
        mixture = [{"path": path, **weights}, {"path": other, **weights}]
        mixed = [list(load_training_data(datasets=mixture, on_bad_sample="skip", streaming=s)) for s in (False, True)]
        for rows in mixed:
            assert all(row["messages"] in [one["messages"] for one in first] for row in rows) and len(rows) >= 4
        assert weights or mixed[0] == mixed[1] == first + list(load_training_data(other))


@pytest.mark.parametrize("streaming", [False, True])
def test_tables(folder, streaming):
    """What a table can hold of them, beside images in it and beside paths."""
    content = (folder / "good.png").read_bytes()
    good, text_only = sample_of(GOOD[0])["messages"], sample_of(GOOD[1])["messages"]
    empty = [{**good[0]}, {"role": "assistant", "content": []}]
    rows = [
        (good, [content], None),
        (good, [], None),  # no image for the place
        (empty, [content], None),
        (text_only, [], None),
        (text_only, [], "run.mp4"),
        (good, [content], ""),
    ]
    features = hf.Features(
        {
            "messages": columns.FEATURES["messages"],
            "images": hf.List(hf.Image()),
            "video": hf.Value("string"),
        }
    )
    inside = [
        {"messages": messages, "images": [{"bytes": one, "path": None} for one in images], "video": video}
        for messages, images, video in rows
    ]
    hf.Dataset.from_list(inside, features=features).to_parquet(folder / "inside.parquet")
    for _ in range(2):
        bad = BadSamples("skip")
        loaded = list(load_training_data(folder / "inside.parquet", streaming=streaming, bad_samples=bad))
        assert [row["sample"] for row in loaded] == [0, 3, 5]
        assert loaded[0]["images"] == [{"bytes": content, "path": None}] and loaded[1]["images"] == []
        assert bad.counts == {"placeholder mismatch": 1, "empty answer": 1, "video sample": 1}
    named = [
        {**row, "images": ["../outside.png" if index == 5 else "good.png"] * len(row["images"])}
        for index, row in enumerate(inside)
    ]
    plain = hf.Features({**features, "images": hf.List(hf.Value("string"))})
    hf.Dataset.from_list(named, features=plain).to_parquet(folder / "named.parquet")
    bad = BadSamples("skip")
    loaded = list(load_training_data(folder / "named.parquet", streaming=streaming, bad_samples=bad))
    assert [row["sample"] for row in loaded] == [0, 3]
    assert loaded[0]["images"] == [{"bytes": None, "path": str(folder / "good.png")}]
    assert bad.counts == {"placeholder mismatch": 1, "empty answer": 1, "video sample": 1, "path escape": 1}
    if not streaming:
        assert check_data(folder / "named.parquet").counts == bad.counts
    with pytest.raises(SampleError, match="sample 1"):
        list(load_training_data(folder / "inside.parquet", streaming=streaming))


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_of_video_and_audio(folder, streaming):
    """Whether a file is there decides, in whatever form; it is not opened."""
    said = sample_of(GOOD[1])["messages"]
    forms = [
        ("video", hf.Value("string"), ["run.mp4", "", None]),
        ("videos", hf.List(hf.Value("string")), [["run.mp4"], [], None]),
        ("audio", hf.Audio(), [{"bytes": b"RIFF", "path": None}, {"bytes": None, "path": None}, None]),
        ("video", hf.Video(), [{"bytes": b"ftyp", "path": None}, {"bytes": None, "path": None}, None]),
    ]
    for number, (name, feature, values) in enumerate(forms):
        rows = [{"messages": said, name: value} for value in values]
        features = hf.Features({"messages": columns.FEATURES["messages"], name: feature})
        stored = hf.Features({**features, name: FILE if isinstance(feature, (hf.Audio, hf.Video)) else feature})
        table = hf.Dataset.from_list(rows, features=stored)
        if stored != features:
            table = table.cast(hf.Features({**features, name: type(feature)(decode=False)}))
        table.to_parquet(folder / f"{number}.parquet")
        bad = BadSamples("skip")
        loaded = load_training_data(folder / f"{number}.parquet", streaming=streaming, bad_samples=bad)
        assert [row["sample"] for row in loaded] == [1, 2], name
        assert bad.counts == check_data(folder / f"{number}.parquet").counts == {"video sample": 1}


FILE = {"bytes": hf.Value("binary"), "path": hf.Value("string")}


def test_a_table_with_text_that_is_not_utf8(folder):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    said = pa.array([b"fine", b"bro\xffken"], pa.binary()).view(pa.string())
    answers = pa.StructArray.from_arrays([pa.array(["assistant"] * 2), said], ["role", "content"])
    questions = pa.StructArray.from_arrays([pa.array(["user"] * 2), pa.array(["a", "b"])], ["role", "content"])
    turns = pa.concat_arrays([questions, answers]).take(pa.array([0, 2, 1, 3]))
    pq.write_table(pa.table({"messages": pa.ListArray.from_arrays([0, 2, 4], turns)}), folder / "data.parquet")
    assert check_data(folder / "data.parquet").counts == {"broken text": 1}
    with pytest.raises(ConvLlavaError, match="not UTF-8.*data check"):
        load_training_data(folder / "data.parquet")


# --- files


@pytest.mark.parametrize("chunk", [1, 7, 1000, 2**20])
@pytest.mark.parametrize("form", ["json", "jsonl"])
def test_reading_goes_on_after_a_sample_that_python_cannot_hold(chunk, form, tmp_path, monkeypatch):
    monkeypatch.setattr(json_reader, "CHUNK", chunk)
    texts = [text for kind, text in BAD if len(text) > 1000]
    kept = [json.dumps({"id": number, "text": ']}"\\\\" [{'}) for number in range(len(texts))]
    mixed = [text for pair in zip(kept, texts, strict=True) for text in pair]
    file = SampleFile(write(tmp_path / "data", mixed, form))
    records = list(file)
    assert [type(record) for record in records] == [dict, UnreadableRecord] * len(texts)
    assert records[0::2] == [json.loads(text) for text in kept]
    assert file.position == file.size and file.is_array is (form == "json")
    (tmp_path / "cut.json").write_text("[" + mixed[0] + "," + texts[1][:-30])
    read = iter(SampleFile(tmp_path / "cut.json"))
    assert next(read) == records[0]
    with pytest.raises(BrokenFileError, match="line 1, column .*nested too deep, and its end is not found"):
        next(read)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs on this system")
def test_what_is_no_file_is_not_waited_for(folder, capsys):
    os.mkfifo(folder / "data.json")
    assert cli.main(["data", "check", str(folder / "data.json")]) == 2
    assert cli.main(["data", "check", str(folder)]) == 2
    with pytest.raises(ConvLlavaError, match="FIFO"):
        load_training_data(folder)
    assert capsys.readouterr().err.count("\n") == 2


# --- data check --write-clean


def check(capsys, *argv) -> tuple[int, str, str]:
    code = cli.main(["data", "check", *map(str, argv)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("form", ["json", "jsonl"])
def test_clean_file_holds_the_good_samples_and_trains(form, folder, capsys):
    path = write(folder / f"data.{form}", spread(), form)
    clean = folder / f"clean.{form}"
    code, out, err = check(capsys, path, "--write-clean", clean)
    assert (code, err) == (1, "") and f"Wrote 4 of {len(BAD) + 4} samples to {clean}" in out
    assert list(SampleFile(clean)) == GOOD
    assert (json.loads if form == "json" else lambda text: text)(clean.read_text()) and not list(folder.glob(".*"))
    assert check_data(clean).clean
    rows, kept = load_training_data(clean), load_training_data(path, on_bad_sample="skip")
    assert rows["messages"][:] == kept["messages"][:] and rows["images"][:] == kept["images"][:]
    # Of nothing but good samples, all are written; as JSON lines where the name says so.
    code, out, _ = check(capsys, clean, "--write-clean", folder / "again.jsonl", "--json")
    assert code == 0 and json.loads(out)["clean_samples"] == 4
    assert [json.loads(line) for line in (folder / "again.jsonl").read_text().splitlines()] == GOOD


def test_clean_file_of_a_broken_one_ends_where_that_breaks_off(folder, capsys):
    path = folder / "data.json"
    path.write_text(in_file(spread(), "json")[:-20])
    assert check(capsys, path, "--write-clean", folder / "clean.json")[0] == 1
    assert json.loads((folder / "clean.json").read_text()) == GOOD[:3]
    path.write_text('{"conversations": 1}\n')
    assert check(capsys, path, "--write-clean", folder / "none.json")[0] == 1
    assert (folder / "none.json").read_text() == ""


def test_clean_file_replaces_nothing(folder, capsys, monkeypatch):
    path = write(folder / "data.json", spread())
    before = (folder / "data.json").read_bytes()
    hf.Dataset.from_list([sample_of(GOOD[1])]).to_parquet(folder / "table.parquet")
    for source, target, says in (
        (path, path, "already exists"),
        (path, folder / "good.png", "expected a name that ends in .json or .jsonl"),
        (path, folder / "nowhere" / "clean.json", "no folder that can be written to"),
        (path, f"{folder}/nul\0.json", "NUL"),
        (path, folder / ("x" * 300 + ".json"), "Cannot write"),
        (folder / "table.parquet", folder / "clean.json", "on_bad_sample: skip"),
    ):
        code, out, err = check(capsys, source, "--write-clean", target)
        assert (code, out) == (2, "") and says in err and err.count("\n") == 1
    assert (folder / "data.json").read_bytes() == before and not list(folder.glob(".*"))
    # Somebody else is faster, or the data change meanwhile.
    from convllava_hf.data import checking

    beaten, changed = "was written by somebody else", "changed while it was being checked"
    for other, says in ((folder / "clean.json", beaten), (folder / "data.json", changed)):
        monkeypatch.setattr(checking, "examine", lambda *args, file=other: file.write_text("[]") and _GOOD_ONE)
        code, _, err = check(capsys, path, "--write-clean", folder / "clean.json")
        assert code == 2 and says in err
        (folder / "clean.json").unlink(missing_ok=True)
    assert not list(folder.glob(".*"))


class _GOOD_ONE:
    kind, size = None, (1, 1)


@pytest.mark.slow
def test_the_table_of_a_terminal_that_knows_ascii_alone(folder):
    path = write(folder / "data.json", spread())
    done = subprocess.run(
        [sys.executable, "-m", "convllava_hf", "data", "check", path, "--examples", "99"],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"},
    )
    assert done.returncode == 1 and b"Traceback" not in done.stderr
    assert done.stdout.count(b"\\ud83d") >= 5
