"""From weights and moments of a batch of experts to codes, scales and biases: the recipe, step by step.

On a CPU the batch is divided over threads, each working with single-threaded operations: a column step is too small
to be worth sharing, while experts have nothing to wait for each other for.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from gptoss_quantize.calibration.moments import Moments
from gptoss_quantize.kernels import int4, native
from gptoss_quantize.kernels.grids import INT4, Grid
from gptoss_quantize.quantize.gptq import asymmetric_target, damp_, factorize, gptq, refine
from gptoss_quantize.quantize.recipes import Recipe
from gptoss_quantize.quantize.scales import RULES, lattice_candidates, on_mxfp4_grid, searched_scale


@dataclass(slots=True)
class Solution:
    """A quantized projection of a batch of experts."""

    codes: torch.Tensor  # int8 [E, N, K]
    scale: torch.Tensor  # [E, N, G], values as stored
    bias: torch.Tensor  # [E, N], values as stored
    retries: list[int]  # per expert, how often the Hessian needed more damping to factor

    def weight(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """Return one expert's dequantized weights [N, K]."""
        return int4.dequantize(self.codes[expert], self.scale[expert], dtype)


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
    rule = RULES[grid.name][recipe.scale]
    if stats is None:
        if recipe.calibrated:
            raise ValueError("this recipe needs calibration moments")
        scale = rule(weight_ENK, weight_ENK, group_size)
        codes = grid.quantize(weight_ENK, scale)
        return Solution(codes, scale, round_bias(bias_EN), [0] * len(codes))

    compiled = recipe.native and weight_ENK.device.type == "cpu" and native.available()
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
    if recipe.scale == "search" and grid is INT4:
        lattice = recipe.lattice and on_mxfp4_grid(weight_ENK)
        extra = lattice_candidates(weight_ENK, group_size) if lattice else None
        scale = searched_scale(target, importance.contiguous(), group_size, extra, compiled)
    else:
        scale = rule(target, importance, group_size)
    if factored is None:
        codes = grid.quantize(target, scale)
    else:
        codes = gptq(target, factored, scale, compiled=compiled, grid=grid)
    retries = [0] * len(target) if factored is None else factored.retries
    factored = None
    for _ in range(recipe.sweeps):
        scale, codes = refine(target, damped, scale, codes, compiled, products, grid)

    bias = bias_EN
    if recipe.centre:
        quantized = int4.dequantize(codes, scale, weight_ENK.dtype)
        # expert by expert: a batched product rounds differently when the batch is a single expert
        bias = bias_EN.clone()
        for e, s in enumerate(stats):
            original = s.mean if s.original_mean is None else s.original_mean
            bias[e] += weight_ENK[e] @ original - quantized[e] @ s.mean
    return Solution(codes, scale, round_bias(bias), retries)
