"""The grids that a weight can be rounded to, as integer codes times a scale.

int4     codes -8..7, and any bfloat16 scale, negative too.
int3     the same with codes -4..3, int2 with -2..1.
mxfp4    E2M1 in halves: 0, 1, 2, 3, 4, 6, 8, 12 and their negatives, and a power of two, one for 32 weights.
         With halves the codes are whole numbers, so that every algorithm handles `code * scale` and neither knows nor
         cares that the gaps between codes are uneven. The stored E8M0 byte e stands for the scale 2^(e - 128).

What an algorithm needs of a grid is in `Grid`, which also says which compiled loops know it: a grid without them runs
in torch. How codes become bytes is in `kernels.int4`, `planes` and `mxfp4`. A new grid is one entry in `GRIDS`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from gptoss_quantize.kernels import int4, mxfp4

# from an E8M0 byte to the exponent of the scale of half-unit codes
HALF_BIAS = mxfp4.SCALE_BIAS + 1
# far below any weight that matters, and far enough above the smallest float32 that products of it do not vanish
POWER_MIN, POWER_MAX = 2.0**-60, 2.0**60


@dataclass(frozen=True, slots=True)
class Grid:
    """A set of whole-number codes and of scales that can be stored."""

    name: str
    low: int  # the least and the greatest code
    high: int
    nearest: Callable[[torch.Tensor], torch.Tensor]  # weight / scale to the nearest code; overwrites its argument
    round_scale: Callable[[torch.Tensor], torch.Tensor]  # to a scale as stored; a new tensor
    rules: str  # key of quantize.scales.RULES: the ways to choose its scales
    # of kernels.native: "integers" (every whole number low..high, bfloat16 scales) or "halves" (E2M1, powers of two)
    loops: str | None

    @property
    def integers(self) -> bool:
        """Return whether every whole number from low to high is a code, under any bfloat16 scale."""
        return self.rules == "integers"

    def quantize(self, weight_RC: torch.Tensor, scale_RG: torch.Tensor) -> torch.Tensor:
        """Return the nearest int8 codes [..., R, C] for scales as stored."""
        dtype = torch.promote_types(weight_RC.dtype, torch.float32)
        grouped = weight_RC.to(dtype).unflatten(-1, (scale_RG.shape[-1], -1))
        return self.nearest(grouped / scale_RG.to(dtype).unsqueeze(-1)).flatten(-2).to(torch.int8)

    def dequantize(self, codes_RC: torch.Tensor, scale_RG: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the weights [..., R, C] = codes * scale. Exact in float32; rounded once for a narrower dtype."""
        return int4.dequantize(codes_RC, scale_RG, dtype)


def nearest_of(low: int, high: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the function that rounds to the nearest of low..high in place, ties to even."""
    return lambda value: value.round_().clamp_(low, high)


def integers(name: str, low: int, high: int) -> Grid:
    """Return the grid of all whole numbers low..high with bfloat16 scales."""
    return Grid(name, low, high, nearest_of(low, high), int4.round_scale, "integers", "integers")


def nearest_halves(value: torch.Tensor) -> torch.Tensor:
    """Round to the nearest E2M1 value in halves in place, ties to even, as `mxfp4.nearest_codes`."""
    value.clamp_(-12, 12)
    magnitude = value.abs()
    # the gap is 1 up to 4, 2 up to 8, 4 up to 12; a multiple of the gap is even where its mantissa is
    gap = torch.ones_like(value).add_(magnitude >= 4).add_(magnitude >= 8, alpha=2)
    return value.div_(gap).round_().mul_(gap)


def power_scale(scale: torch.Tensor) -> torch.Tensor:
    """Return the power of two nearest to each scale (in ratio), from 2^-60, also for zero and below, to 2^60."""
    return torch.exp2(torch.log2(scale.clamp(POWER_MIN, POWER_MAX)).round_())


def halves_to_codes(halves: torch.Tensor) -> torch.Tensor:
    """Return the four-bit E2M1 codes (uint8) of values in halves; zero is +0."""
    table = torch.zeros(25, dtype=torch.uint8, device=halves.device)
    for code, magnitude in enumerate(mxfp4.E2M1_MAGNITUDES):
        table[12 + int(2 * magnitude)] = code
        if magnitude:
            table[12 - int(2 * magnitude)] = code | 8
    return table[halves.int() + 12]


def scale_bytes(scale: torch.Tensor) -> torch.Tensor:
    """Return the E8M0 bytes (uint8) of half-unit scales that are powers of two."""
    return (torch.frexp(scale).exponent - 1 + HALF_BIAS).to(torch.uint8)


INT4 = integers("int4", int4.CODE_MIN, int4.CODE_MAX)
INT3, INT2 = integers("int3", -4, 3), integers("int2", -2, 1)
MXFP4 = Grid("mxfp4", -12, 12, nearest_halves, power_scale, "powers", "halves")
GRIDS: dict[str, Grid] = {grid.name: grid for grid in (INT4, INT3, INT2, MXFP4)}
