"""The operator `gptoss_quantize::experts`: the expert block of packed 2 to 4-bit weights by the fastest kernel.

`experts` takes stacked tensors, `experts_mapped` the same experts wherever they lie in memory (a memory-mapped
checkpoint, whose tensors are separate for every expert). Both are operators of torch: they have a fake, so that
`torch.compile` does not break the graph at them, and a gradient for x and the routing weights. Codes, scales and
biases are frozen. The definition is `kernels.experts.experts_torch`.

    x on            kernel
    CPU             C++ (native_products) for float32, bfloat16, float16; else, and without a compiler, the definition
    CUDA            Triton (experts_triton) for stacked 4-bit tensors where triton is installed, else the definition
"""

import functools
import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

from gptoss_quantize.kernels import native, native_products, planes
from gptoss_quantize.kernels.experts import MappedExperts, PackedExperts, experts_gradient, experts_torch

TRITON = "gptoss_quantize.kernels.experts_triton"
KERNELS = ("auto", "torch")


@functools.lru_cache(maxsize=256)
def _offsets(experts: int, nbytes: tuple[int, ...]) -> Tensor:
    """Return place [6, E, 2] of stacked experts with so many bytes each in every tensor."""
    offset = torch.arange(experts) * torch.tensor(nbytes)[:, None]
    return torch.stack((torch.arange(len(nbytes))[:, None].expand_as(offset), offset), -1).contiguous()


