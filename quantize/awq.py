"""AWQ for gpt-oss: which scales to fold, and how to fold them exactly (arXiv 2306.00978; docs/method.md, E11, E12).

gate_up: one vector s [D] per layer. The norm weight is divided by it, the columns of every expert's gate_up *and
of the router* are multiplied by it. The norm weight is rounded to its stored dtype first and s is taken from the
rounded value, so the experts see no rounding of the fold; the router alone rounds once.

up -> down: one vector t >= 1 [F] per expert. (up + 1) / t = up/t + ((b + 1)/t - 1) + 1, so W_up / t,
W_down * t and b' = (b + 1)/t - 1 give the same function while no clamp binds. b' is rounded first and
t = (b + 1)/(b' + 1) follows from it. Neurons whose up clamp binds on calibration tokens keep t = 1.

Shapes: D hidden, F intermediate, T sample tokens, A candidates.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from gptoss_quantize.calibration.capture import Sample
from gptoss_quantize.config import ModelConfig
from gptoss_quantize.kernels import native
from gptoss_quantize.kernels.experts import gated
from gptoss_quantize.kernels.grids import INT4, Grid
from gptoss_quantize.model import expert_act
from gptoss_quantize.quantize.scales import signed_scale
from gptoss_quantize.source import Expert

ALPHAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7)
BETAS = (0.0, 0.2, 0.35, 0.5, 0.7)
MAX_FOLD = 16.0
# the tensors outside the experts that the gate_up fold changes
FOLDED = ("post_attention_layernorm.weight", "mlp.router.weight")


@dataclass(slots=True)
class InputFold:
    """The gate_up fold of one layer; `scale` is all ones when it did not help."""

    scale: torch.Tensor  # [D], what the experts' columns are multiplied by
    norm: torch.Tensor  # [D], new post_attention_layernorm.weight in its stored dtype
    router: torch.Tensor  # [E, D], new router weight in its stored dtype
    alpha: float  # as applied: the best one for plain rounding, times the recipe's strength
    gain: float  # sampled block output error under plain rounding, with the best fold for it over that without


def fold_input(
    scale_D: torch.Tensor, norm_D: torch.Tensor, router_ED: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (exact scale for the experts, new norm weight, new router weight), the latter two in stored dtype."""
    norm = (norm_D.float() / scale_D).to(norm_D.dtype)
    exact = torch.where(norm == 0, 1.0, norm_D.float() / norm.float())
    norm = torch.where(norm == 0, norm_D, norm)
    return exact, norm, (router_ED.float() * exact).to(router_ED.dtype)


