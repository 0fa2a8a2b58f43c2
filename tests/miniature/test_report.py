"""The quickstart's report: what the table, the figures and the page show is what was measured."""

import base64
import io
import math
import re
import sys
import warnings
import xml.etree.ElementTree as ElementTree
from html import unescape

import pytest
from helpers.tiny_models import make_image
from PIL import Image


pytest.importorskip("matplotlib")

from convllava_hf.errors import ConvLlavaError  # noqa: E402
from convllava_hf.miniature import figures  # noqa: E402
from convllava_hf.miniature.report import format_table, report_page, write_report  # noqa: E402
from convllava_hf.utils import report_style  # noqa: E402


KINDS = ("reading", "color", "shape", "presence", "count", "grounding")
COLUMNS = ("accuracy", "chance", "blind")


def sample(kind="reading", question="What does the sign say?", answer="3", truth="3", correct=True) -> dict:
    said = {"kind": kind, "question": question, "answer": answer, "truth": truth}
    return {**said, "blind": "7", "correct": correct}


BOXED = sample("grounding", "Give the box.", "[0.25, 0.50, 0.75, 1.00]", "[0.20, 0.45, 0.70, 0.95]")


@pytest.fixture
def results(tmp_path) -> dict:
    samples = [
        sample(),
        sample("color", "What color is the ring?", "red", "blue", correct=False),
        BOXED,
        sample("grounding", "Give the other box.", "no idea", "[0.10, 0.20, 0.30, 0.40]", correct=False),
    ]
    (tmp_path / "samples").mkdir()
    for index, one in enumerate(samples):
        one = samples[index] = {**one, "image": f"samples/{index:02d}.png"}
        make_image(256, 256, seed=index).save(tmp_path / one["image"])
    return {
        "seed": 5,
        "scenes": 600,
        "accuracy": dict(zip(KINDS, (0.931, 0.874, 0.852, 0.741, 0.718, 0.563), strict=True)),
        "chance": dict(zip(KINDS, (0.117, 0.19, 0.215, 0.508, 0.36, 0.02), strict=True)),
        "blind": dict(zip(KINDS, (0.098, 0.183, 0.222, 0.487, 0.333, 0.033), strict=True)),
        "questions": dict(zip(KINDS, (600, 588, 400, 600, 600, 600), strict=True)),
        "seconds": {"vision tower": 71.2, "language model": 96.5, "stage 1": 48.0, "total": 125.0},
        "losses": {
            "vision tower": [[10, 3.0], [20, 1.0], [40, 0.1]],
            "language model": [[10, 5.5], [20, 0.31], [30, math.nan]],
            "stage 1": [],
        },
        "model": {"parameters": {"vision tower": 671234, "projector": 41234}, "resolution": 256, "visual_tokens": 16},
        "versions": {"convllava_hf": "0.1.0", "torch": "2.13.0"},
        "machine": "AMD EPYC, 2 cores",
        "samples": samples,
    }


def images_of(results, folder) -> list[bytes]:
    return [(folder / one["image"]).read_bytes() for one in results["samples"]]


def words(html: str) -> str:
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", html)).split())


def section(page: str, heading: str) -> str:
    return next(part for part in page.split("<section>") if part.strip().startswith(f"<h2>{heading}</h2>"))


def rows_of(html: str) -> list[list[str]]:
    """The rows of the table in a section, cell by cell."""
    rows = re.findall(r"<tr>(.*?)</tr>", html.partition("<tbody>")[2], re.DOTALL)
    return [[words(cell) for cell in re.findall(r"<t[hd].*?</t[hd]>", row, re.DOTALL)] for row in rows]


# The table of the terminal


def test_table_holds_every_figure(results):
    head, rule, *rows = format_table(results).splitlines()
    assert head.split() == ["question", *COLUMNS] and set(rule) == {"-"}
    assert [row.split()[0] for row in rows] == list(KINDS)
    for row in rows:
        kind, *shown = row.split()
        assert [float(figure) for figure in shown] == pytest.approx(
            [results[name][kind] for name in COLUMNS], abs=0.0051
        )
    assert len({len(line) for line in (head, rule, *rows)}) == 1  # columns are aligned


@pytest.mark.parametrize("nothing", [None, math.nan])
def test_a_kind_that_was_not_asked_has_a_dash(results, tmp_path, nothing):
    for name in COLUMNS:
        results[name]["shape"] = nothing
    assert format_table(results).splitlines()[4].split() == ["shape", "–", "–", "–"]
    page = report_page(results, images_of(results, tmp_path))
    assert rows_of(section(page, "How often it is right"))[2][1:] == ["–", "–", "–"]


# Figures, by what matplotlib was told to draw


