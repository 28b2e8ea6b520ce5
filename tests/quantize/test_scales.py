"""Group scales: their rules, and the search against an exhaustive float64 search."""

import pytest
import torch

from gptoss_quantize.kernels import grids, int4, mxfp4
from gptoss_quantize.quantize import scales
from gptoss_quantize.quantize.scales import RULES, absmax_scale, searched_scale, signed_scale


def weights(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.05


def weighted_error(weight, scale, importance):
    error = weight - int4.dequantize(int4.quantize(weight, scale), scale, torch.float64)
    return (error.square() * importance[..., None, :]).unflatten(-1, (scale.shape[-1], -1)).sum(-1)


def test_absmax_is_the_largest_magnitude_over_seven_and_a_half():
    weight = weights(3, 128)
    want = weight.unflatten(-1, (-1, 64)).abs().amax(-1) / 7.5
    assert torch.equal(absmax_scale(weight, 64), int4.round_scale(want))


def test_signed_scale_puts_the_largest_weight_on_minus_eight():
    weight = weights(50, 320)
    scale = signed_scale(weight, 64)
    codes = int4.quantize(weight, scale).unflatten(-1, (-1, 64))
    where = weight.unflatten(-1, (-1, 64)).abs().argmax(-1, keepdim=True)
    assert bool((codes.gather(-1, where) == -8).all())
    assert bool((scale < 0).any())
    assert bool((scale > 0).any())


@pytest.mark.parametrize("group", [32, 64])
def test_search_is_close_to_an_exhaustive_search_and_better_than_the_simple_rules(group):
    weight = weights(2, 40, 320)
    importance = torch.exp(weights(2, 320, seed=1) * 30)
    got = weighted_error(weight, searched_scale(weight, importance, group), importance)
    full = signed_scale(weight, group)
    best = torch.full_like(full, float("inf"))
    for ratio in torch.linspace(0.4, 1.3, 181, dtype=torch.float64):
        for sign in (1, -1):
            best = torch.minimum(best, weighted_error(weight, full * ratio * sign, importance))
    assert float(got.sum()) < 1.06 * float(best.sum())
    simple = [weighted_error(weight, rule(weight, group), importance).sum() for rule in (absmax_scale, signed_scale)]
    assert float(got.sum()) < 0.8 * float(min(simple))


def test_extra_candidates_are_used():
    # a group on a 1.5-step lattice with a far outlier code: no ratio of the grid hits the exact step
    codes = torch.tensor([[-8.0, 7, 3, -5, 1, 0, 2, -1] * 4], dtype=torch.float64)
    step = 0.01171875
    weight = codes * step
    importance = torch.ones(32, dtype=torch.float64)
    found = searched_scale(weight, importance, 32, torch.full((1, 1, 1), step, dtype=torch.float64))
    assert float(weighted_error(weight, found, importance).sum()) == 0


def test_chunks_do_not_matter(monkeypatch):
    weight, importance = weights(3, 17, 128), weights(3, 128).abs() + 0.01
    whole = searched_scale(weight, importance, 32)
    monkeypatch.setattr(scales, "_CHUNK_ELEMENTS", 1)
    assert torch.equal(searched_scale(weight, importance, 32), whole)
    single = torch.stack([searched_scale(w, i, 32) for w, i in zip(weight, importance, strict=True)])
    assert torch.equal(single, whole)


def test_every_rule_gives_storable_scales_for_dead_groups():
    weight = torch.zeros(2, 64)
    for scale in (absmax_scale(weight, 32), signed_scale(weight, 32), searched_scale(weight, torch.ones(64), 32)):
        assert torch.equal(scale, int4.round_scale(scale))
        assert not bool(int4.quantize(weight, scale).any())


def test_group_size_must_divide():
    with pytest.raises(ValueError, match="not a multiple of group size"):
        absmax_scale(torch.zeros(2, 100), 64)


def power_error(weight, scale, importance):
    error = weight - int4.dequantize(grids.MXFP4.quantize(weight, scale), scale, torch.float64)
    return (error.square() * importance[..., None, :]).unflatten(-1, (scale.shape[-1], -1)).sum(-1)


def test_mxfp4_rules_are_those_of_the_field():
    weight = weights(9, 96)
    blocks, stored = mxfp4.encode(weight)
    floor = scales.floor_scale(weight)
    assert torch.equal(grids.scale_bytes(floor), stored)
    codes = grids.MXFP4.quantize(weight, floor)
    assert torch.equal(int4.dequantize(codes, floor), mxfp4.decode(blocks, stored))
    # triton_kernels, "round up": the exponent of max / 6, rounded up
    largest = weight.unflatten(-1, (-1, 32)).abs().amax(-1)
    assert torch.equal(scales.ceil_scale(weight), torch.exp2(torch.ceil(torch.log2(largest / 6))) / 2)


def test_mxfp4_search_is_the_best_of_all_powers_of_two():
    weight, importance = weights(40, 320), torch.exp(weights(320, seed=1) * 60)
    importance = importance[None].expand(1, -1)[0]
    got = power_error(weight, scales.searched_power_scale(weight, importance), importance)
    floor = scales.floor_scale(weight)
    every = torch.stack([power_error(weight, floor * 2.0**k, importance) for k in range(-6, 7)])
    assert float(got.sum()) < 1.01 * float(every.amin(0).sum())
    assert float(got.sum()) < 0.95 * float(power_error(weight, floor, importance).sum())


def test_mxfp4_search_finds_weights_that_are_on_the_grid():
    codes = grids.nearest_halves(weights(20, 64) * 100)
    step = torch.exp2(torch.randint(-9, -3, (20, 2), generator=torch.Generator().manual_seed(3)).double())
    weight = codes * step.repeat_interleave(32, 1)
    for rule in ("absmax", "ceil", "search"):
        scale = RULES["powers"][rule](weight, torch.ones(64, dtype=torch.float64), 32, grids.MXFP4)
        assert float(power_error(weight, scale, torch.ones(64)).sum()) == 0


def on_lattice(*shape):
    codes = grids.nearest_halves(weights(*shape, seed=5) * 90)
    step = torch.exp2(
        torch.randint(-9, -3, (*shape[:-1], shape[-1] // 32), generator=torch.Generator().manual_seed(6))
    )
    return codes * step.double().repeat_interleave(32, -1)


def test_mxfp4_values_are_recognised():
    weight = on_lattice(2, 7, 96)
    assert scales.on_mxfp4_grid(weight)
    assert scales.on_mxfp4_grid(weight.float())
    assert scales.on_mxfp4_grid(torch.zeros(3, 64))
    moved = weight.clone()
    moved[1, 3, 50] *= 1.01
    assert not scales.on_mxfp4_grid(moved)
    assert not scales.on_mxfp4_grid(weights(4, 33))


@pytest.mark.parametrize("group", [32, 64])
def test_lattice_candidates_hit_groups_that_ratios_miss(group):
    weight, ones = on_lattice(400, 128), torch.ones(128, dtype=torch.float64)
    found = {
        "plain": searched_scale(weight, ones, group),
        "lattice": searched_scale(weight, ones, group, scales.lattice_candidates(weight, group)),
    }
    error = {name: weighted_error(weight, scale, ones) for name, scale in found.items()}
    power = weight.square().unflatten(-1, (-1, group)).sum(-1)
    # the refit of the plain search finds most exact scales by itself
    assert float((error["lattice"] / power).mean()) < float((error["plain"] / power).mean())
    exact = {name: float((e == 0).double().mean()) for name, e in error.items()}
    # with groups of 32, blocks whose largest magnitude is 4, with one sign only, have an exact scale
    assert exact["lattice"] > exact["plain"] if group == 32 else exact["lattice"] >= exact["plain"]
