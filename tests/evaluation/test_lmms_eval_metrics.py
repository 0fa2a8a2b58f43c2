"""Our metrics against lmms-eval's own functions, and where they must differ: `make test-lmms-eval`."""

import random
from itertools import product

import pytest
from helpers.adversarial_texts import WRITTEN, answer_lists, box_texts, texts

from convllava_hf.evaluation import metrics


pytest.importorskip("lmms_eval", reason="lmms-eval has an environment of its own: make test-lmms-eval")

TEXTS = texts(400)


def test_vqa_accuracy_is_that_of_vqav2():
    from lmms_eval.tasks.vqav2.utils import vqav2_process_results

    scores = []
    for prediction, answers in zip(TEXTS, answer_lists(TEXTS, 10), strict=True):
        document = {"question_id": 0, "answers": [{"answer": a, "answer_id": i} for i, a in enumerate(answers)]}
        theirs = vqav2_process_results(document, [prediction])["exact_match"]
        scores.append(metrics.vqa_accuracy(prediction, answers))
        assert scores[-1] == pytest.approx(theirs, abs=1e-12), (prediction, answers)
    assert {round(score, 9) for score in scores} == {0.0, 0.3, 0.6, 0.9, 1.0}  # all that ten answers allow


def test_textvqa_accuracy_is_that_of_textvqa():
    from lmms_eval.tasks.textvqa.utils import textvqa_process_results

    def theirs(prediction: str, answers: list[str]) -> float:
        document = {"question_id": 0, "answers": list(answers)}
        return textvqa_process_results(document, [prediction])["exact_match"]

    for prediction, answers in zip(TEXTS, answer_lists(TEXTS, 10), strict=True):
        ours = metrics.textvqa_accuracy(prediction, answers)
        assert ours == pytest.approx(theirs(prediction, answers), abs=1e-12), (prediction, answers)
    # The two normalizations are not the same.
    for prediction, answer, words_split in (("red blue", "red,blue", 0.0), ("1000 mile", "1,000-mile", 1.0)):
        assert metrics.textvqa_accuracy(prediction, [answer] * 10) == theirs(prediction, [answer] * 10) == words_split
        assert metrics.vqa_accuracy(prediction, [answer] * 10) == 1.0 - words_split


def test_contractions_are_the_official_ones():
    from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor

    for word, written in EvalAIAnswerProcessor.CONTRACTIONS.items():
        if word == word.lower():  # words are compared in lower case, so entries with capitals never count
            assert metrics.normalize_vqa(word) == written
    assert metrics.normalize_vqa("couldntve hed well shed") == "couldntve he'd well shed"


def test_exact_match_is_equality_after_their_normalization():
    from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor

    theirs = EvalAIAnswerProcessor()

    def normalized(text: str) -> str:
        text = text.replace("\n", " ").replace("\t", " ").strip()
        return theirs.process_digit_article(theirs.process_punctuation(text))

    matches = 0
    for prediction, answers in zip(TEXTS, answer_lists(TEXTS, 2), strict=True):
        if "" in (normalized(text) for text in [prediction, *answers]):
            continue
        matches += (ours := metrics.exact_match(prediction, answers))
        assert ours == float(normalized(prediction) in map(normalized, answers)), (prediction, answers)
    assert 50 < matches < 350
    # Theirs finds "the" in "": nothing is left of either. To us that is no answer.
    assert normalized("the") == normalized("") and metrics.exact_match("", ["the"]) == 0.0
    assert metrics.exact_match("a", ["A"]) == 1.0


def test_anls_is_theirs():
    from lmms_eval.api.metrics import anls

    scores = []
    for prediction, answers in zip(TEXTS, answer_lists(TEXTS, 3), strict=True):
        scores.append(metrics.anls(prediction, answers))
        assert scores[-1] == pytest.approx(anls(answers, [prediction])["anls"], abs=1e-12), (prediction, answers)
    assert 0.0 in scores and 1.0 in scores and any(0 < score < 1 for score in scores)


