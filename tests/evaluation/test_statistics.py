"""Scores, intervals and paired tests against numpy, scipy and the metrics' own functions."""

import itertools

import numpy as np
import pytest


scipy_stats = pytest.importorskip("scipy.stats")

from convllava_hf.evaluation.metrics import MME_COGNITION, MME_PERCEPTION, mme_scores, pope_scores  # noqa: E402
from convllava_hf.evaluation.samples import Sample  # noqa: E402
from convllava_hf.evaluation.scorers import (  # noqa: E402
    F1,
    ImageGeometry,  # noqa: E402
    Mean,
    Mme,
    Table,
    by_overlap,
)
from convllava_hf.evaluation.statistics import bootstrap_interval, paired_test  # noqa: E402


def mean_rows(scores) -> list[dict]:
    return [{"id": str(index), "score": float(score)} for index, score in enumerate(scores)]


def pope_rows(rng, number: int = 400) -> list[dict]:
    return [
        {
            "id": str(index),
            "read": [True, False, None][rng.choice(3, p=[0.45, 0.45, 0.1])],
            "answers": [["yes", "no"][index % 2]],
            "category": ["adversarial", "popular", "random"][index % 3],
        }
        for index in range(number)
    ]


def mme_rows(rng, images: int = 90) -> list[dict]:
    names = MME_PERCEPTION + MME_COGNITION
    rows = []
    for image, turn in itertools.product(range(images), range(2)):
        answer = turn == 0
        read = [answer, not answer, None][rng.choice(3, p=[0.7, 0.2, 0.1])]
        rows.append(
            {
                "id": f"{image}.{turn}",
                "category": names[image % len(names)],
                "group": str(image),
                "read": read,
                "score": float(read == answer),
                "answers": ["yes" if answer else "no"],
            }
        )
    return rows


def total(summary, rows) -> float:
    return float(summary.score(summary.table(rows).sums.sum(0)))


def test_the_interval_of_a_mean_is_scipys():
    scores = np.random.default_rng(1).choice([0, 0.3, 0.6, 0.9, 1], size=500)
    summary = Mean()
    low, high = bootstrap_interval(summary.table(mean_rows(scores)), summary.score)
    theirs = scipy_stats.bootstrap((scores,), np.mean, method="percentile", n_resamples=5000, rng=2)
    assert [low, high] == pytest.approx(
        [100 * theirs.confidence_interval.low, 100 * theirs.confidence_interval.high], abs=0.4
    )
    half = 196 * scores.std() / np.sqrt(len(scores))  # of the normal distribution
    assert [low, high] == pytest.approx([100 * scores.mean() - half, 100 * scores.mean() + half], abs=0.4)


def test_the_interval_of_f1_is_scipys():
    rows = pope_rows(np.random.default_rng(3))
    summary = F1()
    low, high = bootstrap_interval(summary.table(rows), summary.score)

    def f1(chosen) -> float:
        some = [rows[index] for index in chosen]
        return pope_scores([row["read"] for row in some], [row["answers"][0] == "yes" for row in some])["f1"]

    theirs = scipy_stats.bootstrap(
        (np.arange(len(rows)),), f1, method="percentile", n_resamples=1500, vectorized=False, rng=4
    ).confidence_interval
    assert [low, high] == pytest.approx([100 * theirs.low, 100 * theirs.high], abs=0.8)


def test_the_interval_of_mme_draws_images_within_their_category():
    rows = mme_rows(np.random.default_rng(5))
    summary = Mme()
    low, high = bootstrap_interval(summary.table(rows), summary.score)
    rng, drawn = np.random.default_rng(6), []
    by_image = {image: [row for row in rows if row["group"] == image] for image in {r["group"] for r in rows}}
    categories = {name: [p for p, r in by_image.items() if r[0]["category"] == name] for name in MME_PERCEPTION}
    for _ in range(800):
        points = 0.0
        for images in categories.values():
            pairs = [by_image[images[index]] for index in rng.integers(len(images), size=len(images))]
            right = np.array([[row["score"] for row in pair] for pair in pairs])
            points += 100 * right.mean() + 100 * right.all(1).mean()
        drawn.append(points)
    assert [low, high] == pytest.approx(np.quantile(drawn, [0.025, 0.975]), rel=0.03)


def test_groups_are_drawn_and_not_their_samples():
    """Copies of every sample in its group add nothing to what is known."""
    scores = np.random.default_rng(7).integers(0, 2, size=200)
    alone = mean_rows(scores)
    copied = [{**row, "id": f"{row['id']}.{copy}", "group": row["id"]} for row in alone for copy in range(4)]
    summary = Mean()
    intervals = [bootstrap_interval(summary.table(rows), summary.score) for rows in (alone, copied)]
    assert intervals[0] == intervals[1]


def test_a_group_is_as_right_as_its_worst_sample():
    rows = [
        {"id": "0", "score": 1.0, "group": "a"},
        {"id": "1", "score": 0.0, "group": "a"},
        {"id": "2", "score": 1.0, "group": "b"},
        {"id": "3", "score": 1.0, "group": "b"},
    ]
    assert total(Mean(), rows) == 50
    assert Mean().details(rows)["accuracy of single questions"] == 75


