"""Weighted first and second moments of an expert's input (E2), accumulated in float32.

    m = sum w x / sum w        H = sum w x x^T / sum w - m m^T        n_eff = (sum w)^2 / sum w^2
    drift = cov(x - x^, x^) = G - H for the asymmetric target

The covariance is centred because the expert's bias can absorb any error in the mean for free. Only routed tokens
count, weighted by the router's probability.
"""

from dataclasses import dataclass

import torch

_BLOCK = 512
_ROWS = 4096


@dataclass(slots=True)
class Moments:
    """Statistics of what one projection of one expert sees."""

    mean: torch.Tensor  # [K]
    hessian: torch.Tensor  # [K, K], centred unless asked otherwise; [K], its diagonal, where that is enough
    tokens: int
    effective_tokens: float
    drift: torch.Tensor | None = None  # [K, K], cov(original - quantized input, quantized input)
    original_mean: torch.Tensor | None = None  # [K], mean of the original input


def add_gram_(out_KK: torch.Tensor, x_TK: torch.Tensor) -> None:
    """Add x^T x to the blocks of `out` on and above the diagonal; `mirror_` completes it."""
    for start in range(0, x_TK.shape[1], _BLOCK):
        part = slice(start, start + _BLOCK)
        out_KK[part, start:].addmm_(x_TK[:, part].T, x_TK[:, start:])


def mirror_(out_KK: torch.Tensor) -> None:
    """Copy the blocks above the diagonal to below it."""
    for start in range(_BLOCK, out_KK.shape[0], _BLOCK):
        part = slice(start, start + _BLOCK)
        out_KK[part, :start] = out_KK[:start, part].T


def moments(
    x_TK: torch.Tensor,
    weight_T: torch.Tensor,
    *,
    centre: bool = True,
    diagonal: bool = False,
    original_TK: torch.Tensor | None = None,
) -> Moments:
    """Return the moments of x under token weights; with `original`, also its mean and the drift against it.

    x is what the quantized projection will see. With `diagonal` only the Hessian's diagonal is computed, and no
    drift. Tokens are taken in blocks, so the float32 copies stay small. Zero tokens give a zero Hessian and mean.
    """
    tokens, columns = x_TK.shape
    kind = {"device": x_TK.device, "dtype": torch.promote_types(x_TK.dtype, torch.float32)}
    hessian = torch.zeros(columns if diagonal else (columns, columns), **kind)
    drift = None if diagonal or original_TK is None else torch.zeros(columns, columns, **kind)
    mean, original_mean = torch.zeros(columns, **kind), None if original_TK is None else torch.zeros(columns, **kind)
    if not tokens:
        return Moments(mean, hessian, 0, 0.0, drift, original_mean)
    weight = weight_T.to(kind["dtype"])
    share = weight / weight.sum()
    blocks = [slice(start, start + _ROWS) for start in range(0, tokens, _ROWS)]
    for rows in blocks:
        mean += share[rows] @ x_TK[rows].to(kind["dtype"])
        if original_TK is not None and original_mean is not None:
            original_mean += share[rows] @ original_TK[rows].to(kind["dtype"])
    offset = mean if centre else torch.zeros_like(mean)
    for rows in blocks:
        root = share[rows, None].sqrt()
        centred = (x_TK[rows] - offset).mul_(root)
        if diagonal:
            hessian += centred.square().sum(0)
            continue
        add_gram_(hessian, centred)
        if drift is not None and original_TK is not None and original_mean is not None:
            gap = original_TK[rows] - x_TK[rows]
            # the drift is a small correction: the inputs' own precision is enough for its product
            gap = ((gap - (original_mean - mean)) if centre else gap).mul(root).to(x_TK.dtype)
            drift += gap.T @ centred.to(x_TK.dtype)
    if not diagonal:
        mirror_(hessian)
    return Moments(mean, hessian, tokens, float(1 / share.square().sum()), drift, original_mean)