def _place(packed: PackedExperts) -> tuple[list[Tensor], Tensor]:
    """Return storages and place of stacked experts."""
    parts = [getattr(packed, name).contiguous() for name in PackedExperts.__slots__]
    return parts, _offsets(len(parts[0]), tuple(part.nbytes // len(part) for part in parts))


def experts_native(
    x: Tensor,
    index: Tensor,
    prob: Tensor,
    packed: PackedExperts | MappedExperts,
    limit: float,
    alpha: float,
    isa: str = "",
) -> Tensor:
    """Return `experts_torch` [T, D] computed in C++, with an instruction set by name or ("") the fastest."""
    if isinstance(packed, MappedExperts):
        storages, place = packed.storages, packed.place
        bias_dtype = packed.bias_dtype
    else:
        storages, place = _place(packed)
        bias_dtype = packed.w13_bias.dtype
    sizes = (packed.intermediate, packed.group, *packed.bits)
    return native_products.experts(x, index, prob, storages, place, sizes, bias_dtype, limit, alpha, isa)


def _fits_native(x: Tensor, packed: PackedExperts | MappedExperts) -> bool:
    if isinstance(packed, MappedExperts):
        return native_products.takes(x, packed.intermediate, packed.group)
    dtypes = (packed.w13_scale.dtype, packed.w2_scale.dtype)
    biases = {packed.w13_bias.dtype, packed.w2_bias.dtype}
    return (
        dtypes == (torch.bfloat16, torch.bfloat16)
        and len(biases) == 1
        and biases <= native_products.TYPES.keys()
        and native_products.takes(x, packed.intermediate, packed.group)
    )


def _triton() -> Any:
    """Return the module of the Triton kernels if it can be used, else None."""
    if importlib.util.find_spec(TRITON) is None:
        return None
    module = importlib.import_module(TRITON)
    return None if module.problem() else module


def run(
    x: Tensor, index: Tensor, prob: Tensor, packed: PackedExperts | MappedExperts, limit: float, alpha: float
) -> Tensor:
    """Return the block output [T, D] in the dtype of x by the fastest kernel for x; no gradient."""
    if _fits_native(x, packed):
        return experts_native(x, index, prob, packed, limit, alpha)
    on_card = x.device.type == "cuda" and x.dtype in native_products.TYPES
    groups = native_products.GROUPS
    if on_card and isinstance(packed, PackedExperts) and packed.group in groups and (triton := _triton()) is not None:
        parts = (getattr(packed, name) for name in PackedExperts.__slots__)
        return triton.experts_triton(x, index, prob, *parts, limit, alpha, *packed.bits)
    return experts_torch(x, index, prob, packed, limit, alpha)


def kernel_report(device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> str:
    """Return which kernel runs packed experts on a device with activations of a dtype, and why."""
    if torch.device(device).type == "cuda":
        if _triton() is not None:
            return "Triton kernels"
        why = "triton kernels are not part of this installation"
        if importlib.util.find_spec(TRITON) is not None:
            why = importlib.import_module(TRITON).problem()
        return f"plain torch, one expert at a time, slow: {why}"
    if torch.device(device).type != "cpu":
        return f"plain torch, one expert at a time, slow: there is no kernel for {device}"
    if not native.available():
        return f"plain torch, one expert at a time, about 20 times slower than it could be: {native.problem()}"
    if dtype not in native_products.TYPES:
        return f"plain torch, one expert at a time, slow: the C++ kernels do not take {dtype}"
    sets = native_products.instruction_sets()
    return f"C++ with {sets[-1]} (this processor and compiler have {', '.join(sets)})"


def _check(x: Tensor, index: Tensor, prob: Tensor, bits: tuple[int, int]) -> None:
    if not {*bits} <= {*planes.BITS}:
        raise ValueError(f"gptoss_quantize::experts: bits = {bits}; 2, 3 and 4 are implemented")
    if x.dim() != 2 or index.dim() != 2 or index.shape != prob.shape or len(index) != len(x):
        raise ValueError(
            "gptoss_quantize::experts takes x [T, D], index [T, K] and prob [T, K], "
            f"not {tuple(x.shape)}, {tuple(index.shape)}, {tuple(prob.shape)}"
        )


def _check_shapes(x: Tensor, packed: PackedExperts, bits: tuple[int, int]) -> None:
    """Refuse shapes that do not fit each other: the kernels read memory by them."""
    (E, R, _), D = packed.w13_packed.shape, x.shape[1]
    F, G13, G2 = R // 2, packed.w13_scale.shape[-1], packed.w2_scale.shape[-1]
    found = [tuple(getattr(packed, name).shape) for name in PackedExperts.__slots__]
    w13, w2 = planes.words(D, bits[0]), planes.words(F, bits[1])
    if found != [(E, 2 * F, w13), (E, 2 * F, G13), (E, 2 * F), (E, D, w2), (E, D, G2), (E, D)] or (
        D % G13 or F % G2 or D // G13 != F // G2
    ):
        raise ValueError(
            f"gptoss_quantize::experts: shapes {found} do not fit each other, x {tuple(x.shape)} and {bits} bits"
        )


# --- stacked


@torch.library.custom_op("gptoss_quantize::experts", mutates_args=())
def experts(  # noqa: PLR0913 - an operator takes tensors, not a dataclass
    x: Tensor,
    index: Tensor,
    prob: Tensor,
    w13_packed: Tensor,
    w13_scale: Tensor,
    w13_bias: Tensor,
    w2_packed: Tensor,
    w2_scale: Tensor,
    w2_bias: Tensor,
    limit: float,
    alpha: float,
    bits: int = 4,
    bits_down: int = 0,
) -> Tensor:
    """Return the block output [T, D] in the dtype of x for x [T, D], experts index [T, K] and weights prob [T, K].

    The experts are those of PackedExperts; the group size follows from the shapes. `bits`: of a code, 2, 3 or 4;
    `bits_down`: of those of w2 where they are others.
    """
    pair = (bits, bits_down or bits)
    _check(x, index, prob, pair)
    packed = PackedExperts(w13_packed, w13_scale, w13_bias, w2_packed, w2_scale, w2_bias)
    _check_shapes(x, packed, pair)
    return run(x, index, prob, packed, limit, alpha)


@experts.register_fake
def _experts_fake(x: Tensor, index: Tensor, prob: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("gptoss_quantize::experts_backward", mutates_args=())
def experts_backward(  # noqa: PLR0913
    slope: Tensor,
    x: Tensor,
    index: Tensor,
    prob: Tensor,
    w13_packed: Tensor,
    w13_scale: Tensor,
    w13_bias: Tensor,
    w2_packed: Tensor,
    w2_scale: Tensor,
    w2_bias: Tensor,
    limit: float,
    alpha: float,
) -> tuple[Tensor, Tensor]:
    """Return the gradients (by x [T, D], by prob [T, K]) for the gradient by the output; no second derivative."""
    packed = PackedExperts(w13_packed, w13_scale, w13_bias, w2_packed, w2_scale, w2_bias)
    return experts_gradient(slope, x, index, prob, packed, limit, alpha)


def _gradient_fake(slope: Tensor, x: Tensor, index: Tensor, prob: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    contiguous = torch.contiguous_format
    return torch.empty_like(x, memory_format=contiguous), torch.empty_like(prob, memory_format=contiguous)


experts_backward.register_fake(_gradient_fake)


def _refuse(needs: tuple[bool, ...], names: tuple[str, ...]) -> None:
    if wanted := [name for name, need in zip(names, needs, strict=True) if need]:
        raise ValueError(
            f"gptoss_quantize::experts has no gradient for {', '.join(wanted)}: packed experts are frozen, only x "
            "and the routing weights have one; call requires_grad_(False) on them, or train the unquantized model"
        )


def _experts_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _refuse(ctx.needs_input_grad[3:9], PackedExperts.__slots__)
    ctx.save_for_backward(*inputs[:9])
    ctx.settings, ctx.count = inputs[9:11], len(inputs)


def _experts_gradient(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
    by_x, by_prob = experts_backward(slope, *ctx.saved_tensors, *ctx.settings)
    return by_x, None, by_prob, *(None,) * (ctx.count - 3)


experts.register_autograd(_experts_gradient, setup_context=_experts_context)


# --- anywhere in memory


@torch.library.custom_op("gptoss_quantize::experts_mapped", mutates_args=())
def experts_mapped(  # noqa: PLR0913
    x: Tensor,
    index: Tensor,
    prob: Tensor,
    storages: list[Tensor],
    place: Tensor,
    intermediate: int,
    group: int,
    bias_dtype: torch.dtype,
    limit: float,
    alpha: float,
    bits: int,
    bits_down: int,
) -> Tensor:
    """Return `experts` for experts that lie in `storages` where `place` says; see MappedExperts."""
    pair = (bits, bits_down)
    _check(x, index, prob, pair)
    mapped = MappedExperts(storages, place, x.shape[1], intermediate, group, bias_dtype, pair)
    return run(x, index, prob, mapped, limit, alpha)


experts_mapped.register_fake(_experts_fake)


@torch.library.custom_op("gptoss_quantize::experts_mapped_backward", mutates_args=())
def experts_mapped_backward(  # noqa: PLR0913
    slope: Tensor,
    x: Tensor,
    index: Tensor,
    prob: Tensor,
    storages: list[Tensor],
    place: Tensor,
    intermediate: int,
    group: int,
    bias_dtype: torch.dtype,
    limit: float,
    alpha: float,
    bits: int,
    bits_down: int,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of `experts_mapped`, as `experts_backward` does."""
    pair = (bits, bits_down)
    mapped = MappedExperts(storages, place, x.shape[1], intermediate, group, bias_dtype, pair)
    return experts_gradient(slope, x, index, prob, mapped, limit, alpha)


experts_mapped_backward.register_fake(_gradient_fake)


def _mapped_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, index, prob, storages, place, *settings = inputs
    ctx.save_for_backward(x, index, prob, place, *storages)
    ctx.settings, ctx.count = settings, len(inputs)


def _mapped_gradient(ctx: Any, slope: Tensor) -> tuple[Any, ...]:
    x, index, prob, place, *storages = ctx.saved_tensors
    by_x, by_prob = experts_mapped_backward(slope, x, index, prob, storages, place, *ctx.settings)
    return by_x, None, by_prob, [None] * len(storages), *(None,) * (ctx.count - 4)


experts_mapped.register_autograd(_mapped_gradient, setup_context=_mapped_context)
