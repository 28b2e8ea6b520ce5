"""MXFP4 bit for bit: against the specification written out again, and against Transformers' own dequantizer."""

import math

import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from gptoss_quantize.kernels import mxfp4

ALL_BYTES = torch.arange(256, dtype=torch.uint8)


def specified_value(code: int) -> float:
    """E2M1 from its bits: sign, two exponent bits with bias 1, one mantissa bit; exponent 0 is subnormal."""
    sign, exponent, mantissa = code >> 3, (code >> 1) & 3, code & 1
    magnitude = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return math.copysign(magnitude, -1.0 if sign else 1.0)


def every_byte_and_scale() -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks [256 scales, 16 groups, 16] that hold every byte once in every row, and scales [256, 16]."""
    return ALL_BYTES.view(1, 16, 16).repeat(256, 1, 1), ALL_BYTES[:, None].repeat(1, 16)


def same_bits(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equality that tells -0 from 0."""
    kind = {torch.float32: torch.int32, torch.bfloat16: torch.int16}[actual.dtype]
    return actual.dtype == expected.dtype and torch.equal(actual.view(kind), expected.view(kind))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_every_code_in_both_nibbles_under_every_scale(dtype: torch.dtype) -> None:
    blocks, scales = every_byte_and_scale()
    decoded = mxfp4.decode(blocks, scales, dtype)
    codes = [code for byte in range(256) for code in (byte & 15, byte >> 4)]
    elements = torch.tensor([specified_value(code) for code in codes], dtype=torch.float64)
    powers = torch.tensor([2.0 ** (e - 127) for e in range(255)], dtype=torch.float64)
    expected = (powers[:, None] * elements).to(dtype)
    assert decoded.shape == (256, 512)
    assert same_bits(decoded[:255], expected)
    assert decoded[255].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_equals_transformers(dtype: torch.dtype) -> None:
    blocks, scales = every_byte_and_scale()
    # 255 is NaN by the specification; transformers reads it as 2^128
    theirs = convert_moe_packed_tensors(blocks[None, :255], scales[None, :255], dtype=dtype)
    ours = mxfp4.decode(blocks[:255], scales[:255], dtype)
    assert same_bits(ours, theirs[0].T.contiguous())


def test_decode_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks, scales = every_byte_and_scale()
    whole = mxfp4.decode(blocks[:255], scales[:255])
    monkeypatch.setattr(mxfp4, "_DECODE_CHUNK_BYTES", 1008)
    assert same_bits(mxfp4.decode(blocks[:255], scales[:255]), whole)


def test_encode_inverts_decode() -> None:
    blocks, scales = every_byte_and_scale()
    finite = slice(0, 253)  # above, 6 * 2^(e - 127) overflows float32
    weights = mxfp4.decode(blocks[finite], scales[finite])
    again, kept = mxfp4.encode(weights, scales[finite])
    assert torch.equal(again, blocks[finite])
    assert kept is not None
    assert torch.equal(kept, scales[finite])
    # and the scales are found again wherever a group reaches its top binade, as every one here does
    assert torch.equal(mxfp4.shared_scales(weights), scales[finite])


def test_nearest_codes_against_search() -> None:
    """Every multiple of 1/64 up to 8, the midpoints among them, and the neighbours of each."""
    values = torch.arange(-512, 513, dtype=torch.float32) / 64
    inf = torch.full_like(values, torch.inf)
    values = torch.cat((values, torch.nextafter(values, inf), torch.nextafter(values, -inf)))
    for value, code in zip(values.tolist(), mxfp4.nearest_codes(values).tolist(), strict=True):
        distance = {c: abs(abs(value) - specified_value(c)) for c in range(8)}
        nearest = [c for c in range(8) if distance[c] == min(distance.values())]
        expected = nearest[0] if len(nearest) == 1 else next(c for c in nearest if c % 2 == 0)
        assert code & 7 == expected, (value, code)
        assert bool(code >> 3) == (math.copysign(1.0, value) < 0), (value, code)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_nearest_codes_in_other_dtypes(dtype: torch.dtype) -> None:
    values = torch.arange(-512, 513, dtype=torch.float32) / 64  # exact in all of them
    exact = values[values == values.to(dtype).float()]
    assert torch.equal(mxfp4.nearest_codes(exact.to(dtype)), mxfp4.nearest_codes(exact))


@pytest.mark.parametrize(
    ("largest", "scale", "decoded"),
    [
        (1.0, 125, 1.0),  # 4 * 2^-2
        (1.5, 125, 1.5),
        (1.99, 125, 1.5),  # 7.96 saturates at 6
        (2.0, 126, 2.0),
        (2.0**-149, 0, 0.0),  # below the smallest element 2^-128
        (2.0**-128, 0, 2.0**-128),
        (3.0 * 2.0**126, 252, 3.0 * 2.0**126),
        (0.0, 0, 0.0),
    ],
)
def test_shared_scale_follows_the_floor_rule(largest: float, scale: int, decoded: float) -> None:
    weights = torch.zeros(1, 32)
    weights[0, 5] = -largest
    blocks, scales = mxfp4.encode(weights)
    assert scales.tolist() == [[scale]]
    assert mxfp4.decode(blocks, scales)[0, 5].item() == -decoded


def test_encode_keeps_leading_dimensions_and_groups_apart() -> None:
    weights = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    weights[..., 32:] *= 1024
    blocks, scales = mxfp4.encode(weights)
    assert (blocks.shape, scales.shape) == ((2, 3, 2, 16), (2, 3, 2))
    assert (scales[..., 1].int() - scales[..., 0].int() > 5).all()
    decoded = mxfp4.decode(blocks, scales)
    # half a step of the top binade is 1 of 4..6, 1/4 of the group's largest power of two; saturation adds up to 1/4
    step = mxfp4.scales_to_float(scales).repeat_interleave(32, dim=-1)
    assert ((decoded - weights.float()).abs() <= 2 * step).all()
    first = mxfp4.encode(weights[1, 2:3, :32])[0]
    assert torch.equal(blocks[1, 2, :1], first[0])


def test_pack_and_unpack_are_inverse() -> None:
    codes = torch.randint(0, 16, (3, 5, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    blocks = mxfp4.pack_codes(codes)
    assert blocks.shape == (3, 5, 3, 16)
    assert torch.equal(blocks[0, 0, 0, :2] & 15, codes[0, 0, [0, 2]])
    assert torch.equal(mxfp4.unpack_codes(blocks), codes)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="multiples of 32"):
        mxfp4.encode(torch.zeros(2, 48))
    for bad in (torch.nan, torch.inf):
        weights = torch.zeros(2, 32)
        weights[1, 3] = bad
        with pytest.raises(ValueError, match="finite"):
            mxfp4.encode(weights)
        with pytest.raises(ValueError, match="finite"):
            mxfp4.encode(weights, torch.full((2, 1), 127, dtype=torch.uint8))
    with pytest.raises(ValueError, match="finite"):
        mxfp4.encode(torch.ones(2, 32), torch.full((2, 1), 255, dtype=torch.uint8))
    with pytest.raises(ValueError, match="does not match"):
        mxfp4.encode(torch.zeros(2, 32), torch.zeros(2, 2, dtype=torch.uint8))
    with pytest.raises(ValueError, match="does not match"):
        mxfp4.decode(torch.zeros(2, 1, 16, dtype=torch.uint8), torch.zeros(2, 2, dtype=torch.uint8))
