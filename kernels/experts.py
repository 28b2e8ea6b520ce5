"""The gpt-oss expert block in plain torch: the definition that every faster kernel is tested against.

    gate, up = rows 0::2 and 1::2 of (x W13^T + b13)          interleaved, never halves
    a = (clamp(up, -limit, limit) + 1) * g * sigmoid(alpha * g),   g = clamp(gate, max limit)
    y = sum over the selected experts of  p_e * (a W2^T + b2)

Shapes: T tokens, D hidden, F intermediate, R = 2F interleaved rows, E experts, K experts per token.
A kernel is chosen from `EXPERT_KERNELS`; all have the signature of `experts_torch`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from gptoss_quantize.kernels import int4, native


@dataclass(slots=True)
class PackedExperts:
    """The int4 experts of one layer as stored; see docs/checkpoint-format.md and `kernels.int4`."""

    w13_packed: torch.Tensor  # int32 [E, 2F, D/8], rows interleaved gate, up
    w13_scale: torch.Tensor  # bfloat16 [E, 2F, D/g]
    w13_bias: torch.Tensor  # [E, 2F]
    w2_packed: torch.Tensor  # int32 [E, D, F/8]
    w2_scale: torch.Tensor  # bfloat16 [E, D, F/g]
    w2_bias: torch.Tensor  # [E, D]


def swiglu(gate_TF: torch.Tensor, up_TF: torch.Tensor, limit: float, alpha: float) -> torch.Tensor:
    """Return the clamped SwiGLU activations [..., F] of gate and up pre-activations [..., F]."""
    gate = gate_TF.clamp(max=limit)
    glu = torch.sigmoid(gate * alpha).mul_(gate)
    return torch.addcmul(glu, up_TF.clamp(min=-limit, max=limit), glu)


def swiglu_slope(gate_up_TR: torch.Tensor, slope_TF: torch.Tensor, limit: float, alpha: float) -> torch.Tensor:
    """Return the gradient by pre-activations [T, 2F], gates then ups, for the gradient by the activations [T, F]."""
    if native.takes(gate_up_TR, torch.bfloat16):
        return native.swiglu_slope(gate_up_TR, slope_TF, limit, alpha)
    raw_gate, raw_up = gate_up_TR.float().chunk(2, dim=-1)
    gate, up, slope = raw_gate.clamp(max=limit), raw_up.clamp(-limit, limit), slope_TF.float()
    share = torch.sigmoid(alpha * gate)
    by_gate = slope * (up + 1) * (share + alpha * gate * share * (1 - share)) * (raw_gate <= limit)
    by_up = slope * gate * share * (raw_up.abs() <= limit)
    return torch.cat((by_gate, by_up), dim=-1).to(gate_up_TR.dtype)


def by_halves(rows: torch.Tensor) -> torch.Tensor:
    """Return interleaved rows sorted into gates, then ups."""
    return torch.cat((rows[0::2], rows[1::2]))


def activated(gate_up_TR: torch.Tensor, limit: float, alpha: float) -> torch.Tensor:
    """Return the activations [T, F] of pre-activations [T, 2F], gates then ups."""
    if native.takes(gate_up_TR, torch.bfloat16, torch.float32):
        return native.swiglu(gate_up_TR, limit, alpha)
    gate_TF, up_TF = gate_up_TR.chunk(2, dim=-1)
    return swiglu(gate_TF, up_TF, limit, alpha)


def gated(
    x_TD: torch.Tensor, gate_up_RD: torch.Tensor, bias_R: torch.Tensor, limit: float, alpha: float
) -> torch.Tensor:
    """Return the input of down_proj [T, F] for interleaved gate/up weights [2F, D] and biases [2F].

    Rows are sorted into gates, then ups, before the product: halves of its result are cheaper to work on than
    every other column.
    """
    return activated(functional.linear(x_TD, by_halves(gate_up_RD), by_halves(bias_R)), limit, alpha)


def route(
    x_TD: torch.Tensor, weight_ED: torch.Tensor, bias_E: torch.Tensor, top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (expert indices [T, K], probabilities [T, K]): top-k of the logits, then softmax over the selected."""
    logits_TE = torch.nn.functional.linear(x_TD, weight_ED, bias_E)
    values_TK, index_TK = torch.topk(logits_TE, top_k, dim=-1)
    return index_TK, torch.softmax(values_TK, dim=-1)


def tokens_of(index_TK: torch.Tensor, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (token rows [n], position among the token's k choices [n]) of the tokens routed to an expert."""
    token, slot = torch.where(index_TK == expert)
    return token, slot


def experts_torch(
    x_TD: torch.Tensor,
    index_TK: torch.Tensor,
    prob_TK: torch.Tensor,
    packed: PackedExperts,
    limit: float,
    alpha: float,
) -> torch.Tensor:
    """Return the block output [T, D]: dequantize one hit expert at a time, multiply in the dtype of x."""
    out_TD = torch.zeros_like(x_TD)
    for expert in torch.unique(index_TK).tolist():
        token, slot = tokens_of(index_TK, expert)
        w13 = int4.weights(packed.w13_packed[expert], packed.w13_scale[expert], x_TD.dtype)
        act = gated(x_TD[token], w13, packed.w13_bias[expert].to(x_TD.dtype), limit, alpha)
        del w13
        w2 = int4.weights(packed.w2_packed[expert], packed.w2_scale[expert], x_TD.dtype)
        y = act @ w2.T + packed.w2_bias[expert].to(x_TD.dtype)
        out_TD.index_add_(0, token, y * prob_TK[token, slot, None].to(x_TD.dtype))
    return out_TD


EXPERT_KERNELS: dict[str, Callable[..., torch.Tensor]] = {"torch": experts_torch}
