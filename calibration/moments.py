"""Weighted first and second moments of an expert's input (docs/method.md, E2), added up block by block.

    m = sum w x / sum w        H = sum w x x^T / sum w - m m^T        n_eff = (sum w)^2 / sum w^2
    drift = cov(x - x^, x^) = G - H for the asymmetric target

The covariance is centred because the expert's bias can absorb any error in the mean for free. Only routed tokens
count, weighted by the router's probability. Sums run over x - c, with c the mean of the first block: one pass
over the tokens, and no cancellation where a channel's mean is large against its spread.
"""

from dataclasses import dataclass
from typing import Any

import torch

from gptoss_quantize.kernels import native

BLOCK_TOKENS = 2048
_COLUMNS = 512


@dataclass(slots=True)
class Moments:
    """Statistics of what one projection of one expert sees."""

    mean: torch.Tensor  # [K]
    hessian: torch.Tensor  # [K, K], centred unless asked otherwise; [K], its diagonal, where that is enough
    tokens: int
    effective_tokens: float
    drift: torch.Tensor | None = None  # [K, K], cov(original - quantized input, quantized input)
    original_mean: torch.Tensor | None = None  # [K], mean of the original input


def token_blocks(tokens: int) -> list[slice]:
    """Return slices of at most BLOCK_TOKENS tokens: small enough to stay in cache and to be reused by malloc."""
    return [slice(start, min(start + BLOCK_TOKENS, tokens)) for start in range(0, tokens, BLOCK_TOKENS)]


class MomentSums:
    """Running sums over blocks of tokens; `add` blocks, then `finish`. Accumulates in float32 or wider."""

    def __init__(self, columns: int, *, centre: bool = True, diagonal: bool = False):
        self.columns, self.centre, self.diagonal = columns, centre, diagonal
        self.tokens, self.paired = 0, False
        self.total = self.squares = 0.0
        self._shift = self._sum = self._second = self._gap = self._drift = torch.empty(0)

    def _start(self, x_TK: torch.Tensor, weight_T: torch.Tensor) -> None:
        dtype = torch.promote_types(x_TK.dtype, torch.float32)
        kind: dict[str, Any] = {"dtype": dtype, "device": x_TK.device}
        share = (weight_T / weight_T.sum()).to(dtype)
        self._shift = share @ x_TK.to(dtype) if self.centre else torch.zeros(self.columns, **kind)
        # drift multiplies in the inputs' own precision, and must be centred on a value of that precision
        self._shift = self._shift.to(x_TK.dtype).to(dtype)
        self._sum = torch.zeros(self.columns, **kind)
        self._gap = torch.zeros(self.columns, **kind)
        shape = (self.columns,) if self.diagonal else (self.columns, self.columns)
        self._second, self._drift = torch.zeros(shape, **kind), torch.zeros(shape, **kind)

    def add(self, x_TK: torch.Tensor, weight_T: torch.Tensor, original_TK: torch.Tensor | None = None) -> None:
        """Add tokens: x is what the quantized projection will see, `original` what the original one saw."""
        if not x_TK.shape[0]:
            return
        if not self.tokens:
            self._start(x_TK, weight_T)
        self.tokens += x_TK.shape[0]
        weight = weight_T.to(self._sum.dtype)
        self.total += float(weight.sum())
        self.squares += float(weight.square().sum())
        ready = native.takes(x_TK, torch.bfloat16) and native.has_products()
        if not self.diagonal and ready:
            self._add_native(x_TK, weight, original_TK)
            return
        # converted first: torch's mixed-dtype subtraction is several times slower
        centred = x_TK.to(self._sum.dtype, copy=True).sub_(self._shift)
        self._sum += weight @ centred
        if original_TK is not None:
            self.paired = True
            # a small correction, so the inputs' own precision is enough for its products
            gap = (original_TK - x_TK).mul_(weight[:, None].to(x_TK.dtype))
            self._gap += gap.sum(0, dtype=self._gap.dtype)
            if not self.diagonal:
                self._drift += gap.T @ centred.to(x_TK.dtype)
        centred.mul_(weight.sqrt()[:, None])
        if self.diagonal:
            self._second += centred.square().sum(0)
            return
        for start in range(0, self.columns, _COLUMNS):
            part = slice(start, start + _COLUMNS)
            self._second[part, start:].addmm_(centred[:, part].T, centred[:, start:])

    def _add_native(self, x_TK: torch.Tensor, weight_T: torch.Tensor, original_TK: torch.Tensor | None) -> None:
        block = native.centre(x_TK, original_TK, weight_T, self._shift)
        self._sum += block.sum
        if block.gap is not None and block.plain is not None:
            self.paired = True
            self._gap += block.gap_sum
            native.add_product(native.Pairs(block.gap), native.Pairs(block.plain), self._drift)
        scaled = native.Pairs(block.scaled)
        native.add_product(scaled, scaled, self._second)

    def finish(self, device: torch.device | str = "cpu", *, paired: bool = False) -> Moments:
        """Return the moments; the sums are used up.

        Zero tokens give zero mean and Hessian on `device`, and a zero drift if `paired`.
        """
        if not self.tokens:
            zero = torch.zeros(self.columns, device=device)
            square = zero if self.diagonal else torch.zeros(self.columns, self.columns, device=device)
            return Moments(zero, square, 0, 0.0, square if paired else None, zero)
        offset, gap = self._sum / self.total, self._gap / self.total
        mean, hessian, drift = self._shift + offset, self._second.div_(self.total), self._drift.div_(self.total)
        if self.centre and self.diagonal:
            hessian -= offset.square()
        elif self.centre:
            hessian.addr_(offset, offset, alpha=-1)
            drift.addr_(gap, offset, alpha=-1)
        if not self.diagonal:
            for start in range(0, self.columns, _COLUMNS):
                part = slice(start, start + _COLUMNS)
                hessian[part, :start] = hessian[:start, part].T
                hessian[part, part] = hessian[part, part].triu() + hessian[part, part].triu(1).T
        return Moments(
            mean,
            hessian,
            self.tokens,
            self.total**2 / self.squares,
            drift if self.paired and not self.diagonal else None,
            mean + gap,
        )
