"""Codes of 2 and 3 bits in planes, exactly as many bits in memory as a code has; and of 4, by `kernels.int4`.

A row of C columns (a multiple of 32) is `bits` planes of C/32 little-endian int32 words, one plane after the other.
Word w of every plane belongs to columns 32w..32w+31, and its nibble q to the four columns 4q..4q+3 of these. With
u = code + 2^(bits-1), which has no sign:

    plane 0   the two low bits of u of the first column, then of the second:   u0 & 3 | (u1 & 3) << 2
    plane 1   the same of the third and the fourth column:                     u2 & 3 | (u3 & 3) << 2
    plane 2   (3 bits only) the third bits of all four, bit k of column k:     u0>>2 | u1>>2<<1 | u2>>2<<2 | u3>>2<<3

So masks and shifts of whole words turn three words into four whose nibbles are 3-bit codes, columns 4q, 4q+1, 4q+2
and 4q+3, and a nibble is what the int4 kernels multiply. That costs half an operation a code; a bit plane for each
bit would cost twice that, codes that straddle words more.

Shapes: R rows, C columns, W = bits * C / 32 words, G groups; leading dimensions are free.
"""

import torch

from gptoss_quantize.kernels import int4

BITS = (2, 3, 4)
COLUMNS_PER_WORD = 32


def words(columns: int, bits: int) -> int:
    """Return the int32 words of a row."""
    return columns * bits // COLUMNS_PER_WORD


def bits_of(words_of_row: int, columns: int) -> int:
    """Return the bits of a code in rows of so many words and columns; ValueError where there is no such number."""
    bits = words_of_row * COLUMNS_PER_WORD // columns if columns > 0 else 0
    if bits not in BITS or bits * columns != words_of_row * COLUMNS_PER_WORD:
        raise ValueError(f"{words_of_row} words for {columns} columns are not codes of 2, 3 or 4 bits")
    return bits


def pack(codes_RC: torch.Tensor, bits: int) -> torch.Tensor:
    """Return int32 words [..., R, W] for codes [..., R, C] in -2^(bits-1)..2^(bits-1)-1.

    Raises ValueError when C is not a multiple of 32 (of 8 for 4 bits) or a code is out of range.
    """
    if bits == 4:
        return int4.pack(codes_RC)
    columns, half = codes_RC.shape[-1], 1 << (bits - 1)
    if columns % COLUMNS_PER_WORD:
        raise ValueError(f"pack: {columns} columns are not a multiple of {COLUMNS_PER_WORD}")
    if codes_RC.numel() and (int(codes_RC.min()) < -half or int(codes_RC.max()) >= half):
        raise ValueError(f"pack: codes {int(codes_RC.min())}..{int(codes_RC.max())} outside {-half}..{half - 1}")
    u0, u1, u2, u3 = ((codes_RC.to(torch.int16) + half).to(torch.uint8)[..., k::4] for k in range(4))
    planes = [u0 & 3 | (u1 & 3) << 2, u2 & 3 | (u3 & 3) << 2]
    if bits == 3:
        planes.append(u0 >> 2 | u1 >> 2 << 1 | u2 >> 2 << 2 | u3 >> 2 << 3)
    return torch.cat([(n[..., 0::2] | n[..., 1::2] << 4) for n in planes], dim=-1).contiguous().view(torch.int32)


def unpack(packed_RW: torch.Tensor, bits: int) -> torch.Tensor:
    """Return int8 codes [..., R, C] for int32 words [..., R, W]: the inverse of `pack`."""
    if bits == 4:
        return int4.unpack(packed_RW)
    pairs = packed_RW.contiguous().view(torch.uint8).unflatten(-1, (bits, -1))
    low, middle, *high = torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(-2).unbind(-2)
    codes = torch.stack((low & 3, low >> 2, middle & 3, middle >> 2), dim=-1)
    for nibble in high:
        codes |= torch.stack([nibble >> k & 1 for k in range(4)], dim=-1) << 2
    return codes.flatten(-2).to(torch.int8) - (1 << (bits - 1))


def weights(packed_RW: torch.Tensor, scale_RG: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the weights [R, C] of a packed matrix, codes * scale, rounded once."""
    if bits == 4:
        return int4.weights(packed_RW, scale_RG, dtype)
    return int4.dequantize(unpack(packed_RW, bits), scale_RG, dtype)
