"""GPTQ and coordinate descent against their definitions, written out in float64."""

from itertools import pairwise

import pytest
import torch

from gptoss_quantize.kernels import int4, native
from gptoss_quantize.quantize import solve
from gptoss_quantize.quantize.scales import signed_scale
from gptoss_quantize.quantize.solve import asymmetric_target, damp_, factor, factorize

GROUP = 32


def turned(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.transpose(1, 2).contiguous()


def gptq(target, factored, scale, *args, **options):
    """`solve.gptq` for weights that lie as they are stored, [E, N, K]."""
    return turned(solve.gptq(turned(target), factored, turned(scale), *args, **options))


def refine(target, hessian, scale, codes, *args, **options):
    """`solve.refine` likewise."""
    return tuple(map(turned, solve.refine(turned(target), hessian, turned(scale), turned(codes), *args, **options)))


@pytest.fixture(params=[False, True], ids=["torch", "native"])
def compiled(request):
    if request.param and not native.available():
        pytest.skip(native.problem())
    return request.param


def problem(experts: int = 2, rows: int = 12, columns: int = 96, seed: int = 0):
    """Return (weights, Hessians, scales) in float64, with correlated inputs of very uneven power."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    power = torch.exp(normal(experts, 1, columns))
    x = (normal(experts, 4 * columns, columns) @ (normal(experts, columns, columns) / 8)) * power
    hessian = x.transpose(1, 2) @ x / x.shape[1]
    hessian = hessian + 0.01 * hessian.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(columns)
    weight = normal(experts, rows, columns) * 0.1
    return weight, hessian, signed_scale(weight, GROUP)


def loss(weight, codes, scale, hessian):
    error = weight - int4.dequantize(codes, scale, torch.float64)
    return ((error @ hessian) * error).sum((1, 2))


def gptq_definition(weight_NK, hessian_KK, scale_NG, order):
    """Frantar et al., algorithm 1, one column at a time with the Cholesky factor of the inverse."""
    w = weight_NK.clone()[:, order]
    factor_KK = torch.linalg.cholesky(torch.linalg.inv(hessian_KK[order][:, order]), upper=True)
    codes = torch.empty_like(w)
    for k in range(w.shape[1]):
        scale = scale_NG[:, order[k] // GROUP]
        codes[:, k] = torch.round(w[:, k] / scale).clamp(-8, 7)
        error = (w[:, k] - codes[:, k] * scale) / factor_KK[k, k]
        w[:, k:] -= error[:, None] * factor_KK[k, k:]
    out = torch.empty_like(codes)
    out[:, order] = codes
    return out.to(torch.int8)


@pytest.mark.parametrize("leaf", [1, 7, 32, 96, 128])
@pytest.mark.parametrize("act_order", [True, False])
def test_gptq_equals_definition_for_every_block_size(leaf, act_order, compiled):
    # 47 rows: one tile of 32, one vector of 8, 7 single rows
    weight, hessian, scale = problem(rows=47)
    factored = factorize(hessian, act_order)
    assert factored.retries == [0, 0]
    codes = gptq(weight, factored, scale, leaf, compiled)
    for e in range(len(weight)):
        diagonal = hessian[e].diagonal()
        order = torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(96)
        assert torch.equal(codes[e], gptq_definition(weight[e], hessian[e], scale[e], order))


def test_identity_hessian_is_rounding():
    weight, _, scale = problem()
    eye = torch.eye(96, dtype=torch.float64).expand(2, -1, -1)
    codes = gptq(weight, factorize(eye, True), scale)
    assert torch.equal(codes, int4.quantize(weight, scale))


def test_gptq_loses_less_than_rounding_and_act_order_less_again():
    weight, hessian, scale = problem(experts=6, rows=64)
    rounded = loss(weight, int4.quantize(weight, scale), scale, hessian).sum()
    natural = loss(weight, gptq(weight, factorize(hessian, False), scale), scale, hessian).sum()
    ordered = loss(weight, gptq(weight, factorize(hessian, True), scale), scale, hessian).sum()
    assert natural < 0.7 * rounded, f"{natural=} {rounded=}"
    assert ordered < natural, f"{ordered=} {natural=}"


def refine_definition(weight_NK, hessian_KK, scale_NG, codes_NK):
    """One sweep, row by row: closed-form scale of a group, rounded, kept if it helps; then every code in turn."""
    scales, codes = scale_NG.clone(), codes_NK.double().clone()
    for n in range(weight_NK.shape[0]):
        for g in range(scales.shape[1]):
            part = slice(g * GROUP, (g + 1) * GROUP)

            def values(part=part, n=n):
                return codes[n] * scales[n].repeat_interleave(GROUP)

            def cost(n=n):
                error = weight_NK[n] - values()
                return error @ hessian_KK @ error

            u = torch.zeros_like(weight_NK[n])
            u[part] = codes[n, part]
            old, before = scales[n, g].clone(), cost()
            gain = u @ hessian_KK @ (weight_NK[n] - values())
            scales[n, g] = int4.round_scale(old + gain / (u @ hessian_KK @ u))
            if cost() >= before:
                scales[n, g] = old
            for k in range(part.start, part.stop):
                push = (hessian_KK @ (weight_NK[n] - values()))[k]
                wanted = codes[n, k] + push / (hessian_KK[k, k] * scales[n, g])
                codes[n, k] = torch.round(wanted).clamp(-8, 7)
    return scales, codes.to(torch.int8)


def test_refine_equals_definition(compiled):
    # 29 rows: one tile of 16, one vector of 8, 5 single rows
    weight, hessian, scale = problem(rows=29 if compiled else 5)
    codes = gptq(weight, factorize(hessian, True), scale)
    got_scale, got_codes = refine(weight, hessian, scale, codes, compiled)
    for e in range(len(weight)):
        want_scale, want_codes = refine_definition(weight[e], hessian[e], scale[e], codes[e])
        assert torch.equal(got_scale[e], want_scale)
        assert torch.equal(got_codes[e], want_codes)


def test_refine_never_raises_the_objective_and_keeps_scales_storable(compiled):
    weight, hessian, scale = problem(experts=4, rows=40, seed=3)
    codes = gptq(weight, factorize(hessian, True), scale)
    values = [loss(weight, codes, scale, hessian)]
    for _ in range(4):
        scale, codes = refine(weight, hessian, scale, codes, compiled)
        assert torch.equal(scale, int4.round_scale(scale))
        values.append(loss(weight, codes, scale, hessian))
    for before, after in pairwise(values):
        assert bool((after <= before * (1 + 1e-12)).all())
    assert bool((values[1] < 0.97 * values[0]).all()), "a sweep after GPTQ should gain several percent"


def test_float32_loses_no_more_than_float64(compiled):
    weight, hessian, scale = problem(experts=3, rows=64)
    exact = refine(weight, hessian, scale, gptq(weight, factorize(hessian, True), scale))
    w, h, s = weight.float(), hessian.float(), scale.float()
    got = refine(w, h, s, gptq(w, factorize(h, True), s, compiled=compiled), compiled)
    want_loss = loss(weight, exact[1], exact[0], hessian).sum()
    got_loss = loss(weight, got[1], got[0].double(), hessian).sum()
    assert got_loss <= 1.01 * want_loss, f"{got_loss=} {want_loss=}"


def test_bfloat16_products_cost_next_to_nothing(compiled):
    weight, hessian, scale = problem(experts=3, rows=64, columns=192)
    w, h, s = weight.float(), hessian.float(), scale.float()
    codes = gptq(w, factorize(h, True), s, compiled=compiled)
    exact = refine(w, h, s, codes, compiled)
    fast = refine(w, h, s, codes, compiled, torch.bfloat16)
    before = loss(weight, codes, scale, hessian).sum()
    gain = before - loss(weight, exact[1], exact[0].double(), hessian).sum()
    assert before - loss(weight, fast[1], fast[0].double(), hessian).sum() > 0.97 * gain


@pytest.mark.parametrize("act_order", [True, False])
def test_factorize_gives_an_upper_factor_in_visiting_order(act_order):
    _, hessian, _ = problem()
    factored = factorize(hessian, act_order)
    for e in range(2):
        order, upper = factored.order[e], factored.upper[e]
        assert torch.equal(upper, upper.triu())
        assert bool((upper.diagonal() > 0).all())
        torch.testing.assert_close(upper @ upper.T, hessian[e][order][:, order], rtol=1e-9, atol=1e-12)


def test_a_hessian_that_will_not_factor_is_damped_and_counted():
    broken = torch.eye(8, dtype=torch.float64)
    broken[0, 1] = broken[1, 0] = 3.0
    lower, retries = factor(broken)
    assert retries > 0
    assert bool(torch.isfinite(lower).all())
    weight, hessian, scale = problem(columns=96)
    hessian[1, 0, 1] = hessian[1, 1, 0] = 50 * hessian[1].diagonal().max()
    factored = factorize(hessian, True)
    assert factored.retries[0] == 0
    assert factored.retries[1] > 0
    assert gptq(weight, factored, scale).abs().max() <= 8


def test_damping_grows_as_tokens_become_few():
    hessian = torch.eye(4, dtype=torch.float64).repeat(3, 1, 1) * 2
    damped, diagonal = hessian.clone(), hessian.diagonal(dim1=1, dim2=2).clone()
    added = damp_(damped, torch.tensor([4000.0, 4.0, 0.0]), 0.003, 0.2)
    assert added.tolist() == pytest.approx([2 * (0.003 + 0.2 * 4 / 4000), 2 * (0.003 + 0.2), 2 * (0.003 + 0.8)])
    assert torch.equal(damped[0], hessian[0] + added[0] * torch.eye(4, dtype=torch.float64))
    assert torch.equal(damp_(diagonal, torch.tensor([4000.0, 4.0, 0.0]), 0.003, 0.2), added)
    assert torch.equal(diagonal, damped.diagonal(dim1=1, dim2=2))


def test_no_hessian_at_all_becomes_the_identity():
    hessian = torch.zeros(1, 5, 5)
    assert damp_(hessian, torch.zeros(1), 0.003, 0.2).item() == 1
    assert torch.equal(hessian[0], torch.eye(5))


def test_asymmetric_target_at_full_strength_is_the_least_squares_weight():
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(400, 24, generator=generator, dtype=torch.float64)
    seen = x + 0.3 * torch.randn(400, 24, generator=generator, dtype=torch.float64)
    weight = torch.randn(1, 7, 24, generator=generator, dtype=torch.float64)
    hessian, drift = seen.T @ seen / 400, (x - seen).T @ seen / 400
    factored = factorize(hessian[None], True)
    got = asymmetric_target(weight, drift[None], factored, 1.0)[0]
    best = torch.linalg.lstsq(seen, x @ weight[0].T).solution.T
    torch.testing.assert_close(got, best, rtol=1e-8, atol=1e-10)
    half = asymmetric_target(weight, drift[None], factored, 0.5)[0]
    torch.testing.assert_close(half, (weight[0] + best) / 2, rtol=1e-8, atol=1e-10)


def test_inputs_are_not_changed():
    weight, hessian, scale = problem()
    kept = [t.clone() for t in (weight, hessian, scale)]
    codes = gptq(weight, factorize(hessian, True), scale)
    before = codes.clone()
    refine(weight, hessian, scale, codes)
    assert all(map(torch.equal, (weight, hessian, scale, codes), (*kept, before)))
    assert solve.LEAF >= 1


def test_factors_do_not_depend_on_the_number_of_threads():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 1537, generator=generator)
    hessian = (x.T @ x / 2000 + 0.01 * torch.eye(1537)).double()
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(factor(hessian)[0])
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(other, found[0]) for other in found[1:])
