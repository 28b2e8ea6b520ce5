"""The Triton experts in triton's interpreter, against float64. Run by test_experts_triton.py in a process of its own.

The interpreter rounds to bfloat16 by cutting off, so its bfloat16 errors are larger than a card's; the tolerance of
twice the plain path's error holds for it all the same.
"""

from dataclasses import replace

import pytest
import torch

from gptoss_quantize.kernels import experts_triton as et
from gptoss_quantize.kernels import int4, planes
from gptoss_quantize.kernels.experts import PackedExperts, experts_torch

LIMIT, ALPHA = 7.0, 1.702
Weights = tuple[torch.Tensor, ...]


def layer(
    experts: int, hidden: int, inner: int, group: int, scale: float = 0.06, bits: tuple[int, int] = (4, 4)
) -> Weights:
    """Random packed experts, scales of both signs; pre-activations go beyond the limit."""
    generator = torch.Generator().manual_seed(experts * hidden + inner)
    made = []
    for rows, columns, width in ((2 * inner, hidden, bits[0]), (hidden, inner, bits[1])):
        half = 1 << (width - 1)
        codes = torch.randint(-half, half, (experts, rows, columns), generator=generator, dtype=torch.int8)
        scale *= 8 / half  # outputs of the same size
        scales = torch.randn(experts, rows, columns // group, generator=generator) * scale
        bias = torch.randn(experts, rows, generator=generator).bfloat16()
        made += [planes.pack(codes, width), int4.round_scale(scales).bfloat16(), bias]
    return tuple(made)


def inputs(tokens: int, choices: int, experts: int, hidden: int, dtype: torch.dtype = torch.float32) -> Weights:
    """Random x [T, D], distinct experts [T, K], probabilities [T, K]."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    index = torch.stack([torch.randperm(experts, generator=generator)[:choices] for _ in range(tokens)])
    return x, index, torch.softmax(torch.randn(tokens, choices, generator=generator), dim=-1).to(dtype)


def wide(name: str) -> et.Config:
    """A configuration of the table with larger tiles: fewer programs to interpret."""
    config = et.CONFIGS[name]
    return replace(config, gate_up=replace(config.gate_up, rows=128), down=replace(config.down, rows=128))


def errors(out: torch.Tensor, given: Weights, weights: Weights, clamp=(LIMIT, ALPHA)) -> tuple[float, float]:
    """Relative root mean square errors against float64: of out, and of the plain path."""
    x, index, prob = given
    packed = PackedExperts(*weights)
    wanted = experts_torch(x.double(), index, prob.double(), packed, *clamp)
    plain = experts_torch(x, index, prob, packed, *clamp)
    assert out.dtype == x.dtype and out.shape == x.shape
    return tuple(float((y.double() - wanted).norm() / wanted.norm()) for y in (out, plain))


def close(out: torch.Tensor, given: Weights, weights: Weights, clamp=(LIMIT, ALPHA)) -> None:
    mine, plain = errors(out, given, weights, clamp)
    # below one rounding of float32 the plain path's luck is no measure
    assert mine <= 2 * max(plain, 2.0**-23), (mine, plain)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory is NaN: what no kernel writes, or what one reads before, shows."""
    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like

    def nan(made: torch.Tensor) -> torch.Tensor:
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kwargs: nan(new_empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: nan(empty_like(*args, **kwargs)))


def test_interpreted() -> None:
    assert et.interpreted() and et.problem() == ""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", list(et.CONFIGS))
def test_every_configuration(name: str, dtype: torch.dtype) -> None:
    weights, given = layer(8, 192, 128, 64), inputs(2 if name == "pairs" else 13, 2, 8, 192, dtype)
    close(et.run(wide(name), *given, weights, (LIMIT, ALPHA)), given, weights)


@pytest.mark.parametrize("bits", [(3, 3), (2, 2), (3, 4), (4, 2)])
@pytest.mark.parametrize("name", list(et.CONFIGS))
def test_fewer_bits(name: str, bits: tuple[int, int]) -> None:
    """Every configuration, both groups, rows that no tile divides, bits that differ between the projections."""
    for hidden, inner, group in ((192, 128, 64), (96, 160, 32)):
        weights, given = layer(4, hidden, inner, group, bits=bits), inputs(2, 2, 4, hidden)
        assert PackedExperts(*weights).bits == bits
        close(et.run(wide(name), *given, weights, (LIMIT, ALPHA), bits), given, weights)


def test_fewer_bits_by_the_operators_signature() -> None:
    weights, given = layer(4, 64, 32, 32, bits=(2, 3)), inputs(20, 2, 4, 64)
    close(et.experts_triton(*given, *weights, LIMIT, ALPHA, 2, 3), given, weights)
    with pytest.raises(ValueError, match="w13_packed is"):
        et.experts_triton(*given, *weights, LIMIT, ALPHA)
    with pytest.raises(ValueError, match=r"bits \(5, 4\), expected 4, 3 or 2"):
        et.experts_triton(*given, *weights, LIMIT, ALPHA, 5, 4)


@pytest.mark.parametrize("name", list(et.CONFIGS))
def test_the_tiles_of_the_table(name: str) -> None:
    weights, given = layer(2, 96, 32, 32), inputs(2, 2, 2, 96)
    close(et.run(et.CONFIGS[name], *given, weights, (LIMIT, ALPHA)), given, weights)


@pytest.mark.parametrize("name", ["pairs", "direct-16", "sorted-16"])
@pytest.mark.parametrize(("hidden", "inner", "group"), [(320, 64, 64), (96, 160, 32), (576, 64, 64)])
def test_sizes_that_no_tile_divides(name: str, hidden: int, inner: int, group: int) -> None:
    weights, given = layer(3, hidden, inner, group, 0.03), inputs(2, 2, 3, hidden)
    close(et.run(wide(name), *given, weights, (LIMIT, ALPHA)), given, weights)


def test_scales_first_as_plain_bfloat16_does() -> None:
    weights, given = layer(4, 128, 64, 64), inputs(9, 2, 4, 128, torch.bfloat16)
    first = replace(wide("sorted-16"), scale_first=True)
    close(et.run(first, *given, weights, (LIMIT, ALPHA)), given, weights)


@pytest.mark.parametrize("tokens", [1, 3, 17, 70, 300])
def test_any_number_of_tokens(tokens: int) -> None:
    weights, given = layer(4, 64, 32, 32), inputs(tokens, 2, 4, 64)
    out = et.experts_triton(*given, *weights, LIMIT, ALPHA)
    close(out, given, weights)
    if tokens < 20:
        assert torch.equal(out, et.experts_triton(*given, *weights, LIMIT, ALPHA))


def test_more_tokens_than_fit_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(et, "MAX_TOKENS", 20)
    weights, given = layer(4, 64, 32, 32), inputs(45, 2, 4, 64)
    close(et.experts_triton(*given, *weights, LIMIT, ALPHA), given, weights)


@pytest.mark.parametrize(("experts", "choices"), [(8, 1), (32, 4), (128, 4)])
@pytest.mark.parametrize("tokens", [1, 5, 18])
def test_experts_and_choices(experts: int, choices: int, tokens: int) -> None:
    weights, given = layer(experts, 32, 32, 32), inputs(tokens, choices, experts, 32)
    close(et.experts_triton(*given, *weights, LIMIT, ALPHA), given, weights)


@pytest.mark.parametrize("tokens", [2, 16, 40])
def test_one_expert_has_every_token_and_others_none(tokens: int) -> None:
    weights, (x, index, prob) = layer(8, 64, 32, 32), inputs(tokens, 1, 8, 64)
    given = (x, torch.full_like(index, 5), prob)
    close(et.experts_triton(*given, *weights, LIMIT, ALPHA), given, weights)


@pytest.mark.parametrize("tokens", [1, 4, 20])
@pytest.mark.parametrize("side", ["gate high", "gate low", "up high", "up low"])
def test_each_clamp_binds(tokens: int, side: str) -> None:
    weights, given = layer(3, 32, 32, 32), inputs(tokens, 2, 3, 32)
    part, sign = side.split()
    bias = torch.zeros_like(weights[2])
    bias[:, 0 if part == "gate" else 1 :: 2] = 60.0 if sign == "high" else -60.0
    # gates far below give activations of 0 unless alpha is small
    clamp = (1.5, 0.01)
    weights = (*weights[:2], bias, *weights[3:])
    close(et.experts_triton(*given, *weights, *clamp), given, weights, clamp)


@pytest.mark.parametrize("tokens", [1, 3, 17])
def test_an_expert_named_twice_and_one_that_does_not_exist(tokens: int) -> None:
    weights, (x, index, prob) = layer(4, 32, 32, 32), inputs(tokens, 3, 4, 32)
    index[:, 2] = index[:, 0]
    given = (x, index, prob)
    out = et.experts_triton(*given, *weights, LIMIT, ALPHA)
    close(out, given, weights)
    for absent in (-1, 4):
        index[:, 2] = absent
        alone = (x, index[:, :2].contiguous(), prob[:, :2].contiguous())
        close(et.experts_triton(x, index, prob, *weights, LIMIT, ALPHA), alone, weights)


@pytest.mark.parametrize("tokens", [2, 5, 20])
def test_nan_stays_in_its_token(tokens: int) -> None:
    weights, given = layer(4, 32, 32, 32), inputs(tokens, 2, 4, 32)
    clean = et.experts_triton(*given, *weights, LIMIT, ALPHA)
    given[0][1, 3] = float("nan")
    out = et.experts_triton(*given, *weights, LIMIT, ALPHA)
    others = torch.arange(tokens) != 1
    assert out[1].isnan().all() and torch.equal(out[others], clean[others])


def test_biases_and_indices_of_other_types_and_no_token() -> None:
    weights, (x, index, prob) = layer(4, 32, 32, 32), inputs(3, 2, 4, 32)
    weights = (*weights[:2], weights[2].float() + 1e-3, *weights[3:5], weights[5].half())
    given = (x, index.int(), prob.bfloat16())
    close(et.experts_triton(*given, *weights, LIMIT, ALPHA), given, weights)
    assert et.experts_triton(x[:0], index[:0], prob[:0], *weights, LIMIT, ALPHA).shape == (0, 32)
