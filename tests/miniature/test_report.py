"""The quickstart's report: what stands on the page, in the table and in the figures is what was measured."""

import base64
import copy
import io
import math
import re
import sys
import warnings
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import numpy as np
import pytest
from helpers.tiny_models import make_image
from PIL import Image


pytest.importorskip("matplotlib")

from convllava_hf.errors import ConvLlavaError  # noqa: E402
from convllava_hf.miniature import report_parts  # noqa: E402
from convllava_hf.miniature.report import format_table, write_report  # noqa: E402
from convllava_hf.miniature.report_figure import _draw_boxes, figure_style, report_figure  # noqa: E402
from convllava_hf.miniature.report_page import report_page  # noqa: E402


KINDS = ("reading", "color", "shape", "presence", "count", "grounding")
VOID = {"meta", "link", "img", "br", "hr", "input"}


def sample(kind="reading", question="What does the sign say?", answer="3", truth="3", correct=True, **more) -> dict:
    return {
        "kind": kind,
        "question": question,
        "answer": answer,
        "truth": truth,
        "blind": "7",
        "correct": correct,
        **more,
    }


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
            "language model": [[10, 5.5], [20, 0.31]],
            "stage 1": [],
        },
        "model": {"parameters": {"vision tower": 671234, "projector": 41234}, "resolution": 256, "visual_tokens": 16},
        "versions": {"convllava_hf": "0.1.0", "torch": "2.13.0"},
        "machine": "AMD EPYC, 2 cores",
        "samples": samples,
    }


