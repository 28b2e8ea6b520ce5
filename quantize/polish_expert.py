"""One quantized expert for the polish: its output, and gradients for what is free, without going back to the weights.

The backward pass is written out: pre-activations and outputs are kept from the forward pass, so a step multiplies
each matrix three times (output, input gradient, weight gradient) and never a fourth. A weight's gradient exists for
one matrix at a time and is summed into its groups' scales at once. Rows of gate_up are sorted into gates, then ups.

Shapes: n tokens of the expert, D hidden, F intermediate, R = 2F rows, G groups.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from gptoss_quantize.config import ModelConfig
from gptoss_quantize.kernels import mxfp4, native, planes
from gptoss_quantize.kernels.experts import activated, swiglu_slope
from gptoss_quantize.layouts import MXFP4, WRITTEN


@dataclass(slots=True)
class Matrix:
    """A stored expert matrix: its weights for given scales, and the gradient of its scales."""

    weight: Callable[[torch.Tensor | None], torch.Tensor]  # scales as stored [R, G] -> [R, C] in the compute dtype
    scale_gradient: Callable[[torch.Tensor], torch.Tensor] | None  # gradient of the weights -> of the scales


def integer_matrix(packed_RW: torch.Tensor, groups: int, bits: int, dtype: torch.dtype) -> Matrix:
    """Return a matrix of 2, 3 or 4-bit codes, whose scales are free."""

    def weight(scale_RG: torch.Tensor | None) -> torch.Tensor:
        assert scale_RG is not None
        # exact: stored scales are bfloat16 values
        return planes.weights(packed_RW, scale_RG.to(dtype), bits, dtype)

    def scale_gradient(slope_RC: torch.Tensor) -> torch.Tensor:
        if bits == 4 and native.takes(slope_RC, torch.bfloat16):
            return native.scale_gradient(packed_RW, slope_RC, groups)
        product = planes.unpack(packed_RW, bits).to(slope_RC.dtype).mul_(slope_RC)
        return product.unflatten(-1, (groups, -1)).sum(-1, dtype=torch.float32)

    return Matrix(weight, scale_gradient)


def mxfp4_matrix(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> Matrix:
    """Return a matrix of MXFP4 blocks, of which nothing is free."""
    return Matrix(lambda _: mxfp4.decode(blocks, scales, dtype), None)


def _packed_matrix(bits: int, packed_RW: torch.Tensor, scale_RG: torch.Tensor, dtype: torch.dtype) -> Matrix:
    return integer_matrix(packed_RW, scale_RG.shape[1], bits, dtype)


# layout -> (stored tensors by the order of its suffixes, compute dtype) -> matrix
MATRICES: dict[str, Callable[..., Matrix]] = {
    MXFP4.name: mxfp4_matrix,
    **{name: partial(_packed_matrix, layout.bits) for name, layout in WRITTEN.items() if layout.packed},
}


@dataclass(slots=True)
class Kept:
    """What the backward pass needs of a forward pass."""

    gate_up: torch.Tensor  # pre-activations
    y: torch.Tensor  # output before the router's weight


class ExpertOutput(torch.autograd.Function):
    """The router-weighted output of one expert, float32 [n, D].

    `kept` is empty, and filled, or holds what an earlier call for the same tokens has left there, and used.
    """

    @staticmethod
    def forward(  # noqa: PLR0913 - one argument for each gradient
        ctx: Any,
        x_nD: torch.Tensor,
        prob_n: torch.Tensor,
        scale13: torch.Tensor | None,
        bias13: torch.Tensor,
        scale2: torch.Tensor | None,
        bias2: torch.Tensor,
        w13: Matrix,
        w2: Matrix,
        config: ModelConfig,
        kept: list[Kept],
    ) -> torch.Tensor:
        limit, alpha, dtype = config.swiglu_limit, config.swiglu_alpha, x_nD.dtype
        if not kept:
            gate_up = functional.linear(x_nD, w13.weight(scale13), bias13.to(dtype))
            y = functional.linear(activated(gate_up, limit, alpha), w2.weight(scale2), bias2.to(dtype))
            kept.append(Kept(gate_up, y))
        ctx.save_for_backward(x_nD, prob_n, scale13, scale2)
        ctx.w13, ctx.w2, ctx.config, ctx.kept = w13, w2, config, kept
        return kept[0].y.float() * prob_n[:, None]

    @staticmethod
    def backward(ctx: Any, *slopes: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, prob, scale13, scale2 = ctx.saved_tensors
        (kept,), limit, alpha = ctx.kept, ctx.config.swiglu_limit, ctx.config.swiglu_alpha
        by_prob = (slopes[0] * kept.y).sum(1)
        by_y = (slopes[0] * prob[:, None]).to(x.dtype)
        by_scale2 = by_scale13 = None
        if ctx.w2.scale_gradient is not None:
            by_scale2 = ctx.w2.scale_gradient(by_y.T @ activated(kept.gate_up, limit, alpha))
        by_gate_up = swiglu_slope(kept.gate_up, by_y @ ctx.w2.weight(scale2), limit, alpha)
        if ctx.w13.scale_gradient is not None:
            by_scale13 = ctx.w13.scale_gradient(by_gate_up.T @ x)
        by_x = by_gate_up @ ctx.w13.weight(scale13)
        by_bias13, by_bias2 = (by.sum(0, dtype=torch.float32) for by in (by_gate_up, by_y))
        return by_x, by_prob, by_scale13, by_bias13, by_scale2, by_bias2, None, None, None, None
