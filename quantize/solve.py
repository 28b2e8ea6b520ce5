"""From weights and moments of a batch of experts to codes, scales and biases: the recipe's steps and inner loops.

GPTQ and the coordinate descent that follows it both walk over columns: the value of column k is its target minus what
the errors of earlier columns say,
    value_k = state_k - sum over earlier j of  coupling[j, k] * delta_j
GPTQ (arXiv 2210.17323): state = w*, coupling = -V[j, k] / V[k, k] with H = V V^T, delta = w* - quantized value.
  That is the LDLQ form of QuIP (arXiv 2307.13304, theorem 6), the same codes without an inverse: the objective is
  |(w* - q) V|^2, whose column k depends on the columns up to k alone, and is 0 at the value above.
Coordinate descent: state = H (W* - Q), coupling = H, delta = change of the quantized value.
`_walk` does this once for both, as a recursive blocked triangular solve: nearly all work is matrix products, and
the result does not depend on the blocking but for rounding. The objective is the sum over rows of
(w* - q) H (w* - q)^T.

Weights come as [E, N, K] (experts, rows, columns) and are turned once: in the walks columns come second, [E, K, N],
so that a column is contiguous memory. docs/method.md derives each step.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from gptoss_quantize.calibration.moments import Moments
from gptoss_quantize.kernels import native
from gptoss_quantize.kernels.grids import INT4, Grid
from gptoss_quantize.quantize.recipes import Recipe
from gptoss_quantize.quantize.scales import RULES, lattice_candidates, on_mxfp4_grid, searched_scale

LEAF = 32
NATIVE_LEAF = 96


@dataclass(slots=True)
class Solution:
    """A quantized projection of a batch of experts."""

    grid: Grid
    codes: torch.Tensor  # int8 [E, N, K]
    scale: torch.Tensor  # [E, N, G], values as stored
    bias: torch.Tensor  # [E, N], values as stored
    retries: list[int]  # per expert, how often the Hessian needed more damping to factor

    def weight(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """Return one expert's dequantized weights [N, K]."""
        return self.grid.dequantize(self.codes[expert], self.scale[expert], dtype)


def round_bias(bias: torch.Tensor) -> torch.Tensor:
    """Return the bias values as stored: rounded to bfloat16, in the dtype given."""
    return bias.to(torch.bfloat16).to(bias.dtype)


