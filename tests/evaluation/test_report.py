"""Two runs side by side, and the page about runs."""

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image


pytest.importorskip("datasets")
pytest.importorskip("rapidfuzz")
pytest.importorskip("scipy")

from helpers.benchmark_data import ROWS, make, save  # noqa: E402
from helpers.browser import CHROMIUM, chromium  # noqa: E402
from helpers.paths import ROOT  # noqa: E402

from convllava_hf import cli  # noqa: E402
from convllava_hf.errors import ConvLlavaError  # noqa: E402
from convllava_hf.evaluation.benchmarks import BENCHMARKS  # noqa: E402
from convllava_hf.evaluation.comparison import compare  # noqa: E402
from convllava_hf.evaluation.engine import Reply  # noqa: E402
from convllava_hf.evaluation.gallery import OF_EACH, chosen, read_gallery, save_gallery  # noqa: E402
from convllava_hf.evaluation.html_report import report_page, write_report  # noqa: E402
from convllava_hf.evaluation.paper import PAPER, REFCOCO_SPLITS, refcoco_average  # noqa: E402
from convllava_hf.evaluation.predictor import Predictor  # noqa: E402
from convllava_hf.evaluation.run_settings import Model  # noqa: E402
from convllava_hf.evaluation.runner import evaluate  # noqa: E402
from convllava_hf.inference import load  # noqa: E402


