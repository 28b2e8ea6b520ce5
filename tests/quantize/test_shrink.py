"""Shrinkage towards the layer's Hessian, an ablation."""

import torch

from gptoss_quantize.calibration.moments import Moments
from gptoss_quantize.quantize.shrink import shrunk


def moments(tokens: int, seed: int) -> Moments:
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Moments(x.mean(0), x.T @ x / 50, tokens, float(tokens))


def test_few_tokens_mean_the_layers_hessian_and_many_the_experts_own():
    stats = [moments(100000, 0), moments(100000, 1), moments(3, 2), moments(0, 3)]
    stats[3].hessian.zero_()
    before = [s.hessian.clone() for s in stats]
    got = [s.hessian for s in shrunk(stats, 0.2)]
    pooled = sum(s.tokens * h for s, h in zip(stats, before, strict=True)) / sum(s.tokens for s in stats)
    torch.testing.assert_close(got[0], before[0], rtol=1e-3, atol=1e-4)
    rate = 1.2 / (3 + 1.2)
    want = (1 - rate) * before[2] + rate * before[2].trace() / pooled.trace() * pooled
    torch.testing.assert_close(got[2], want)
    torch.testing.assert_close(got[3], pooled)
    assert all(torch.equal(s.hessian, h) for s, h in zip(stats, before, strict=True))
    diagonal = [Moments(s.mean, s.hessian.diagonal().clone(), s.tokens, s.effective_tokens) for s in stats]
    for full, short in zip(got, shrunk(diagonal, 0.2), strict=True):
        torch.testing.assert_close(short.hessian, full.diagonal())


def test_no_tokens_at_all_change_nothing():
    stats = [moments(0, 0)]
    assert shrunk(stats, 0.2) is stats
