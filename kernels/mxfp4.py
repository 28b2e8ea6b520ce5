"""MXFP4: 32 four-bit floats (E2M1) that share one power of two (E8M0), as OpenAI stores gpt-oss's experts.

The OCP Microscaling specification, in short. A weight is `element * scale`. An element has one sign bit, two
exponent bits and one mantissa bit: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives, with the sign as bit 3 of
the code. A scale is a byte e that means 2^(e - 127); 255 is NaN. Encoding takes the exponent of the largest
magnitude of the group, less the 2 that E2M1 reaches by itself, so that the largest element lands in [4, 8):
above 6 it saturates. Elements round to the nearest value, ties to the even mantissa, which is the even code.

The file layout is OpenAI's: two codes a byte, element 2j in the low nibble and 2j+1 in the high one, 16 bytes a
group; the scale bytes are a tensor of their own. (ggml pairs element j with j+16: not this layout.)

Every scale is a power of two, so dividing by it is exact and the decoded weight is exact in bfloat16.
"""

import torch
from torch import Tensor

GROUP_SIZE = 32
BYTES_PER_GROUP = GROUP_SIZE // 2
SCALE_BIAS = 127
SCALE_NAN = 255

# magnitudes of the codes 0..7; bit 3 is the sign
E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_VALUES = (*E2M1_MAGNITUDES, *(-value for value in E2M1_MAGNITUDES))
E2M1_MAX_EXPONENT = 2
E8M0_VALUES = (*(2.0 ** (code - SCALE_BIAS) for code in range(SCALE_NAN)), float("nan"))

# bounds the temporaries of decode, whose index is wider than the bytes it looks up
_DECODE_CHUNK_BYTES = 1 << 22


def scales_to_float(scales: Tensor) -> Tensor:
    """E8M0 bytes to the powers of two they mean, in float32 (255 is NaN)."""
    table = torch.tensor(E8M0_VALUES, dtype=torch.float32, device=scales.device)
    return table[scales.int()]


def shared_scales(weights: Tensor) -> Tensor:
    """The E8M0 byte of every group [..., R, G], by the specification's floor rule; a group of zeros gets 0."""
    maxima = _as_groups(weights).abs().amax(dim=-1)
    if not torch.isfinite(maxima).all():
        raise ValueError("MXFP4 weights must be finite, and these contain NaN or Inf")
    # frexp has the mantissa in [0.5, 1): its exponent is floor(log2(x)) + 1
    exponents = torch.frexp(maxima).exponent - 1
    codes = (exponents - E2M1_MAX_EXPONENT + SCALE_BIAS).clamp(0, SCALE_NAN - 1)
    return torch.where(maxima == 0, torch.zeros_like(codes), codes).to(torch.uint8)


def nearest_codes(elements: Tensor) -> Tensor:
    """The nearest E2M1 code (uint8, 0..15) of values already divided by their scale; saturates at 6."""
    magnitudes = elements.abs()
    if magnitudes.dtype not in (torch.float32, torch.float64):
        magnitudes = magnitudes.float()
    table = torch.tensor(E2M1_MAGNITUDES, dtype=magnitudes.dtype, device=magnitudes.device)
    midpoints = (table[1:] + table[:-1]) / 2
    # bucketize sends a tie down; where the lower code is odd the tie belongs to the upper, even one
    midpoints[1::2] = torch.nextafter(midpoints[1::2], torch.zeros_like(midpoints[1::2]))
    codes = torch.bucketize(magnitudes, midpoints, out_int32=True).to(torch.uint8)
    return codes | (torch.signbit(elements).to(torch.uint8) << 3)


def pack_codes(codes: Tensor) -> Tensor:
    """Codes [..., R, C] to bytes [..., R, G, 16]: element 2j low nibble, 2j+1 high."""
    groups = _as_groups(codes)
    return groups[..., 0::2] | (groups[..., 1::2] << 4)


def unpack_codes(blocks: Tensor) -> Tensor:
    """Bytes [..., R, G, 16] to codes [..., R, C]."""
    return torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-3)


def encode(weights: Tensor, scales: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Weights [..., R, C] to (blocks [..., R, G, 16], scales [..., R, G]); given scales are kept as they are."""
    groups = _as_groups(weights)
    if scales is None:
        scales = shared_scales(weights)
    elif scales.shape != groups.shape[:-1]:
        raise ValueError(f"{scales.shape=} does not match the groups {groups.shape[:-1]} of {weights.shape=}")
    # float32 at least: the smallest scales are below float16's range
    elements = groups / scales_to_float(scales)[..., None]
    if not torch.isfinite(elements).all():
        raise ValueError("MXFP4 weights and scales must be finite, and these contain NaN or Inf")
    return pack_codes(nearest_codes(elements).flatten(-2)), scales


def decode(blocks: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Blocks [..., R, G, 16] and scales [..., R, G] to weights [..., R, C]; exact in float32 and bfloat16."""
    if blocks.shape != (*scales.shape, BYTES_PER_GROUP):
        raise ValueError(f"{blocks.shape=} does not match {scales.shape=}: expected 16 bytes for every scale")
    bytes_flat, scales_flat = blocks.reshape(-1, BYTES_PER_GROUP), scales.reshape(-1)
    out = torch.empty(bytes_flat.shape[0], GROUP_SIZE, dtype=dtype, device=blocks.device)
    # one look-up gives both elements of a byte
    codes = unpack_codes(torch.arange(256, device=blocks.device).view(256, 1, 1))
    pairs = torch.tensor(E2M1_VALUES, dtype=torch.float32, device=blocks.device)[codes]  # [256, 2]
    step = _DECODE_CHUNK_BYTES // BYTES_PER_GROUP
    for start in range(0, bytes_flat.shape[0], step):
        part = slice(start, start + step)
        elements = pairs[bytes_flat[part].int()].flatten(-2)  # [groups, 32]
        out[part] = elements * scales_to_float(scales_flat[part])[:, None]
    return out.view(*scales.shape[:-1], scales.shape[-1] * GROUP_SIZE)


def _as_groups(weights: Tensor) -> Tensor:
    """[..., R, C] to [..., R, G, 32]."""
    if weights.shape[-1] % GROUP_SIZE:
        raise ValueError(f"{weights.shape=}: MXFP4 needs columns in multiples of {GROUP_SIZE}")
    return weights.unflatten(-1, (-1, GROUP_SIZE))
