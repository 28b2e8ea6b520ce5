"""The parts of the expert block that vLLM's ranks compute, without vLLM: their sum is the whole."""

import pytest
import torch

from gptoss_quantize.kernels import int4
from gptoss_quantize.kernels.experts import PackedExperts, experts_torch
from gptoss_quantize.runtimes.vllm_split import localize, narrow

E, D, F, K, GROUP = 6, 96, 128, 3, 32
# in the order of PackedExperts
PARTS = ("w13_weight_packed", "w13_weight_scale", "w13_bias", "w2_weight_packed", "w2_weight_scale", "w2_bias")


@pytest.fixture(scope="module")
def block():
    """(packed experts, x, index, prob), everything random and none of it zero."""
    generator = torch.Generator().manual_seed(0)

    def matrix(rows, columns):
        codes = torch.randint(-8, 8, (E, rows, columns), generator=generator, dtype=torch.int8)
        scale = torch.randn(E, rows, columns // GROUP, generator=generator).mul_(0.05).bfloat16()
        return int4.pack(codes), scale, torch.randn(E, rows, generator=generator)

    packed = PackedExperts(*matrix(2 * F, D), *matrix(D, F))
    x = torch.randn(10, D, generator=generator, dtype=torch.float64)
    index = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(10)])
    return packed, x, index, torch.rand(10, K, generator=generator, dtype=torch.float64)


def run(parts, x, index, prob):
    """The block of some stacked experts, by its definition."""
    return experts_torch(x, index, prob, PackedExperts(*parts), 7.0, 1.702)


def parts_of(packed):
    return [getattr(packed, name) for name in PackedExperts.__slots__]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_tensor_parallel_ranks_add_up(block, ranks):
    packed, *routing = block
    whole = run(parts_of(packed), *routing)
    total = torch.zeros_like(whole)
    for rank in range(ranks):
        stored = zip(parts_of(packed), PARTS, strict=True)
        shares = [torch.stack([narrow(one, part, rank, ranks) for one in tensor]) for tensor, part in stored]
        assert shares[0].shape[1] == 2 * F // ranks and shares[3].shape[2] == F // 8 // ranks
        total += run(shares, *routing)
    torch.testing.assert_close(total, whole, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("held", [([0, 1, 2], [3, 4, 5]), ([0, 2, 4], [1, 3, 5]), ([5], [0, 1, 2, 3, 4])])
def test_expert_parallel_ranks_add_up(block, held):
    packed, x, index, prob = block
    whole = run(parts_of(packed), x, index, prob)
    total = torch.zeros_like(whole)
    for experts in held:
        expert_map = torch.full((E,), -1, dtype=torch.int32)
        expert_map[experts] = torch.arange(len(experts), dtype=torch.int32)
        local, weight = localize(index.int(), prob, expert_map)
        assert int(local.min()) >= 0
        total += run([tensor[experts] for tensor in parts_of(packed)], x, local, weight)
    torch.testing.assert_close(total, whole, rtol=1e-10, atol=1e-10)
