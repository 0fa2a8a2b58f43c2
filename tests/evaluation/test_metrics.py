"""The metrics' definitions: values worked out by hand, properties, and other libraries' figures.

That they equal lmms-eval's functions on hundreds of answers is the matter of test_lmms_eval_metrics.py.
"""

import random
import subprocess
import sys

import numpy as np
import pytest
from helpers.adversarial_texts import box_texts, texts
from PIL import Image

from convllava_hf.errors import ConvLlavaError
from convllava_hf.evaluation import metrics
from convllava_hf.evaluation.metrics import MmeRow


TEXTS = texts(250)


def test_metrics_import_nothing_large():
    code = (
        "import sys; sys.argv = ['convllava']; import convllava_hf.evaluation.metrics; "  # as the command line starts
        "print(sorted({'torch', 'transformers', 'numpy', 'rapidfuzz'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "answers, expected",
    [
        # Of ten people m agree: (m * min((m - 1) / 3, 1) + (10 - m) * min(m / 3, 1)) / 10
        (["2"] * 0 + ["x"] * 10, 0.0),
        (["2"] * 1 + ["x"] * 9, 0.3),
        (["2"] * 2 + ["x"] * 8, 0.6),
        (["2"] * 3 + ["x"] * 7, 0.9),
        (["2"] * 4 + ["x"] * 6, 1.0),
        (["2"] * 10, 1.0),
    ],
)
def test_vqa_accuracy_leaves_each_of_ten_out(answers, expected):
    assert metrics.vqa_accuracy("Two", answers) == pytest.approx(expected)
    assert metrics.textvqa_accuracy("Two", answers) == pytest.approx(expected)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("The two Dogs.", "2 dogs"),
        ("an apple", "apple"),
        ("dont", "don't"),
        ("3.5", "3.5"),
        ("10,000", "10000"),
        ("red/blue", "red blue"),
        ("red / blue", "red blue"),
        ("10:30", "10:30"),
        ("red\nblue", "red blue"),
        ("none", "0"),
        ("eleven", "eleven"),
    ],
)
def test_normalization(text, expected):
    assert metrics.normalize_vqa(text) == expected


def test_normalized_text_has_no_article_and_no_capital():
    for text in TEXTS:
        words = metrics.normalize_vqa(text).split(" ")
        assert not {"a", "an", "the"} & set(words), text
        assert all(word == word.lower() for word in words), text


def test_exact_match():
    assert metrics.exact_match("The dog.", ["cat", "dog"]) == 1.0
    assert metrics.exact_match("dogs", ["dog"]) == 0.0
    assert metrics.exact_match("", ["a"]) == metrics.exact_match("the", ["a"]) == 0.0
    assert metrics.exact_match("A", ["a"]) == 1.0


def _edits(one: str, other: str) -> int:
    """The definition of the edit distance, in a table."""
    table = np.zeros((len(one) + 1, len(other) + 1), int)
    table[:, 0], table[0] = range(len(one) + 1), range(len(other) + 1)
    for i, a in enumerate(one, 1):
        for j, b in enumerate(other, 1):
            table[i, j] = min(table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (a != b))
    return int(table[-1, -1])


def test_anls_is_one_minus_the_edits_by_length():
    pytest.importorskip("rapidfuzz")
    short = [text for text in TEXTS if len(text) < 12 and text.isascii() and text == " ".join(text.split())]
    rng = random.Random(0)
    found = []
    for _ in range(250):
        prediction, answer = rng.choice(short), rng.choice(short)
        length = max(len(prediction), len(answer))
        similarity = 1 - _edits(prediction.lower(), answer.lower()) / length if length else 1.0
        found.append(metrics.anls(prediction, [answer]))
        assert found[-1] == pytest.approx(similarity if similarity >= 0.5 else 0.0)
    assert any(0 < score < 1 for score in found)
    assert metrics.anls("Hello  World", ["x", "hello world"]) == pytest.approx(1.0)
    assert metrics.anls("abcd", ["abxx"]) == 0.5 and metrics.anls("abcd", ["axxx"]) == 0.0
    assert metrics.anls("abcd", ["axxx"], threshold=0.25) == 0.25