class Page(HTMLParser):
    """A strict reader: every element that is opened is closed, in order. `root` is the page as a tree."""

    def __init__(self, html: str):
        super().__init__()
        self.builder, self.open = ElementTree.TreeBuilder(), []
        self.declared = False
        self.feed(html)
        self.close()
        assert self.declared and not self.open
        self.root = self.builder.close()

    def handle_decl(self, decl):
        self.declared = decl == "DOCTYPE html"

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"{tag} has an attribute twice"
        self.builder.start(tag, {name: value or "" for name, value in attrs})
        self.builder.end(tag) if tag in VOID else self.open.append(tag)

    def handle_startendtag(self, tag, attrs):  # only within SVG
        assert "svg" in self.open
        self.builder.start(tag, dict(attrs))
        self.builder.end(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag
        self.builder.end(tag)

    def handle_data(self, data):
        if self.open:
            self.builder.data(data)


def words(element) -> str:
    return " ".join("".join(element.itertext()).split())


def of_class(element, name: str) -> list:
    return [one for one in element.iter() if name in one.get("class", "").split()]


def section(root, heading: str):
    return next(one for one in root.iter("section") if words(one.find("h2")) == heading)


def page_of(results, folder, commands=()) -> ElementTree.Element:
    """The page as a tree, without the time that the figure takes."""
    images = [(folder / one["image"]).read_bytes() for one in results["samples"]]
    return Page(report_page(results, images, commands)).root


# The table


def test_table_holds_every_figure(results):
    head, rule, *rows = format_table(results).splitlines()
    assert head.split() == ["question", "accuracy", "chance", "blind"]
    assert set(rule) == {"-"}
    assert [row.split()[0] for row in rows] == list(KINDS)
    for row in rows:
        kind, *figures = row.split()
        assert [float(figure) for figure in figures] == pytest.approx(
            [results[name][kind] for name in ("accuracy", "chance", "blind")], abs=0.0051
        )
    assert len({len(line) for line in (head, rule, *rows)}) == 1  # columns stand under one another


@pytest.mark.parametrize("nothing", [None, math.nan])
def test_a_kind_that_was_not_asked_has_a_dash(results, tmp_path, nothing):
    for name in ("accuracy", "chance", "blind"):
        results[name]["shape"] = nothing
    assert format_table(results).splitlines()[4].split() == ["shape", "–", "–", "–"]
    root = page_of(results, tmp_path)
    row = root.findall(".//tbody/tr")[2]
    assert [words(cell) for cell in row.findall("td")] == ["–", "–", "–"]
    assert not of_class(row, "mark")


# The page


def test_page_is_whole_and_needs_nothing(results, tmp_path):
    html = write_report(results, tmp_path).read_text(encoding="utf-8")
    root = Page(html).root
    assert root.tag == "html" and root.get("lang") == "en"
    assert [one.tag for one in root] == ["head", "body"]
    assert root.find("head/title").text
    assert not list(root.iter("script")) and not list(root.iter("link"))
    assert not re.search(r"https?:|//[a-z]|url\(|@import", re.sub(r"data:image/png;base64,[\w+/=]+", "", html))
    for element in root.iter():
        assert not [name for name in element.attrib if name.startswith("on")]
        if element.tag == "img":
            assert element.get("src").startswith("data:image/png;base64,") and element.get("alt")
    viewport = next(one for one in root.iter("meta") if one.get("name") == "viewport")
    assert viewport.get("content") == "width=device-width, initial-scale=1"


def test_page_shows_every_accuracy(results, tmp_path):
    rows = section(page_of(results, tmp_path), "How often it is right").findall("table/tbody/tr")
    assert [words(row.find("th")).split()[0] for row in rows] == list(KINDS)
    for kind, row in zip(KINDS, rows, strict=True):
        shown = [float(words(cell)) for cell in row.findall("td")]
        expected = [results[name][kind] for name in ("accuracy", "chance", "blind")]
        assert shown == pytest.approx(expected, abs=0.0051)
        drawn = [of_class(row, "fill")[0], *of_class(row, "mark")]
        shares = [float(re.search(r"(?:width|left):([\d.]+)%", one.get("style"))[1]) / 100 for one in drawn]
        assert shares == pytest.approx(expected, abs=0.001)
    assert "Of 400 answers, a share is known to within ±0.05" in words(
        section(page_of(results, tmp_path), "How often it is right")
    )


def test_page_embeds_the_images_in_their_order(results, tmp_path):
    images = list(page_of(results, tmp_path).iter("img"))
    assert len(images) == len(results["samples"])
    for image, one in zip(images, results["samples"], strict=True):
        content = base64.b64decode(image.get("src").split(",")[1], validate=True)
        assert content == (tmp_path / one["image"]).read_bytes()


def test_page_tells_what_was_answered(results, tmp_path):
    for card, one in zip(of_class(page_of(results, tmp_path), "card"), results["samples"], strict=True):
        assert words(of_class(card, "question")[0]) == one["question"]
        told = dict(zip(map(words, card.iter("dt")), map(words, card.iter("dd")), strict=True))
        assert {name: told[name] for name in ("answer", "truth", "blind")} == {
            name: one[name] for name in ("answer", "truth", "blind")
        }
        assert ("✓ right" in words(card)) == one["correct"] and ("✗ wrong" in words(card)) != one["correct"]
        # 0.45 * 0.45 of two squares with sides of 0.5 are shared.
        assert told.get("overlap") == ("0.68" if one["question"] == "Give the box." else None)


def test_page_draws_the_boxes(results, tmp_path):
    cards = of_class(page_of(results, tmp_path), "card")
    assert not list(cards[0].iter("svg")) and not list(cards[1].iter("svg"))
    truth, answer = (of_class(cards[2], name)[-1] for name in ("truth", "answer"))
    assert truth.get("stroke-dasharray") and not answer.get("stroke-dasharray")
    for rectangle, left, top in ((answer, 0.25, 0.5), (truth, 0.2, 0.45)):
        place = [float(rectangle.get(name)) / 256 for name in ("x", "y", "width", "height")]
        assert place == pytest.approx([left, top, 0.5, 0.5], abs=0.001)
    assert of_class(cards[3], "truth") and not of_class(cards[3], "answer")  # what it answered is no box


def test_page_draws_the_losses_to_scale(results, tmp_path):
    figures = section(page_of(results, tmp_path), "How it learned").findall(".//figure")
    assert [words(figure.find("h3")).rstrip("0123456789. ") for figure in figures[:2]] == [
        "vision tower",
        "language model",
    ]
    scales = []
    for figure, (name, logged) in zip(figures, results["losses"].items(), strict=True):
        if not logged:
            assert name == "stage 1" and "No loss was recorded" in words(figure)
            continue
        ticks = [
            (float(t.text), float(t.get("y")) - 3.2)
            for t in figure.iter("text")
            if t.get("text-anchor") and "steps" not in t.text
        ]
        (low, low_y), (high, high_y) = ticks[0], ticks[-1]
        scales.append((low_y, high_y))
        points = [tuple(map(float, point.split(","))) for point in figure.find(".//polyline").get("points").split()]
        read = [low * (high / low) ** ((y - low_y) / (high_y - low_y)) for _, y in points]
        assert read == pytest.approx([loss for _, loss in logged], rel=0.02)
        steps = [(x - 30) / (250 - 30) * logged[-1][0] for x, _ in points]
        assert steps == pytest.approx([step for step, _ in logged], abs=0.2)
        assert f"{logged[-1][0]} steps" in words(figure)
    assert scales[0] == scales[1]  # one scale for all


def test_page_tells_times_versions_and_commands(results, tmp_path):
    commands = ['convllava ask "a  b/model" <pic>.png "What?" && true', "convllava demo x"]
    root = page_of(results, tmp_path, commands)
    assert "".join(root.find(".//pre/code").itertext()).splitlines() == commands
    rows = section(root, "Where the time went").findall("table/tbody/tr")
    assert [words(row.find("td")) for row in rows] == ["1 min 11 s", "1 min 36 s", "48 s", "2 min 05 s"]
    assert "side by side" in words(rows[-1])  # the steps' times add up to more than passed
    foot = words(next(root.iter("footer")))
    for text in ("--seed 5", "convllava_hf 0.1.0", "torch 2.13.0", "AMD EPYC, 2 cores", "results.json"):
        assert text in foot
    facts = words(of_class(root, "facts")[0])
    for text in ("0.67 M parameters", "41 k parameters", "256 px, 16 tokens", "600 unseen scenes", "2 min 05 s"):
        assert text in facts
    assert not list(page_of(results, tmp_path).iter("pre"))


@pytest.mark.parametrize(
    "text",
    ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</dd></dl>&amp;&", "'$x_{' $\\frac", "]]><!--"],
)
def test_what_a_model_says_stays_text(results, tmp_path, text):
    for one in results["samples"]:
        one.update(question=text, answer=text, blind=text, truth=text if one["kind"] != "grounding" else one["truth"])
    results["machine"] = text
    results["versions"] = {text: text}
    root = page_of(results, tmp_path, [text])
    assert not list(root.iter("script")) and len(list(root.iter("img"))) == len(results["samples"])
    for card in of_class(root, "card"):
        assert words(of_class(card, "question")[0]) == text
        assert words(card.find(".//dd")) == text
        assert card.find(".//img").get("alt").endswith(text)
    assert "".join(root.find(".//pre/code").itertext()) == text


