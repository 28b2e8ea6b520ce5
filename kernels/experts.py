"""The gpt-oss expert block in plain torch: the definition that every faster kernel is tested against.

    gate, up = rows 0::2 and 1::2 of (x W13^T + b13)          interleaved, never halves
    a = (clamp(up, -limit, limit) + 1) * g * sigmoid(alpha * g),   g = clamp(gate, max limit)
    y = sum over the selected experts of  p_e * (a W2^T + b2)

Shapes: T tokens, D hidden, F intermediate, R = 2F interleaved rows, E experts, K experts per token.
The operator that models call, and the choice among the kernels, is in `kernels.experts_op`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch.nn import functional

from gptoss_quantize.kernels import int4, native, planes


@dataclass(slots=True)
class PackedExperts:
    """The packed experts of one layer, stacked; see docs/checkpoint-format.md, `kernels.int4` and `kernels.planes`.

    A code has 2, 3 or 4 bits, in w13 perhaps others than in w2: the shapes tell.
    """

    w13_packed: torch.Tensor  # int32 [E, 2F, bits D/32], rows interleaved gate, up
    w13_scale: torch.Tensor  # bfloat16 [E, 2F, D/g]
    w13_bias: torch.Tensor  # [E, 2F]
    w2_packed: torch.Tensor  # int32 [E, D, bits F/32]
    w2_scale: torch.Tensor  # bfloat16 [E, D, F/g]
    w2_bias: torch.Tensor  # [E, D]

    @property
    def hidden(self) -> int:
        """Return D."""
        return self.w2_bias.shape[-1]

    @property
    def intermediate(self) -> int:
        """Return F."""
        return self.w13_bias.shape[-1] // 2

    @property
    def group(self) -> int:
        """Return the weights per scale."""
        return self.hidden // self.w13_scale.shape[-1]

    @property
    def bits(self) -> tuple[int, int]:
        """Return the bits of a code in w13 and in w2; ValueError where the shapes fit none."""
        return (
            planes.bits_of(self.w13_packed.shape[-1], self.hidden),
            planes.bits_of(self.w2_packed.shape[-1], self.intermediate),
        )

    def of(self, expert: int) -> "PackedExperts":
        """Return one expert's tensors, without the leading dimension."""
        return PackedExperts(*(getattr(self, field.name)[expert] for field in fields(self)))


