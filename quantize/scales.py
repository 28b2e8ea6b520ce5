"""Group scales: the ways to choose them, each rounded to its stored dtype before any code is chosen.

integers (of int4; other widths have their own least code instead of -8)
absmax   |w|max / 7.5, what GPTQModel and compressed-tensors write; wastes half of code -8.
signed   s = -w_absmax / 8 with the sign of the largest weight, so that it lands on code -8 (ggml Q4_0, AutoRound).
search   for candidates s = +-|w|max * r / 8: round, refit s in closed form, keep the best under an importance
         per column (docs/method.md, E6; the diagonal of the damped Hessian, as in ggml's imatrix).

powers, where a scale is a power of two and the codes are E2M1 in halves (`kernels.grids`)
absmax   the OCP specification's floor rule: the largest weight lands in [4, 8) and saturates above 6.
ceil     the smallest power of two that does not saturate (triton_kernels, ModelOpt).
search   the best of the floor rule's power of two, its half and its double under the importance.

Shapes: weights [..., N, K] (rows, columns), importance [..., K], scales [..., N, G] with G = K / group_size.
"""

from collections.abc import Callable

import torch

from gptoss_quantize.kernels import grids, mxfp4, native
from gptoss_quantize.kernels.grids import INT4, Grid

# ratios of the candidates to the full-range scale |w|max / 8; the second row is tried with the opposite sign,
# where the largest weight can only reach code +7
RATIOS = (0.76, 0.85, 0.92, 1.0, 1.05)
RATIOS_OPPOSITE = (0.85, 1.0)

# of the floor rule's power of two: halving it saturates the largest weights, and lets the others be finer
POWER_FACTORS = (1.0, 2.0, 0.5)

# int4 steps in half steps of the MXFP4 lattice
LATTICE_STEPS = (1.0, 1.5, 2.0, 4 / 3, 12 / 7, 1.6)

# rows handled at a time: the working set of a chunk stays in the second-level cache
_CHUNK_ELEMENTS = 1 << 17


def _grouped(weight_NK: torch.Tensor, group_size: int) -> torch.Tensor:
    if weight_NK.shape[-1] % group_size:
        raise ValueError(f"{weight_NK.shape[-1]} columns are not a multiple of group size {group_size}")
    return weight_NK.unflatten(-1, (-1, group_size))


def absmax_scale(weight_NK: torch.Tensor, group_size: int, grid: Grid = INT4) -> torch.Tensor:
    """Return |w|max over half the range of codes (int4: 7.5) per group [..., N, G], rounded as stored."""
    return grid.round_scale(_grouped(weight_NK, group_size).abs().amax(-1) / ((grid.high - grid.low) / 2))


def signed_scale(weight_NK: torch.Tensor, group_size: int, grid: Grid = INT4) -> torch.Tensor:
    """Return w / least code (int4: -8) of each group's largest-magnitude weight w, which is exact then, rounded."""
    return grid.round_scale(_largest(_grouped(weight_NK, group_size)) / grid.low)


def _largest(grouped: torch.Tensor) -> torch.Tensor:
    high, low = grouped.amax(-1), grouped.amin(-1)
    return torch.where(high >= -low, high, low)