def test_unprintable_and_endless_answers(results, tmp_path):
    results["samples"][0].update(answer="a\x00b\n\tc\ud800\x1b[31m", blind="")
    results["samples"][1].update(answer="never " * 200)
    cards = of_class(page_of(results, tmp_path), "card")
    told = list(map(words, cards[0].iter("dd")))
    assert told == ["a b c [31m", "3", "(nothing)"]
    assert len(words(cards[1].find(".//dd"))) <= 120
    results["samples"][2].update(question="$x_{ 中", answer="$\\frac")  # no formula, and no glyph
    images = [(tmp_path / one["image"]).read_bytes() for one in results["samples"]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Image.open(io.BytesIO(report_figure(results, images))).width == 1690


def test_a_report_without_samples(results, tmp_path):
    results.update(samples=[], losses={})
    root = page_of(results, tmp_path)
    assert not list(root.iter("img"))
    Image.open(io.BytesIO(report_figure(results, []))).verify()


# Curves, boxes and numbers


def test_curves_tell_what_is_not_finite_and_keep_the_last_of_a_step():
    logged = [[10, 9.0], [20, 2.0], [10, 1.0], [30, math.nan], [40, math.inf], [50, None], [60, 0.0]]
    drawn, lost = report_parts.curves({"stage 2": logged})
    assert lost == {"stage 2": 3}
    assert drawn["stage 2"] == [(10, 1.0), (20, 2.0), (60, 0.001)]  # nothing is zero on a logarithmic axis


def test_page_says_that_losses_were_not_finite(results, tmp_path):
    results["losses"]["language model"] += [[30, math.nan]]
    figure = section(page_of(results, tmp_path), "How it learned").findall(".//figure")[1]
    assert "1 of its losses were not finite" in words(figure)


def test_long_curves_are_averaged():
    logged = [[step, 1.0 + step % 2] for step in range(1, 1801)]
    drawn, _ = report_parts.curves({"vision tower": logged})
    curve = drawn["vision tower"]
    assert 100 < len(curve) <= 240
    assert {loss for _, loss in curve} == {1.5}
    assert np.mean([step for step, _ in curve]) == pytest.approx(900.5)


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
    found = dict(report_parts.boxes({**BOXED, "answer": answer}))
    assert found.get("answer") == (None if expected is None else pytest.approx(expected))
    assert found["truth"] == pytest.approx((0.2, 0.45, 0.5, 0.5))


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
    assert report_parts.duration(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(16, "16"), (999, "999"), (41_234, "41 k"), (671_234, "0.67 M"), (5.1e7, "51 M"), (1.24e9, "1.2 G")],
)
def test_amounts(value, text):
    assert report_parts.amount(value) == text


