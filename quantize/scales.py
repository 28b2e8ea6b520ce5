"""Group scales: the three ways to choose them, each rounded to its stored dtype before any code is chosen.

absmax   |w|max / 7.5, what GPTQModel and compressed-tensors write; wastes half of code -8.
signed   s = -w_absmax / 8 with the sign of the largest weight, so that it lands on code -8 (ggml Q4_0, AutoRound).
search   for candidates s = +-|w|max * r / 8: round, refit s in closed form, keep the best under an importance
         per column (E6; the importance is the diagonal of the damped Hessian, as in ggml's imatrix).

Shapes: weights [..., N, K] (rows, columns), importance [..., K], scales [..., N, G] with G = K / group_size.
"""

import torch

from gptoss_quantize.kernels import native
from gptoss_quantize.kernels.int4 import CODE_MAX, CODE_MIN, round_scale

# ratios of the candidates to the full-range scale |w|max / 8; the second row is tried with the opposite sign,
# where the largest weight can only reach code +7
RATIOS = (0.76, 0.85, 0.92, 1.0, 1.05)
RATIOS_OPPOSITE = (0.85, 1.0)

# rows handled at a time: the working set of a chunk stays in the second-level cache
_CHUNK_ELEMENTS = 1 << 17


def _grouped(weight_NK: torch.Tensor, group_size: int) -> torch.Tensor:
    if weight_NK.shape[-1] % group_size:
        raise ValueError(f"{weight_NK.shape[-1]} columns are not a multiple of group size {group_size}")
    return weight_NK.unflatten(-1, (-1, group_size))


def absmax_scale(weight_NK: torch.Tensor, group_size: int) -> torch.Tensor:
    """Return |w|max / 7.5 per group [..., N, G], rounded as stored."""
    return round_scale(_grouped(weight_NK, group_size).abs().amax(-1) / 7.5)


def signed_scale(weight_NK: torch.Tensor, group_size: int) -> torch.Tensor:
    """Return -w / 8 of each group's largest-magnitude weight w, so that its code is exactly -8, rounded."""
    return round_scale(_largest(_grouped(weight_NK, group_size)) / CODE_MIN)


def _largest(grouped: torch.Tensor) -> torch.Tensor:
    high, low = grouped.amax(-1), grouped.amin(-1)
    return torch.where(high >= -low, high, low)


def searched_scale(
    weight_NK: torch.Tensor,
    importance_K: torch.Tensor,
    group_size: int,
    extra_NGA: torch.Tensor | None = None,
    compiled: bool = False,
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
        )
        return round_scale(best.reshape(*lead, rows, groups))
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
            scale[b, part] = _search_chunk(weight[b, part], importance[b], more)
    return round_scale(scale.reshape(*lead, rows, groups))


def _search_chunk(
    weight_NGg: torch.Tensor, importance_Gg: torch.Tensor, extra_NGA: torch.Tensor | None
) -> torch.Tensor:
    """Return the refitted best scale [N, G] of one chunk of rows."""
    full = _largest(weight_NGg) / CODE_MIN
    weighted = weight_NGg * importance_Gg
    candidates = [full * r for r in RATIOS] + [full * -r for r in RATIOS_OPPOSITE]
    if extra_NGA is not None:
        candidates += list(extra_NGA.unbind(-1))
    best_gain = torch.zeros_like(full)
    best_scale = full
    for candidate in candidates:
        inverse = torch.where(candidate == 0, 0.0, 1.0 / candidate)
        codes = torch.mul(weight_NGg, inverse.unsqueeze(-1)).round_().clamp_(CODE_MIN, CODE_MAX)
        cross = (codes * weighted).sum(-1)
        power = codes.square_().mul_(importance_Gg).sum(-1)
        gain = torch.where(power > 0, cross.square() / power, 0.0)
        better = gain > best_gain
        best_scale = torch.where(better, cross / power, best_scale)
        best_gain = torch.where(better, gain, best_gain)
    return best_scale