def solve(
    weight_ENK: torch.Tensor,
    bias_EN: torch.Tensor,
    stats: list[Moments] | None,
    recipe: Recipe,
    group_size: int,
    grid: Grid = INT4,
    products: torch.dtype | None = None,
) -> Solution:
    """Return the quantized projection of E experts under a recipe; `stats` are None for plain rounding.

    With drift in the moments the target is corrected for the quantized input; with a centred recipe the bias
    becomes b + W m - Q m^ (docs/method.md, E3): the mean output is exact. `products`: the dtype of those matrix
    products that choose and correct, but are not the result (None: the weights').

    On a CPU the batch is divided over threads, each working with single-threaded operations: a column step is too
    small to be worth sharing, while experts have nothing to wait for each other for.
    """
    experts, threads = weight_ENK.shape[0], torch.get_num_threads()
    if stats is None or weight_ENK.device.type != "cpu" or min(experts, threads) == 1:
        return _solve_batch(weight_ENK, bias_EN, stats, recipe, group_size, grid, products)
    share = -(-experts // threads)
    parts = [slice(start, start + share) for start in range(0, experts, share)]

    def work(part: slice) -> Solution:
        # inference mode is a property of the thread
        with torch.inference_mode():
            return _solve_batch(weight_ENK[part], bias_EN[part], stats[part], recipe, group_size, grid, products)

    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(len(parts)) as pool:
            solved = list(pool.map(work, parts))
    finally:
        torch.set_num_threads(threads)
    return Solution(
        grid,
        torch.cat([s.codes for s in solved]),
        torch.cat([s.scale for s in solved]),
        torch.cat([s.bias for s in solved]),
        [count for s in solved for count in s.retries],
    )


def _solve_batch(
    weight_ENK: torch.Tensor,
    bias_EN: torch.Tensor,
    stats: list[Moments] | None,
    recipe: Recipe,
    group_size: int,
    grid: Grid,
    products: torch.dtype | None = None,
) -> Solution:
    """Solve one batch in the calling thread; see `solve`."""
    rule = RULES[grid.rules][recipe.scale]
    if stats is None:
        if recipe.calibrated:
            raise ValueError("this recipe needs calibration moments")
        scale = rule(weight_ENK, weight_ENK, group_size, grid)
        codes = grid.quantize(weight_ENK, scale)
        return Solution(grid, codes, scale, round_bias(bias_EN), [0] * len(codes))

    compiled = weight_ENK.device.type == "cpu" and native.available() and native.handles(grid, group_size)
    damped = torch.stack([s.hessian for s in stats])
    effective = torch.tensor([s.effective_tokens for s in stats], device=damped.device)
    damp_(damped, effective, recipe.damping, recipe.damping_starved)
    target, factored = weight_ENK, None
    if recipe.gptq:
        factored = factorize(damped, recipe.act_order)
        drifts = [s.drift for s in stats if s.drift is not None]
        if recipe.asymmetric and drifts:
            drift = torch.stack(drifts)
            target = asymmetric_target(weight_ENK, drift, factored, recipe.asymmetric, products)
    importance = damped if damped.dim() == 2 else damped.diagonal(dim1=-2, dim2=-1)
    if recipe.scale == "search" and grid.integers:
        lattice = recipe.lattice and on_mxfp4_grid(weight_ENK)
        extra = lattice_candidates(weight_ENK, group_size) if lattice else None
        scale = searched_scale(target, importance.contiguous(), group_size, extra, compiled, grid)
    else:
        scale = rule(target, importance, group_size, grid)
    retries = [0] * len(target) if factored is None else factored.retries
    if factored is None and not recipe.sweeps:
        codes = grid.quantize(target, scale)
    else:
        scale, codes = _walks(target, scale, damped, factored, recipe, compiled, products, grid)
        factored = None

    bias = bias_EN
    if recipe.centre:
        quantized = grid.dequantize(codes, scale, weight_ENK.dtype)
        # expert by expert: a batched product rounds differently when the batch is a single expert
        bias = bias_EN.clone()
        for e, s in enumerate(stats):
            original = s.mean if s.original_mean is None else s.original_mean
            bias[e] += weight_ENK[e] @ original - quantized[e] @ s.mean
    return Solution(grid, codes, scale, round_bias(bias), retries)


def _walks(
    target_ENK: torch.Tensor,
    scale_ENG: torch.Tensor,
    damped_EKK: torch.Tensor,
    factored: "Factored | None",
    recipe: Recipe,
    compiled: bool,
    products: torch.dtype | None,
    grid: Grid,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (scales, codes) after GPTQ and the sweeps, whichever of them the recipe has."""
    target, scale = (t.transpose(1, 2).contiguous() for t in (target_ENK, scale_ENG))
    if factored is None:
        codes = grid.quantize(target_ENK, scale_ENG).transpose(1, 2).contiguous()
    else:
        codes = gptq(target, factored, scale, compiled=compiled, grid=grid)
    for _ in range(recipe.sweeps):
        scale, codes = refine(target, damped_EKK, scale, codes, compiled, products, grid)
    return scale.transpose(1, 2).contiguous(), codes.transpose(1, 2).contiguous()


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
    target_EKN: torch.Tensor,
    factored: Factored,
    scale_EGN: torch.Tensor,
    leaf: int | None = None,
    compiled: bool = False,
    grid: Grid = INT4,
) -> torch.Tensor:
    """Return int8 codes [E, K, N] of the grid for static, rounded scales.

    Columns are visited in the factor's order; each keeps its own group's scale, so the stored order does not change
    and no g_idx is needed. `compiled`: blocks of columns are left to `kernels.native`.
    """
    E, K, N = target_EKN.shape
    group = K // scale_EGN.shape[1]
    order_EK = factored.order.contiguous()
    coupling_EKK = factored.upper / -factored.upper.diagonal(dim1=-2, dim2=-1).unsqueeze(1)
    state_EKN = torch.stack([w[o] for w, o in zip(target_EKN, order_EK, strict=True)])
    scale_EGN = scale_EGN.to(state_EKN.dtype).contiguous()
    delta_EKN = state_EKN.clone()  # the target, until a column is visited
    codes_EKN = torch.empty(E, K, N, dtype=torch.int8, device=target_EKN.device)
    experts = torch.arange(E, device=target_EKN.device)
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
        native.gptq_block(low, high, *arrays, grid)

    visit = native_block if compiled else visit_block
    _walk(state_EKN, coupling_EKK, delta_EKN, visit, leaf or (NATIVE_LEAF if compiled else LEAF))
    return codes_EKN


def refine(
    target_EKN: torch.Tensor,
    hessian_EKK: torch.Tensor,
    scale_EGN: torch.Tensor,
    codes_EKN: torch.Tensor,
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
    group = target_EKN.shape[1] // scale_EGN.shape[1]
    scale_EGN = scale_EGN.to(target_EKN.dtype, copy=True)
    codes_EKN = codes_EKN.to(target_EKN.dtype)
    delta_EKN = target_EKN.clone()
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
        native.refine_block(low, high, *arrays, grid)

    _walk(state_EKN, hessian_EKK, delta_EKN, native_group if compiled else visit_group, group)
    return scale_EGN, codes_EKN.to(torch.int8)


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
