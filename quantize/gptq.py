"""GPTQ for a batch of experts at once, and the coordinate descent that follows it.

Both walk over columns: the value of column k is its target minus what the errors of earlier columns say,
    value_k = state_k - sum over earlier j of  coupling[j, k] * delta_j
GPTQ (arXiv 2210.17323; E7): state = w*, coupling = -V[j, k] / V[k, k] with H = V V^T, delta = w* - quantized value.
  That is the LDLQ form of QuIP (arXiv 2307.13304, theorem 6), the same codes without an inverse: the objective is
  |(w* - q) V|^2, whose column k depends on the columns up to k alone, and is 0 at the value above.
Coordinate descent (E8, E9): state = H (W* - Q), coupling = H, delta = change of the quantized value.
`_walk` does this once for both, as a recursive blocked triangular solve: nearly all work is matrix products, and
the result does not depend on the blocking but for rounding.

Layout: columns come second, [E, K, N] (experts, columns, rows), so that a column is contiguous memory.
The objective is  sum over rows of  (w* - q) H (w* - q)^T. E4 to E9 are equations of docs/method.md.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from gptoss_quantize.kernels import native
from gptoss_quantize.kernels.grids import INT4, MXFP4, Grid

LEAF = 32
NATIVE_LEAF = 96


def damp_(hessian_EKK: torch.Tensor, tokens_E: torch.Tensor, damping: float, starved: float) -> torch.Tensor:
    """Add lambda = (damping + starved * K / effective tokens) * mean diag H to the diagonals (E5); return lambda [E].

    An expert without tokens has no Hessian; it gets the identity, and the caller reports it. `hessian` may also be
    just the diagonals [E, K].
    """
    diagonal_EK = hessian_EKK if hessian_EKK.dim() == 2 else hessian_EKK.diagonal(dim1=-2, dim2=-1)
    mean_E = diagonal_EK.mean(-1)
    relative_E = damping + starved * diagonal_EK.shape[-1] / tokens_E.clamp(min=1.0).to(mean_E)
    lambda_E = torch.where(mean_E > 0, relative_E * mean_E, 1.0)
    diagonal_EK += lambda_E[:, None]
    return lambda_E


def factor(hessian_KK: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return (lower Cholesky factor, retries), factored in float64 and given in the Hessian's dtype.

    A Hessian that will not factor gets ten times more damping until it does; the report names such experts. On a CPU
    it is factored by one thread: of all steps this one would round differently with two (9 of 8.3 million numbers).
    """
    matrix = hessian_KK.double()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        lower, info = torch.linalg.cholesky_ex(matrix)
        extra, retries = 1e-3 * float(matrix.diagonal().mean().abs()) + 1e-30, 0
        while int(info):
            matrix.diagonal().add_(extra)
            lower, info = torch.linalg.cholesky_ex(matrix)
            extra, retries = extra * 10, retries + 1
    finally:
        torch.set_num_threads(threads)
    return lower.to(hessian_KK.dtype), retries


@dataclass(slots=True)
class Factored:
    """Damped Hessians in the order their columns are visited: H[order][:, order] = V V^T."""

    order: torch.Tensor  # [E, K], the stored column visited k-th
    upper: torch.Tensor  # [E, K, K], V, upper triangular
    retries: list[int]  # per expert, see `factor`


def factorize(hessian_EKK: torch.Tensor, act_order: bool) -> Factored:
    """Return the factors of damped Hessians, columns by descending diagonal or as stored.

    V is the Cholesky factor of H with both axes reversed, reversed again: one factorization, where the usual route
    (the factor of the inverse) takes two factorizations and an inverse.
    """
    experts, columns = hessian_EKK.shape[:2]
    order_EK = torch.arange(columns, device=hessian_EKK.device).expand(experts, columns)
    if act_order:
        diagonal_EK = hessian_EKK.diagonal(dim1=-2, dim2=-1)
        order_EK = torch.argsort(diagonal_EK, dim=-1, descending=True, stable=True)
    upper_EKK, retries = torch.empty_like(hessian_EKK), []
    for e, (hessian, order) in enumerate(zip(hessian_EKK, order_EK, strict=True)):
        backwards = order.flip(0)
        lower, count = factor(hessian[backwards][:, backwards])
        retries.append(count)
        upper_EKK[e] = lower.flip(0, 1)
    return Factored(order_EK, upper_EKK, retries)


