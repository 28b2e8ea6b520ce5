"""Symmetric int8 with one float16 scale for 32 neighbours along the input dimension: the numbers of GGUF's Q8_0.

A weight is ``code * scale`` with a code in -127..127. The scale is max|w| / 127 rounded to float16 first, then codes
are chosen with the rounded scale; the same codes and scales, block by block, are a Q8_0 tensor.

Shapes: R rows, C columns, G = C / 32 groups of a row; leading dimensions are free.
"""

import torch

GROUP_SIZE = 32
CODE_MAX = 127
_ROWS = 4096
# of float16: the smallest number above zero, and the largest
SCALE_MIN, SCALE_MAX = 2.0**-24, 65504.0


def quantize(weight_RC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (int8 codes [..., R, C], float16 scales [..., R, G]); a group of zeros gets the smallest scale."""
    rows_RGg = weight_RC.unflatten(-1, (-1, GROUP_SIZE)).flatten(0, -3)
    codes = torch.empty(rows_RGg.shape, dtype=torch.int8, device=weight_RC.device)
    scale = torch.empty(rows_RGg.shape[:-1], dtype=torch.float16, device=weight_RC.device)
    # in pieces: a vocabulary in float32 would be twice the size of what is quantized
    for part, code, stored in zip(rows_RGg.split(_ROWS), codes.split(_ROWS), scale.split(_ROWS), strict=True):
        values = part.float()
        stored.copy_((values.abs().amax(-1) / CODE_MAX).clamp_(SCALE_MIN, SCALE_MAX))
        code.copy_((values / stored.float()[..., None]).round_().clamp_(-CODE_MAX, CODE_MAX))
    return codes.reshape(weight_RC.shape), scale.reshape(*weight_RC.shape[:-1], -1)


def dequantize(codes_RC: torch.Tensor, scale_RG: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the weights [..., R, C]. Exact in float32; rounded once for a narrower dtype."""
    grouped = codes_RC.unflatten(-1, (-1, GROUP_SIZE)).float()
    return grouped.mul_(scale_RG.float()[..., None]).flatten(-2).to(dtype)