@pytest.mark.parametrize(
    "prediction, answer, expected",
    [
        ("105", "100", 1.0),
        ("105.1", "100", 0.0),
        ("95", "100", 1.0),
        ("-100", "100", 0.0),
        ("12%", "0.12", 1.0),
        ("12", "12%", 0.0),
        ("0", "0", 1.0),
        ("0.001", "0", 0.0),
        ("Red", "red", 1.0),
        ("12 cm", "12", 0.0),
        ("", "12", 0.0),
        ("NaN", "nan", 1.0),
    ],
)
def test_relaxed_accuracy(prediction, answer, expected):
    assert metrics.relaxed_accuracy(prediction, ["something else", answer]) == expected


def test_relaxed_accuracy_at_another_tolerance():
    assert metrics.relaxed_accuracy("110", ["100"], tolerance=0.1) == 1.0
    assert metrics.relaxed_accuracy("104", ["100"], tolerance=0.0) == 0.0


def test_ocrbench_score():
    assert metrics.ocrbench_score("It says: STOP", ["stop"], "Regular Text Recognition") == 1.0
    assert metrics.ocrbench_score("s t o p", ["stop"], "Regular Text Recognition") == 0.0
    for category in ("Handwritten Mathematical Expression Recognition", "HME100k"):
        assert metrics.ocrbench_score("x ^ { 2 }", ["x^{2}"], category) == 1.0
        assert metrics.ocrbench_score("X^{2}", ["x^{2}"], category) == 0.0
    with pytest.raises(ConvLlavaError, match="is empty"):
        metrics.ocrbench_score("anything", ["word", " "], "Regular Text Recognition")


def test_what_is_right_is_right_whatever_it_is():
    for text in TEXTS:
        assert metrics.vqa_accuracy(text, [text] * 10) == metrics.textvqa_accuracy(text, [text] * 10) == 1.0, text
        assert metrics.exact_match(text, [text]) == metrics.relaxed_accuracy(text, [text]) == 1.0, text
        if text.strip():
            scores = [metrics.ocrbench_score(text, [text], category) for category in ("HME100k", "Doc-oriented VQA")]
            assert scores == [1.0, 1.0], text


def test_answers_that_nothing_can_be_compared_with_are_refused():
    for metric in (metrics.vqa_accuracy, metrics.exact_match, metrics.anls, metrics.relaxed_accuracy):
        with pytest.raises(ConvLlavaError, match=r"a list of texts is expected: \['dog'\]"):
            metric("dog", "dog")
        with pytest.raises(ConvLlavaError, match="There are 0 answers"):
            metric("dog", [])
    with pytest.raises(ConvLlavaError, match="There are 3 answers, and this metric needs 4 at least"):
        metrics.vqa_accuracy("dog", ["dog"] * 3)
    with pytest.raises(ConvLlavaError, match="The answer 7 is a int"):
        metrics.exact_match("7", [7])


@pytest.mark.parametrize(
    "prediction, expected",
    [
        ("B", 1), ("b", 1), ("(b)", 1), ("B.", 1), ("[B]", 1), ("**B**", 1), ("B. car", 1), ("b) red car", 1),
        ("The answer is B.", 1), ("answer: (B)", 1), ("Option B", 1), ("B is right", 1), ("It must be B, not red", 1),
        ("A because it is", 0), ("A and B", None), ("A or B?", None), ("A. red car\nB. car", 0), ("E", None),
        ("red car", 0), ("Red  Car.", 0), ("It is a red car.", 0), ("A car", 1), ("A car and a red car", None),
        ("vitamin C", 2), ("It is vitamin C", 2), ("It is vitamin C, so C", 2), ("vitamins", None), ("X", 3), ("x", 3),
        ("", None), ("I think so", None), ("Answer: a car", 1), ("cars", None), ("The answer is D", 3),
    ],
)  # fmt: skip
def test_choice_by_letter_and_by_text(prediction, expected):
    assert metrics.parse_choice(prediction, ["red car", "car", "vitamin C", "X"]) == expected


