"""Paired statistics against slow twins: counting by hand, resampling item by item, exact binomials in fractions."""

from fractions import Fraction
from itertools import product
from math import comb, sqrt

import numpy as np
import pytest

from gptoss_quantize.eval.paired import (
    Cells,
    cells,
    combined,
    compare_answers,
    fallen,
    holm,
    mcnemar,
    mcnemar_mid_p,
    newcombe,
    resample,
    wilson,
)


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


def test_each_task_has_an_interval_of_its_own():
    # in one task the candidate always loses, in the other never: the doubt is that of each task, not of their mix
    base = {"a": np.ones(40, bool), "b": np.ones(40, bool)}
    cand = {"a": np.zeros(40, bool), "b": np.ones(40, bool)}
    low, high = compare_answers(base, cand)["interval"]
    mixed = compare_answers({"all": np.concatenate([*base.values()])}, {"all": np.concatenate([*cand.values()])})
    assert mixed["interval"][0] < low < -0.5 < high < mixed["interval"][1]


def test_the_same_answers_twice():
    base, _ = answers(30, 10, 0, 10)
    got = compare_answers({"t": base}, {"t": base})
    assert got["p_mcnemar"] == 1 and got["recovery"] == 1 and got["recovery_se"] == 0
    low, high = got["interval"]
    assert low == pytest.approx(-high) and 0.01 < high < 0.08


# --- intervals that are right for few items


def test_nine_items_without_a_flip_know_next_to_nothing():
    # resampling gives [0, 0]; up to 3.7 / 9 of all items may get worse unseen (2.5 %, one-sided)
    for right in (5, 9):
        low, high = newcombe(Cells(right, 0, 0, 9 - right))
        assert low < -0.18 and high > 0.18


def test_wilson_solves_its_equation():
    # the limits are where |share - p| is z standard errors of p itself
    z = 1.959963984540054
    for right, items in ((0, 9), (5, 9), (9, 9), (81, 263), (1500, 1508)):
        for limit in wilson(right, items):
            distance = abs(right / items - limit)
            assert distance == pytest.approx(z * sqrt(limit * (1 - limit) / items), abs=1e-7)
    # Newcombe 1998 (17, p. 857), Table I: 81 of 263
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)


@pytest.mark.parametrize(
    ("both", "first", "second", "neither", "interval"),
    [
        # Newcombe 1998 (17, p. 2635), Table III, method 10
        (36, 12, 2, 0, (0.0569, 0.3404)),
        (20, 12, 2, 16, (0.0562, 0.3292)),
        (18, 14, 0, 18, (0.1441, 0.3963)),
    ],
)
def test_newcombes_published_examples(both, first, second, neither, interval):
    got = newcombe(Cells(both=both, only_baseline=second, only_candidate=first, neither=neither))
    assert got == pytest.approx(interval, abs=5e-5)
    # and mirrored when the two change places
    low, high = newcombe(Cells(both=both, only_baseline=first, only_candidate=second, neither=neither))
    assert (-high, -low) == pytest.approx(got, abs=1e-12)


@pytest.mark.parametrize("counts", [*product((0, 1, 7), repeat=4)][1:])
def test_newcombe_is_its_twin(counts):
    a, b, c, d = np.array(counts, dtype=np.float64)  # both, only candidate, only baseline, neither
    n, z = a + b + c + d, 1.959963984540054

    def limits(x):
        middle, half = 2 * x + z**2, z * np.sqrt(z**2 + 4 * x * (1 - x / n))
        return (middle - half) / (2 * (n + z**2)), (middle + half) / (2 * (n + z**2))

    p, q = (a + b) / n, (a + c) / n
    (l1, u1), (l2, u2) = limits(a + b), limits(a + c)
    spread = (a + b) * (c + d) * (a + c) * (b + d)
    numerator = a * d - b * c
    if numerator > n / 2:
        numerator -= n / 2
    elif numerator >= 0:
        numerator = 0
    phi = numerator / np.sqrt(spread) if spread else 0
    low = p - q - np.sqrt(max(0, (p - l1) ** 2 - 2 * phi * (p - l1) * (u2 - q) + (u2 - q) ** 2))
    high = p - q + np.sqrt(max(0, (u1 - p) ** 2 - 2 * phi * (u1 - p) * (q - l2) + (q - l2) ** 2))
    assert newcombe(Cells(*map(int, (a, c, b, d)))) == pytest.approx((max(low, -1), min(high, 1)), abs=1e-12)


def test_one_task_combined_is_that_task():
    counts = Cells(30, 9, 3, 18)
    assert combined([counts]) == pytest.approx(newcombe(counts), abs=1e-12)
    # twice the same task: the same difference, and the doubt of independent halves
    low, high = combined([counts, counts])
    one = newcombe(counts)
    assert (-0.1 - low, high + 0.1) == pytest.approx(((-0.1 - one[0]) / sqrt(2), (one[1] + 0.1) / sqrt(2)))


# --- the task that fell


@pytest.mark.parametrize(("worse", "better"), [(0, 0), (1, 0), (6, 0), (10, 1), (1, 10), (40, 61)])
def test_the_mid_p_value_in_fractions(worse, better):
    flips = worse + better
    tail = sum(Fraction(comb(flips, k), 2**flips) for k in range(worse, flips + 1))
    exact = tail - Fraction(comb(flips, worse), 2 ** (flips + 1))
    assert mcnemar_mid_p(worse, better) == pytest.approx(float(exact), rel=1e-12)


def test_holm_by_hand():
    # Holm (1979): the smallest times 4, the next times 3, ..., never below one before it
    got = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert got == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert list(got) == ["a", "b", "c", "d"] and holm({"x": 0.7, "y": 0.9}) == {"x": 1.0, "y": 1.0}


def nine_tasks(capitals: tuple[int, int]) -> dict:
    base, cand = {}, {}
    for number in range(8):
        base[f"t{number}"], cand[f"t{number}"] = answers(100, 4, 5, 60)
    base["gptoss_capitals"], cand["gptoss_capitals"] = answers(100, *capitals, 34 - sum(capitals))
    return {task: compare_answers({task: base[task]}, {task: cand[task]}) for task in base}


def test_the_single_task_that_fell_is_found_among_nine():
    # capitals -6.7 [-12, -2.2] of 134 stood under a green verdict
    (found,) = fallen(nine_tasks((10, 1)))
    assert found["task"] == "gptoss_capitals" and found["difference"] == pytest.approx(-9 / 134)
    assert found["p"] < 0.05 and found["interval"][1] < 0
    # half of it is what one of nine tasks loses by chance; and a task that rose is no alarm
    assert fallen(nine_tasks((5, 1))) == [] == fallen(nine_tasks((1, 10)))


def test_false_alarms_are_as_rare_as_promised():
    rng = np.random.default_rng(0)
    truth = [0.6, 0.05, 0.05, 0.3]
    alarms = 0
    for _ in range(400):
        pairs = {}
        for task in "abcdefghi":
            both, worse, better, neither = rng.multinomial(150, truth)
            base, cand = answers(both, worse, better, neither)
            pairs[task] = compare_answers({task: base}, {task: cand}, resamples=2)
        alarms += bool(fallen(pairs))
    # 5 %, and two standard errors of 400 trials
    assert alarms / 400 <= 0.05 + 0.022


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
        low, high = compare_answers({"t": base}, {"t": cand}, resamples=2, seed=trial)["interval"]
        inside += low <= truth[2] - truth[1] <= high
    assert 0.92 <= inside / 400 <= 0.98