@pytest.fixture
def drawn(monkeypatch, results, tmp_path):
    """Draws the figure of some results; matplotlib's object and no file."""
    monkeypatch.setattr(figures, "file_of", lambda figure, form="png": figure)

    def draw(**more):
        changed = {**results, **more}
        return figures.report_png(changed, images_of(changed, tmp_path))

    return draw


def texts(figure) -> list[str]:
    found = [text.get_text() for axis in figure.axes for text in axis.texts]
    return found + [text.get_text() for text in figure.texts]


def test_bars_are_as_high_as_accuracies(results, drawn):
    accuracies = drawn().axes[1]
    assert [label.get_text() for label in accuracies.get_xticklabels()] == list(KINDS)
    for bars, name in zip(accuracies.containers, COLUMNS, strict=True):
        assert [bar.get_height() for bar in bars] == list(results[name].values())
        assert {f"{value:.2f}" for value in results[name].values()} <= {text.get_text() for text in accuracies.texts}


def test_curves_are_the_losses_on_one_scale(results, drawn):
    tower, language, nothing = drawn().axes[2:5]
    for axis, logged in ((tower, results["losses"]["vision tower"]), (language, [[10, 5.5], [20, 0.31]])):
        assert axis.get_yscale() == "log" and axis.lines[0].get_xydata().tolist() == logged
        assert axis.get_title("right") == f"{logged[-1][1]:g}"
    assert tower.get_ylim() == language.get_ylim() == nothing.get_ylim()
    assert [text.get_text() for text in language.texts] == ["1 losses not finite"]
    assert [text.get_text() for text in nothing.texts] == ["no loss was recorded"]


def test_samples_have_their_words_and_boxes(results, drawn):
    for axis, one in zip(drawn().axes[5:], results["samples"], strict=True):
        shown = [text.get_text() for text in axis.texts]
        mark = "✓" if one["correct"] else "✗"
        expected = [one["question"], f"{mark} {one['answer']}", f"truth: {one['truth']}", f"blind: {one['blind']}"]
        assert shown == expected
        dark = [patch for patch in axis.patches if patch.get_edgecolor()[0] < 0.5]  # the others are white margins
        boxes = {patch.get_linestyle(): (*patch.get_xy(), patch.get_width(), patch.get_height()) for patch in dark}
        if one["question"] == "Give the box.":
            assert boxes == {"--": pytest.approx((0.2, 0.45, 0.5, 0.5)), "-": pytest.approx((0.25, 0.5, 0.5, 0.5))}
        else:
            assert list(boxes) == (["--"] if one["kind"] == "grounding" else [])  # what it answered is no box


@pytest.mark.parametrize("boxed", [True, False])
def test_figure_says_which_box_is_which(results, drawn, boxed):
    """Where there are boxes, even if only below the first row. A second row makes it higher."""
    first = results["samples"][0]
    one_row = drawn(samples=[first] * 6)
    two_rows = drawn(samples=[first] * 6 + [results["samples"][2] if boxed else first])
    assert texts(two_rows).count("solid: box answered, dashed: true box") == boxed
    assert two_rows.get_figheight() > one_row.get_figheight() + 2


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("[0.80, 0.90, 1.20, 1.10]", (0.8, 0.9, 0.2, 0.1)),  # sticks out
        ("[0.50, 0.60, 0.20, 0.10]", (0.2, 0.1, 0.3, 0.5)),  # inside out
        ("[0.50, 0.60]", None),
        ("", None),
    ],
)
def test_boxes_of_odd_answers(answer, expected):
    found = dict(figures.boxes({**BOXED, "answer": answer}))
    assert found.get("answer") == (None if expected is None else pytest.approx(expected))
    assert found["truth"] == pytest.approx((0.2, 0.45, 0.5, 0.5))


