"""The integer grids against the formats they stand for."""

import pytest
import torch

from gptoss_quantize.kernels import grids, int4, mxfp4
from gptoss_quantize.kernels.grids import INT4, MXFP4


def elements() -> torch.Tensor:
    """Values around every code, midpoint and limit, their neighbours in float32 included."""
    points = torch.arange(0, 33) / 4
    points = torch.cat((points, torch.tensor([1e-30, 100.0, float("inf")])))
    near = torch.cat(
        (points, torch.nextafter(points, torch.tensor(99.0)), torch.nextafter(points, torch.tensor(0.0)))
    )
    return torch.cat((near, -near, torch.randn(5000, generator=torch.Generator().manual_seed(0)) * 3))


def test_halves_round_as_the_format_does():
    values = elements()
    halves = MXFP4.nearest(2 * values)
    codes = mxfp4.nearest_codes(values)
    assert torch.equal(halves / 2, torch.tensor(mxfp4.E2M1_VALUES)[codes.int()])
    # the code of zero has no sign here
    assert torch.equal(grids.halves_to_codes(halves), torch.where(codes == 8, 0, codes))


def test_every_half_has_its_code():
    halves = torch.tensor([0, 1, 2, 3, 4, 6, 8, 12, -1, -2, -3, -4, -6, -8, -12])
    decoded = torch.tensor(mxfp4.E2M1_VALUES)[grids.halves_to_codes(halves).int()]
    assert torch.equal(decoded * 2, halves.float())


def test_scales_and_blocks_decode_to_code_times_scale():
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(6, 96, generator=generator)
    scale = torch.exp2(torch.randint(-60, 61, (6, 3), generator=generator).float())
    codes = MXFP4.quantize(weight * scale.repeat_interleave(32, 1) * 4, scale)
    blocks = mxfp4.pack_codes(grids.halves_to_codes(codes))
    decoded = mxfp4.decode(blocks, grids.scale_bytes(scale))
    assert torch.equal(decoded, int4.dequantize(codes, scale))
    assert len(torch.unique(codes)) == 15


def test_power_scale_is_the_nearest_power_and_always_positive():
    got = grids.power_scale(torch.tensor([0.0, -3.0, 1e-40, 1e30, 1.4, 1.42, 2.0, 2.9, 0.0625]))
    assert got.tolist() == [2.0**-60, 2.0**-60, 2.0**-60, 2.0**60, 1, 2, 2, 4, 0.0625]


@pytest.mark.parametrize("grid", [INT4, MXFP4])
def test_quantize_takes_the_nearest_representable_value(grid):
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    scale = grid.round_scale(torch.full((4, 2), 0.3, dtype=torch.float64))
    values = grid.nearest(torch.arange(-20.0, 21, dtype=torch.float64)).unique()
    got = int4.dequantize(grid.quantize(weight, scale), scale, torch.float64)
    best = (weight[..., None] - values * scale[0, 0]).abs().amin(-1)
    torch.testing.assert_close((weight - got).abs(), best)
    assert torch.equal(INT4.quantize(weight, scale), int4.quantize(weight, scale))