def test_relaxed_accuracy_is_that_of_chartqa():
    from lmms_eval.tasks.chartqa.utils import relaxed_correctness

    pairs = [(p.strip(), a.strip()) for p, answers in zip(TEXTS, answer_lists(TEXTS, 2), strict=True) for a in answers]
    numbers = [text for text in WRITTEN if any(character.isdigit() for character in text)]
    pairs += list(product(numbers, numbers))
    matches = 0
    for prediction, answer in pairs:
        if answer.lower() in ("nan", "inf", "-inf", "infinity", "1e400"):
            continue
        matches += (ours := metrics.relaxed_accuracy(prediction, [answer]))
        assert ours == float(relaxed_correctness(prediction, answer)), (prediction, answer)
    assert 100 < matches < len(pairs) - 100
    # Theirs counts these as numbers, and finds that a name is not itself.
    assert not relaxed_correctness("NaN", "NaN") and metrics.relaxed_accuracy("NaN", ["NaN"]) == 1.0
    assert (
        not relaxed_correctness("Infinity", "Infinity") and metrics.relaxed_accuracy("Infinity", ["Infinity"]) == 1.0
    )
    # Theirs takes one answer as it is, blanks included; what asks models strips their answers before.
    assert not relaxed_correctness("Red ", "red") and metrics.relaxed_accuracy("Red ", ["blue", "red"]) == 1.0


@pytest.mark.parametrize("source", ["HME100k", "TextVQA"])
def test_ocrbench_score_is_theirs(source):
    from lmms_eval.tasks.ocrbench.utils import ocrbench_process_results

    scores = []
    for prediction, answers in zip(TEXTS, answer_lists(TEXTS, 2), strict=True):
        answers = [answer for answer in answers if answer.strip()] or ["word"]
        if any(
            0xFF01 <= ord(character) <= 0xFF5E or character == "\u3000" for character in prediction + "".join(answers)
        ):
            continue
        document = {"dataset": source, "question_type": "any", "answer": answers}
        scores.append(metrics.ocrbench_score(prediction, answers, source))
        assert scores[-1] == ocrbench_process_results(document, [prediction])["ocrbench_accuracy"]["score"]
    assert len(scores) > 350 and {0.0, 1.0} == set(scores)
    # lmms-eval takes full-width letters for the others; the official code does not, nor VLMEvalKit.
    document = {"dataset": "TextVQA", "question_type": "any", "answer": ["ABC"]}
    assert ocrbench_process_results(document, ["ＡＢＣ"])["ocrbench_accuracy"]["score"] == 1
    assert metrics.ocrbench_score("ＡＢＣ", ["ABC"], "TextVQA") == 0.0


CHOICES = ["teddy bear", "rabbit", "red car", "vitamin C"]
LETTERS = "ABCD"
FORMS = (
    "{0}", "{0}.", "({0})", "{0})", "{0}:", " {0} ", "{0}. {1}", "({0}) {1}", "{0}: {1}", "The answer is {0}.",
    "The answer is ({0}).", "The correct option is {0}", "Answer: {0}", "**{0}**", "I choose {0}", "Option {0}",
    "The best answer is\n{0}", "({0})\nbecause of it", "{0}, surely",
)  # fmt: skip
BY_TEXT = (
    "{1}",
    "{1}.",
    "It is the {1}.",
    "a {1}, I think",
    "the {1} on the left",
    "Clearly {1}!",
    " {1}\n",
    "THE {1}",
)