def exact_down(expert: Expert, wanted_F: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (t [F] near the wanted one for which the shifted bias is exact as stored, that up bias [F])."""
    bias = expert.gate_up_bias[1::2].float()
    shifted = ((bias + 1) / wanted_F - 1).to(torch.bfloat16).float()
    # where b is exactly -1 the shifted bias is -1 for any t
    exact = torch.where(bias == -1, wanted_F, (bias + 1) / (shifted + 1))
    usable = torch.isfinite(exact) & (exact >= 1) & (exact <= 2 * MAX_FOLD)
    exact = torch.where(usable, exact, 1.0)
    return exact, torch.where(exact == 1, bias, shifted)


def fold_down(expert: Expert, wanted_F: torch.Tensor) -> tuple[Expert, torch.Tensor]:
    """Return (folded expert, exact t [F]): up rows / t, down columns * t, shifted and rounded up bias."""
    exact, shifted = exact_down(expert, wanted_F)
    gate_up, gate_up_bias = expert.gate_up.clone(), expert.gate_up_bias.clone()
    gate_up[1::2] /= exact[:, None].to(gate_up.dtype)
    gate_up_bias[1::2] = shifted.to(gate_up_bias.dtype)
    return Expert(gate_up, gate_up_bias, expert.down * exact.to(expert.down.dtype), expert.down_bias), exact


def nearest(
    weight_NK: torch.Tensor, fold_K: torch.Tensor, group_size: int, dtype: torch.dtype, grid: Grid = INT4
) -> torch.Tensor:
    """Return weight * fold after plain signed rounding, over fold: the cheap stand-in used while searching."""
    if dtype == torch.bfloat16 and weight_NK.device.type == "cpu" and native.available():
        return native.round_signed(weight_NK.float().contiguous(), fold_K.float().contiguous(), group_size, grid)
    folded = weight_NK * fold_K
    step = signed_scale(folded, group_size, grid).unsqueeze(-1)
    grouped = folded.unflatten(-1, (-1, group_size))
    codes = grid.nearest(grouped / step)
    return (codes.mul_(step).flatten(-2) / fold_K).to(dtype)


def input_candidates(magnitude_D: torch.Tensor, alphas: tuple[float, ...] = ALPHAS) -> torch.Tensor:
    """Return candidate scales [A, D]: mean |x| to the power alpha, centred so that sqrt(max * min) is 1."""
    safe = magnitude_D.clamp(min=1e-4 * float(magnitude_D.max()) + 1e-12)
    powers = torch.stack([safe**alpha for alpha in alphas])
    return powers / (powers.amax(1) * powers.amin(1)).sqrt()[:, None]


def search_input(  # noqa: PLR0913 - what is searched on, and over which ranks
    samples: list[Sample],
    experts: Iterator[Expert],
    magnitude_D: torch.Tensor,
    dense: dict[str, torch.Tensor],
    config: ModelConfig,
    group_size: int,
    strength: float = 1.0,
    gather: Callable[[Any], list[Any]] = lambda value: [value],
    grid: Grid = INT4,
) -> InputFold:
    """Return the layer's gate_up fold with the least routed, probability-weighted output error on the samples.

    `samples` and `experts` may be one rank's share; `gather` returns a value of every rank, in their order. Losses
    are added up in the order of experts, and all ranks take the fold of the first.

    Only gate_up is rounded while searching; its error is measured after down_proj, in the dtype of the samples.
    alpha = 0 is no fold; when nothing beats it the layer stays as it is, with gain 1. The best alpha is taken times
    `strength`: plain rounding needs more of a fold than error feedback does.
    """
    norm, router = dense["post_attention_layernorm.weight"], dense["mlp.router.weight"]
    folds = [fold_input(s, norm, router) for s in input_candidates(magnitude_D)]
    loss_EA = torch.zeros(len(samples), len(ALPHAS), dtype=torch.float64)
    for e, (sample, expert) in enumerate(zip(samples, experts, strict=True)):
        if not sample.x.shape[0]:
            continue
        dtype = sample.x.dtype
        down = expert.down.to(dtype)
        wanted = functional.linear(_act(sample.x, expert.gate_up.to(dtype), expert, config), down)
        for a, (scale, _, _) in enumerate(folds):
            rounded = nearest(expert.gate_up, scale, group_size, dtype, grid)
            got = functional.linear(_act(sample.x, rounded, expert, config), down)
            loss_EA[e, a] = float(((got - wanted).float().square().sum(1) * sample.weight).sum())
    loss_A = torch.cat(gather(loss_EA)).sum(0)
    best = int(loss_A.argmin())
    gain = float(loss_A[best] / loss_A[0]) if float(loss_A[0]) > 0 else 1.0
    if best == 0 or gain >= 1:
        return InputFold(torch.ones_like(magnitude_D), norm, router, 0.0, 1.0)
    alpha = ALPHAS[best] * strength
    (wanted_D,) = input_candidates(magnitude_D, (alpha,))
    first = gather([tensor.cpu() for tensor in fold_input(wanted_D, norm, router)])[0]
    scale, new_norm, new_router = (tensor.to(norm.device) for tensor in first)
    return InputFold(scale, new_norm, new_router, alpha, gain)


def _act(x_TD: torch.Tensor, gate_up_RD: torch.Tensor, expert: Expert, config: ModelConfig) -> torch.Tensor:
    bias = expert.gate_up_bias.to(x_TD.dtype)
    return gated(x_TD, gate_up_RD, bias, config.swiglu_limit, config.swiglu_alpha)


def search_down(
    sample: Sample,
    expert: Expert,
    config: ModelConfig,
    group_size: int,
    clamped_F: torch.Tensor,
    strength: float = 1.0,
    grid: Grid = INT4,
) -> tuple[Expert, torch.Tensor, float, float]:
    """Return (folded expert, t [F], beta, gain) with the least down_proj output error on the samples.

    `clamped` marks neurons whose up clamp binds on some calibration token; they and an expert without tokens
    keep t = 1. The best t is taken to the power `strength`, see `search_input`. gain 1 means that
    nothing helped and the expert is unchanged.
    """
    ones = torch.ones(config.intermediate, device=expert.down.device)
    if not sample.x.shape[0]:
        return expert, ones, 0.0, 1.0
    dtype = sample.x.dtype
    cast = expert.to(dtype)
    act = expert_act(sample.x, cast, config)
    wanted = functional.linear(act, cast.down).float()
    magnitude = (act.float().abs() * sample.weight[:, None]).sum(0)
    magnitude = magnitude.clamp(min=1e-6 * float(magnitude.max()) + 1e-12)
    losses, tries = [], []
    for beta in BETAS:
        t = (magnitude**beta).unflatten(0, (-1, group_size))
        t = (t / t.amin(1, keepdim=True)).flatten().clamp(1.0, MAX_FOLD)
        t = torch.where(clamped_F, 1.0, t)
        exact, _ = exact_down(expert, t)
        rounded = nearest(expert.down, exact, group_size, dtype, grid)
        error = (functional.linear(act, rounded).float() - wanted).square().sum(1)
        losses.append(float((error * sample.weight).sum()))
        tries.append(t)
    best = min(range(len(BETAS)), key=losses.__getitem__)
    gain = losses[best] / losses[0] if losses[0] > 0 else 1.0
    if best == 0 or gain >= 1:
        return expert, ones, 0.0, 1.0
    return *fold_down(expert, tries[best] ** strength), BETAS[best] * strength, gain