def test_choice_of_a_letter_that_is_no_option():
    assert metrics.parse_choice("C", ["yes", "no"]) is None
    assert metrics.parse_choice("C", ["C", "D"]) == 0  # the text, as there is no third option
    assert metrics.parse_choice("B", ["B", "A"]) == 1  # the letter, as the prompts ask for it
    with pytest.raises(ConvLlavaError, match="a list of 1 to 26 texts"):
        metrics.parse_choice("A", [])


def test_parsers_take_whatever_comes():
    for text in TEXTS + box_texts():
        assert metrics.parse_choice(text, ["red", "blue", "12", "yes"]) in (None, 0, 1, 2, 3), text
        assert metrics.parse_yes_no(text) in (None, True, False), text
        assert all(len(box) == 4 for box in metrics.parse_boxes(text)), text


@pytest.mark.parametrize(
    "prediction, expected",
    [
        ("Yes", True), ("no.", False), ("Yes, there is no doubt", True), ("The answer is no", False), ("y", True),
        ("N", False), ("There is yes and no", None), ("Not sure", None), ("Yesterday", None), ("none", None),
        ("", None), ("I know", None), ("no yes", False),
    ],
)  # fmt: skip
def test_yes_or_no(prediction, expected):
    assert metrics.parse_yes_no(prediction) is expected


def test_pope_scores_are_those_of_scikit_learn():
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    rng = random.Random(0)
    for size in (1, 3, 40, 200):
        predictions = [rng.choice([True, False, None]) for _ in range(size)]
        answers = [rng.random() < 0.4 for _ in range(size)]
        names = {True: "yes", False: "no", None: "neither"}
        precision, recall, f1, _ = sklearn_metrics.precision_recall_fscore_support(
            [names[answer] for answer in answers],
            [names[prediction] for prediction in predictions],
            labels=["yes"],
            zero_division=0,
        )
        scores = metrics.pope_scores(predictions, answers)
        assert [scores["precision"], scores["recall"], scores["f1"]] == pytest.approx([precision[0], recall[0], f1[0]])
        assert scores["accuracy"] == pytest.approx(np.mean(np.array(predictions) == np.array(answers)))
    with pytest.raises(ConvLlavaError, match="There are 1 predictions and 2 answers"):
        metrics.pope_scores([True], [True, False])


def test_mme_scores_by_hand():
    rows = [
        MmeRow("count", "1", True, True), MmeRow("count", "1", False, False),  # both right
        MmeRow("count", "2", True, True), MmeRow("count", "2", True, False),  # one right
        MmeRow("OCR", "1", None, True), MmeRow("OCR", "1", None, False),  # neither is said
        MmeRow("code_reasoning", "1", False, True), MmeRow("code_reasoning", "1", False, False),
    ]  # fmt: skip
    expected = {"count": 75 + 50, "OCR": 0, "code_reasoning": 50 + 0, "perception": 125, "cognition": 50}
    assert metrics.mme_scores(rows) == expected
    assert "cognition" not in metrics.mme_scores(rows[:6])  # what was not asked has no score
    with pytest.raises(ConvLlavaError, match="'2' of MME's count has 1 answers, and two are expected"):
        metrics.mme_scores(rows[:3])
    with pytest.raises(ConvLlavaError, match="MME has no category 'shade'"):
        metrics.mme_scores([MmeRow("shade", "1", True, True)])


