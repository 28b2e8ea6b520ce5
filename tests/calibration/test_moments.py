"""Moments against their definition in float64."""

import pytest
import torch

from gptoss_quantize.calibration import moments as module
from gptoss_quantize.calibration.moments import MomentSums, token_blocks
from gptoss_quantize.kernels import native


def moments(x, weight, *, centre=True, diagonal=False, original_TK=None):
    sums = MomentSums(x.shape[1], centre=centre, diagonal=diagonal)
    for rows in token_blocks(len(x)):
        sums.add(x[rows], weight[rows], None if original_TK is None else original_TK[rows])
    return sums.finish()


def data(tokens=300, columns=40, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, columns, generator=generator, dtype=torch.float64) + torch.arange(columns) * 0.3
    original = x + 0.2 * torch.randn(tokens, columns, generator=generator, dtype=torch.float64) + 0.1
    weight = torch.rand(tokens, generator=generator, dtype=torch.float64)
    return x.to(dtype), original.to(dtype), weight


@pytest.fixture(params=[16, 4096], ids=["many blocks", "one block"])
def blocks(request, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_TOKENS", request.param)
    monkeypatch.setattr(module, "_COLUMNS", request.param)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("centre", [True, False])
def test_moments_equal_their_definition(centre):
    x, original, w = data()
    share = w / w.sum()
    mean, original_mean = share @ x, share @ original
    offset, original_offset = (mean, original_mean) if centre else (0 * mean, 0 * mean)
    hessian = (x - offset).T @ torch.diag(share) @ (x - offset)
    gap = (original - original_offset) - (x - offset)
    got = moments(x, w, centre=centre, original_TK=original)
    torch.testing.assert_close(got.mean, mean)
    torch.testing.assert_close(got.original_mean, original_mean)
    torch.testing.assert_close(got.hessian, hessian)
    torch.testing.assert_close(got.drift, gap.T @ torch.diag(share) @ (x - offset))
    assert got.tokens == 300
    assert got.effective_tokens == pytest.approx(float(w.sum() ** 2 / w.square().sum()))


@pytest.mark.usefixtures("blocks")
def test_diagonal_only():
    x, _, w = data()
    full, diagonal = moments(x, w), moments(x, w, diagonal=True)
    torch.testing.assert_close(diagonal.hessian, full.hessian.diagonal())
    assert diagonal.drift is None


def test_bfloat16_inputs_are_accumulated_in_float32():
    x, original, w = data(5000, 24, torch.bfloat16)
    exact = moments(x.double(), w, original_TK=original.double())
    with native.switched(False):
        got = moments(x, w, original_TK=original)
    assert got.hessian.dtype == torch.float32
    # float32 sums: 24 bits, not the 8 of the inputs
    assert float((got.hessian - exact.hessian).abs().max() / exact.hessian.abs().max()) < 1e-5
    # the drift is multiplied in bfloat16: 2^-8 of its own size
    assert float((got.drift - exact.drift).norm() / exact.drift.norm()) < 2**-7


def test_a_large_mean_does_not_cancel():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5000, 8, generator=generator) + 1000.0
    got = moments(x, torch.ones(5000))
    want = torch.cov(x.double().T, correction=0)
    assert float((got.hessian - want).abs().max()) < 1e-3


def test_no_tokens_give_zeros():
    got = MomentSums(5).finish(paired=True)
    assert (got.tokens, got.effective_tokens) == (0, 0.0)
    assert not bool(got.hessian.any())
    assert got.drift is not None
    assert not bool(got.drift.any())