@dataclass(slots=True)
class MappedExperts:
    """The same experts wherever they lie in memory, a mapped file say: nothing is stacked, nothing copied."""

    storages: Sequence[torch.Tensor]  # uint8 [bytes]
    place: torch.Tensor  # int64 [6, E, 2] on the CPU: storage and byte offset of each tensor of PackedExperts
    hidden: int
    intermediate: int
    group: int
    bias_dtype: torch.dtype
    bits: tuple[int, int] = (4, 4)  # of a code in w13 and in w2

    def shapes(self) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
        """Return (shape, dtype) of one expert's six tensors."""
        D, F, g = self.hidden, self.intermediate, self.group
        w13, w2 = (planes.words(columns, bits) for columns, bits in zip((D, F), self.bits, strict=True))
        parts = (((2 * F, w13), (2 * F, D // g), (2 * F,)), ((D, w2), (D, F // g), (D,)))
        return tuple(
            shape_dtype
            for packed, scale, bias in parts
            for shape_dtype in ((packed, torch.int32), (scale, torch.bfloat16), (bias, self.bias_dtype))
        )

    def of(self, expert: int) -> PackedExperts:
        """Return one expert's tensors: views of the storages."""
        parts = []
        for (shape, dtype), (storage, offset) in zip(self.shapes(), self.place[:, expert].tolist(), strict=True):
            nbytes = math.prod(shape) * dtype.itemsize
            parts.append(self.storages[storage][offset : offset + nbytes].view(dtype).view(shape))
        return PackedExperts(*parts)

    def stack(self) -> PackedExperts:
        """Return a stacked copy."""
        experts = [self.of(e) for e in range(self.place.shape[1])]
        return PackedExperts(*(torch.stack([getattr(e, f.name) for e in experts]) for f in fields(PackedExperts)))

    def nbytes(self) -> int:
        """Return the bytes of all experts' tensors."""
        return self.place.shape[1] * sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.shapes())


def swiglu(gate_TF: torch.Tensor, up_TF: torch.Tensor, limit: float, alpha: float) -> torch.Tensor:
    """Return the clamped SwiGLU activations [..., F] of gate and up pre-activations [..., F]."""
    gate = gate_TF.clamp(max=limit)
    share = torch.sigmoid(gate * alpha)
    # sigmoid keeps its result for the backward pass
    glu = share * gate if share.requires_grad else share.mul_(gate)
    return torch.addcmul(glu, up_TF.clamp(min=-limit, max=limit), glu)


def swiglu_slope(gate_up_TR: torch.Tensor, slope_TF: torch.Tensor, limit: float, alpha: float) -> torch.Tensor:
    """Return the gradient by pre-activations [T, 2F], gates then ups, for the gradient by the activations [T, F]."""
    if native.takes(gate_up_TR, torch.bfloat16):
        return native.swiglu_slope(gate_up_TR, slope_TF, limit, alpha)
    dtype = torch.promote_types(gate_up_TR.dtype, torch.float32)
    raw_gate, raw_up = gate_up_TR.to(dtype).chunk(2, dim=-1)
    gate, up, slope = raw_gate.clamp(max=limit), raw_up.clamp(-limit, limit), slope_TF.to(dtype)
    share = torch.sigmoid(alpha * gate)
    by_gate = slope * (up + 1) * (share + alpha * gate * share * (1 - share)) * (raw_gate <= limit)
    by_up = slope * gate * share * (raw_up.abs() <= limit)
    return torch.cat((by_gate, by_up), dim=-1).to(gate_up_TR.dtype)


def by_halves(rows: torch.Tensor) -> torch.Tensor:
    """Return interleaved rows sorted into gates, then ups."""
    return torch.cat((rows[0::2], rows[1::2]))


def activated(gate_up_TR: torch.Tensor, limit: float, alpha: float) -> torch.Tensor:
    """Return the activations [T, F] of pre-activations [T, 2F], gates then ups."""
    # the compiled pass writes where autograd does not see it
    if not gate_up_TR.requires_grad and native.takes(gate_up_TR, torch.bfloat16, torch.float32):
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


def rows_of(index_TK: torch.Tensor, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (token rows [n], position among the token's k choices [n]) of the tokens routed to an expert."""
    token, slot = torch.where(index_TK == expert)
    return token, slot


def experts_torch(
    x_TD: torch.Tensor,
    index_TK: torch.Tensor,
    prob_TK: torch.Tensor,
    packed: PackedExperts | MappedExperts,
    limit: float,
    alpha: float,
) -> torch.Tensor:
    """Return the block output [T, D]: dequantize one hit expert at a time, multiply in the dtype of x."""
    out_TD, (bits13, bits2) = torch.zeros_like(x_TD), packed.bits
    for expert in torch.unique(index_TK).tolist():
        token, slot = rows_of(index_TK, expert)
        of = packed.of(expert)
        w13 = planes.weights(of.w13_packed, of.w13_scale, bits13, x_TD.dtype)
        act = gated(x_TD[token], w13, of.w13_bias.to(x_TD.dtype), limit, alpha)
        del w13
        w2 = planes.weights(of.w2_packed, of.w2_scale, bits2, x_TD.dtype)
        y = act @ w2.T + of.w2_bias.to(x_TD.dtype)
        out_TD.index_add_(0, token, y * prob_TK[token, slot, None].to(x_TD.dtype))
    return out_TD


def experts_gradient(
    slope_TD: torch.Tensor,
    x_TD: torch.Tensor,
    index_TK: torch.Tensor,
    prob_TK: torch.Tensor,
    packed: PackedExperts | MappedExperts,
    limit: float,
    alpha: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients (by x [T, D], by prob [T, K]) of `experts_torch` for the gradient by its output.

    Written out, with the forward pass done again one expert at a time: nothing of the size of the weights is kept.
    Works in float32 where x is narrower; on a CPU that is also faster.
    """
    dtype = torch.promote_types(x_TD.dtype, torch.float32)
    bits13, bits2 = packed.bits
    by_x, by_prob = torch.zeros_like(x_TD, dtype=dtype), torch.zeros_like(prob_TK, dtype=dtype)
    for expert in torch.unique(index_TK).tolist():
        token, slot = rows_of(index_TK, expert)
        of = packed.of(expert)
        slope = slope_TD[token].to(dtype)
        w13 = by_halves(int4.dequantize(planes.unpack(of.w13_packed, bits13), of.w13_scale, dtype))
        gate_up = functional.linear(x_TD[token].to(dtype), w13, by_halves(of.w13_bias.to(dtype)))
        by_act = slope @ int4.dequantize(planes.unpack(of.w2_packed, bits2), of.w2_scale, dtype)
        of_act = (by_act * activated(gate_up, limit, alpha)).sum(-1)
        by_prob[token, slot] = of_act + slope @ of.w2_bias.to(dtype)
        by_act *= prob_TK[token, slot, None].to(dtype)
        by_x.index_add_(0, token, swiglu_slope(gate_up, by_act, limit, alpha) @ w13)
    return by_x.to(x_TD.dtype), by_prob.to(prob_TK.dtype)