@pytest.mark.parametrize(
    "text, expected",
    [
        ("[0.1, 0.2, 0.3, 0.4]", [(0.1, 0.2, 0.3, 0.4)]),
        ("at (100,200,300,400).", [(100, 200, 300, 400)]),
        ("[[.1, 2., -3e-1, +4]] [5,6,7,8]", [(0.1, 2, -0.3, 4), (5, 6, 7, 8)]),
        ('{"bbox": [0.1, 0.2, 0.3, 0.4', []),
        ("[1, 2, 3]", []),
        ("[1, 2, 3, 4, 5]", []),
        ("[1, 2, 3, 4)", []),
        ("[1e999, 2, 3, 4]", []),
    ],
)
def test_boxes_as_written(text, expected):
    assert metrics.parse_boxes(text) == expected


def test_iou_is_that_of_torchvision():
    torch, ops = pytest.importorskip("torch"), pytest.importorskip("torchvision.ops")
    corners = torch.rand((2, 60, 2, 2), generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1.4 - 0.2
    corners = corners.sort(dim=2).values.flatten(2)  # left, top, right, bottom
    theirs = ops.box_iou(*corners)
    ours = [[metrics.box_iou(one, other) for other in corners[1].tolist()] for one in corners[0].tolist()]
    assert np.allclose(ours, theirs.numpy(), atol=1e-12) and theirs.max() > 0.5
    assert metrics.box_iou((0.6, 0.6, 0.1, 0.1), (0, 0, 1, 1)) == 0.0
    with pytest.raises(ConvLlavaError, match="has 3 numbers"):
        metrics.box_iou((1, 2, 3), (1, 2, 3, 4))


@pytest.mark.parametrize("width, height", [(60, 101), (101, 60), (80, 80), (1, 7), (33, 32)])
def test_padding_is_undone_as_the_image_processor_does_it(width, height):
    from convllava_hf.modeling.image_processing_convllava import _pad_to_square

    image = np.zeros((height, width, 3), np.uint8)
    top, left = height // 3, width // 4
    bottom, right = max(top + 1, 2 * height // 3), max(left + 1, 3 * width // 4)
    image[top:bottom, left:right] = 255
    padded = np.asarray(_pad_to_square(Image.fromarray(image), [0.0, 0.0, 0.0]))[..., 0] == 255
    rows, columns = np.flatnonzero(padded.any(1)), np.flatnonzero(padded.any(0))
    side = max(width, height)
    seen = (columns[0] / side, rows[0] / side, (columns[-1] + 1) / side, (rows[-1] + 1) / side)
    expected = (left / width, top / height, right / width, bottom / height)
    assert metrics.undo_square_padding(seen, width, height) == pytest.approx(expected, abs=1e-12)


def test_undoing_the_padding_leaves_the_iou_as_it_was():
    rng = random.Random(0)
    for _ in range(200):
        one, other = ((rng.random() / 2, rng.random() / 2, 0.5 + rng.random(), 0.5 + rng.random()) for _ in range(2))
        undone = [metrics.undo_square_padding(box, 640, 427) for box in (one, other)]
        assert metrics.box_iou(*undone) == pytest.approx(metrics.box_iou(one, other))
    with pytest.raises(ConvLlavaError, match="0 x 5 pixels"):
        metrics.undo_square_padding((0, 0, 1, 1), 0, 5)


@pytest.mark.parametrize(
    "box, expected",
    [
        ((0.1, 0.2, 0.3, 0.4), (0.1, 0.2, 0.3, 0.4)),
        ((100, 200, 300, 400), (0.1, 0.2, 0.3, 0.4)),
        ((0, 0, 1, 1), (0, 0, 1, 1)),
        ((0, 0, 2, 2), (0, 0, 0.002, 0.002)),
        ((0.1, 0.2, 0.3, 1.02), (0.1, 0.2, 0.3, 1.02)),
        ((-5, 0, 999.5, 1010), (-0.005, 0, 0.9995, 1.01)),
    ],
)
def test_fractions_and_thousandths_are_told_apart(box, expected):
    assert metrics.to_unit_box(box) == pytest.approx(expected)
