"""Reading other tools' int4 files back into float32, and checking that they were read right.

Every format here stores a code q in 0..15 and a scale s per group of input columns; a weight is (q - zero) * s.
What differs is the packing axis, the zero-point convention, and above all which rows of gpt-oss's interleaved
gate_up tensor go by the name of gate_proj: the even ones, or the first half. A wrong guess loads without any
error, so each dequantized tensor is compared with the original. int4 noise gives a relative error near 0.1; two
unrelated matrices of equal norm give sqrt(2).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

NIBBLE_SHIFTS = torch.arange(0, 32, 4, dtype=torch.int32)
# blocks that matter little to the tokens seen may be rounded very badly: llama.cpp's IQ4_NL had 0.89 in one matrix
# of the demo model, its other elements right (correlation 0.996); a wrong split gives 1.4
MAX_RELATIVE_ERROR = 1.1
# the experts of a layer together
MAX_MEAN_RELATIVE_ERROR = 0.35
# below this nothing was quantized at all
MIN_RELATIVE_ERROR = 0.01


@dataclass(frozen=True)
class ExpertLinear:
    """One expert matrix as float32 [out, in], its bias, and the bits its file spends on the matrix."""

    weight: torch.Tensor
    bias: torch.Tensor
    stored_bits: int
    payload_bits: int


def bits_of(*tensors: torch.Tensor) -> int:
    """Stored size in bits."""
    return sum(tensor.numel() * tensor.element_size() * 8 for tensor in tensors)


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """int32 [..., n] -> codes 0..15 [..., 8n], low nibble first."""
    return ((packed.unsqueeze(-1) >> NIBBLE_SHIFTS) & 15).flatten(-2)


def dequantize_gptq(
    qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, g_idx: torch.Tensor
) -> torch.Tensor:
    """AutoGPTQ layout, version 1 (it stores zero point - 1): [in/8, out] words -> float32 [out, in]."""
    codes = unpack_nibbles(qweight.T.contiguous())
    zeros = unpack_nibbles(qzeros) + 1
    columns = g_idx.long()
    return (codes - zeros.T[:, columns]).float() * scales.float().T[:, columns]


def dequantize_compressed_tensors(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """pack-quantized, symmetric: [out, in/8] words and [out, groups] scales -> float32 [out, in]."""
    codes = unpack_nibbles(packed) - 8
    group_size = codes.shape[1] // scale.shape[1]
    return codes.float() * scale.float().repeat_interleave(group_size, 1)


def fuse_gate_up(gate: torch.Tensor, up: torch.Tensor, halves: bool) -> torch.Tensor:
    """The interleaved rows (of weights or biases) from a tool's gate and up, for either meaning of the names."""
    if halves:
        return torch.cat([gate, up])
    return torch.stack([gate, up], 1).flatten(0, 1)


@dataclass(frozen=True)
class LayerCheck:
    """Relative errors of one layer's expert matrices against the original."""

    mean: float
    max: float


def check_layer(
    layer: int,
    tensors: dict[str, torch.Tensor],
    prefix: str,
    original: Callable[[str], torch.Tensor],
    rescaled: bool,
) -> LayerCheck:
    """Compare every expert matrix with its original; SystemExit names the first that cannot be right."""
    errors = []
    for projection in ("gate_up_proj", "down_proj"):
        written, source = tensors[prefix + projection], original(prefix + projection).float()
        if written.shape != source.shape:
            raise SystemExit(f"{prefix}{projection} is {tuple(written.shape)}, expected {tuple(source.shape)}")
        for expert in range(source.shape[0]):
            error = relative_error(written[expert], source[expert], rescaled)
            if not MIN_RELATIVE_ERROR < error < MAX_RELATIVE_ERROR:
                raise SystemExit(
                    f"layer {layer} expert {expert} {projection}: relative error {error:.4f} against the "
                    f"original, expected {MIN_RELATIVE_ERROR} to {MAX_RELATIVE_ERROR}; about 1.4 means gate and "
                    "up were read in the wrong order, about 0 that nothing was quantized"
                )
            errors.append(error)
    mean = sum(errors) / len(errors)
    if mean > MAX_MEAN_RELATIVE_ERROR:
        raise SystemExit(f"layer {layer}: mean relative error {mean:.4f}, expected < {MAX_MEAN_RELATIVE_ERROR}")
    if not rescaled:
        _check_biases(tensors, prefix, original)
    return LayerCheck(mean, max(errors))


def relative_error(written: torch.Tensor, source: torch.Tensor, rescaled: bool) -> float:
    """|written - source| / |source|; after AWQ the source is first scaled per row and column to fit best."""
    if rescaled:
        # alternating least squares for the diagonal factors AWQ put between tensors; two rounds are plenty
        for _ in range(2):
            for axis in (0, 1):
                # a channel that was rounded to zero fits with zero, and stays zero
                power = source.square().sum(axis, keepdim=True).clamp(min=1e-30)
                fit = (written * source).sum(axis, keepdim=True) / power
                source = source * fit
    return float((written - source).norm() / source.norm())


def _check_biases(tensors: dict[str, torch.Tensor], prefix: str, original: Callable[[str], torch.Tensor]) -> None:
    for name in ("gate_up_proj_bias", "down_proj_bias"):
        # some tools keep biases in float16, which cannot hold the smallest bfloat16 values
        source = original(prefix + name).float()
        if not torch.allclose(tensors[prefix + name], source, rtol=1e-3, atol=1e-6):
            raise SystemExit(f"{prefix}{name} differs from the original, although biases are not quantized")