def test_choices_are_those_that_theirs_find():
    from lmms_eval.tasks._task_utils.mcq_extract import extract_mcq_answer
    from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator

    theirs = MMBench_Evaluator.__new__(MMBench_Evaluator)
    options = dict(zip(LETTERS, CHOICES, strict=True))
    asked = 0
    rng = random.Random(0)
    fillers = ["", " ", "\n", "  \n"]
    for form, index in product(FORMS, range(4)):
        for filler in fillers:
            text = form.format(LETTERS[index], CHOICES[index]) + filler
            assert metrics.parse_choice(text, CHOICES) == index, text
            # Theirs takes the C of a vitamin for the option C.
            if "vitamin" not in text:
                assert extract_mcq_answer(text, list(LETTERS)) == LETTERS[index], text
            asked += 1
    for form, index in product(BY_TEXT, range(4)):
        for filler in fillers:
            text = (
                form.format(LETTERS[index], CHOICES[index].lower() if rng.random() < 0.5 else CHOICES[index]) + filler
            )
            assert metrics.parse_choice(text, CHOICES) == index, text
            if "vitamin C" not in text:  # as above; "vitamin c" it finds
                assert theirs.can_infer(text, dict(options)) == LETTERS[index], text
            asked += 1
    assert asked >= 400
    for text in (
        "",
        " ",
        "neither",
        "A or B",
        "the rabbit and the teddy bear",
        "?",
        "E",
        "42",
        "日本",
        "rabbits",
        "a",
    ):
        theirs_found = theirs.can_infer(text, dict(options))
        ours = metrics.parse_choice(text, CHOICES)
        if text == "rabbits":  # theirs finds an option within another word
            assert (theirs_found, ours) == ("B", None)
        elif text == "a":  # theirs wants capitals
            assert (theirs_found, ours) == (False, 0)
        elif text == "E":  # theirs takes five options where there are four
            assert (theirs_found, ours) == ("E", None)
        else:
            assert not theirs_found and ours is None, text


def test_yes_and_no_are_those_of_mme():
    from lmms_eval.tasks.mme.utils import parse_pred_ans

    said = {"yes": True, "no": False, "other": None}
    rng = random.Random(1)
    words = ["Yes", "No", "yes", "no", "it", "is", "there", "a", "dog", "Maybe", "definitely", "The answer"]
    made = [
        rng.choice(["Yes", "No", "yes", "no", "YES", "NO"])
        + rng.choice([".", ",", "!", " ", "\n", ": ", ""])
        + " ".join(["", *rng.choices(words, k=rng.randint(0, 5))])
        for _ in range(200)
    ]
    equal = sum(metrics.parse_yes_no(text) == said[parse_pred_ans(text)] for text in made)
    assert equal == len(made)
    for text in TEXTS:
        theirs, ours = said[parse_pred_ans(text)], metrics.parse_yes_no(text)
        if theirs != ours:
            start = text.lower().strip().replace(".", "")[:4]
            within = any(word in start for word in ("yes", "no")) and ours is None
            later = theirs is None and ours is not None
            either = theirs is not None and ours is not None and "yes" in text.lower() and "no" in text.lower()
            assert within or later or either, text
    # Theirs reads four letters: these are no answers to it, or wrong ones.
    for text, theirs in {"Not sure": "no", "None": "no", "Nobody knows": "no", "Yesterday": "yes"}.items():
        assert parse_pred_ans(text) == theirs and metrics.parse_yes_no(text) is None
    assert parse_pred_ans("There is no dog") == "other" and metrics.parse_yes_no("There is no dog") is False


def _polls(seed: int, size: int) -> tuple[list[bool | None], list[bool]]:
    rng = random.Random(seed)
    return [rng.choice([True, False, None]) for _ in range(size)], [rng.random() < 0.5 for _ in range(size)]


def test_pope_scores_are_theirs():
    from lmms_eval.tasks.pope import utils

    words = {True: "yes", False: "no", None: "maybe"}
    for seed, size in product(range(20), (1, 2, 10, 50)):
        predictions, answers = _polls(seed, size)
        documents = [{"question_id": 0, "answer": words[answer]} for answer in answers]
        results = [
            utils.pope_process_results(document, [words[prediction]])["pope_accuracy"]
            for document, prediction in zip(documents, predictions, strict=True)
        ]
        ours = metrics.pope_scores(predictions, answers)
        assert ours["accuracy"] == pytest.approx(utils.pope_aggregate_accuracy(results))
        assert ours["precision"] == pytest.approx(utils.pope_aggregate_precision(results))
        # Theirs leaves answers that are neither out of recall, so that they improve it. We count them, as no yes.
        for result in results:
            result["prediction"] = "no" if result["prediction"] == "maybe" else result["prediction"]
        assert ours["recall"] == pytest.approx(utils.pope_aggregate_recall(results))
        assert ours["f1"] == pytest.approx(utils.pope_aggregate_f1_score(results))
        # Theirs counts how many of the right answers are yes. POPE's ratio is that of the model's.
        assert utils.pope_aggregate_yes_ratio(results) == pytest.approx(sum(answers) / size)
        assert ours["yes_ratio"] == pytest.approx(sum(prediction is True for prediction in predictions) / size)