@pytest.fixture(scope="module")
def assistant(checkpoint):
    return load(checkpoint, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def run_in(checkpoint, assistant):
    """A function: a run whose answers are made up by sample, with its gallery, in an output folder."""

    def evaluated(output: Path, name: str, path: Path, answer) -> Path:
        def ask(self, batch):
            return [Reply(answer(sample), 10, 4, [2]) for sample in batch.samples]

        model = Model(str(checkpoint), lambda: assistant, torch.float32)
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(Predictor, "predict", ask)
            folder, _, source = evaluate(BENCHMARKS[name], model, assistant.processor, output, path)
        save_gallery(folder, source)
        return folder

    return evaluated


@pytest.fixture
def run(run_in, tmp_path):
    """The same in a folder of the test's own."""
    return lambda name, path, output, answer: run_in(tmp_path / output, name, path, answer)


# --- comparing


def wrong(letters: str):
    """Answers every question of AI2D rightly but those with these ids."""
    return lambda sample: "X" if sample.id in letters.split() else sample.answers[0]


def test_runs_are_compared_sample_by_sample(run, tmp_path, capsys):
    path = make("ai2d", tmp_path / "data", samples=10)
    first = run("ai2d", path, "first", wrong("0 1 2 3 4 5"))
    second = run("ai2d", path, "second", wrong("5 6"))
    (one,) = compare(tmp_path / "first", tmp_path / "second")
    assert (one.scores, one.samples) == ((40, 80), 10)
    assert {sample.id for sample in one.better} == set("01234") and [sample.id for sample in one.worse] == ["6"]
    assert one.test.p_value == pytest.approx(2 * 7 / 64)  # six of ten differ, five or six of them to one side
    assert one.test.difference == 40 and one.test.interval[0] < 40 < one.test.interval[1]
    assert cli.main(["eval", "--compare", str(first), str(second), "--show", "2"]) == 0
    printed = capsys.readouterr().out
    assert "AI2D: accuracy, 10 samples in both" in printed
    assert "B less A: +40.00" in printed and "p = 0.22 (McNemar, exact)" in printed
    assert "5 became better:" in printed and "and 3 more" in printed and "1 became worse:" in printed
    assert "6: What does letter 6 stand for? [C]  A: C  B: X" in printed
    assert cli.main(["eval", "--compare", str(first), str(second), "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)
    assert told["test"]["difference"] == 40 and len(told["changed"]) == 6


def test_only_samples_that_both_have_answered_count(run, tmp_path):
    rows = [ROWS["mmbench"](index) for index in range(12)]
    whole = save(rows, tmp_path / "whole.parquet")
    first = run("mmbench", whole, "first", lambda sample: sample.answers[0])
    rows[5]["image"] = {"bytes": b"broken", "path": "5.png"}
    second = run("mmbench", save(rows, tmp_path / "broken.parquet"), "second", lambda sample: "A")
    (one,) = compare(first, second)
    assert one.samples == 8  # the second of three questions is left out with all of its copies
    assert one.scores == (100, 0)


def test_folders_of_several_runs_are_matched_by_name(run, tmp_path):
    for output in ("first", "second"):
        for name in ("pope", "mme"):
            run(name, make(name, tmp_path / "data", samples=12), output, lambda sample: "yes")
    run("ai2d", make("ai2d", tmp_path / "data", samples=4), "first", wrong(""))
    compared = compare(tmp_path / "first", tmp_path / "second")
    assert [one.name for one in compared] == ["mme", "pope"]
    assert all(one.test.p_value == 1 and not one.changed for one in compared)


def test_what_cannot_be_compared(run, tmp_path):
    path = make("ai2d", tmp_path / "data", samples=4)
    first = run("ai2d", path, "first", wrong(""))
    pope = run("pope", make("pope", tmp_path / "data", samples=4), "pope", lambda sample: "yes")
    with pytest.raises(ConvLlavaError, match="is a run of ai2d, and .* of pope"):
        compare(first, pope)
    rows = [{**ROWS["ai2d"](index), "answer": "0"} for index in range(4)]
    other = run("ai2d", save(rows, tmp_path / "other.parquet"), "other", wrong(""))
    with pytest.raises(ConvLlavaError, match="Sample 1 has the answers .* the runs are of other data"):
        compare(first, other)
    run("pope", make("pope", tmp_path / "data", samples=4), "first", lambda sample: "yes")
    run("mme", make("mme", tmp_path / "data", samples=4), "pope/x", lambda sample: "yes")
    with pytest.raises(ConvLlavaError, match="holds no finished run"):
        compare(first, tmp_path / "nowhere")
    (first / "record.json").write_text("{}")
    with pytest.raises(ConvLlavaError, match="is no record of this version"):
        compare(first, other)


# --- the page


class Page(HTMLParser):
    """Tags that are opened and closed, and everything that would be fetched."""

    VOID = {"meta", "img", "br", "rect", "path"}

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.sources = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.sources += [value for name, value in attributes if name in ("src", "href", "srcset", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def of(self, tag: str, name: str = "") -> list[dict]:
        return [
            values for found, values in self.tags if found == tag and name in (values.get("class") or "").split(" ")
        ]


@pytest.fixture(scope="module")
def reported(run_in, tmp_path_factory) -> Path:
    """An output folder of three runs: with boxes, with failures, and with text that means to break out."""
    folder = tmp_path_factory.mktemp("reported")
    rows = [ROWS["refcoco"](index) for index in range(4)]
    boxes = save(rows, folder / "boxes.parquet")
    run_in(folder / "out", "refcoco", boxes, lambda sample: "[0.30, 0.20, 0.60, 0.60]")
    rows = [ROWS["textvqa"](index) for index in range(20)]
    rows[3]["image"] = {"bytes": b"broken", "path": "<script>.png"}
    said = "<script>alert(1)</script> & \x1b[31m"
    texts = save(rows, folder / "text.parquet")
    run_in(folder / "out", "textvqa", texts, lambda sample: "sign" if int(sample.id) % 2 else said)
    run_in(folder / "out", "pope", make("pope", folder / "data", samples=9), lambda sample: "Yes, there is.")
    return folder / "out"


def test_the_page_holds_everything_itself(reported):
    text = write_report(reported).read_text(encoding="utf-8")
    page = Page(text)
    assert all(source.startswith(("data:image/jpeg;base64,", "#")) for source in page.sources)
    assert not page.of("script") and not page.of("link") and "url(" not in text
    assert "\x1b" not in text and "&lt;script&gt;alert(1)&lt;/script&gt; &amp;" in text
    names = {values["id"] for tag, values in page.tags if tag == "section" and "id" in values}
    assert names == {"refcoco", "textvqa", "pope"}
    assert {source[1:] for source in page.sources if source.startswith("#")} == names


def test_the_page_shows_scores_beside_the_papers(reported):
    text = write_report(reported).read_text(encoding="utf-8")
    rows = re.findall(r'<tr><th scope="row"><a href="#(\w+)">.*?</tr>', text)
    assert rows == ["pope", "refcoco", "textvqa"]
    row = re.search(r'<tr><th scope="row"><a href="#textvqa">.*?</tr>', text)[0]
    record = json.loads((reported / "textvqa" / "record.json").read_text())
    for shown in (f"{record['score']:.1f}", "59.1", "62.5", "65.8", "1 failed", "without OCR tokens"):
        assert shown in row
    assert re.search(r'<tr><th scope="row"><a href="#refcoco">.*?</tr>', text)[0].count("–") == 3
    assert "1 samples got no answer (1 image)" in text and "&lt;script&gt;.png" in text


def test_the_gallery_has_right_and_wrong_samples_with_boxes(reported):
    page = Page(write_report(reported).read_text(encoding="utf-8"))
    gallery = read_gallery(reported / "textvqa")
    assert [row["score"] >= 0.5 for row in gallery] == [True] * OF_EACH + [False] * OF_EACH
    for row in gallery:
        image = Image.open(io.BytesIO(base64.b64decode(row["jpeg"])))
        assert image.size == (60, 100)
    assert len(page.of("article", "card")) == 12 + 6 + 9  # of RefCOCO six that are right, of POPE all
    truth, answer = page.of("rect", "truth"), page.of("rect", "answer")
    assert len(truth) == len(answer) == len(read_gallery(reported / "refcoco")) == 6
    for box in (*truth, *answer):  # 10 to 40 of 60, and 20 to 60 of 100 pixels
        assert [float(box[side]) for side in ("x", "y", "width", "height")] == [10, 20, 30, 40]


def test_the_gallery_is_spread_and_the_same_each_time():
    rows = [{"id": str(index), "score": float(index % 4 == 0)} for index in range(80)]
    ids = [int(row["id"]) for row in chosen(rows, 4)]
    assert ids == [0, 20, 40, 60, 1, 21, 41, 61]
    assert chosen(rows[:3], 4) == [rows[0], rows[1], rows[2]]


def test_a_run_without_a_gallery_has_a_page(reported, tmp_path):
    shutil.copytree(reported, tmp_path / "out")
    (tmp_path / "out" / "pope" / "gallery.json").unlink()
    assert "POPE" in write_report(tmp_path / "out").read_text(encoding="utf-8")


def test_the_papers_figures_are_those_of_the_docs():
    text = (ROOT / "docs" / "evaluate.md").read_text("utf-8")
    table = re.findall(r"^\| (\d+) \| \d+ \| ((?:[\d.]+ \| ){9}[\d.]+) \|$", text, flags=re.M)
    assert [int(side) for side, _ in table] == [768, 1024, 1536]
    columns = zip(*([float(cell) for cell in cells.split(" | ")] for _, cells in table), strict=True)
    assert list(columns) == [pytest.approx(row) for row in PAPER.values()]


def test_the_average_of_refcoco_is_over_all_eight_splits(reported):
    record = json.loads((reported / "refcoco" / "record.json").read_text())
    records = [
        {**record, "benchmark_name": name, "split": split, "score": 80.0 + number}
        for number, (name, split) in enumerate(REFCOCO_SPLITS)
    ]
    assert refcoco_average(records) == pytest.approx(83.5)
    assert refcoco_average(records[1:]) is None
    assert refcoco_average([{**records[0], "limit": 5}, *records[1:]]) is None
    page = report_page({f"run{number}": one for number, one in enumerate(records)}, {})
    row = re.search(r'<tr><th scope="row">RefCOCO average.*?</tr>', page)[0]
    assert all(shown in row for shown in ("83.5", "80.6", "81.4", "82.3"))


def test_the_command_writes_the_page(checkpoint, tmp_path, capsys):
    path = make("gqa", tmp_path / "data", samples=4)
    argv = ["eval", str(checkpoint), "--benchmark", "gqa", "--data", str(path), "--output", str(tmp_path / "out")]
    assert cli.main([*argv, "--device", "cpu", "--dtype", "float32", "--report"]) == 0
    assert "report.html" in capsys.readouterr().err
    assert len(Page((tmp_path / "out" / "report.html").read_text("utf-8")).of("img")) == 4


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_the_page_in_a_browser(reported):
    """Boxes lie on their images, nothing is fetched, and nothing sticks out on a phone."""
    page = write_report(reported)
    with chromium() as browser:
        for width, phone in ((1280, False), (390, True)):
            browser.open(page.as_uri(), width=width, phone=phone)
            browser.wait("document.readyState === 'complete' && document.images.length > 0")
            assert browser.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
            assert browser.evaluate("[...document.images].every(one => one.naturalWidth > 0)")
        assert not browser.problems
        assert all(url.startswith(("file:", "data:", "about:")) for url in browser.requests)


# --- files of other versions, and edited ones


def _without(value: dict, key: str) -> dict:
    return {name: entry for name, entry in value.items() if name != key}


@pytest.fixture
def edited(reported, tmp_path):
    """A function: a copy of the output folder in which a file of one run is another."""

    def edit(run: str, name: str, change) -> Path:
        folder = tmp_path / "edited"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(reported, folder)
        path = folder / run / name
        if name.endswith("jsonl"):
            rows = [change(json.loads(line)) for line in path.read_text().splitlines()]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            path.write_text(json.dumps(change(json.loads(path.read_text()))))
        return folder

    return edit


def test_every_key_that_a_page_needs_is_looked_at(edited, reported):
    """Without a key, or with another type under it, there is a page or one sentence that names file and key."""
    record = json.loads((reported / "textvqa" / "record.json").read_text())
    for key in record:
        changes = [_without(record, key), *({**record, key: value} for value in (None, [], "x", 1e400))]
        for changed in changes:
            folder = edited("textvqa", "record.json", lambda one, changed=changed: changed)
            try:
                write_report(folder)
            except ConvLlavaError as error:
                assert "record.json" in str(error), (key, error)
                assert key in str(error) or "this version" in str(error), (key, error)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda one: _without(one, "ocr_tokens"), "ocr_tokens is missing; expected true or false"),
        (lambda one: {**one, "score": "65"}, "score is '65'; expected a finite number"),
        (lambda one: {**one, "counts": {}}, "counts.left_out is missing; expected a number of samples"),
        (lambda one: {**one, "images": {"mode": "<b>"}}, "images.mode is '<b>'; expected one of pad, native"),
    ],
)
def test_an_edited_record_is_refused_by_its_key(edited, change, said):
    folder = edited("textvqa", "record.json", change)
    with pytest.raises(ConvLlavaError, match=re.escape(said)):
        write_report(folder)
    with pytest.raises(ConvLlavaError, match=re.escape(said)):
        compare(folder / "textvqa", folder / "textvqa")


@pytest.mark.parametrize("run", ["refcoco", "textvqa", "pope"])
def test_edited_samples_are_compared_or_refused_by_their_key(edited, run, monkeypatch):
    monkeypatch.setattr("convllava_hf.evaluation.comparison.paired_test", lambda *args: None)  # it takes its time
    for key in ("id", "question", "prediction", "answers", "score", "read", "group", "category", "failure"):
        for value in (None, [], 5, "x", [["x"]]):
            folder = edited(run, "samples.jsonl", lambda one, key=key, value=value: {**one, key: value})
            try:
                compare(folder / run, folder / run)
            except ConvLlavaError as error:
                assert key in str(error) or "no row" in str(error) or "no scored sample" in str(error), (key, value)


def test_an_edited_gallery_cannot_put_anything_else_into_the_page(edited):
    evil = '"><script>alert(1)</script><img src="https://example.org/x.png">'
    for run in ("refcoco", "textvqa"):
        for key in ("id", "question", "prediction", "answers", "score", "read", "jpeg", "truth", "overlap", "image"):
            for value in (evil, [evil], None, 5):
                folder = edited(run, "gallery.json", lambda rows, k=key, v=value: [{**row, k: v} for row in rows])
                try:
                    page = Page(write_report(folder).read_text())
                except ConvLlavaError as error:
                    assert "gallery.json" in str(error) and key in str(error), (key, value, error)
                else:
                    assert not page.of("script")
                    assert all(source.startswith(("data:image/jpeg;base64,", "#")) for source in page.sources)
