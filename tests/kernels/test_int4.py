"""int4 codes, scales and packing against plain Python and float64 twins, compressed-tensors, AutoGPTQ and AutoAWQ."""

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized import (
    PackedQuantizationCompressor,
    pack_to_int32,
    unpack_from_int32,
)
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gptoss_quantize.kernels import int4

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
PROPERTY = settings(deadline=None, max_examples=40, derandomize=True)

leading = st.lists(st.integers(1, 3), max_size=2).map(tuple)


@st.composite
def codes_of(draw, multiple: int = 8) -> torch.Tensor:
    """Codes [..., R, C] of any leading dimensions, C a multiple of `multiple`."""
    shape = (*draw(leading), draw(st.integers(1, 4)), multiple * draw(st.integers(1, 4)))
    return torch.from_numpy(draw(hnp.arrays(np.int8, shape, elements=st.integers(-8, 7))))


@st.composite
def codes_and_scales(draw) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [..., R, C] and storable scales [..., R, G] of both signs, with 8, 16 or 32 columns a group."""
    group = draw(st.sampled_from((8, 16, 32)))
    codes = draw(codes_of(group))
    shape = (*codes.shape[:-1], codes.shape[-1] // group)
    raw = draw(hnp.arrays(np.float32, shape, elements=st.floats(-64, 64, width=32)))
    return codes, int4.round_scale(torch.from_numpy(raw))


def words_in_python(codes: torch.Tensor) -> list[int]:
    """The specification: word c of a row is the sum of (code 8c+j + 8) << 4j, as a signed 32-bit number."""
    words = []
    for row in codes.reshape(-1, codes.shape[-1]).tolist():
        for start in range(0, len(row), 8):
            word = sum((code + 8) << (4 * j) for j, code in enumerate(row[start : start + 8]))
            words.append(word - (1 << 32) if word >= 1 << 31 else word)
    return words


def expand(scale: torch.Tensor, columns: int) -> np.ndarray:
    """Scales [..., R, G] repeated over their columns, float64."""
    return np.repeat(scale.double().numpy(), columns // scale.shape[-1], axis=-1)


# --- packing


def test_a_word_by_hand():
    assert int4.pack(torch.arange(-8, 0)[None]).item() == 0x76543210
    assert int4.pack(torch.tensor([[-8] * 7 + [0]])).item() == -(1 << 31)


@PROPERTY
@given(codes_of())
def test_pack_is_its_definition_and_unpack_its_inverse(codes):
    packed = int4.pack(codes)
    assert packed.dtype == torch.int32 and packed.shape == (*codes.shape[:-1], codes.shape[-1] // 8)
    assert packed.flatten().tolist() == words_in_python(codes)
    unpacked = int4.unpack(packed)
    assert unpacked.dtype == torch.int8 and torch.equal(unpacked, codes)


def test_every_code_in_every_nibble_round_trips():
    codes = (torch.arange(16)[:, None] + torch.arange(8)) % 16 - 8
    for dtype in (torch.int8, torch.int16, torch.int32, torch.int64, torch.float32):
        packed = int4.pack(codes.to(dtype))
        assert packed.flatten().tolist() == words_in_python(codes)
        assert torch.equal(int4.unpack(packed), codes.to(torch.int8))


@PROPERTY
@given(hnp.arrays(np.int32, st.tuples(st.integers(1, 4), st.integers(1, 4))))
def test_every_word_round_trips(words):
    packed = torch.from_numpy(words)
    assert torch.equal(int4.pack(int4.unpack(packed)), packed)


def test_views_are_packed_by_their_values_and_not_changed():
    codes = torch.randint(-8, 8, (16, 24), dtype=torch.int8)
    before = codes.clone()
    assert torch.equal(int4.pack(codes.T), int4.pack(codes.T.contiguous()))
    packed = int4.pack(codes)
    assert torch.equal(int4.unpack(packed.T), int4.unpack(packed.T.contiguous()))
    assert torch.equal(codes, before)


def test_an_empty_matrix_packs_to_an_empty_matrix():
    assert int4.pack(torch.empty(3, 0, 16, dtype=torch.int8)).shape == (3, 0, 2)


def test_pack_refuses_what_it_cannot_hold():
    with pytest.raises(ValueError, match="12 columns are not a multiple of 8"):
        int4.pack(torch.zeros(2, 12, dtype=torch.int8))
    for bad in (-9, 8, 127):
        codes = torch.zeros(2, 8, dtype=torch.int8)
        codes[1, 3] = bad
        with pytest.raises(ValueError, match=f"{min(bad, 0)}..{max(bad, 0)} outside"):
            int4.pack(codes)


# --- other people's packers


@PROPERTY
@given(codes_of())
def test_packing_is_that_of_compressed_tensors_bit_for_bit(codes):
    theirs = pack_to_int32(codes, 4)
    assert torch.equal(int4.pack(codes), theirs)
    assert torch.equal(int4.unpack(theirs), unpack_from_int32(theirs, 4, codes.shape))


@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_compressed_tensors_reads_our_weights_and_writes_our_words(group, dtype):
    torch.manual_seed(group)
    codes = torch.randint(-8, 8, (24, 128), dtype=torch.int8)
    scale = int4.round_scale(torch.randn(24, 128 // group) * 0.02).to(dtype)
    weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=group)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    stored = {"weight_packed": int4.pack(codes), "weight_scale": scale, "weight_shape": torch.tensor(codes.shape)}

    theirs = PackedQuantizationCompressor.decompress(stored, scheme)["weight"]
    assert theirs.dtype == dtype
    assert torch.equal(int4.dequantize(codes, scale, dtype), theirs)

    written = PackedQuantizationCompressor.compress({"weight": theirs, "weight_scale": scale}, scheme)
    assert torch.equal(written["weight_packed"], stored["weight_packed"])


def test_autogptq_packs_the_transpose_of_ours_and_decodes_the_same_floats(golden):
    assert torch.equal(int4.pack(golden["codes"]).T, golden["gptq"]["qweight"])
    # its zero point 8 is stored less one
    assert (golden["gptq"]["qzeros"] == 0x77777777).all()
    assert torch.equal(int4.dequantize(golden["codes"], golden["scales"], torch.float16).T, golden["gptq"]["decoded"])


def test_autoawq_packs_outputs_in_its_own_order_and_decodes_the_same_floats(golden):
    interleaved = golden["codes"].T.unflatten(-1, (-1, 8))[..., AWQ_ORDER].flatten(-2)
    assert torch.equal(int4.pack(interleaved), golden["awq"]["qweight"])
    assert (golden["awq"]["qzeros"] == int4.pack(torch.zeros(1, 8, dtype=torch.int8)).item()).all()
    assert torch.equal(int4.dequantize(golden["codes"], golden["scales"], torch.float16).T, golden["awq"]["decoded"])


# --- scales


def all_bfloat16() -> torch.Tensor:
    """Every bfloat16 value but NaN, as float32."""
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.bfloat16).float()
    return every[~every.isnan()]


def test_every_scale_is_stored_exactly_in_bfloat16_and_in_float16():
    given_scales = all_bfloat16()
    stored = int4.round_scale(given_scales)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(stored.to(dtype).float(), stored), dtype
    # among them infinity, subnormals and both zeros
    assert given_scales.isinf().sum() == 2 and (given_scales == 0).sum() == 2
    nonzero = given_scales != 0
    assert torch.equal(stored[nonzero].sign(), given_scales[nonzero].sign())
    assert (stored[~nonzero] == 2.0**-17).all()
    assert torch.equal(stored.abs(), given_scales.abs().clamp(2.0**-17, 65280))
    assert torch.equal(int4.round_scale(stored), stored)


@PROPERTY
@given(hnp.arrays(np.float32, 16, elements=st.floats(width=32, allow_nan=False, allow_infinity=False)))
def test_scales_round_to_the_nearest_of_eight_significant_bits(values):
    mantissa, exponent = np.frexp(values.astype(np.float64))
    nearest = np.ldexp(np.rint(mantissa * 256), exponent - 8)
    clamped = np.clip(np.abs(nearest), 2.0**-17, 65280)
    # frexp knows no subnormals; they are far below the smallest scale, where bfloat16 keeps the sign down to 2^-134
    tiny = np.abs(values) < 2.0**-126
    stored = int4.round_scale(torch.from_numpy(values)).double().numpy()
    assert np.array_equal(np.abs(stored), clamped)
    assert np.array_equal(np.signbit(stored[~tiny]), (values < 0)[~tiny])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_scales_keep_their_dtype_and_values(dtype):
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, 0.3, -0.3, 1e-7, -1e-7, 6e4, -6e4, 65504.0], dtype=dtype)
    before = values.clone()
    stored = int4.round_scale(values)
    assert stored.dtype == dtype and torch.equal(values, before)
    assert torch.equal(stored.float(), int4.round_scale(values.float()))


def test_a_scale_that_is_not_a_number_stays_one_that_is_not():
    assert int4.round_scale(torch.tensor([float("nan")])).isnan().all()


# --- codes


@PROPERTY
@given(codes_and_scales())
def test_dequantize_is_the_product_and_quantize_its_inverse(pair):
    codes, scale = pair
    exact = codes.double().numpy() * expand(scale, codes.shape[-1])
    weight = int4.dequantize(codes, scale)
    assert weight.dtype == torch.float32 and np.array_equal(weight.double().numpy(), exact)
    assert torch.equal(int4.dequantize(codes, scale.bfloat16()), weight)
    rounded_once = torch.from_numpy(exact).float().bfloat16()
    assert torch.equal(int4.dequantize(codes, scale, torch.bfloat16), rounded_once)
    assert torch.equal(int4.quantize(weight, scale), codes)


@PROPERTY
@given(codes_and_scales(), st.integers(0, 2**32 - 1))
def test_quantize_takes_the_nearest_code_in_every_dtype(pair, seed):
    codes, scale = pair
    spread = torch.from_numpy(expand(scale, codes.shape[-1])).abs()
    noise = torch.rand(codes.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        # up to three codes outside the range at both ends
        weight = ((noise * 22 - 11) * spread).to(dtype)
        exact = np.rint(weight.double().numpy() / expand(scale, codes.shape[-1])).clip(-8, 7)
        got = int4.quantize(weight, scale)
        assert got.dtype == torch.int8
        if dtype != torch.float32:
            assert np.array_equal(got.numpy(), exact)
        # a float32 quotient may be rounded onto a tie
        error, least = (
            np.abs(c * expand(scale, codes.shape[-1]) - weight.double().numpy()) for c in (got.numpy(), exact)
        )
        assert (error <= least + 8 * 2.0**-24 * spread.numpy()).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.5, -0.5, 3 * 2.0**-10, 2.0**-17])
def test_ties_go_to_even_and_the_ends_saturate(dtype, scale):
    quotient = torch.arange(-10, 10, dtype=torch.float64) + 0.5
    expected = [-8, -8, -8, -6, -6, -4, -4, -2, -2, 0, 0, 2, 2, 4, 4, 6, 6, 7, 7, 7]
    assert [max(-8, min(7, round(q))) for q in quotient.tolist()] == expected
    padded = torch.cat((quotient, torch.zeros(12)))[None]
    codes = int4.quantize((padded * scale).to(dtype), torch.tensor([[scale]], dtype=dtype))
    assert codes[0, :20].tolist() == expected
    assert codes[0, 20:].eq(0).all()


def test_a_bfloat16_weight_just_beside_a_tie_takes_the_nearer_code():
    # a quotient of 6.51 becomes 6.5 when it is rounded to bfloat16 first, and then 6 instead of 7
    scale = torch.tensor([[0.59765625]])
    weight = torch.arange(1, 256, dtype=torch.float64).mul(2.0**-6).bfloat16()
    weight = torch.cat((weight, -weight[:1]))[None]
    exact = torch.round(weight.double() / scale.double()).clamp(-8, 7).to(torch.int8)
    assert torch.equal(int4.quantize(weight, scale), exact)


def test_float64_weights_are_judged_in_float64():
    weight = torch.tensor([[0.5 - 1e-12, 0.5 + 1e-12, 1.5 - 1e-12, 1.5 + 1e-12]], dtype=torch.float64)
    assert int4.quantize(weight, torch.ones(1, 1)).tolist() == [[0, 1, 1, 2]]


def test_groups_do_not_touch_each_other_and_inputs_are_not_changed():
    weight = torch.randn(3, 5, 64)
    scale = int4.round_scale(torch.randn(3, 5, 2))
    kept = weight.clone(), scale.clone()
    codes = int4.quantize(weight, scale)
    assert torch.equal(codes[..., :32], int4.quantize(weight[..., :32], scale[..., :1]))
    assert torch.equal(codes[..., 32:], int4.quantize(weight[..., 32:], scale[..., 1:]))
    int4.dequantize(codes, scale)
    assert torch.equal(weight, kept[0]) and torch.equal(scale, kept[1])


@pytest.mark.parametrize("call", [int4.quantize, int4.dequantize])
def test_groups_that_do_not_fill_the_columns_are_refused(call):
    with pytest.raises(RuntimeError, match="unflatten"):
        call(torch.zeros(2, 40), torch.ones(2, 3))


def test_bits_per_weight_counts_the_scales():
    assert int4.bits_per_weight(2880, 64) == 4.25
    assert int4.bits_per_weight(2880, 32) == 4.5
    with pytest.raises(ValueError, match="2880 columns are not a multiple of group size 128"):
        int4.bits_per_weight(2880, 128)