def test_f1_is_that_of_the_metric():
    rows = pope_rows(np.random.default_rng(8))
    truth = [row["answers"][0] == "yes" for row in rows]
    expected = pope_scores([row["read"] for row in rows], truth)
    assert total(F1(), rows) == pytest.approx(100 * expected["f1"])
    details = F1().details(rows)
    assert details["recall"] == pytest.approx(100 * expected["recall"])
    parts = [f"f1, {name}" for name in ("adversarial", "popular", "random")]
    assert set(parts) <= set(details)
    assert total(F1(), [{**row, "read": False} for row in rows]) == 0


def test_mme_is_that_of_the_metric():
    rows = mme_rows(np.random.default_rng(9))
    details = Mme().details(rows)
    assert total(Mme(), rows) == pytest.approx(details["perception"])
    some = [row for row in rows if row["category"] in ("OCR", "code_reasoning")]
    assert total(Mme(), some) == pytest.approx(Mme().details(some)["OCR"])
    perfect = [{**row, "score": 1.0, "read": row["answers"] == ["yes"]} for row in rows]
    assert total(Mme(), perfect) == pytest.approx(2000) and Mme().details(perfect)["cognition"] == 800
    assert mme_scores([("OCR", "1", True, True), ("OCR", "1", True, False)])["OCR"] == 50


def test_mcnemar_is_scipys():
    one = np.array([1] * 60 + [0] * 25 + [1] * 10 + [0] * 5)
    other = np.array([1] * 60 + [1] * 25 + [0] * 10 + [0] * 5)
    summary = Mean()
    tables = [summary.table(mean_rows(scores)) for scores in (one, other)]
    tested = paired_test(*tables, summary.score)
    assert tested.test == "McNemar, exact"
    assert tested.difference == pytest.approx(15)
    # By hand: 35 samples differ, and 25 or more of 35 fall to one side.
    tail = sum(float(scipy_stats.binom.pmf(k, 35, 0.5)) for k in range(25, 36))
    assert tested.p_value == pytest.approx(2 * tail)
    theirs = scipy_stats.bootstrap(
        (one, other),
        lambda a, b: b.mean() - a.mean(),
        paired=True,
        vectorized=False,
        n_resamples=2000,
        method="percentile",
        rng=1,
    ).confidence_interval
    assert tested.interval == pytest.approx((100 * theirs.low, 100 * theirs.high), abs=1.5)  # steps of one sample


def test_the_permutation_test_is_scipys():
    rng = np.random.default_rng(10)
    one = rng.choice([0, 0.5, 1], size=120)
    other = np.clip(one + rng.choice([-0.5, 0, 0, 0, 0.5, 0.5, 0.5], size=120), 0, 1)
    summary = Mean()
    tested = paired_test(*(summary.table(mean_rows(scores)) for scores in (one, other)), summary.score)
    theirs = scipy_stats.permutation_test(
        (one, other),
        lambda a, b, axis: b.mean(axis) - a.mean(axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=10_000,
        rng=3,
    )
    assert tested.test.startswith("permutation")
    assert 0 < theirs.pvalue < 0.2  # a case in which there is something to get wrong
    assert tested.p_value == pytest.approx(theirs.pvalue, abs=0.015)


def test_runs_that_are_alike_do_not_differ():
    rows = pope_rows(np.random.default_rng(11))
    table = F1().table(rows)
    tested = paired_test(table, table, F1().score, resamples=200)
    assert (tested.difference, tested.interval, tested.p_value) == (0, (0, 0), 1)
    right = Mean().table(mean_rows([1, 0, 1]))
    assert paired_test(right, right, Mean().score).p_value == 1


def test_one_sample_has_an_interval():
    table = Table(np.array([[1.0, 1.0]]), np.array([0]), ["0"])
    assert bootstrap_interval(table, Mean().score) == (100, 100)


# --- boxes


def found(prediction: str, padded: bool = True) -> dict:
    """Of an image of 60 x 100 pixels, which stands 20 pixels from the left in its square."""
    sample = Sample("0", 0, "", (), box=(6.0, 20.0, 36.0, 60.0))
    return by_overlap(sample, prediction, ImageGeometry(60, 100, padded))


@pytest.mark.parametrize(
    ("prediction", "padded"),
    [
        ("[0.26, 0.20, 0.56, 0.60]", True),  # of the square
        ("[260, 200, 560, 600]", True),
        ("It is at (0.26, 0.2, 0.56, 0.6). And [0, 0, 1, 1]", True),
        ("[0.10, 0.20, 0.60, 0.60]", False),  # of the image
        ("[100, 200, 600, 600]", False),
    ],
)
def test_boxes_are_read_in_what_the_model_saw(prediction, padded):
    judged = found(prediction, padded)
    assert judged["score"] == 1 and judged["overlap"] == pytest.approx(1)
    assert judged["read"] == pytest.approx([0.1, 0.2, 0.6, 0.6])
    assert judged["truth"] == pytest.approx([0.1, 0.2, 0.6, 0.6])


def test_boxes_in_the_wrong_place_are_wrong():
    assert found("[0.26, 0.20, 0.56, 0.60]", padded=False)["overlap"] == pytest.approx(0.6)  # 30 of 50 hundredths
    assert found("[0.26, 0.20, 0.56, 0.39]")["score"] == 0  # 19 of 40 pixels high
    assert found("[0.26, 0.20, 0.56, 0.41]")["score"] == 1
    nothing = found("on the left")
    assert nothing["score"] == 0 and nothing["read"] is None
