"""Codes of 2 and 3 bits in planes against a plain Python twin of the specification, and what is refused."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gptoss_quantize.kernels import grids, int4, planes

PROPERTY = settings(deadline=None, max_examples=40, derandomize=True)
small = st.sampled_from((2, 3))


@st.composite
def codes_of(draw) -> tuple[torch.Tensor, int]:
    """Codes [..., R, C] and their bits."""
    bits, half = (n := draw(small)), 1 << (n - 1)
    lead = tuple(draw(st.lists(st.integers(1, 3), max_size=2)))
    shape = (*lead, draw(st.integers(1, 4)), 32 * draw(st.integers(1, 4)))
    return torch.from_numpy(draw(hnp.arrays(np.int8, shape, elements=st.integers(-half, half - 1)))), bits


def words_in_python(row: list[int], bits: int) -> list[int]:
    """The specification, bit by bit: where column c's bits lie among the planes of W words."""
    W = len(row) // 32
    words = [0] * (bits * W)
    for column, code in enumerate(row):
        value, word, inside = code + (1 << (bits - 1)), column // 32, column % 32
        quad, place = inside // 4, inside % 4
        words[(place // 2) * W + word] |= (value & 3) << (4 * quad + 2 * (place % 2))
        if bits == 3:
            words[2 * W + word] |= (value >> 2) << inside
    return [word - (1 << 32) if word >= 1 << 31 else word for word in words]


@PROPERTY
@given(codes_of())
def test_pack_is_its_definition_and_unpack_its_inverse(case):
    codes, bits = case
    packed = planes.pack(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (*codes.shape[:-1], codes.shape[-1] * bits // 32)
    rows = [words_in_python(row, bits) for row in codes.flatten(0, -2).tolist()]
    assert packed.flatten(0, -2).tolist() == rows
    unpacked = planes.unpack(packed, bits)
    assert unpacked.dtype == torch.int8 and torch.equal(unpacked, codes)
    # exactly as many bits in memory as a code has
    assert 8 * packed.nbytes == bits * codes.numel()
    assert planes.bits_of(packed.shape[-1], codes.shape[-1]) == bits


@PROPERTY
@given(small, st.integers(1, 3), st.integers(0, 2**31))
def test_every_word_round_trips(bits, words, seed):
    shape, generator = (3, bits * words), torch.Generator().manual_seed(seed)
    packed = torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, generator=generator)
    assert torch.equal(planes.pack(planes.unpack(packed, bits), bits), packed)


def test_four_bits_are_those_of_int4():
    codes = torch.randint(-8, 8, (5, 64), dtype=torch.int8)
    assert torch.equal(planes.pack(codes, 4), int4.pack(codes))
    assert torch.equal(planes.unpack(int4.pack(codes), 4), codes)


def test_views_are_packed_by_their_values():
    codes = torch.randint(-4, 4, (64, 96), dtype=torch.int8)
    assert torch.equal(planes.pack(codes.T, 3), planes.pack(codes.T.contiguous(), 3))
    packed = planes.pack(codes, 3)
    halves = torch.cat((packed, packed), 1)[:, : packed.shape[1]]
    assert torch.equal(planes.unpack(halves, 3), codes)


@pytest.mark.parametrize("bits", [2, 3])
def test_weights_are_codes_times_scales(bits):
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (6, 128), dtype=torch.int8)
    scale = int4.round_scale(torch.randn(6, 2)).bfloat16()
    want = codes.double() * scale.double().repeat_interleave(64, 1)
    assert torch.equal(planes.weights(planes.pack(codes, bits), scale, bits, torch.float32).double(), want)


@pytest.mark.parametrize("bits", [2, 3])
def test_refused(bits):
    half = 1 << (bits - 1)
    with pytest.raises(ValueError, match="40 columns are not a multiple of 32"):
        planes.pack(torch.zeros(2, 40, dtype=torch.int8), bits)
    for bad in (-half - 1, half):
        codes = torch.zeros(2, 32, dtype=torch.int8)
        codes[1, 3] = bad
        with pytest.raises(ValueError, match="outside"):
            planes.pack(codes, bits)
    for words in (1, 5, 13):
        with pytest.raises(ValueError, match="not codes of 2, 3 or 4 bits"):
            planes.bits_of(words, 64)


@pytest.mark.parametrize(("grid", "bits"), [(grids.INT3, 3), (grids.INT2, 2)])
def test_grids_are_all_codes_of_so_many_bits(grid, bits):
    assert (grid.low, grid.high) == (-(1 << (bits - 1)), (1 << (bits - 1)) - 1)
