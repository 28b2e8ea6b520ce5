"""Symmetric int4 with one scale per group: codes, scales, and the compressed-tensors packing.

A weight is ``code * scale`` with a signed code in -8..7 and one bfloat16 scale for ``group_size`` neighbours
along the input dimension. The scale may be negative: only then can both ends of an asymmetric group use the
code -8, which is worth a fifth of the rounding error. Packing follows compressed-tensors "pack-quantized":
word ``c`` of a row holds columns 8c..8c+7, lowest nibble first, each stored as ``code + 8``.

Shapes: R rows (outputs), C columns (inputs), G = C / group_size groups of a row; leading dimensions are free.
"""

import sys

import torch

from gptoss_quantize.kernels import native

CODE_MIN, CODE_MAX = -8, 7
CODES_PER_WORD = 8

# A stored scale is exact in bfloat16 *and* float16, so that one file and its GGUF twin hold the same numbers:
# 8 significant bits fit float16 (as a subnormal) down to 2^-17, and 65280 is the last bfloat16 below its maximum.
SCALE_MIN, SCALE_MAX = 2.0**-17, 65280.0

if sys.byteorder != "little":
    raise ImportError("gptoss_quantize.kernels.int4 views bytes as little-endian int32; this machine is big-endian")


def round_scale(scale: torch.Tensor) -> torch.Tensor:
    """Return the scales as they will be stored: bfloat16 values, exact in float16 too, in the dtype given.

    Magnitudes are clamped to [2^-17, 65280]; zero becomes +2^-17, so that no group divides by zero.
    """
    stored = scale.to(torch.bfloat16).to(scale.dtype)
    magnitude = stored.abs().clamp(SCALE_MIN, SCALE_MAX)
    return torch.where(stored < 0, -magnitude, magnitude)


def pack(codes_RC: torch.Tensor) -> torch.Tensor:
    """Return int32 words [..., R, C/8] for codes [..., R, C] in -8..7.

    Raises ValueError when C is not a multiple of 8 or a code is out of range.
    """
    columns = codes_RC.shape[-1]
    if columns % CODES_PER_WORD:
        raise ValueError(f"pack: {columns} columns are not a multiple of {CODES_PER_WORD}")
    if codes_RC.numel() and (int(codes_RC.min()) < CODE_MIN or int(codes_RC.max()) > CODE_MAX):
        raise ValueError(f"pack: codes {int(codes_RC.min())}..{int(codes_RC.max())} outside -8..7")
    nibbles = (codes_RC.to(torch.int16) + 8).to(torch.uint8)
    return (nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)).contiguous().view(torch.int32)


def unpack(packed_RW: torch.Tensor) -> torch.Tensor:
    """Return int8 codes [..., R, 8W] in -8..7 for int32 words [..., R, W]: the inverse of `pack`."""
    pairs = packed_RW.contiguous().view(torch.uint8)
    nibbles = torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(-2)
    return nibbles.to(torch.int8) - 8


def dequantize(codes_RC: torch.Tensor, scale_RG: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the weights [..., R, C] = codes * scale. Exact in float32; rounded once for a narrower dtype."""
    group = codes_RC.shape[-1] // scale_RG.shape[-1]
    grouped = codes_RC.unflatten(-1, (scale_RG.shape[-1], group)).to(torch.float32)
    return (grouped * scale_RG.to(torch.float32).unsqueeze(-1)).flatten(-2).to(dtype)


def weights(packed_RW: torch.Tensor, scale_RG: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the weights [R, C] of a packed matrix: `dequantize` of `unpack`, in one compiled pass if it can be."""
    if dtype == torch.bfloat16 and native.takes(scale_RG, torch.bfloat16):
        return native.dequantize(packed_RW, scale_RG)
    return dequantize(unpack(packed_RW), scale_RG, dtype)


def quantize(weight_RC: torch.Tensor, scale_RG: torch.Tensor) -> torch.Tensor:
    """Return the nearest int8 codes [..., R, C] for given (already rounded) scales; ties go to even."""
    # a quotient in bfloat16 would be rounded to a tie before it is rounded to a code
    dtype = torch.promote_types(weight_RC.dtype, torch.float32)
    group = weight_RC.shape[-1] // scale_RG.shape[-1]
    grouped = weight_RC.to(dtype).unflatten(-1, (scale_RG.shape[-1], group))
    codes = torch.round(grouped / scale_RG.to(dtype).unsqueeze(-1)).clamp_(CODE_MIN, CODE_MAX)
    return codes.flatten(-2).to(torch.int8)


def bits_per_weight(columns: int, group_size: int) -> float:
    """Return the exact stored bits per weight: 4 for the code, 16 for the scale shared by a group."""
    if columns % group_size:
        raise ValueError(f"{columns} columns are not a multiple of group size {group_size}")
    return 4 + 16 / group_size
