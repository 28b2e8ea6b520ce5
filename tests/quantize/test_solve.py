"""The step from weights and moments to codes, scale and bias: what the recipe's fields do to the result."""

from dataclasses import replace

import pytest
import torch

from gptoss_quantize.calibration.moments import MomentSums
from gptoss_quantize.kernels.grids import INT4, MXFP4
from gptoss_quantize.quantize.recipes import RECIPES
from gptoss_quantize.quantize.solve import solve

EXPERTS, ROWS, COLUMNS, TOKENS, GROUP = 2, 48, 96, 700, 32


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def case():
    """Return (weights, biases, router weights, original inputs, quantized inputs), float64."""
    mix = normal(COLUMNS, COLUMNS, seed=1) / COLUMNS**0.5
    # means far from zero, and other than those of the original input
    original = normal(EXPERTS, TOKENS, COLUMNS, seed=2) @ mix + 0.5 * normal(EXPERTS, 1, COLUMNS, seed=3)
    quantized = original + 0.05 * normal(EXPERTS, TOKENS, COLUMNS, seed=4) + 0.1 * normal(EXPERTS, 1, COLUMNS, seed=5)
    weight = normal(EXPERTS, ROWS, COLUMNS, seed=6) / COLUMNS**0.5
    share = torch.rand(EXPERTS, TOKENS, generator=torch.Generator().manual_seed(7), dtype=torch.float64) + 0.1
    return weight, normal(EXPERTS, ROWS, seed=8), share, original, quantized


def moments(case, recipe):
    _, _, share, original, quantized = case
    stats = []
    for e in range(EXPERTS):
        sums = MomentSums(COLUMNS, centre=recipe.centre)
        for rows in (slice(0, 300), slice(300, None)):
            sums.add(quantized[e, rows], share[e, rows], original[e, rows])
        stats.append(sums.finish(paired=True))
    return stats


def output_error(case, solution, bias):
    """Return the output error of every token [E, T, N]: W x + b - Q x^ - b'."""
    weight, given, _, original, quantized = case
    dequantized = torch.stack([solution.weight(e, torch.float64) for e in range(EXPERTS)])
    wanted = original @ weight.transpose(1, 2) + given[:, None]
    return wanted - quantized @ dequantized.transpose(1, 2) - bias[:, None]


def weighted_mean(case, error):
    share = case[2][..., None]
    return (share * error).sum(1) / share.sum(1)


@pytest.mark.parametrize(("grid", "native"), [(INT4, False), (INT4, True), (MXFP4, False)])
def test_the_bias_takes_the_mean_error_and_leaves_the_least(case, grid, native):
    recipe = replace(RECIPES["gptq"], native=native)
    solution = solve(case[0], case[1], moments(case, recipe), recipe, GROUP, grid)
    assert torch.equal(solution.bias, solution.bias.bfloat16().double())
    error = output_error(case, solution, solution.bias)
    # exact but for the rounding of the bias to bfloat16
    assert bool((weighted_mean(case, error).abs() <= solution.bias.abs() / 256 + 1e-6).all())
    # the bias that was given would leave far more
    before = output_error(case, solution, case[1])
    share = case[2][..., None]
    energy = [float((share * x.square()).sum()) for x in (error, before)]
    assert energy[0] < 0.7 * energy[1]
    # and no other bias less
    for shift in (0.05, -0.05):
        assert float((share * (error + shift).square()).sum()) > energy[0]


def test_without_centring_the_bias_stays(case):
    recipe = replace(RECIPES["gptq"], centre=False)
    solution = solve(case[0], case[1], moments(case, recipe), recipe, GROUP)
    assert torch.equal(solution.bias, case[1].bfloat16().double())


def test_the_centred_hessian_is_the_error_that_a_bias_cannot_take(case):
    recipe = replace(RECIPES["gptq"], asymmetric=0.0)
    _, _, share, _, quantized = case
    stats = moments(case, recipe)
    delta = normal(EXPERTS, ROWS, COLUMNS, seed=9)
    error = quantized @ delta.transpose(1, 2)
    rest = error - weighted_mean(case, error)[:, None]
    direct = (share[..., None] * rest.square()).sum((1, 2)) / share.sum(1)
    hessian = torch.stack([s.hessian for s in stats])
    torch.testing.assert_close(torch.einsum("enk,ekl,enl->e", delta, hessian, delta), direct, rtol=1e-10, atol=0)


@pytest.mark.parametrize("field", [{"gptq": False}, {"sweeps": 0}, {"asymmetric": 0.0}, {"centre": False}])
def test_every_step_lowers_the_output_error(case, field):
    def energy(recipe):
        solution = solve(case[0], case[1], moments(case, recipe), recipe, GROUP)
        return float((case[2][..., None] * output_error(case, solution, solution.bias).square()).sum())

    assert energy(RECIPES["gptq"]) < 0.99 * energy(replace(RECIPES["gptq"], **field))
