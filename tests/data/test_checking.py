"""`convllava data check` finds every kind of problem that was sown, and `inspect` shows what the model sees."""

import io
import json
import re
import sys

import numpy as np
import pytest
from helpers.tiny_models import make_image
from PIL import Image

from convllava_hf import cli
from convllava_hf.data import checking
from convllava_hf.data.checking import check_data
from convllava_hf.data.conversations import sample_of
from convllava_hf.data.image_files import examine
from convllava_hf.data.inspecting import inspect_sample
from convllava_hf.data.tokens import TokenCounter, with_images
from convllava_hf.errors import ConvLlavaError


def conversation(question="<image>\nWhat?", answer="It.", **more) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns, **more}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of good images of every format, and one of each bad kind."""
    folder = tmp_path_factory.mktemp("data") / "images"
    folder.mkdir()
    image = make_image(80, 60)
    for name in ("a.png", "a.jpg", "a.webp", "a.gif", "a.bmp", "a.tiff"):
        image.save(folder / name)
    image.convert("L").save(folder / "gray.png")
    image.convert("CMYK").save(folder / "cmyk.jpg")
    image.save(folder / "progressive.jpg", progressive=True)
    for name in ("a.png", "a.jpg", "a.webp", "a.gif", "progressive.jpg"):
        content = (folder / name).read_bytes()
        (folder / f"cut-{name}").write_bytes(content[: len(content) * 2 // 3])
    (folder / "zero.png").touch()
    (folder / "text.jpg").write_text("no image at all")
    frames = [make_image(8, 8, seed=seed) for seed in range(3)]
    for name in ("moving.gif", "moving.png", "moving.webp"):
        frames[0].save(folder / name, save_all=True, append_images=frames[1:])
    Image.new("1", (100_000, 1000)).save(folder / "bomb.png")  # 100 million pixels in a file of 12 kB
    Image.new("1", (200_000, 1000)).save(folder / "large-bomb.png")
    (folder.parent / "outside.png").write_bytes((folder / "a.png").read_bytes())
    (folder / "link.png").symlink_to(folder.parent / "outside.png")
    return folder


GOOD = ["a.png", "a.jpg", "a.webp", "a.gif", "a.bmp", "a.tiff", "gray.png", "cmyk.jpg", "progressive.jpg"]
CUT = ["cut-a.png", "cut-a.jpg", "cut-a.webp", "cut-a.gif", "cut-progressive.jpg"]
MOVING = ["moving.gif", "moving.png", "moving.webp"]
SOWN = [
    *(("truncated image", conversation(image=name)) for name in CUT),
    *(("animated image", conversation(image=name)) for name in MOVING),
    ("missing image", conversation(image="nowhere.png")),
    ("placeholder mismatch", conversation(image="")),  # an empty path is no image
    ("empty image", conversation(image="zero.png")),
    ("unreadable image", conversation(image="text.jpg")),
    ("gigantic image", conversation(image="bomb.png")),
    ("gigantic image", conversation(image="large-bomb.png")),
    ("path escape", conversation(image="../outside.png")),
    ("path escape", conversation(image="link.png")),
    ("path escape", conversation(image="/etc/hostname")),
    ("malformed", conversation(image="https://host/a.png")),
    ("malformed", conversation(image={"url": "a.png"})),
    ("malformed", {"id": "none"}),
    ("wrong role", {"conversations": [{"from": "robot", "value": "Hi"}] * 2}),
    ("wrong role", {"conversations": [{"from": "human", "value": "Hi"}] * 2}),
    ("placeholder mismatch", conversation(image=["a.png", "a.jpg"])),
    ("placeholder mismatch", conversation("What?", image="a.png")),
    ("empty answer", conversation(answer="  ", image="a.png")),
]


def write(path, records) -> str:
    path.write_text(json.dumps(records, indent=1))
    return str(path)


def run(capsys, *argv) -> tuple[int, str, str]:
    code = cli.main(["data", *map(str, argv)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# --- check


def test_golden_data_are_clean(golden, checkpoint, capsys):
    argv = ["check", golden / "conversations.json", "--images", golden / "images", "--model", checkpoint, "--json"]
    code, out, err = run(capsys, *argv)
    assert (code, err) == (0, "")
    report = json.loads(out)
    counts = {name: report[name] for name in ("ok", "samples", "bad_samples", "text_only", "turns", "images")}
    assert counts == {"ok": True, "samples": 8, "bad_samples": 0, "text_only": 1, "turns": 22, "images": 7}
    assert report["problems"] == []


def test_tokens_are_counted_as_the_original_has_them(golden, tmp_path):
    from convllava_hf.convert import convert_checkpoint

    convert_checkpoint(golden / "checkpoint-init", tmp_path / "model", progress=False)
    report = check_data(golden / "conversations.json", golden / "images", model=tmp_path / "model")
    labels = json.loads((golden / "labels.json").read_text()).values()
    lengths = [len(sample["input_ids"]) + 24 * sample["input_ids"].count(-200) for sample in labels]
    assert report.tokens.total == sum(lengths)
    assert report.tokens.longest == max(lengths)
    assert report.tokens.visual == 7 * 25
    assert report.tokens.supervised == sum(label != -100 for sample in labels for label in sample["labels"])


@pytest.mark.parametrize(("kind", "record"), SOWN, ids=lambda value: value if isinstance(value, str) else "")
def test_each_kind_is_found(images, tmp_path, kind, record):
    path = write(tmp_path / "data.json", [conversation(image="a.png"), {**record, "id": "sown"}])
    report = check_data(path, images)
    assert report.counts == {kind: 1}
    (problem,) = report.problems[kind]
    assert (problem.sample, problem.id) == (1, "sown")
    assert report.samples == 2 and report.bad_samples == 1 and not report.clean


def test_good_images_are_found_good(images, tmp_path):
    report = check_data(write(tmp_path / "data.json", [conversation(image=name) for name in GOOD]), images)
    assert report.clean and report.images == len(GOOD)


def test_sown_data_set_as_table_and_json(images, tmp_path, capsys):
    records = [conversation(image=name) for name in GOOD] + [record for _, record in SOWN] + [conversation("Text?")]
    path = write(tmp_path / "data.json", records)
    code, out, err = run(capsys, "check", path, "--images", images, "--json")
    assert (code, err) == (1, "")
    report = json.loads(out)
    assert not report["ok"] and report["bad_samples"] == len(SOWN) and report["samples"] == len(records)
    assert report["text_only"] == 1
    expected = {}
    for kind, _ in SOWN:
        expected[kind] = expected.get(kind, 0) + 1
    assert {problem["kind"]: problem["count"] for problem in report["problems"]} == expected
    assert [problem["count"] for problem in report["problems"]] == sorted(expected.values(), reverse=True)

    code, out, err = run(capsys, "check", path, "--images", images)
    assert (code, err) == (1, "")
    assert f"{len(SOWN)} of {len(records)} samples have something wrong" in out
    for kind, count in expected.items():
        assert re.search(rf"^ +{count}  {kind} ", out, re.M)
    assert "and 2 more" in out  # five are cut short, three of them shown


def test_lengths_and_what_is_learned(checkpoint, images, tmp_path, capsys):
    long = "word " * 100
    records = [
        conversation(image="a.png"),
        conversation(answer=long, image="a.png", id="long answer"),
        conversation(f"<image>\n{long}", image="a.png", id="long question"),
        conversation(image="nowhere.png"),  # not counted, as its size may be anything
    ]
    path = write(tmp_path / "data.json", records)
    tokens = [len(inspect_sample(path, images, index, checkpoint).tokens) for index in range(3)]
    limit = tokens[0]
    argv = ["check", path, "--images", images, "--model", checkpoint, "--json", "--max-length"]
    report = json.loads(run(capsys, *argv, limit)[1])
    found = {problem["kind"]: [e["id"] for e in problem["examples"]] for problem in report["problems"]}
    assert found["too long"] == ["long answer", "long question"]
    assert found["no supervised token"] == ["long question"]
    assert f"{tokens[1]} tokens, 4 of them visual; the limit is {limit}" in json.dumps(report)
    assert report["bad_samples"] == 3
    assert report["tokens"]["samples"] == 3 and report["tokens"]["longest"] == max(tokens)
    assert "too long" not in run(capsys, *argv, max(tokens))[1]
    assert "too long" in run(capsys, *argv, max(tokens) - 1)[1]


@pytest.mark.slow  # workers import everything anew
def test_many_samples_are_checked_by_workers(images, tmp_path, checkpoint, monkeypatch):
    """The same report in the same order, whoever looked."""
    monkeypatch.setattr(checking, "ALONE", 0)
    records = [conversation(image=GOOD[index % len(GOOD)], id=index) for index in range(300)]
    for index in (5, 131, 280, 299):
        records[index] = conversation(image="nowhere.png", id=index)
    path = write(tmp_path / "data.json", records)
    alone = check_data(path, images, model=checkpoint, workers=1)
    assert alone.counts == {"missing image": 4}
    assert [problem.sample for problem in alone.problems["missing image"]] == [5, 131, 280]
    assert check_data(path, images, model=checkpoint, workers=2) == alone


def test_broken_file_is_a_finding(images, tmp_path, capsys):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([conversation(image="a.png")] * 3)[:-20])
    code, out, err = run(capsys, "check", path, "--images", images, "--json")
    report = json.loads(out)
    assert code == 1 and report["samples"] == 2
    (problem,) = report["problems"]
    assert problem["kind"] == "broken file" and "line 1, column" in problem["examples"][0]["detail"]


def test_tables_are_checked_too(images, tmp_path, golden, monkeypatch):
    hf = pytest.importorskip("datasets")
    monkeypatch.setattr(hf.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    hf.disable_progress_bars()
    contents = [(images / name).read_bytes() for name in ("a.png", "cut-a.jpg", "zero.png")]
    messages = sample_of(conversation(image="a.png"))["messages"]
    rows = [{"messages": messages, "images": [{"bytes": content, "path": None}]} for content in contents]
    rows.append({"messages": messages, "images": []})
    from convllava_hf.data.columns import FEATURES

    features = hf.Features({name: FEATURES[name] for name in ("messages", "images")})
    hf.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "data.parquet")
    report = check_data(tmp_path / "data.parquet")
    assert report.counts == {"truncated image": 1, "empty image": 1, "placeholder mismatch": 1}
    assert report.samples == 4 and report.images == 3


def test_mistakes_in_check(images, tmp_path, golden, checkpoint, capsys):
    path = write(tmp_path / "data.json", [conversation(image="a.png")])
    for argv, says in (
        (["nowhere.json", "--images", images], "no such file"),
        ([path, "--images", tmp_path / "nowhere"], "nowhere"),
        ([path, "--images", images, "--model", golden / "checkpoint-init"], "convllava convert"),
        ([images / "a.png", "--images", images], "expected .json, .jsonl or .parquet"),
    ):
        code, out, err = run(capsys, "check", *argv)
        assert (code, out) == (2, "") and says in err and err.count("\n") == 1
    with pytest.raises(SystemExit) as caught:
        run(capsys, "check", path, "--max-length", "0")
    assert caught.value.code == 2


def test_what_is_found_good_can_be_opened(processor):
    """Over damaged files of many kinds: what passes the check is opened in training as well, and what does not is
    not. Only images that move or are too large are opened but refused."""
    rng = np.random.default_rng(0)
    encoded = []
    for options in (
        {"format": "PNG"},
        {"format": "JPEG"},
        {"format": "JPEG", "progressive": True},
        {"format": "WEBP"},
    ):
        buffer = io.BytesIO()
        make_image(60, 80).save(buffer, **options)
        encoded.append(buffer.getvalue())
    outcomes = {True: 0, False: 0}
    for _ in range(600):
        content = bytearray(encoded[rng.integers(len(encoded))])
        if rng.random() < 0.4:
            del content[rng.integers(1, len(content)) :]
        else:
            for _ in range(rng.integers(1, 6)):
                content[rng.integers(len(content))] = rng.integers(256)
        image = {"bytes": bytes(content), "path": None}
        try:
            processor.image_processor(image)
            opens = True
        except ValueError:
            opens = False
        examined = examine(image)
        assert opens or examined.kind is not None, examined
        assert not opens or examined.kind in (None, "animated image", "gigantic image"), examined
        outcomes[opens] += 1
    assert min(outcomes.values()) > 100


def test_size_is_that_of_the_upright_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    make_image(40, 90).save(tmp_path / "turned.jpg", exif=exif)
    make_image(40, 90).save(tmp_path / "plain.jpg")
    assert examine({"bytes": None, "path": str(tmp_path / "turned.jpg")}).size == (90, 40)
    assert examine({"bytes": None, "path": str(tmp_path / "plain.jpg")}).size == (40, 90)


def test_counting_prepares_no_image(processor, monkeypatch):
    sample = sample_of(conversation("<image>\n<image>\nWhich?", image=["a.png", "b.png"]))
    images = [make_image(30, 50), make_image(70, 20)]
    real = processor.apply_chat_template(
        with_images(sample["messages"], images),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ids = np.ravel(real["input_ids"])
    monkeypatch.setattr(type(processor.image_processor), "preprocess", lambda *args, **kwargs: pytest.fail("prepared"))
    counted, within = TokenCounter(processor, 10_000)(sample["messages"], [(30, 50), (70, 20)])
    assert (counted.total, counted.visual) == (len(ids), 8)
    assert counted.supervised == within == np.sum(real["assistant_masks"])
    assert TokenCounter(processor, len(ids) - 2)(sample["messages"], [(30, 50), (70, 20)])[1] == within - 2


# --- inspect


def test_inspect_shows_the_golden_sample(golden, checkpoint, tmp_path, capsys):
    source = [golden / "conversations.json", "--images", golden / "images", "--model", checkpoint]
    code, out, err = run(capsys, "inspect", *source, "--index", 2, "--save", tmp_path / "seen.png")
    assert (code, err) == (0, "")
    assert "Sample 2 (three-turns)" in out and "\033" not in out
    assert "USER: <image>\nDescribe the image in detail. ASSISTANT: A street, a bicycle" in out
    marked = re.findall(r"\[\[(.*?)\]\]", out.split("Tokens")[1].partition("\n")[2])
    said = ["".join(run.split("|")).replace("▁", " ").replace("\\n", "\n") for run in marked]
    turns = json.loads((golden / "conversations.json").read_text())[2]["conversations"]
    assert said == [f" {turn['value']}</s>" for turn in turns if turn["from"] == "gpt"]
    assert "<image> x 4" in out and "seen as 128 x 128: 4 visual tokens" in out
    # What was saved is what the tower gets, up to the rounding of eight bits.
    from convllava_hf import ConvLlavaProcessor

    image_processor = ConvLlavaProcessor.from_pretrained(checkpoint).image_processor
    with Image.open(golden / "images" / "photo.jpg") as image:
        expected = image_processor(image)["pixel_values"][0]
    with Image.open(tmp_path / "seen.png") as image:
        assert image.size == (128, 128)
        seen = image_processor(image)["pixel_values"][0]
    assert np.abs(np.asarray(seen) - np.asarray(expected)).max() < 1e-5


def test_tokens_are_the_rendered_text(golden, checkpoint):
    """Also where one character is several tokens."""
    for index in range(8):
        seen = inspect_sample(golden / "conversations.json", golden / "images", index, checkpoint)
        assert "".join(token.text for token in seen.tokens) == seen.text.replace("<image>", "<image>" * 4)
        assert seen.visual == 4 * len(seen.images) and 0 < seen.supervised < len(seen.tokens)


def test_inspect_in_a_terminal(golden, checkpoint, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    source = [golden / "conversations.json", "--images", golden / "images", "--model", checkpoint, "--index", 5]
    out = run(capsys, "inspect", *source)[1]
    assert "\033[1;32m" in out and "[[" not in out and "No images" in out
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033" not in run(capsys, "inspect", *source)[1]


def test_text_cannot_steer_the_terminal(images, checkpoint, tmp_path, capsys):
    path = write(tmp_path / "data.json", [conversation(answer="\x1b[2Jgone\r", image="a.png", id="\x1b]0;x\x07")])
    out = run(capsys, "inspect", path, "--images", images, "--model", checkpoint, "--index", 0)[1]
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", out) and "\\x1b[2Jgone" in out
    path = write(tmp_path / "bad.json", [conversation(image="\x1b[2J.png", id="\x1b]0;x\x07")])
    out = run(capsys, "check", path, "--images", images)[1]
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", out) and "\\x1b[2J.png" in out


def test_inspect_saves_each_image(images, checkpoint, tmp_path, capsys):
    record = conversation("<image>\n<image>\nWhich?", image=["a.png", "gray.png"])
    path = write(tmp_path / "data.json", [record])
    argv = ["inspect", path, "--images", images, "--model", checkpoint, "--index", 0, "--save"]
    out = run(capsys, *argv, tmp_path / "seen.png")[1]
    assert f"Saved as {tmp_path / 'seen.png'}" in out and f"Saved as {tmp_path / 'seen-2.png'}" in out
    assert Image.open(tmp_path / "seen.png").size == Image.open(tmp_path / "seen-2.png").size == (128, 128)
    assert "seen.xyz" in run(capsys, *argv, tmp_path / "seen.xyz")[2]


def test_mistakes_in_inspect(images, checkpoint, tmp_path, capsys):
    records = [conversation(image="a.png"), conversation(image="cut-a.png"), conversation(answer="", image="a.png")]
    path = write(tmp_path / "data.json", records)
    for index, says in ((1, "cut-a.png"), (2, "empty"), (3, "no sample 3: ")):
        code, out, err = run(capsys, "inspect", path, "--images", images, "--model", checkpoint, "--index", index)
        assert (code, out) == (2, "") and says in err and err.count("\n") == 1
    for index in (99, -1):
        with pytest.raises(ConvLlavaError, match="has 3|from 0"):
            inspect_sample(path, images, index, checkpoint)


def test_data_without_datasets(images, tmp_path, monkeypatch):
    """JSON is checked without `datasets`, which comes with the extra `train`; other forms say what to install."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.delitem(sys.modules, "convllava_hf.data.columns", raising=False)
    assert check_data(write(tmp_path / "data.json", [conversation(image="a.png")]), images).clean
    (tmp_path / "data.parquet").touch()
    with pytest.raises(ConvLlavaError, match=r"pip install 'convllava-hf\[train\]'"):
        check_data(tmp_path / "data.parquet", images)
