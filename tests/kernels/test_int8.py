"""int8 in groups of 32: the definition, its edges, and GGUF's own Q8_0 on the same numbers."""

import gguf
import numpy as np
import pytest
import torch

from gptoss_quantize.kernels import int8


def slow(weight):
    """The definition, group by group in float64."""
    codes, scales = np.empty(weight.shape, np.int8), np.empty((weight.shape[0], weight.shape[1] // 32), np.float16)
    for r, row in enumerate(weight.double().numpy()):
        for g in range(scales.shape[1]):
            part = row[g * 32 : g * 32 + 32]
            scales[r, g] = np.float16(max(np.float32(abs(part).max()) / np.float32(127), 2.0**-24))
            codes[r, g * 32 : g * 32 + 32] = np.clip(np.rint(part / float(scales[r, g])), -127, 127)
    return torch.from_numpy(codes), torch.from_numpy(scales)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_and_scales_are_the_definition(dtype):
    weight = (torch.randn(40, 96, generator=torch.Generator().manual_seed(0)) * 0.05).to(dtype)
    weight[3, 32:64] = 0
    weight[5] *= 1e-6
    codes, scales = int8.quantize(weight)
    wanted, wanted_scales = slow(weight)
    assert torch.equal(scales, wanted_scales)
    # float32 and float64 may round a tie differently
    assert (codes - wanted).abs().max() <= 1
    assert (codes != wanted).float().mean() < 1e-3
    exact = codes.double().unflatten(1, (-1, 32)) * scales.double()[..., None]
    assert torch.equal(int8.dequantize(codes, scales, torch.float32).double(), exact.flatten(1))


def test_error_is_half_a_step():
    weight = torch.randn(64, 320, generator=torch.Generator().manual_seed(1))
    codes, scales = int8.quantize(weight)
    step = scales.float().repeat_interleave(32, 1)
    error = (int8.dequantize(codes, scales) - weight).abs()
    # the scale is rounded to 11 bits: the largest of a group may be cut by 127 / 2048 of a step more
    assert bool((error <= step * (0.5 + 127 / 2048)).all())


def test_in_pieces_is_the_same(monkeypatch):
    weight = torch.randn(3, 50, 64, generator=torch.Generator().manual_seed(2))
    whole = int8.quantize(weight)
    monkeypatch.setattr(int8, "_ROWS", 7)
    assert all(torch.equal(a, b) for a, b in zip(int8.quantize(weight), whole, strict=True))
    assert whole[0].shape == weight.shape
    assert whole[1].shape == (3, 50, 2)


def test_gguf_reads_the_same_numbers():
    # a Q8_0 block is the float16 scale and 32 codes: gguf's own reader gives our weights exactly
    weight = torch.randn(16, 96, generator=torch.Generator().manual_seed(3))
    codes, scales = int8.quantize(weight)
    blocks = np.concatenate(
        [scales.numpy().view(np.uint8).reshape(16, 3, 2), codes.numpy().view(np.uint8).reshape(16, 3, 32)], axis=-1
    )
    read = gguf.quants.dequantize(blocks.reshape(16, -1), gguf.GGMLQuantizationType.Q8_0)
    assert np.array_equal(read, int8.dequantize(codes, scales).numpy())
