"""Distances between predictions, against a slow twin, and when they count as agreement."""

import math

import pytest
import torch

from gptoss_quantize.runtimes.agreement import AGREES, DISAGREES, NOT_CHECKED, Agreement, bound, compare, verdict


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


def test_without_noise_there_is_no_verdict():
    assert verdict(agreement(0.0), None) == NOT_CHECKED
