"""ggml's blocks: against the gguf library's own dequantizer, for random codes, scales, shapes and groups."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Ggml
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_quantize.kernels import ggml, int4, int8, mxfp4

PROPERTY = settings(max_examples=40, deadline=None)


@st.composite
def int4_matrix(draw):
    """Codes int8 [R, C] and float32 scales [R, G], as `round_scale` leaves them, for groups of 32 or 64."""
    group = draw(st.sampled_from((32, 64)))
    rows, groups = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    codes = torch.randint(-8, 8, (rows, groups * group), generator=generator).to(torch.int8)
    # every exponent that is allowed, and beyond
    exponent = torch.randint(-20, 18, (rows, groups), generator=generator)
    scale = int4.round_scale(torch.randn(rows, groups, generator=generator) * 2.0**exponent)
    return codes, scale


@st.composite
def mxfp4_matrix(draw):
    """OpenAI's blocks [R, G, 16] and scale bytes [R, G] whose products float32 can hold."""
    rows, groups = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    blocks = torch.randint(256, (rows, groups, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(253, (rows, groups), generator=generator, dtype=torch.uint8)
    return blocks, scales


def library(data: torch.Tensor, kind: Ggml) -> torch.Tensor:
    """What the gguf package decodes the bytes to."""
    return torch.from_numpy(gguf.quants.dequantize(data.numpy(), kind).copy())


@PROPERTY
@given(int4_matrix())
def test_q4_0_is_read_by_gguf_as_code_times_scale_and_by_us_as_it_was(matrix):
    codes, scale = matrix
    data = ggml.q4_0(codes, scale.bfloat16())
    assert data.shape == (codes.shape[0], codes.shape[1] // 32 * 18) and data.dtype == torch.uint8
    assert torch.equal(library(data, Ggml.Q4_0), int4.dequantize(codes, scale))
    back, half = ggml.read_q4_0(data)
    assert torch.equal(back, codes)
    repeat = codes.shape[1] // 32 // scale.shape[1]
    assert torch.equal(half.float(), scale.repeat_interleave(repeat, dim=1))


@PROPERTY
@given(mxfp4_matrix())
def test_mxfp4_is_read_by_gguf_as_openais_blocks_and_by_us_as_it_was(matrix):
    blocks, scales = matrix
    data = ggml.mxfp4(blocks, scales)
    assert torch.equal(library(data, Ggml.MXFP4), mxfp4.decode(blocks, scales))
    back = ggml.read_mxfp4(data)
    assert torch.equal(back[0], blocks) and torch.equal(back[1], scales)


def test_q8_0_is_the_int8_of_dense_matrices():
    weight = torch.randn(6, 96)
    codes, scale = int8.quantize(weight)
    data = ggml.q8_0(codes, scale)
    assert data.shape == (6, 3 * 34)
    assert torch.equal(library(data, Ggml.Q8_0), int8.dequantize(codes, scale))


def test_q4_0_bytes_written_out_by_hand():
    codes = (torch.arange(32) % 16 - 8).to(torch.int8)[None]
    data = ggml.q4_0(codes, torch.tensor([[1.0]]))
    # 1.0 is 0x3c00; element j and j + 16 have the same code here
    assert data[0].tolist() == [0x00, 0x3C, *(j | j << 4 for j in range(16))]


def test_leading_dimensions_are_free():
    codes = torch.randint(-8, 8, (2, 3, 64)).to(torch.int8)
    scale = int4.round_scale(torch.rand(2, 3, 1))
    assert torch.equal(ggml.q4_0(codes, scale)[1], ggml.q4_0(codes[1], scale[1]))


@pytest.mark.parametrize("scale", [2.0**-25, 1e6, 1 + 2.0**-11])
def test_a_scale_that_float16_cannot_hold_is_refused_and_counted(scale):
    scales = torch.tensor([[1.0], [scale], [-scale]])
    assert ggml.float16_scale(scales)[1] == 2
    with pytest.raises(ValueError, match="2 of 3 scales are not exact in float16"):
        ggml.q4_0(torch.zeros(3, 64, dtype=torch.int8), scales)


@pytest.mark.parametrize(("columns", "groups"), [(48, 1), (64, 4), (96, 2)])
def test_groups_that_do_not_fill_blocks_are_refused(columns, groups):
    with pytest.raises(ValueError, match="blocks of 32"):
        ggml.q4_0(torch.zeros(2, columns, dtype=torch.int8), torch.ones(2, groups))


def test_every_scale_we_choose_is_exact_in_float16():
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    stored = int4.round_scale(every[every.isfinite()])
    assert ggml.float16_scale(stored.bfloat16())[1] == 0
    assert np.isfinite(stored.half().numpy()).all()
