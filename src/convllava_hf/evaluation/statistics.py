"""How sure a score is, and whether two scores differ: the bootstrap, McNemar's test and a permutation test."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .scorers import Table


Score = Callable[[np.ndarray], np.ndarray]  # (..., quantities) -> (...)

RESAMPLES = 1000
LEVEL = 0.95


@dataclass(frozen=True)
class PairedTest:
    """Two runs on the same samples. `difference`: the second's score less the first's, with its `interval`.

    `p_value`: two-sided, of `test`: the chance of a difference as large if the runs were alike.
    """

    difference: float
    interval: tuple[float, float]
    p_value: float
    test: str


def bootstrap_interval(table: Table, score: Score, resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile interval of a score (Efron and Tibshirani, 1993, section 13).

    Groups of samples are drawn with replacement, as many as there are, each within its stratum.
    """
    return _percentiles(score(_resampled(table.sums, table.strata, resamples, seed)))


def paired_test(one: Table, other: Table, score: Score, resamples: int = 10_000, seed: int = 0) -> PairedTest:
    """Compares two runs on the same groups of samples.

    The interval is of a bootstrap that draws the same groups for both. Where every group is right or wrong, the test
    is McNemar's exact one (scipy's `binomtest` on the groups that differ); otherwise answers are exchanged between the
    runs at random, group by group (a permutation test).
    """
    difference = float(score(other.sums.sum(0)) - score(one.sums.sum(0)))
    both = np.concatenate([one.sums, other.sums], axis=1)
    drawn = _resampled(both, one.strata, RESAMPLES, seed)
    width = one.sums.shape[1]
    interval = _percentiles(score(drawn[:, width:]) - score(drawn[:, :width]))
    if _is_right_or_wrong(one) and _is_right_or_wrong(other):
        from scipy.stats import binomtest

        gained = int(np.sum(other.sums[:, 0] > one.sums[:, 0]))
        lost = int(np.sum(other.sums[:, 0] < one.sums[:, 0]))
        p_value = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
        return PairedTest(difference, interval, float(p_value), "McNemar, exact")
    p_value = _permutation_p_value(one.sums, other.sums, score, difference, resamples, seed)
    return PairedTest(difference, interval, p_value, f"permutation, {resamples} times")


def _resampled(sums: np.ndarray, strata: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """(groups, quantities) -> (resamples, quantities): sums over groups that are drawn."""
    rng = np.random.default_rng(seed)
    parts = [sums[strata == stratum] for stratum in np.unique(strata)]
    drawn = np.zeros((resamples, sums.shape[1]))
    for number in range(resamples):
        for part in parts:
            # How often each group was drawn: sums need no more, and nothing large is copied.
            times = np.bincount(rng.integers(len(part), size=len(part)), minlength=len(part))
            drawn[number] += times @ part
    return drawn


def _permutation_p_value(
    one: np.ndarray, other: np.ndarray, score: Score, difference: float, resamples: int, seed: int
) -> float:
    rng = np.random.default_rng(seed)
    gain, first, second = other - one, one.sum(0), other.sum(0)
    changed = gain[np.any(gain != 0, axis=1)]  # exchanging what is equal changes nothing
    as_large = 0
    for start in range(0, resamples, 500):
        size = min(500, resamples - start)
        moved = (rng.random((size, len(changed))) < 0.5).astype(float) @ changed
        differences = score(second - moved) - score(first + moved)
        as_large += int(np.sum(np.abs(differences) >= abs(difference) - 1e-9))
    return (1 + as_large) / (1 + resamples)


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _is_right_or_wrong(table: Table) -> bool:
    right, ones = table.sums[:, 0], table.sums[:, -1]
    return table.sums.shape[1] == 2 and bool(np.all((right == 0) | (right == 1)) and np.all(ones == 1))