def test_mme_scores_are_theirs():
    from lmms_eval.tasks.mme.utils import eval_type_dict, mme_aggregate_results, mme_process_results

    assert set(eval_type_dict["Perception"]) == set(metrics.MME_PERCEPTION)
    assert set(eval_type_dict["Cognition"]) == set(metrics.MME_COGNITION)
    rng = random.Random(0)
    words = {True: ["Yes", "yes."], False: ["No", "no, it is not"], None: ["Perhaps", ""]}
    for _ in range(20):
        rows, theirs = [], {"mme_perception_score": [], "mme_cognition_score": []}
        for category, image in product(metrics.MME_PERCEPTION + metrics.MME_COGNITION, range(6)):
            for answer in (True, False):
                prediction = rng.choice([True, False, None])
                rows.append(metrics.MmeRow(category, str(image), prediction, answer))
                document = {"category": category, "question_id": image, "answer": "Yes" if answer else "No"}
                for name, value in mme_process_results(document, [rng.choice(words[prediction])]).items():
                    theirs[name].append(value)
        ours = metrics.mme_scores(rows)
        assert ours["perception"] == pytest.approx(mme_aggregate_results(theirs["mme_perception_score"]))
        assert ours["cognition"] == pytest.approx(mme_aggregate_results(theirs["mme_cognition_score"]))
        for category in metrics.MME_COGNITION:
            alone = [value for value in theirs["mme_cognition_score"] if value["category"] == category]
            assert ours[category] == pytest.approx(mme_aggregate_results(alone))


def test_boxes_are_those_that_theirs_read():
    from lmms_eval.tasks.refcoco.utils_rec import parse_float_sequence_within

    found = 0
    for text in box_texts():
        if "٠" in text:  # theirs reads digits of any script
            assert parse_float_sequence_within(text) == [0, 1, 2, 3] and metrics.parse_boxes(text) == []
            continue
        theirs = parse_float_sequence_within(text)
        ours = metrics.parse_boxes(text)
        # Theirs finds the first box alone, and gives four zeros for none.
        assert list(ours[0] if ours else (0, 0, 0, 0)) == theirs, text
        found += bool(ours)
    assert len(box_texts()) >= 200 and found > 80
    for text in (
        "[.1, .2, .3, .4]",
        "[0.1 , 0.2 , 0.3 , 0.4]",
        "[1e-1, 2e-1, 3e-1, 4e-1]",
        "(0.1, 0.2, 0.3, 0.4)",
        "[+0.1, 0.2, 0.3, 0.4]",
    ):
        assert parse_float_sequence_within(text) == [0, 0, 0, 0]
        assert metrics.parse_boxes(text) == [(0.1, 0.2, 0.3, 0.4)]


def test_iou_is_theirs():
    from lmms_eval.tasks.refcoco.utils_rec import compute_accuracy, compute_iou

    rng = random.Random(0)
    boxes = []
    for _ in range(30):
        left, top = rng.uniform(-0.2, 1), rng.uniform(-0.2, 1)
        boxes.append((left, top, left + rng.uniform(0.01, 1), top + rng.uniform(0.01, 1)))
    hits = 0
    for one, other in product(boxes, boxes):
        assert metrics.box_iou(one, other) == pytest.approx(compute_iou(one, other), abs=1e-12)
        hits += (hit := metrics.box_iou(one, other) >= 0.5)
        assert hit == compute_accuracy(one, other)
    assert 30 < hits < 800
    inside_out = (0.6, 0.6, 0.1, 0.1)
    assert metrics.box_iou((0.0, 0.0, 1.0, 1.0), inside_out) == compute_iou((0.0, 0.0, 1.0, 1.0), inside_out) == 0
    with pytest.raises(ZeroDivisionError):  # what has no area makes theirs stumble
        compute_iou((0.1,) * 4, (0.1,) * 4)
    assert metrics.box_iou((0.1,) * 4, (0.1,) * 4) == 0.0
