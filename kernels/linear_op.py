"""Linear layers whose weights are int8 or bfloat16, as fast at a few rows as the bytes can be read.

Operators of torch with a fake and a gradient for x and the bias; the weights of `int8_linear` are frozen. Torch's
own bfloat16 `linear` is slower at one row, and without AVX-512 several times slower at any number of rows.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gptoss_quantize.kernels import int8, native_products

BLOCK_ROWS = 8192  # of int8 weights that are unpacked at a time where there is no kernel
FEW_ROWS = 8  # up to so many the reading counts, and torch's bfloat16 products are slower on any processor


def int8_torch(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Return x W^T + b by unpacking some rows at a time: the definition of `int8_linear`."""
    parts = [
        functional.linear(x, int8.dequantize(code, by, x.dtype))
        for code, by in zip(codes.split(BLOCK_ROWS), scale.split(BLOCK_ROWS), strict=True)
    ]
    out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    return out if bias is None else out + bias.to(x.dtype)


def _fits(x: Tensor, bias: Tensor | None) -> bool:
    return native_products.takes(x, x.shape[-1], int8.GROUP_SIZE) and (
        bias is None or bias.dtype in native_products.TYPES
    )


def _int8_linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    if _fits(x, bias) and scale.dtype == torch.float16:
        return native_products.int8_linear(x, codes, scale, bias)
    return int8_torch(x, codes, scale, bias)


@torch.library.custom_op("gptoss_quantize::int8_linear", mutates_args=())
def int8_linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Return x W^T + b [..., R] in the dtype of x, W = int8 codes [R, C] times float16 scales [R, C/32]."""
    return _int8_linear(x, codes, scale, bias)


@torch.library.custom_op("gptoss_quantize::int8_linear_backward", mutates_args=())
def int8_linear_backward(slope: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """Return the gradient by x [..., C] of `int8_linear` for the gradient by its output [..., R]."""
    dtype = torch.promote_types(slope.dtype, torch.float32)
    out = slope.new_zeros(*slope.shape[:-1], codes.shape[1], dtype=dtype)
    blocks = zip(slope.split(BLOCK_ROWS, -1), codes.split(BLOCK_ROWS), scale.split(BLOCK_ROWS), strict=True)
    for part, code, by in blocks:
        out += part.to(dtype) @ int8.dequantize(code, by, dtype)
    return out.to(slope.dtype)


def _bf16_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if _fits_bf16(x, weight, bias):
        return native_products.bf16_linear(x, weight, bias)
    return functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


@torch.library.custom_op("gptoss_quantize::bf16_linear", mutates_args=())
def bf16_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x W^T + b [..., R] in the dtype of x for bfloat16 weights [R, C]."""
    return _bf16_linear(x, weight, bias)


def _fits_bf16(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return weight.dtype == torch.bfloat16 and weight.is_contiguous() and _fits(x, bias)


def _linear_fake(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


int8_linear.register_fake(_linear_fake)
bf16_linear.register_fake(_linear_fake)


@int8_linear_backward.register_fake
def _backward_fake(slope: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    return slope.new_empty(*slope.shape[:-1], codes.shape[1])


def _over_rows(slope: Tensor) -> Tensor:
    return slope.flatten(0, -2).sum(0)


def _int8_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, codes, scale, _ = inputs
    if ctx.needs_input_grad[2]:
        raise ValueError(
            "gptoss_quantize::int8_linear has no gradient for its scales: call requires_grad_(False) on them"
        )
    ctx.save_for_backward(codes, scale)


def _int8_gradient(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
    by_x, _, _, by_bias = ctx.needs_input_grad
    codes, scale = ctx.saved_tensors
    return (
        int8_linear_backward(slope, codes, scale) if by_x else None,
        None,
        None,
        _over_rows(slope) if by_bias else None,
    )


def _bf16_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _bf16_gradient(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
    by_x, by_weight, by_bias = ctx.needs_input_grad
    x, weight = ctx.saved_tensors
    return (
        slope @ weight.to(slope.dtype) if by_x else None,
        (slope.flatten(0, -2).T @ x.flatten(0, -2)).to(weight.dtype) if by_weight else None,
        _over_rows(slope) if by_bias else None,
    )


int8_linear.register_autograd(_int8_gradient, setup_context=_int8_context)
bf16_linear.register_autograd(_bf16_gradient, setup_context=_bf16_context)


def _eager(*tensors: Tensor | None) -> bool:
    """Return whether a kernel may be called past torch's dispatcher, which takes longer than a small product."""
    return not torch.compiler.is_compiling() and not (
        torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    )


def int8_product(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Return `int8_linear`, without the dispatcher where it is not needed."""
    if _eager(x, scale, bias):
        return _int8_linear(x, codes, scale, bias)
    return int8_linear(x, codes, scale, bias)


class Bf16Linear(nn.Linear):
    """nn.Linear that reads bfloat16 weights with `bf16_linear` where that is faster; elsewhere it is nn.Linear."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Linear's name
        """Return [..., rows] for [..., columns]."""
        few = input.numel() <= FEW_ROWS * input.shape[-1]
        if input.dtype != torch.bfloat16 or input.device.type != "cpu" or not (few or not fast_bfloat16()):
            return super().forward(input)
        if _eager(input, self.weight, self.bias):
            return _bf16_linear(input, self.weight, self.bias)
        return bf16_linear(input, self.weight, self.bias)


@functools.cache
def fast_bfloat16() -> bool:
    """Return whether torch multiplies bfloat16 matrices fast on this processor (it needs AVX-512 for that)."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def use_bf16_linear(model: nn.Module) -> None:
    """Make every nn.Linear of a model a Bf16Linear, its parameters untouched."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Bf16Linear
