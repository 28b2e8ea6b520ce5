"""ggml's 4-bit blocks of 32 weights: our int4 codes as Q4_0, OpenAI's MXFP4 as ggml's MXFP4. No value changes.

Both types hold 32 neighbours along the input dimension in one block, and pair element j (low nibble of byte j) with
element j + 16 (high nibble). OpenAI's files pair 2j with 2j + 1 instead.

    Q8_0     34 bytes: the scale as float16, then 32 int8 codes; value = code * scale
    Q4_0     18 bytes: the scale as little-endian float16, then 16 bytes of codes; value = (nibble - 8) * scale
    MXFP4    17 bytes: the E8M0 byte, then 16 bytes of E2M1 codes

A scale for 64 weights is written into both of its blocks. It must be exact in float16, or the file would hold other
weights than the checkpoint; `int4.round_scale` makes sure of that when we choose the scale, `float16_scale` for any.
Source: ggml-common.h and quantize_row_q4_0_ref, dequantize_row_mxfp4 of llama.cpp.
"""

import torch
from torch import Tensor

BLOCK = 32
Q4_0_BYTES = 2 + BLOCK // 2
MXFP4_BYTES = 1 + BLOCK // 2


def float16_scale(scale: Tensor) -> tuple[Tensor, int]:
    """Return (the scales as float16, how many of them float16 cannot hold exactly)."""
    half = scale.to(torch.float16)
    return half, int((half.double() != scale.double()).sum())


def pair_nibbles(codes: Tensor) -> Tensor:
    """Return bytes [..., C/2] for codes 0..15 [..., C]: in each block of 32, j low and j + 16 high."""
    blocks = codes.unflatten(-1, (-1, BLOCK))
    return (blocks[..., : BLOCK // 2] | (blocks[..., BLOCK // 2 :] << 4)).flatten(-2)


def split_nibbles(pairs: Tensor) -> Tensor:
    """Return codes 0..15 [..., 2B] of bytes [..., B]: the inverse of `pair_nibbles`."""
    blocks = pairs.unflatten(-1, (-1, BLOCK // 2))
    return torch.cat((blocks & 15, blocks >> 4), dim=-1).flatten(-2)


def _with_head(head: Tensor, pairs: Tensor) -> Tensor:
    """Return rows of blocks: head bytes [..., B, n] before 16 bytes of pairs each, flattened over blocks."""
    return torch.cat((head, pairs.unflatten(-1, (-1, BLOCK // 2))), dim=-1).flatten(-2)


def q4_0(codes_RC: Tensor, scale_RG: Tensor) -> Tensor:
    """Return the Q4_0 bytes [..., R, C/32*18] of int8 codes -8..7 and scales exact in float16.

    Raises ValueError when a group is no multiple of 32 weights or float16 cannot hold a scale.
    """
    columns, groups = codes_RC.shape[-1], scale_RG.shape[-1]
    if columns % groups or columns // groups % BLOCK:
        raise ValueError(f"Q4_0 has blocks of {BLOCK}; {columns} columns in {groups} groups do not fit")
    half, inexact = float16_scale(scale_RG)
    if inexact:
        raise ValueError(f"{inexact} of {scale_RG.numel()} scales are not exact in float16, as Q4_0 stores them")
    repeated = half.repeat_interleave(columns // groups // BLOCK, dim=-1)
    head = repeated.unsqueeze(-1).contiguous().view(torch.uint8)
    nibbles = (codes_RC.to(torch.int16) + 8).to(torch.uint8)
    return _with_head(head, pair_nibbles(nibbles))


def q8_0(codes_RC: Tensor, scale_RG: Tensor) -> Tensor:
    """Return the Q8_0 bytes [..., R, C/32*34] of int8 codes and float16 scales (`kernels.int8`)."""
    head = scale_RG.to(torch.float16).unsqueeze(-1).contiguous().view(torch.uint8)
    return torch.cat((head, codes_RC.unflatten(-1, (-1, BLOCK)).view(torch.uint8)), dim=-1).flatten(-2)


def mxfp4(blocks_RGB: Tensor, scales_RG: Tensor) -> Tensor:
    """Return ggml's MXFP4 bytes [..., R, G*17] of OpenAI's blocks [..., R, G, 16] and scale bytes [..., R, G]."""
    codes = torch.stack((blocks_RGB & 15, blocks_RGB >> 4), dim=-1).flatten(-3)
    return _with_head(scales_RG.unsqueeze(-1), pair_nibbles(codes))


def read_q4_0(data: Tensor) -> tuple[Tensor, Tensor]:
    """Return (int8 codes [..., R, C], float16 scales [..., R, C/32]) of Q4_0 bytes: the inverse of `q4_0`."""
    blocks = data.unflatten(-1, (-1, Q4_0_BYTES))
    scale = blocks[..., :2].contiguous().view(torch.float16).squeeze(-1)
    return split_nibbles(blocks[..., 2:].flatten(-2)).to(torch.int8) - 8, scale


def read_mxfp4(data: Tensor) -> tuple[Tensor, Tensor]:
    """Return OpenAI's (blocks [..., R, G, 16], scale bytes [..., R, G]) of ggml's MXFP4 bytes."""
    blocks = data.unflatten(-1, (-1, MXFP4_BYTES))
    codes = split_nibbles(blocks[..., 1:].flatten(-2)).unflatten(-1, (-1, BLOCK))
    return codes[..., 0::2] | (codes[..., 1::2] << 4), blocks[..., 0].contiguous()
