"""Distances between predictions, against a slow twin, and when they count as agreement."""

import math

import pytest
import torch

from gptoss_quantize.runtimes.agreement import (
    AGREES,
    DISAGREES,
    LIMITS,
    NOT_CHECKED,
    Agreement,
    alarm,
    bound,
    compare,
    judge,
    verdict,
)


def test_the_distance_by_its_definition():
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(5, 7, generator=generator)
    got = reference + 0.1 * torch.randn(5, 7, generator=generator)
    kls, differences, same = [], [], 0
    for p_row, q_row in zip(reference.tolist(), got.tolist(), strict=True):
        p = [math.exp(x) / sum(map(math.exp, p_row)) for x in p_row]
        q = [math.exp(x) / sum(map(math.exp, q_row)) for x in q_row]
        kls.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
        differences += [abs(math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True)]
        same += p.index(max(p)) == q.index(max(q))
    found = compare(reference, got)
    mean = sum(kls) / 5
    assert found.kl == pytest.approx(mean)
    assert found.kl_se == pytest.approx(math.sqrt(sum((k - mean) ** 2 for k in kls) / 4 / 5))
    assert found.max_difference == pytest.approx(max(differences))
    assert found.mean_difference == pytest.approx(sum(differences) / 35)
    assert found.top1 == same / 5 and found.positions == 5
    assert found.kl_median == pytest.approx(sorted(kls)[2]) and found.kl_max == pytest.approx(max(kls))
    assert found.kls == pytest.approx(kls) and "kls" not in found.record()


def test_a_constant_added_to_all_logits_is_no_difference():
    reference = torch.randn(3, 11, dtype=torch.float64)
    found = compare(reference, reference + 5)
    assert found.max_difference < 1e-12 and found.kl < 1e-12 and found.top1 == 1


def test_what_is_not_finite_is_infinitely_far():
    reference = torch.randn(2, 4)
    broken = reference.clone()
    broken[1, 2] = float("nan")
    found = compare(reference, broken)
    assert found.kl == math.inf and verdict(found, compare(reference, reference)) == DISAGREES


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"shape \[2, 5\], expected \[2, 4\]"):
        compare(torch.zeros(2, 4), torch.zeros(2, 5))


def agreement(kl, error=0.0):
    """An agreement with this KL."""
    return Agreement(8, 0.1, 0.01, kl, error, 1.0)


def test_twice_the_noise_agrees_and_more_does_not():
    noise = agreement(0.01)
    assert verdict(agreement(0.02), noise) == AGREES
    assert verdict(agreement(0.0201), noise) == DISAGREES
    # a spread of its own widens the bound, and so does the noise's
    assert verdict(agreement(0.0201, 0.001), noise) == AGREES
    assert bound(agreement(0.01, 0.002), agreement(0.02, 0.003)) == pytest.approx(0.02 + 3 * 0.005 + 1e-6)


def test_without_noise_there_is_no_verdict_but_for_what_nothing_explains():
    assert verdict(agreement(0.0), None) == NOT_CHECKED
    assert verdict(agreement(0.04), None, "16 bit") == NOT_CHECKED
    assert verdict(agreement(0.06), None, "16 bit") == DISAGREES
    assert verdict(agreement(0.04), None, "float32") == DISAGREES


# --- the absolute alarms


def positions(*kls):
    """An agreement with these KLs, its mean, spread and median as `compare` finds them."""
    values = torch.tensor(kls, dtype=torch.float64)
    error = float(values.std() / math.sqrt(len(values)))
    return Agreement(
        len(kls), 1.0, 0.1, float(values.mean()), error, 1.0, float(values.quantile(0.5)), float(values.max()), kls
    )


@pytest.mark.parametrize("precision", LIMITS)
def test_a_baseline_that_is_far_off_itself_disagrees_whatever_the_candidate_does(precision):
    # KL 6.2 of random experts, seen in both: twice the noise is twice the fault
    fault = positions(*[6.2] * 16)
    assert fault.kl <= bound(fault, fault)
    for candidate in (fault, agreement(0.0)):
        outcome, why = judge(candidate, fault, precision)
        assert outcome == DISAGREES and "the unquantized model itself is far from ours" in why


@pytest.mark.parametrize("precision", LIMITS)
def test_each_limit_is_where_it_says(precision):
    limits = LIMITS[precision]
    small = limits.median / 10
    for just, beyond, words in (
        # mean: one position carries it, the others stay below the median's limit
        ((small,) * 99 + (limits.mean * 99 - small * 99,), (small,) * 99 + (limits.mean * 101,), "KL "),
        ((limits.median * 0.99,) * 10, (limits.median * 1.01,) * 10, "median"),
    ):
        assert alarm(positions(*just), precision) is None
        assert words in alarm(positions(*beyond), precision)


def test_a_rare_fault_is_seen_where_mean_and_spread_hide_it():
    # one expert of 128 with four per token: 3 % of the positions, each as far off as random weights make it
    limits = LIMITS["16 bit"]
    rare = positions(*[1e-3] * 62, 1.2, 1.3)
    noise = positions(*[1e-3] * 64)
    assert rare.kl < limits.mean and rare.kl <= bound(noise, rare) and rare.kl_median < limits.median
    assert judge(rare, noise, "16 bit") == (DISAGREES, alarm(rare, "16 bit"))
    assert "2 of 64 positions beyond 1 nats" in alarm(rare, "16 bit")
    # one position alone may be a router's tie
    assert alarm(positions(*[1e-3] * 63, 1.2), "16 bit") is None


def test_what_is_not_a_number_is_an_alarm():
    nan = float("nan")
    assert alarm(Agreement(4, nan, nan, nan, nan, 0.0, nan, nan, (nan,) * 4), "16 bit")