# The figure


def test_figure_shows_what_changes(results, tmp_path):
    image = (tmp_path / "samples/00.png").read_bytes()

    def drawn(results, samples):
        results = {**results, "samples": [BOXED] * samples}
        return Image.open(io.BytesIO(report_figure(results, [image] * samples))).convert("RGB")

    def oranges(image):
        return int((np.asarray(image) == (194, 65, 12)).all(-1).sum())

    before = drawn(results, 1)
    changed = copy.deepcopy(results)
    changed["accuracy"]["reading"] = 0.2
    after = drawn(changed, 7)
    assert oranges(before) > oranges(after) + 5000
    assert after.width == before.width and after.height > before.height + 200  # a second row of samples


@pytest.mark.parametrize("boxed", [True, False])
def test_figure_says_which_box_is_which(results, tmp_path, monkeypatch, boxed):
    """Where there are boxes, be it below the first row alone."""
    image = (tmp_path / "samples/00.png").read_bytes()
    monkeypatch.setattr("convllava_hf.miniature.report_figure.png", lambda figure: figure)
    samples = [sample()] * 6 + [BOXED if boxed else sample()]
    figure = report_figure({**results, "samples": samples}, [image] * 7)
    words = [text.get_text() for part in figure.subfigs for text in part.texts]
    assert words.count("What it saw and said") == 1
    assert words.count("solid: box answered, dashed: true box") == boxed


def test_figure_draws_the_boxes():
    with figure_style() as figure_class:
        axis = figure_class().add_subplot()
        _draw_boxes(axis, BOXED)
    dark = [patch for patch in axis.patches if patch.get_edgecolor()[0] < 0.5]  # the others are their white margins
    drawn = {patch.get_linestyle(): (*patch.get_xy(), patch.get_width(), patch.get_height()) for patch in dark}
    assert drawn == {"--": pytest.approx((0.2, 0.45, 0.5, 0.5)), "-": pytest.approx((0.25, 0.5, 0.5, 0.5))}


def test_figures_leave_matplotlib_as_it_was(results):
    import matplotlib

    with matplotlib.rc_context({"text.usetex": True, "figure.facecolor": "black", "axes.titlesize": 3}):
        before = dict(matplotlib.rcParams)
        content = report_figure({**results, "samples": []}, [])  # not by LaTeX
        assert dict(matplotlib.rcParams) == before
    assert Image.open(io.BytesIO(content)).convert("RGB").getpixel((2, 2)) == (255, 255, 255)


def test_without_matplotlib_the_page_is_there(results, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.style", None)
    with pytest.raises(ConvLlavaError, match=r"pip install 'convllava-hf\[quickstart\]'"):
        write_report(results, tmp_path)
    assert (tmp_path / "report.html").is_file() and not (tmp_path / "report.png").exists()


# Files


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