def test_unprintable_and_endless_answers(results, tmp_path):
    results["samples"][0].update(answer="a\x00b\n\tc\ud800\x1b[31m", blind="")
    results["samples"][1].update(answer="never " * 200)
    results["samples"][2].update(question="$x_{ 中", answer="$\\frac")  # no formula, and no glyph
    images = images_of(results, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = report_page(results, images)
        assert Image.open(io.BytesIO(figures.report_png(results, images))).width == 1690
    first, second, third, _ = re.findall(r'alt="([^"]*)"', section(page, "What it saw and said"))
    assert "answer: a b c [31m; truth: 3; blind: (nothing)" in unescape(first)
    assert len(second) < 250 and "$x_{ 中" in unescape(third)


# The page


def test_page_embeds_the_figures(results, tmp_path):
    """Those of the PNG, in order, and whole: nothing comes from elsewhere, and nothing runs."""
    page = write_report(results, tmp_path).read_text(encoding="utf-8")
    found = re.findall(r'<img src="data:image/svg\+xml;base64,([\w+/=]+)" alt="([^"]+)">', page)
    samples = zip(results["samples"], images_of(results, tmp_path), strict=True)
    expected = [figures.accuracies_svg(results), *(figures.sample_svg(*one) for one in samples)]
    expected += figures.losses_svg(results["losses"]).values()
    assert [base64.b64decode(content) for content, _ in found] == expected
    assert len(found) == page.count("<img") == 1 + 4 + 3
    for one in expected:
        root = ElementTree.fromstring(one)
        assert root.tag == "{http://www.w3.org/2000/svg}svg" and not list(root.iter("{*}script"))
    assert not re.search(r"<script|<link|https?:|url\(|@import|\son\w+=", page)
    assert page.startswith("<!DOCTYPE html>") and '<html lang="en">' in page
    with Image.open(tmp_path / "report.png") as image:
        assert image.format == "PNG" and image.width == 1690


def test_page_shows_every_accuracy(results, tmp_path):
    part = section(report_page(results, images_of(results, tmp_path)), "How often it is right")
    rows = rows_of(part)
    assert [row[0].split()[0] for row in rows] == list(KINDS)
    for kind, row in zip(KINDS, rows, strict=True):
        assert [float(cell) for cell in row[1:]] == pytest.approx(
            [results[name][kind] for name in COLUMNS], abs=0.0051
        )
    assert "Of 400 answers, a share is known to within ±0.05" in words(part)


def test_page_has_times_versions_and_commands(results, tmp_path):
    commands = ['convllava ask "a  b/model" <pic>.png "What?" && true', "convllava demo x"]
    page = report_page(results, images_of(results, tmp_path), commands)
    assert unescape(re.search(r"<pre><code>(.*?)</code></pre>", page, re.DOTALL)[1]).splitlines() == commands
    rows = rows_of(section(page, "Where the time went"))
    assert [row[1] for row in rows] == ["1 min 11 s", "1 min 36 s", "48 s", "2 min 05 s"]
    assert "side by side" in rows[-1][0]  # the steps' times add up to more than passed
    for text in ("--seed 5", "convllava_hf 0.1.0", "torch 2.13.0", "AMD EPYC, 2 cores", "results.json"):
        assert text in words(page.partition("<footer>")[2])
    for text in ("0.67 M parameters", "41 k parameters", "256 px, 16 tokens", "600 unseen scenes", "2 min 05 s"):
        assert text in words(page.partition("</header>")[0])
    assert "<pre>" not in report_page(results, images_of(results, tmp_path))


@pytest.mark.parametrize(
    "text",
    ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</p>&amp;&", "'$x_{' $\\frac", "]]><!--"],
)
def test_what_a_model_says_stays_text(results, tmp_path, text):
    for one in results["samples"]:
        one.update(question=text, answer=text, blind=text, truth=text if one["kind"] != "grounding" else one["truth"])
    results["machine"] = text
    results["versions"] = {text: text}
    page = report_page(results, images_of(results, tmp_path), [text])
    assert "<script" not in page and page.count("<img") == 8 and "onerror=alert(1)>" not in page
    for description in re.findall(r'alt="([^"]*)"', section(page, "What it saw and said")):
        assert unescape(description).startswith(f"{text} ") and f"answer: {text};" in unescape(description)
    assert unescape(re.search(r"<code>(.*)</code></pre>", page)[1]) == text
    for one, image in zip(results["samples"], images_of(results, tmp_path), strict=True):
        assert not list(ElementTree.fromstring(figures.sample_svg(one, image)).iter("{*}script"))


def test_a_report_without_samples(results, tmp_path):
    results.update(samples=[], losses={})
    assert report_page(results, []).count("<img") == 1
    Image.open(io.BytesIO(figures.report_png(results, []))).verify()


# Numbers and files


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (59.4, "59 s"),
        (60, "1 min 00 s"),
        (392.3, "6 min 32 s"),
        (5460, "1 h 31 min"),
    ],
)
def test_durations(value, text):
    assert report_style.duration(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(16, "16"), (999, "999"), (41_234, "41 k"), (671_234, "0.67 M"), (5.1e7, "51 M"), (1.24e9, "1.2 G")],
)
def test_amounts(value, text):
    assert report_style.amount(value) == text


def test_without_matplotlib_the_remedy_is_named(results, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.style", None)
    with pytest.raises(ConvLlavaError, match=r"matplotlib.*pip install 'convllava-hf\[train\]'"):
        write_report(results, tmp_path)


def test_a_failed_write_leaves_what_was_there(results, tmp_path, monkeypatch):
    write_report(results, tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert set(files) == {"report.html", "report.png"}

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("convllava_hf.utils.atomic.os.replace", fail)
    results["seed"] = 6
    with pytest.raises(OSError, match="disk full"):
        write_report(results, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == files


def test_a_missing_image_is_named(results, tmp_path):
    (tmp_path / "samples" / "02.png").unlink()
    with pytest.raises(ConvLlavaError, match=r"samples/02\.png cannot be read"):
        write_report(results, tmp_path)