def searched_scale(
    weight_NK: torch.Tensor,
    importance_K: torch.Tensor,
    group_size: int,
    extra_NGA: torch.Tensor | None = None,
    compiled: bool = False,
    grid: Grid = INT4,
) -> torch.Tensor:
    """Return the best scale per group [..., N, G] under sum_k importance_k (w_k - s q_k)^2, rounded as stored.

    Each candidate is scored after its closed-form refit s* = sum(h w q) / sum(h q^2), whose error is
    sum(h w^2) - sum(h w q)^2 / sum(h q^2). `extra` holds more candidate scales per group (MXFP4 lattice steps).
    `compiled`: the search is left to `kernels.native`.
    """
    lead = weight_NK.shape[:-2]
    if compiled:
        rows, columns = weight_NK.shape[-2:]
        groups = _grouped(weight_NK, group_size).shape[-2]
        more = None if extra_NGA is None else extra_NGA.reshape(-1, rows, groups, extra_NGA.shape[-1]).contiguous()
        best = native.search_scale(
            weight_NK.reshape(-1, rows, columns).contiguous(),
            importance_K.reshape(-1, columns).contiguous(),
            group_size,
            (*RATIOS, *(-r for r in RATIOS_OPPOSITE)),
            more,
            grid,
        )
        return grid.round_scale(best.reshape(*lead, rows, groups))
    weight = _grouped(weight_NK, group_size).flatten(0, -4) if lead else _grouped(weight_NK, group_size)[None]
    importance = importance_K.unflatten(-1, (-1, group_size))
    importance = importance.flatten(0, -3) if lead else importance[None]
    batch, rows, groups, _ = weight.shape
    scale = torch.empty(batch, rows, groups, dtype=weight.dtype, device=weight.device)
    extra = None if extra_NGA is None else extra_NGA.reshape(batch, rows, groups, -1)
    step = max(1, _CHUNK_ELEMENTS // (groups * group_size))
    for b in range(batch):
        for start in range(0, rows, step):
            part = slice(start, start + step)
            more = None if extra is None else extra[b, part]
            scale[b, part] = _search_chunk(weight[b, part], importance[b], more, grid)
    return grid.round_scale(scale.reshape(*lead, rows, groups))


def _search_chunk(
    weight_NGg: torch.Tensor, importance_Gg: torch.Tensor, extra_NGA: torch.Tensor | None, grid: Grid
) -> torch.Tensor:
    """Return the refitted best scale [N, G] of one chunk of rows."""
    full = _largest(weight_NGg) / grid.low
    weighted = weight_NGg * importance_Gg
    candidates = [full * r for r in RATIOS] + [full * -r for r in RATIOS_OPPOSITE]
    if extra_NGA is not None:
        candidates += list(extra_NGA.unbind(-1))
    best_gain = torch.zeros_like(full)
    best_scale = full
    for candidate in candidates:
        inverse = torch.where(candidate == 0, 0.0, 1.0 / candidate)
        codes = torch.mul(weight_NGg, inverse.unsqueeze(-1)).round_().clamp_(grid.low, grid.high)
        cross = (codes * weighted).sum(-1)
        power = codes.square_().mul_(importance_Gg).sum(-1)
        gain = torch.where(power > 0, cross.square() / power, 0.0)
        better = gain > best_gain
        best_scale = torch.where(better, cross / power, best_scale)
        best_gain = torch.where(better, gain, best_gain)
    return best_scale


def on_mxfp4_grid(weight_NK: torch.Tensor) -> bool:
    """Return whether the weights are MXFP4 values, blocks of 32 along the columns: a release, or a copy of one."""
    if weight_NK.shape[-1] % mxfp4.GROUP_SIZE:
        return False
    # rows that stay in the cache, and the first that is off the grid ends it
    for rows in weight_NK.flatten(0, -2).split(max(1, _CHUNK_ELEMENTS // weight_NK.shape[-1])):
        scale = floor_scale(rows)
        if not torch.equal(grids.MXFP4.dequantize(grids.MXFP4.quantize(rows, scale), scale, rows.dtype), rows):
            return False
    return True


def lattice_candidates(weight_NK: torch.Tensor, group_size: int) -> torch.Tensor:
    """Return int4 scales [..., N, G, A] that hit the MXFP4 lattice of each group's coarsest 32-block.

    In half steps h of the block, codes are 0, 1, 2, 3, 4, 6, 8, 12. Step h is exact up to 6 (and up to -8 with its
    sign), 2h keeps all but 1 and 3, 1.5h keeps 3, 6 and -12, and so on. A grid of percents never hits these.
    """
    step = floor_scale(weight_NK).unflatten(-1, (-1, group_size // mxfp4.GROUP_SIZE)).amax(-1)
    return torch.stack([step * sign * steps for steps in LATTICE_STEPS for sign in (1, -1)], dim=-1)


def floor_scale(weight_NK: torch.Tensor, group_size: int = mxfp4.GROUP_SIZE) -> torch.Tensor:
    """Return the half-unit MXFP4 scale of every group [..., N, G] by the specification's floor rule."""
    _grouped(weight_NK, group_size)
    scale = mxfp4.scales_to_float(mxfp4.shared_scales(weight_NK)).to(weight_NK.dtype) / 2
    return scale.clamp(grids.POWER_MIN, grids.POWER_MAX)


def ceil_scale(weight_NK: torch.Tensor, group_size: int = mxfp4.GROUP_SIZE) -> torch.Tensor:
    """Return the smallest half-unit MXFP4 scale [..., N, G] under which no weight saturates."""
    scale = floor_scale(weight_NK, group_size)
    # the floor rule puts the largest weight into [8, 16) halves, and the largest code is 12
    return torch.where(_grouped(weight_NK, group_size).abs().amax(-1) > 12 * scale, 2 * scale, scale)


def searched_power_scale(
    weight_NK: torch.Tensor, importance_K: torch.Tensor, group_size: int = mxfp4.GROUP_SIZE
) -> torch.Tensor:
    """Return the best half-unit MXFP4 scale per group [..., N, G] under sum_k importance_k (w_k - s q_k)^2."""
    floor = floor_scale(weight_NK, group_size)
    weight, importance = _grouped(weight_NK, group_size), _grouped(importance_K, group_size)[..., None, :, :]
    best, best_error = floor, torch.full_like(floor, torch.inf)
    for factor in POWER_FACTORS:
        scale = grids.power_scale(floor * factor)
        codes = grids.nearest_halves(weight / scale[..., None])
        error = codes.mul_(scale[..., None]).sub_(weight).square_().mul_(importance).sum(-1)
        best, best_error = torch.where(error < best_error, scale, best), torch.minimum(error, best_error)
    return best


# Grid.rules -> recipe's name of the rule -> (weights, importance or None, group size, grid) -> scales
RULES: dict[str, dict[str, Callable[[torch.Tensor, torch.Tensor, int, Grid], torch.Tensor]]] = {
    "integers": {
        "absmax": lambda weight, _, group, grid: absmax_scale(weight, group, grid),
        "signed": lambda weight, _, group, grid: signed_scale(weight, group, grid),
        "search": lambda weight, importance, group, grid: searched_scale(weight, importance, group, grid=grid),
    },
    "powers": {
        "absmax": lambda weight, _, group, grid: floor_scale(weight, group),
        "ceil": lambda weight, _, group, grid: ceil_scale(weight, group),
        "search": lambda weight, importance, group, grid: searched_power_scale(weight, importance, group),
    },
}
