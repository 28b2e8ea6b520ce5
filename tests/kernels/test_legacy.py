"""AutoGPTQ's and AutoAWQ's words: against what the packages themselves packed (goldens), and as properties."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_quantize.kernels import int4, legacy

PROPERTY = settings(max_examples=40, deadline=None)


def test_autogptq_packs_the_same_words(golden):
    rows, groups = golden["scales"].shape
    assert torch.equal(legacy.gptq_qweight(int4.pack(golden["codes"])), golden["gptq"]["qweight"])
    assert torch.equal(legacy.gptq_qzeros(groups, rows, version=1), golden["gptq"]["qzeros"])
    codes, zeros = legacy.read_gptq(golden["gptq"]["qweight"], golden["gptq"]["qzeros"], version=1)
    assert torch.equal(codes - 8, golden["codes"]) and (zeros == 8).all() and zeros.shape == (rows, groups)


def test_autoawq_packs_the_same_words(golden):
    rows, groups = golden["scales"].shape
    assert torch.equal(legacy.awq_qweight(golden["codes"]), golden["awq"]["qweight"])
    assert torch.equal(legacy.awq_qzeros(groups, rows), golden["awq"]["qzeros"])
    codes, zeros = legacy.read_awq(golden["awq"]["qweight"], golden["awq"]["qzeros"])
    assert torch.equal(codes - 8, golden["codes"]) and (zeros == 8).all() and zeros.shape == (rows, groups)


def test_version_2_is_version_1_plus_one_in_every_nibble():
    first, second = (legacy.gptq_qzeros(3, 16, version=version) for version in (1, 2))
    assert torch.equal(first + 0x11111111, second)
    assert first.shape == (3, 2) and first.dtype == torch.int32
    with pytest.raises(ValueError, match="versions 1 and 2"):
        legacy.gptq_qzeros(3, 16, version=3)


@PROPERTY
@given(st.integers(1, 4), st.integers(1, 6), st.sampled_from((8, 16, 32, 64)), st.integers(0, 2**32 - 1))
def test_any_codes_and_zero_points_come_back(rows8, groups, group, seed):
    rows, columns = 8 * rows8, groups * group
    random = np.random.default_rng(seed)
    codes = torch.from_numpy(random.integers(-8, 8, (rows, columns)).astype(np.int8))
    zeros = torch.from_numpy(random.integers(1, 16, (rows, groups)).astype(np.int16))
    # asymmetric zero points, as the other tools write them: [G, R/8], version 1 less one
    stored = zeros.T.flatten().view(groups, rows)
    words = {less: int4.pack((stored - 8 - less).to(torch.int8)) for less in (0, 1)}
    qweight = legacy.gptq_qweight(int4.pack(codes))
    for version in (1, 2):
        back = legacy.read_gptq(qweight, words[2 - version], version=version)
        assert torch.equal(back[0] - 8, codes) and torch.equal(back[1], zeros)
    interleaved = int4.pack((stored - 8).to(torch.int8).unflatten(-1, (-1, 8))[..., legacy.AWQ_ORDER].flatten(-2))
    back = legacy.read_awq(legacy.awq_qweight(codes), interleaved)
    assert torch.equal(back[0] - 8, codes) and torch.equal(back[1], zeros)


@PROPERTY
@given(st.integers(1, 3), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_awq_words_by_their_definition(rows8, columns8, seed):
    rows, columns = 8 * rows8, 8 * columns8
    codes = np.random.default_rng(seed).integers(-8, 8, (rows, columns))
    slow = np.zeros((columns, rows // 8), dtype=np.uint32)
    for row in range(rows):
        place = [0, 2, 4, 6, 1, 3, 5, 7].index(row % 8)
        slow[:, row // 8] |= ((codes[row] + 8).astype(np.uint32)) << np.uint32(4 * place)
    fast = legacy.awq_qweight(torch.from_numpy(codes).to(torch.int8))
    assert np.array_equal(fast.numpy().view(np.uint32), slow)


def test_rows_that_do_not_fill_words_are_refused():
    with pytest.raises(ValueError, match="12 rows are no multiple of 8"):
        legacy.awq_qweight(torch.zeros(12, 8, dtype=torch.int8))
    with pytest.raises(ValueError, match="12 rows are no multiple of 8"):
        legacy.gptq_qzeros(2, 12, version=1)


def test_group_index_is_in_order():
    assert legacy.group_index(96, 32).tolist() == [0] * 32 + [1] * 32 + [2] * 32
