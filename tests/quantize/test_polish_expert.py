"""One expert's output and gradients, written out by hand, against autograd over dequantized weights in float64."""

from types import SimpleNamespace

import pytest
import torch

from gptoss_quantize.kernels import int4, native
from gptoss_quantize.kernels.experts import by_halves
from gptoss_quantize.quantize.polish_expert import ExpertOutput, integer_matrix

D, F, GROUP, TOKENS = 64, 96, 32, 40


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("dtype", "size", "error"), [(torch.float32, 1.0, 1e-5), (torch.bfloat16, 0.1, 0.02)])
def test_gradients_are_autograds(dtype, size, error):
    config = SimpleNamespace(swiglu_limit=7.0, swiglu_alpha=1.702)
    codes = [torch.randint(-8, 8, shape, dtype=torch.int8) for shape in ((2 * F, D), (D, F))]
    packed = [int4.pack(c) for c in codes]
    # in float32 both clamps bind; in bfloat16 none does: its rounding would cross them, where the gradient jumps
    free = [
        (size * (0.2 + 0.1 * normal(2 * F, D // GROUP))).bfloat16().float(),
        normal(2 * F, seed=1),
        (0.02 + 0.01 * normal(D, F // GROUP, seed=2)).bfloat16().float(),
        normal(D, seed=3),
    ]
    x, prob, slope = normal(TOKENS, D, seed=4).to(dtype), torch.rand(TOKENS), normal(TOKENS, D, seed=5)
    inputs = [t.clone().requires_grad_() for t in (x, prob, *free)]
    matrices = [integer_matrix(p, k // GROUP, 4, dtype) for p, k in zip(packed, (D, F), strict=True)]
    kept = []
    with torch.no_grad():
        first = ExpertOutput.apply(*inputs, *matrices, config, kept)
    got = ExpertOutput.apply(*inputs, *matrices, config, kept)
    assert torch.equal(first, got)
    got.backward(slope)

    wide = [t.detach().double().requires_grad_() for t in (x, prob, *free)]
    xs, p, scale13, bias13, scale2, bias2 = wide
    w13, w2 = (
        (c.double().unflatten(-1, (-1, GROUP)) * s[..., None]).flatten(-2)
        for c, s in zip(codes, (scale13, scale2), strict=True)
    )
    gate, up = (xs @ w13.T + bias13).chunk(2, dim=-1)
    assert bool((gate > config.swiglu_limit).any()) == bool((up.abs() > config.swiglu_limit).any()) == (size == 1)
    glu = gate.clamp(max=7.0) * torch.sigmoid(1.702 * gate.clamp(max=7.0))
    want = ((up.clamp(-7.0, 7.0) + 1) * glu @ w2.T + bias2) * p[:, None]
    want.backward(slope.double())
    names = ("x", "prob", "scale13", "bias13", "scale2", "bias2")
    for name, mine, theirs in zip(("output", *names), (got, *inputs), (want, *wide), strict=True):
        a, b = (mine, theirs) if name == "output" else (mine.grad, theirs.grad)
        assert float((a.detach().double() - b.detach()).norm() / b.detach().norm()) < error, name


def test_rows_by_halves():
    rows = torch.arange(6)
    assert by_halves(rows).tolist() == [0, 2, 4, 1, 3, 5]


@pytest.mark.skipif(not native.available(), reason=native.problem())
def test_compiled_and_plain_matrices_agree():
    codes = torch.randint(-8, 8, (20, 64), dtype=torch.int8)
    scale, slope = (0.1 + normal(20, 2).abs()).bfloat16(), normal(20, 64).bfloat16()
    fast, plain = (integer_matrix(int4.pack(codes), 2, 4, dtype) for dtype in (torch.bfloat16, torch.float32))
    assert torch.equal(fast.weight(scale.float()), plain.weight(scale.float()).bfloat16())
    torch.testing.assert_close(fast.scale_gradient(slope), plain.scale_gradient(slope.float()), rtol=1e-5, atol=1e-4)
