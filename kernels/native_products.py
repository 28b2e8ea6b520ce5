"""The C++ products of packed weights (native_experts.cpp): the expert block, int8 and bfloat16 linear layers.

The instruction set is chosen at run time; `instruction_sets` lists those that this processor has, slowest first, and
every function takes one by name, for tests. Results are the same for any number of threads.
"""

import ctypes
import functools
from collections.abc import Sequence

import torch

from gptoss_quantize.kernels import native

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
GROUPS = (32, 64)


class _Experts(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "index", "prob", "base", "place", "out")),
        *((name, ctypes.c_int64) for name in ("T", "K", "D", "F", "E", "group", "bits13", "bits2")),
        *((name, ctypes.c_int64) for name in ("x_type", "bias_type", "terms", "threads", "isa")),
        *((name, ctypes.c_float) for name in ("limit", "alpha")),
    ]


class _Linear(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "weight", "scale", "bias", "out")),
        *((name, ctypes.c_int64) for name in ("n", "C", "R", "x_type", "bias_type", "terms", "threads", "isa")),
    ]


@functools.cache
def _function(name: str) -> ctypes._CFuncPtr:  # type: ignore[name-defined]
    library, why = native._load()
    if library is None:
        raise RuntimeError(f"native kernels: {why}")
    function = getattr(library, name)
    function.restype = ctypes.c_char_p if name == "dot_kernel_name" else ctypes.c_int64
    return function


@functools.cache
def instruction_sets() -> tuple[str, ...]:
    """Return the names of the instruction sets that compiler and processor have, from the slowest to the fastest."""
    if not native.available():
        return ()
    count = _function("dot_kernel_count")()
    return tuple(_function("dot_kernel_name")(ctypes.c_int64(i)).decode() for i in range(count))


def _isa(name: str) -> int:
    """Return the number of an instruction set, -1 for the fastest ("")."""
    if not name:
        return -1
    if name not in instruction_sets():
        raise ValueError(f"instruction set {name!r}: this processor and compiler have {instruction_sets()}")
    return instruction_sets().index(name)


def _terms(dtype: torch.dtype) -> int:
    """Return how many 16-bit integers an activation takes: a float32 has more bits than one holds."""
    return 2 if dtype == torch.float32 else 1


def takes(x: torch.Tensor, columns: int, group: int) -> bool:
    """Return whether the products below take activations like x for rows of so many columns and groups."""
    return (
        x.device.type == "cpu" and x.dtype in TYPES and group in GROUPS and not columns % group and native.available()
    )


def experts(  # noqa: PLR0913 - the operator's own arguments
    x_TD: torch.Tensor,
    index_TK: torch.Tensor,
    prob_TK: torch.Tensor,
    storages: Sequence[torch.Tensor],
    place_6E2: torch.Tensor,
    sizes: tuple[int, int, int, int],
    bias_dtype: torch.dtype,
    limit: float,
    alpha: float,
    isa: str = "",
) -> torch.Tensor:
    """Return kernels.experts.experts_torch [T, D] for packed experts that lie anywhere in memory.

    `place_6E2` says where: storage number and byte offset of w13 packed, scale, bias and w2 packed, scale, bias of
    every expert. `sizes`: (intermediate size, group size, bits of a code in w13, in w2). Packed words are
    little-endian int32, scales bfloat16.
    """
    T, D = x_TD.shape
    x_TD, index_TK = x_TD.contiguous(), index_TK.to(torch.int64).contiguous()
    prob_TK, out_TD = prob_TK.to(torch.float32).contiguous(), torch.empty_like(x_TD)
    base = (ctypes.c_void_p * len(storages))(*(storage.data_ptr() for storage in storages))
    E = place_6E2.shape[1]
    arguments = _Experts(
        x_TD.data_ptr(), index_TK.data_ptr(), prob_TK.data_ptr(), ctypes.addressof(base), place_6E2.data_ptr(),
        out_TD.data_ptr(), T, index_TK.shape[1], D, *(sizes[0], E, *sizes[1:]), TYPES[x_TD.dtype], TYPES[bias_dtype],
        _terms(x_TD.dtype), torch.get_num_threads(), _isa(isa), limit, alpha,
    )  # fmt: skip
    if _function("experts_packed")(ctypes.byref(arguments)):
        found = f"{int(index_TK.min())}..{int(index_TK.max())}"
        raise ValueError(f"experts: expert numbers {found} are not all in 0..{E - 1}")
    return out_TD


def _linear(
    name: str,
    x: torch.Tensor,
    weight_RC: torch.Tensor,
    scale: torch.Tensor | None,
    bias_R: torch.Tensor | None,
    isa: str,
) -> torch.Tensor:
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    out = flat.new_empty(len(flat), len(weight_RC))
    bias_R = None if bias_R is None else bias_R.contiguous()
    (R, C), groups = weight_RC.shape, None if scale is None else tuple(scale.shape)
    if not weight_RC.is_contiguous() or (scale is not None and not scale.is_contiguous()):
        raise ValueError(f"{name}: weights and scales must be contiguous")
    if flat.shape[1] != C or groups not in (None, (R, C // 32)) or (bias_R is not None and bias_R.shape != (R,)):
        raise ValueError(f"{name}: {tuple(x.shape)} by weights [{R}, {C}] and scales {groups}: shapes do not fit")
    # products with bfloat16 weights are of float32 activations, whatever x is
    terms = 1 if scale is None else _terms(x.dtype)
    bias_type = 0 if bias_R is None else TYPES[bias_R.dtype]
    addresses = (None if t is None else t.data_ptr() for t in (flat, weight_RC, scale, bias_R, out))
    sizes = (len(flat), C, R, TYPES[x.dtype], bias_type, terms, torch.get_num_threads(), _isa(isa))
    arguments = _Linear(*addresses, *sizes)
    _function(name)(ctypes.byref(arguments))
    return out.view(*x.shape[:-1], len(weight_RC))


def int8_linear(
    x: torch.Tensor, codes_RC: torch.Tensor, scale_RG: torch.Tensor, bias_R: torch.Tensor | None, isa: str = ""
) -> torch.Tensor:
    """Return x W^T + b [..., R] in the dtype of x, W = int8 codes [R, C] * float16 scales [R, C/32]."""
    return _linear("linear_int8", x, codes_RC, scale_RG, bias_R, isa)


def bf16_linear(x: torch.Tensor, weight_RC: torch.Tensor, bias_R: torch.Tensor | None, isa: str = "") -> torch.Tensor:
    """Return x W^T + b [..., R] in the dtype of x for bfloat16 weights [R, C]: exact products, float32 sums."""
    return _linear("linear_bf16", x, weight_RC, None, bias_R, isa)
