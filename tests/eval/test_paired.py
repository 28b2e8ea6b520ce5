"""Paired statistics against slow twins: counting by hand, resampling item by item, exact binomials in fractions."""

from fractions import Fraction
from math import comb

import numpy as np
import pytest

from gptoss_quantize.eval.paired import Cells, cells, compare_answers, mcnemar, resample


def answers(both: int, worse: int, better: int, neither: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two lists of answers with these counts, in a mixed order."""
    base = np.repeat([True, True, False, False], [both, worse, better, neither])
    cand = np.repeat([True, False, True, False], [both, worse, better, neither])
    order = np.random.default_rng(seed).permutation(len(base))
    return base[order], cand[order]


def test_cells_are_counted():
    assert cells(*answers(5, 3, 2, 4)) == Cells(5, 3, 2, 4)
    with pytest.raises(ValueError, match="equal lists"):
        cells(np.ones(3, bool), np.ones(4, bool))


@pytest.mark.parametrize(("worse", "better"), [(0, 0), (1, 0), (5, 5), (12, 3), (3, 12), (40, 61), (1200, 1100)])
def test_mcnemar_is_the_two_sided_binomial_test(worse, better):
    flips = worse + better
    # every outcome that is at most as probable as the one seen
    seen = comb(flips, worse)
    exact = sum(Fraction(comb(flips, k), 2**flips) for k in range(flips + 1) if comb(flips, k) <= seen)
    assert mcnemar(worse, better) == pytest.approx(float(exact), rel=1e-12)


def test_the_comparison_by_hand():
    base, cand = answers(60, 12, 4, 24)
    got = compare_answers({"one": base}, {"one": cand})
    assert got["items"] == 100 and got["flips_worse"] == 12 and got["flips_better"] == 4
    assert got["baseline_accuracy"] == 0.72 and got["accuracy"] == 0.64
    assert got["difference"] == pytest.approx(-0.08) and got["recovery"] == pytest.approx(64 / 72)
    low, high = got["interval"]
    # the normal approximation of a paired difference
    error = np.sqrt((12 + 4) / 100 - 0.08**2) / 10
    assert (low, high) == pytest.approx((-0.08 - 1.96 * error, -0.08 + 1.96 * error), abs=0.012)
    # the delta method for the ratio of two dependent means
    p, q, joint = 0.72, 0.64, 0.60
    variance = (q * (1 - q) / p**2 + q**2 * p * (1 - p) / p**4 - 2 * q * (joint - p * q) / p**3) / 100
    assert got["recovery_se"] == pytest.approx(np.sqrt(variance), rel=0.1)


def test_counting_cells_is_resampling_items():
    base, cand = answers(30, 9, 3, 18)
    quick = resample([cells(base, cand)], resamples=20_000, seed=1)
    rng = np.random.default_rng(2)
    drawn = rng.integers(len(base), size=(20_000, len(base)))
    slow = (cand[drawn].astype(int) - base[drawn].astype(int)).mean(1)
    fast = (quick[:, 2] - quick[:, 1]) / len(base)
    assert fast.mean() == pytest.approx(slow.mean(), abs=1e-3)
    assert np.quantile(fast, [0.025, 0.5, 0.975]) == pytest.approx(np.quantile(slow, [0.025, 0.5, 0.975]), abs=0.02)


def test_tasks_are_resampled_by_themselves():
    # in one task the candidate always loses, in the other never: no resample can move the difference
    base = {"a": np.ones(40, bool), "b": np.ones(40, bool)}
    cand = {"a": np.zeros(40, bool), "b": np.ones(40, bool)}
    assert compare_answers(base, cand)["interval"] == [-0.5, -0.5]
    mixed = compare_answers({"all": np.concatenate([*base.values()])}, {"all": np.concatenate([*cand.values()])})
    assert mixed["interval"][0] < -0.55


def test_the_same_answers_twice():
    base, _ = answers(30, 10, 0, 10)
    got = compare_answers({"t": base}, {"t": base})
    assert got["interval"] == [0, 0] and got["p_mcnemar"] == 1 and got["recovery"] == 1 and got["recovery_se"] == 0


def test_nothing_right_has_no_recovery():
    got = compare_answers({"t": np.zeros(20, bool)}, {"t": np.ones(20, bool)})
    assert got["recovery"] is None and got["recovery_se"] is None and got["difference"] == 1


def test_the_result_does_not_depend_on_the_order_of_items_or_on_global_state():
    first = compare_answers({"t": answers(30, 9, 3, 18)[0]}, {"t": answers(30, 9, 3, 18)[1]})
    np.random.default_rng(5).random(10)
    base, cand = answers(30, 9, 3, 18, seed=9)
    assert compare_answers({"t": base}, {"t": cand}) == first


def test_different_tasks_are_refused():
    with pytest.raises(ValueError, match="tasks differ"):
        compare_answers({"a": np.ones(2, bool)}, {"b": np.ones(2, bool)})


def test_the_interval_covers_the_truth():
    # benchmarks/coverage.py does 2,000 per setting; 400 leave a standard error of 1.1 points
    rng = np.random.default_rng(0)
    truth = np.array([0.55, 0.08, 0.05, 0.32])
    inside = 0
    for trial in range(400):
        both, worse, better, neither = rng.multinomial(300, truth)
        base, cand = answers(both, worse, better, neither)
        low, high = compare_answers({"t": base}, {"t": cand}, resamples=2000, seed=trial)["interval"]
        inside += low <= truth[2] - truth[1] <= high
    assert 0.92 <= inside / 400 <= 0.98