def _walk(
    state_EKN: torch.Tensor,
    coupling_EKK: torch.Tensor,
    delta_EKN: torch.Tensor,
    leaf: Callable[[int, int], None],
    width: int,
    low: int = 0,
    high: int | None = None,
) -> None:
    """Visit columns low..high-1 in blocks of `width`; at a block, `state` holds the effect of all earlier deltas."""
    high = state_EKN.shape[1] if high is None else high
    blocks = -(-(high - low) // width)
    if blocks == 1:
        leaf(low, high)
        return
    middle = low + blocks // 2 * width
    _walk(state_EKN, coupling_EKK, delta_EKN, leaf, width, low, middle)
    coupling = coupling_EKK[:, low:middle, middle:high].transpose(1, 2)
    state_EKN[:, middle:high].baddbmm_(coupling, delta_EKN[:, low:middle], alpha=-1)
    _walk(state_EKN, coupling_EKK, delta_EKN, leaf, width, middle, high)


def _within(
    state_EKN: torch.Tensor, coupling_EKK: torch.Tensor, delta_EKN: torch.Tensor, low: int, k: int
) -> torch.Tensor:
    """Return state of column k [E, N] minus the effect of the columns low..k-1 of its own block."""
    value_EN = state_EKN[:, k]
    if k == low:
        return value_EN
    row = coupling_EKK[:, low:k, k].unsqueeze(1)
    return torch.baddbmm(value_EN.unsqueeze(1), row, delta_EKN[:, low:k], alpha=-1).squeeze(1)


def _product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """Return a @ b in the dtype of a, multiplied in `dtype` (None: as it is)."""
    return a @ b if dtype is None else (a.to(dtype) @ b.to(dtype)).to(a.dtype)


def gptq(
    target_ENK: torch.Tensor,
    factored: Factored,
    scale_ENG: torch.Tensor,
    leaf: int | None = None,
    compiled: bool = False,
    grid: Grid = INT4,
) -> torch.Tensor:
    """Return int8 codes [E, N, K] of the grid for static, rounded scales.

    Columns are visited in the factor's order; each keeps its own group's scale, so the stored order does not change
    and no g_idx is needed. `compiled`: blocks of columns are left to `kernels.native`.
    """
    E, N, K = target_ENK.shape
    group = K // scale_ENG.shape[-1]
    order_EK = factored.order.contiguous()
    coupling_EKK = factored.upper / -factored.upper.diagonal(dim1=-2, dim2=-1).unsqueeze(1)
    state_EKN = torch.stack([w.T[o] for w, o in zip(target_ENK, order_EK, strict=True)])
    scale_EGN = scale_ENG.to(state_EKN.dtype).transpose(1, 2).contiguous()
    delta_EKN = state_EKN.clone()  # the target, until a column is visited
    codes_EKN = torch.empty(E, K, N, dtype=torch.int8, device=target_ENK.device)
    experts = torch.arange(E, device=target_ENK.device)
    group_EK = order_EK // group

    def visit_block(low: int, high: int) -> None:
        for k in range(low, high):
            value_EN = _within(state_EKN, coupling_EKK, delta_EKN, low, k)
            scale_EN = scale_EGN[experts, group_EK[:, k]]
            code_EN = grid.nearest(torch.div(value_EN, scale_EN))
            delta_EKN[:, k].addcmul_(code_EN, scale_EN, value=-1)
            codes_EKN[experts, order_EK[:, k]] = code_EN.to(torch.int8)

    def native_block(low: int, high: int) -> None:
        arrays = (coupling_EKK, state_EKN, delta_EKN, codes_EKN, scale_EGN, order_EK)
        native.gptq_block(low, high, *arrays, halves=grid is MXFP4)

    visit = native_block if compiled else visit_block
    _walk(state_EKN, coupling_EKK, delta_EKN, visit, leaf or (NATIVE_LEAF if compiled else LEAF))
    return codes_EKN.transpose(1, 2).contiguous()


def refine(
    target_ENK: torch.Tensor,
    hessian_EKK: torch.Tensor,
    scale_ENG: torch.Tensor,
    codes_ENK: torch.Tensor,
    compiled: bool = False,
    products: torch.dtype | None = None,
    grid: Grid = INT4,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (scales, codes) after one sweep: per group, refit its scale, round it, then descend over its codes.

    The scale step is the closed form s += u R / (u H u) with u the group's codes and R = H (w* - q), taken only
    where it lowers the objective after rounding; the code steps are exact minimisers. So the objective never rises.
    `compiled`: groups are left to `kernels.native`. `products`: the dtype in which the state H (w* - q) is set up; it
    only has to tell which code is nearest.
    """
    K = target_ENK.shape[-1]
    group = K // scale_ENG.shape[-1]
    scale_EGN = scale_ENG.to(target_ENK.dtype).transpose(1, 2).contiguous()
    codes_EKN = codes_ENK.transpose(1, 2).contiguous().to(target_ENK.dtype)
    delta_EKN = target_ENK.transpose(1, 2).contiguous()
    delta_EKN.unflatten(1, (-1, group)).addcmul_(codes_EKN.unflatten(1, (-1, group)), scale_EGN[:, :, None], value=-1)
    state_EKN = _product(hessian_EKK, delta_EKN, products)

    def visit_group(low: int, high: int) -> None:
        part = slice(low, high)
        codes, state = codes_EKN[:, part], state_EKN[:, part]
        local = hessian_EKK[:, part, part]
        old_scale = scale_EGN[:, low // group].clone()
        old_value = codes * old_scale[:, None]
        pushed = torch.bmm(local, codes)
        gain, power = (codes * state).sum(1), (codes * pushed).sum(1)
        new_scale = grid.round_scale(old_scale + torch.where(power > 0, gain / power, 0.0))
        step = new_scale - old_scale
        scale = torch.where(step * (step * power - 2 * gain) < 0, new_scale, old_scale)
        scale_EGN[:, low // group] = scale
        state.addcmul_(pushed, (scale - old_scale)[:, None], value=-1)
        for k in range(low, high):
            push = _within(state_EKN, hessian_EKK, delta_EKN, low, k)
            old_code = codes_EKN[:, k]
            wanted = old_code + push / (hessian_EKK[:, k, k, None] * scale)
            code = grid.nearest(wanted)
            delta_EKN[:, k] = (code - old_code) * scale
            codes_EKN[:, k] = code
        # later groups must see the whole change of this group, scale step included
        delta_EKN[:, part] = codes * scale[:, None] - old_value

    def native_group(low: int, high: int) -> None:
        arrays = (hessian_EKK, state_EKN, delta_EKN, codes_EKN, scale_EGN)
        native.refine_block(low, high, *arrays, halves=grid is MXFP4)

    _walk(state_EKN, hessian_EKK, delta_EKN, native_group if compiled else visit_group, group)
    return scale_EGN.transpose(1, 2).contiguous(), codes_EKN.to(torch.int8).transpose(1, 2).contiguous()


def asymmetric_target(
    weight_ENK: torch.Tensor,
    drift_EKK: torch.Tensor,
    factored: Factored,
    alpha: float,
    products: torch.dtype | None = None,
) -> torch.Tensor:
    """Return W* = W + alpha W (G - H) (H + lambda I)^-1 (E4): the target that makes up for a quantized input.

    `drift` is G - H = cov(x - x^, x^), x the original input and x^ the one the quantized model will see. W (G - H),
    a small correction, is multiplied in the dtype `products`.
    """
    corrected = torch.empty_like(weight_ENK)
    for e, (weight, drift) in enumerate(zip(weight_ENK, drift_EKK, strict=True)):
        order, upper = factored.order[e], factored.upper[e]
        right_KN = _product(weight, drift, products).T[order]
        half = torch.linalg.solve_triangular(upper, right_KN, upper=True)
        solved = torch.linalg.solve_triangular(upper.T, half, upper=False)
        corrected[e, :, order] = weight[:, order] + alpha * solved.T
    return corrected
