"""The int4 packings of AutoGPTQ and AutoAWQ: the same codes and scales in other people's words.

Both store the transpose of ours, [in, out], with a zero point beside every scale; ours is symmetric, so every zero
point is 8. Words are int32, eight nibbles each, lowest first.

    AutoGPTQ   qweight [C/8, R]  rows 8w..8w+7 of a column in word w
               qzeros  [G, R/8]  v1 ("gptq") stores the zero point less one: 0x77777777;  v2 ("gptq_v2") as it is
               scales  [G, R]    g_idx [C], the group of each input
    AutoAWQ    qweight [C, R/8]  eight outputs in a word, in the order 0 2 4 6 1 3 5 7
    GEMM       qzeros  [G, R/8]  the same order, as it is: 0x88888888;   scales [G, R]

Sources: auto_gptq qlinear_cuda_old.py, autoawq gemm.py and packing_utils.py (0.7.1, 0.2.9); tests/goldens has words
that both packages packed. R rows (outputs), C columns (inputs), G groups of the inputs.
"""

import torch
from torch import Tensor

from gptoss_quantize.kernels import int4

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
ZERO = 8


def gptq_qweight(packed_RW: Tensor) -> Tensor:
    """Return AutoGPTQ's qweight [C/8, R] of our words [R, C/8]: the transpose, no code is touched."""
    return _transposed(packed_RW)


def gptq_qzeros(groups: int, rows: int, *, version: int) -> Tensor:
    """Return AutoGPTQ's qzeros [G, R/8] for zero point 8, in layout version 1 or 2."""
    if version not in (1, 2):
        raise ValueError(f"AutoGPTQ's layout has versions 1 and 2, not {version}")
    return _filled(groups, rows, ZERO - 1 if version == 1 else ZERO)


def group_index(columns: int, group_size: int) -> Tensor:
    """Return g_idx [C]: the group of every input, in order."""
    return torch.arange(columns, dtype=torch.int32) // group_size


def awq_qweight(codes_RC: Tensor) -> Tensor:
    """Return AutoAWQ's qweight [C, R/8] of int8 codes [R, C] in -8..7."""
    if codes_RC.shape[0] % 8:
        raise ValueError(f"AutoAWQ packs eight outputs a word; {codes_RC.shape[0]} rows are no multiple of 8")
    return int4.pack(codes_RC.T.unflatten(-1, (-1, 8))[..., AWQ_ORDER].flatten(-2).contiguous())


def awq_qzeros(groups: int, rows: int) -> Tensor:
    """Return AutoAWQ's qzeros [G, R/8] for zero point 8."""
    return _filled(groups, rows, ZERO)


def _transposed(words: Tensor) -> Tensor:
    # contiguous() would keep the strides of a single transposed row, which no view as bytes accepts
    return words.T.flatten().view(words.shape[1], words.shape[0])


def _filled(groups: int, rows: int, nibble: int) -> Tensor:
    if rows % 8:
        raise ValueError(f"zero points of eight outputs share a word; {rows} rows are no multiple of 8")
    return int4.pack(torch.full((groups, rows), nibble - 8, dtype=torch.int8))


def read_gptq(qweight: Tensor, qzeros: Tensor, *, version: int) -> tuple[Tensor, Tensor]:
    """Return (codes [R, C] as 0..15, zero points [R, G]) of AutoGPTQ's words; both int16."""
    codes = int4.unpack(_transposed(qweight)).to(torch.int16) + 8
    zeros = int4.unpack(qzeros).to(torch.int16) + 8
    # version 1 lost the zero point 0: its 15 stands for 16
    return codes, (zeros + 1 if version == 1 else zeros).T


def read_awq(qweight: Tensor, qzeros: Tensor) -> tuple[Tensor, Tensor]:
    """Return (codes [R, C] as 0..15, zero points [R, G]) of AutoAWQ's words; both int16."""
    back = torch.tensor(AWQ_ORDER).argsort()

    def unpack(words: Tensor) -> Tensor:
        nibbles = int4.unpack(words).to(torch.int16) + 8
        return nibbles.unflatten(-1, (-1, 8))[..., back].flatten(-2).T

    return unpack(qweight), unpack(qzeros)
