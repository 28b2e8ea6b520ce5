"""Error feedback and sweeps on the uneven E2M1 grid, against their definitions in float64, in torch and in C++."""

import pytest
import torch

from gptoss_quantize.kernels import native
from gptoss_quantize.kernels.grids import MXFP4
from gptoss_quantize.quantize import solve
from gptoss_quantize.quantize.scales import floor_scale, searched_power_scale
from gptoss_quantize.quantize.solve import factorize

HALVES = torch.tensor([-12.0, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12], dtype=torch.float64)


def turned(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.transpose(1, 2).contiguous()


def gptq(target, factored, scale, *args, **options):
    """`solve.gptq` for weights that lie as they are stored, [E, N, K]."""
    return turned(solve.gptq(turned(target), factored, turned(scale), *args, **options))


def refine(target, hessian, scale, codes, *args, **options):
    """`solve.refine` likewise."""
    return tuple(map(turned, solve.refine(turned(target), hessian, turned(scale), turned(codes), *args, **options)))


@pytest.fixture(params=["torch", "C++"])
def compiled(request):
    """Return whether the C++ loops are tested; they need a compiler."""
    if request.param == "C++" and not native.available():
        pytest.skip(native.problem())
    return request.param == "C++"


def problem(rows: int, columns: int = 96):
    """Return (weights, Hessians, half-unit scales) of two experts in float64."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 600, columns, generator=generator, dtype=torch.float64)
    x = x @ (torch.randn(2, columns, columns, generator=generator, dtype=torch.float64) / 5)
    hessian = x.transpose(1, 2) @ x / 600 + 0.01 * torch.eye(columns)
    weight = torch.randn(2, rows, columns, generator=generator, dtype=torch.float64) * 0.1
    return weight, hessian, searched_power_scale(weight, hessian.diagonal(dim1=1, dim2=2))


def loss(weight, hessian, codes, scale):
    error = weight - codes * scale.repeat_interleave(32, -1)
    return float(((error @ hessian) * error).sum())


def nearest(value):
    return HALVES[(value[..., None] - HALVES).abs().argmin(-1)]


def gptq_definition(weight, hessian, scale, order):
    w, codes = weight.clone()[:, order], torch.empty_like(weight)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian[order][:, order]), upper=True)
    for k in range(w.shape[1]):
        step = scale[:, order[k] // 32]
        codes[:, order[k]] = nearest(w[:, k] / step)
        error = (w[:, k] - codes[:, order[k]] * step) / upper[k, k]
        w[:, k:] -= error[:, None] * upper[k, k:]
    return codes


@pytest.mark.parametrize("leaf", [7, 32, 96])
def test_gptq_equals_definition(leaf, compiled):
    # 47 rows: one tile of 32, one vector of 8, 7 single rows
    weight, hessian, scale = problem(47)
    factored = factorize(hessian, True)
    codes = gptq(weight, factored, scale, leaf, compiled, MXFP4)
    for e in range(2):
        assert torch.equal(codes[e].double(), gptq_definition(weight[e], hessian[e], scale[e], factored.order[e]))


def test_sweep_equals_definition(compiled):
    weight, hessian, scale = problem(29)
    codes = gptq(weight, factorize(hessian, True), scale, grid=MXFP4)
    got_scale, got = refine(weight, hessian, scale, codes, compiled, grid=MXFP4)
    assert torch.equal(got_scale, scale), "no refit with frozen codes moves a power of two here"
    want = codes.double()
    for e in range(2):
        step = scale[e].repeat_interleave(32, -1)
        for k in range(96):
            push = (weight[e] - want[e] * step) @ hessian[e][:, k]
            want[e, :, k] = nearest(want[e, :, k] + push / (hessian[e, k, k] * step[:, k]))
    assert torch.equal(got.double(), want)
    assert not torch.equal(got, codes)


def test_a_scale_that_is_wrong_by_far_is_moved(compiled):
    weight, _, _ = problem(29)
    eye = torch.eye(96, dtype=torch.float64).expand(2, -1, -1).contiguous()
    scale = floor_scale(weight)
    codes = MXFP4.quantize(weight, scale)
    got_scale, got = refine(weight, eye, scale / 4, codes, compiled, grid=MXFP4)
    assert torch.equal(got_scale, scale)
    assert torch.equal(got, codes)


def test_every_step_lowers_the_objective(compiled):
    weight, hessian, found = problem(50)
    floor = floor_scale(weight)
    codes = gptq(weight, factorize(hessian, True), found, None, compiled, MXFP4)
    swept = refine(weight, hessian, found, codes, compiled, grid=MXFP4)
    losses = [
        loss(weight, hessian, MXFP4.quantize(weight, floor), floor),
        loss(weight, hessian, MXFP4.quantize(weight, found), found),
        loss(weight, hessian, codes, found),
        loss(weight, hessian, swept[1], swept[0]),
    ]
    assert losses[1] < losses[0]
    assert losses[2] < 0.7 * losses[1]
    assert losses[3] < 0.98 * losses[2]
    assert set(swept[1].unique().tolist()) <= set(HALVES.int().tolist())
    assert torch.equal(torch.frexp(swept[0]).mantissa, torch.full_like(swept[0], 0.5))
