"""Our metrics through `evaluate.load`, from the package's own folder and without the Hub."""

import random
import sys

import pytest
from helpers.adversarial_texts import answer_lists, texts

from convllava_hf.errors import ConvLlavaError
from convllava_hf.evaluation import MODULES, metrics


evaluate = pytest.importorskip("evaluate")
pytest.importorskip("rapidfuzz")

PREDICTIONS = texts(220)[:220]


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
    """`evaluate` copies what it loads into a cache: one of the tests' own."""
    patch = pytest.MonkeyPatch()
    folder = tmp_path_factory.mktemp("modules")
    patch.setattr(evaluate.config, "HF_MODULES_CACHE", folder)
    patch.setattr(evaluate.config, "HF_METRICS_CACHE", folder / "metrics")
    patch.syspath_prepend(str(folder))
    for name in [name for name in sys.modules if name.partition(".")[0] == "evaluate_modules"]:
        patch.delitem(sys.modules, name)  # from the cache of another test
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "evaluate_modules"]:
        del sys.modules[name]
    patch.undo()


def load(name: str):
    return evaluate.load(str(MODULES / name))


def test_every_folder_is_a_module():
    names = sorted(path.name for path in MODULES.iterdir() if path.name != "__pycache__")
    assert len(names) == 10
    for name in names:
        module = load(name)
        assert module.name == name and module.description.strip() and set(module.features) == set(module.columns)


@pytest.mark.parametrize(
    "name, metric",
    [
        ("vqa_accuracy", metrics.vqa_accuracy),
        ("textvqa_accuracy", metrics.textvqa_accuracy),
        ("anls", metrics.anls),
        ("relaxed_accuracy", metrics.relaxed_accuracy),
        ("vqa_exact_match", metrics.exact_match),
    ],
)
def test_means_are_those_of_the_functions(name, metric):
    answers = answer_lists(PREDICTIONS, 10)
    expected = sum(map(metric, PREDICTIONS, answers)) / len(PREDICTIONS)
    assert load(name).compute(predictions=PREDICTIONS, references=answers) == {name: pytest.approx(expected)}
    assert 0.1 < expected < 1
    module = load(name)  # and in pieces
    module.add_batch(predictions=PREDICTIONS[:100], references=answers[:100])
    module.add_batch(predictions=PREDICTIONS[100:], references=answers[100:])
    assert module.compute() == {name: pytest.approx(expected)}


def test_ocrbench():
    result = load("ocrbench").compute(
        predictions=["It says STOP", "x ^ 2", "x ^ 2"],
        references=[["stop"], ["x^2"], ["x^2"]],
        categories=["Regular Text Recognition", "HME100k", "Regular Text Recognition"],
    )
    assert result == {"ocrbench": pytest.approx(2 / 3)}


def test_choices():
    choices = [["red", "blue"]] * 4
    result = load("choice_accuracy").compute(
        predictions=["B", "It is red.", "neither", "A"], references=[1, 0, 0, 1], choices=choices
    )
    assert result == {"choice_accuracy": 0.5}


def test_boxes():
    columns = {"widths": [200] * 3, "heights": [100] * 3, "references": [[0, 0, 100, 50]] * 3}
    # The square is 200 x 200 and the image stands 50 below its top.
    padded = ["[0.00, 0.25, 0.50, 0.50]", "[0, 250, 500, 500] or [1, 2, 3, 4]", "no idea"]
    assert load("box_accuracy").compute(predictions=padded, **columns) == {"box_accuracy": pytest.approx(2 / 3)}
    plain = ["[0, 0, 0.5, 0.5]", "[0.00, 0.30, 0.50, 0.50]", "[0, 0, 0.5"]
    result = load("box_accuracy").compute(predictions=plain, **columns, padded=False)
    assert result == {"box_accuracy": pytest.approx(1 / 3)}


def test_pope_and_mme():
    rng = random.Random(0)
    said = [rng.choice(["Yes", "no, it is not", "perhaps"]) for _ in range(40)]
    truth = ["yes", "no"] * 20
    flags = [metrics.parse_yes_no(text) for text in said]
    assert load("pope").compute(predictions=said, references=truth) == metrics.pope_scores(flags, [True, False] * 20)
    images = [str(number // 2) for number in range(40)]
    categories = ["count"] * 20 + ["code_reasoning"] * 20
    scores = load("mme").compute(predictions=said, references=truth, categories=categories, image_ids=images)
    assert scores == metrics.mme_scores(map(metrics.MmeRow, categories, images, flags, [True, False] * 20))
    assert set(scores) == {"count", "code_reasoning", "perception", "cognition"}
    with pytest.raises(ConvLlavaError, match="A reference is 'maybe', and yes or no is expected"):
        load("pope").compute(predictions=["yes"], references=["maybe"])
