"""The expert block against its definition in float64 numpy, and against transformers' own module.

Every bias is non-zero, gate and up go beyond the clamp on every side, and the sizes differ from each other, so
that a swapped pair, a forgotten bias, a missing clamp or halves instead of interleaved rows all show.
"""

from dataclasses import fields

import numpy as np
import pytest
import torch
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts, GptOssTopKRouter

from gptoss_quantize.kernels import experts_op, int4
from gptoss_quantize.kernels.experts import (
    PackedExperts,
    experts_torch,
    gated,
    route,
    rows_of,
    swiglu,
)

E, K, T, D, F, GROUP = 5, 2, 23, 64, 96, 32
LIMIT, ALPHA = 7.0, 1.702


@pytest.fixture
def packed() -> PackedExperts:
    """Random packed experts whose pre-activations reach well beyond the limit of 7."""
    torch.manual_seed(1)
    return PackedExperts(
        w13_packed=int4.pack(torch.randint(-8, 8, (E, 2 * F, D), dtype=torch.int8)),
        w13_scale=int4.round_scale(torch.randn(E, 2 * F, D // GROUP) * 0.2).bfloat16(),
        w13_bias=torch.randn(E, 2 * F).bfloat16() * 2,
        w2_packed=int4.pack(torch.randint(-8, 8, (E, D, F), dtype=torch.int8)),
        w2_scale=int4.round_scale(torch.randn(E, D, F // GROUP) * 0.02).bfloat16(),
        w2_bias=torch.randn(E, D).bfloat16(),
    )


@pytest.fixture
def routed() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens [T, D], expert indices [T, K] and probabilities [T, K]; every expert is chosen, in either slot."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(T, D, generator=generator)
    index = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(T)])
    assert all((index[:, slot] == e).any() for e in range(E) for slot in range(K))
    return x, index, torch.softmax(torch.randn(T, K, generator=generator), dim=-1)


def weights(packed: PackedExperts) -> tuple[torch.Tensor, torch.Tensor]:
    """The float32 weights [E, 2F, D] and [E, D, F] that the packed ones stand for."""
    w13 = int4.dequantize(int4.unpack(packed.w13_packed), packed.w13_scale)
    return w13, int4.dequantize(int4.unpack(packed.w2_packed), packed.w2_scale)


def naive_swiglu(gate: np.ndarray, up: np.ndarray, limit: float = LIMIT, alpha: float = ALPHA) -> np.ndarray:
    """docs/method.md: clamp(gate, max=limit), clamp(up, +-limit), (up+1) * gate * sigmoid(alpha * gate)."""
    gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    return (up + 1) * gate / (1 + np.exp(-alpha * gate))


def naive_block(x, index, prob, packed: PackedExperts) -> np.ndarray:
    """The block output [T, D] token by token and expert by expert, float64."""
    w13, w2 = (w.double().numpy() for w in weights(packed))
    b13, b2 = packed.w13_bias.double().numpy(), packed.w2_bias.double().numpy()
    x, index, prob = x.double().numpy(), index.numpy(), prob.double().numpy()
    out = np.zeros_like(x)
    for t, (experts, shares) in enumerate(zip(index, prob, strict=True)):
        for e, share in zip(experts, shares, strict=True):
            h = w13[e] @ x[t] + b13[e]
            out[t] += share * (w2[e] @ naive_swiglu(h[0::2], h[1::2]) + b2[e])
    return out


def transformers_experts(packed: PackedExperts, dtype: torch.dtype) -> GptOssExperts:
    """transformers' module with the dequantized weights in its layout [E, in, out]."""
    config = GptOssConfig(
        hidden_size=D,
        intermediate_size=F,
        num_local_experts=E,
        num_experts_per_tok=K,
        swiglu_limit=LIMIT,
        swiglu_alpha=ALPHA,
    )
    config._experts_implementation = "eager"
    module = GptOssExperts(config)
    w13, w2 = weights(packed)
    state = {
        "gate_up_proj": w13.transpose(1, 2),
        "gate_up_proj_bias": packed.w13_bias,
        "down_proj": w2.transpose(1, 2),
        "down_proj_bias": packed.w2_bias,
    }
    module.load_state_dict(state)
    return module.to(dtype)


def error(value: torch.Tensor, exact: np.ndarray) -> float:
    """The Frobenius norm of value - exact."""
    return float(np.linalg.norm(value.detach().double().numpy() - exact))


# --- activation


def clamped_on_every_side(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate and up [64, 31] with values inside the limit and far outside it on both sides."""
    generator = torch.Generator().manual_seed(3)
    gate = (torch.randn(64, 31, generator=generator) * 8).to(dtype)
    up = (torch.randn(64, 31, generator=generator) * 8).to(dtype)
    gate[0, :3], up[0, :3] = torch.tensor([300.0, -300.0, 0.0]), torch.tensor([-300.0, 300.0, -1.0])
    for part in (gate, up):
        assert (part > 7).sum() > 100 and (part < -7).sum() > 100 and (part.abs() < 7).sum() > 100
    return gate, up


@pytest.mark.parametrize("limit, alpha", [(LIMIT, ALPHA), (2.5, 1.0)])
def test_swiglu_is_its_definition(limit, alpha):
    gate, up = clamped_on_every_side(torch.float64)
    exact = naive_swiglu(gate.numpy(), up.numpy(), limit, alpha)
    np.testing.assert_allclose(swiglu(gate, up, limit, alpha).numpy(), exact, rtol=1e-13, atol=1e-300)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_is_as_exact_as_transformers(dtype):
    gate, up = clamped_on_every_side(dtype)
    exact = naive_swiglu(gate.double().numpy(), up.double().numpy())
    got = swiglu(gate, up, LIMIT, ALPHA)
    module = GptOssExperts(GptOssConfig(hidden_size=8, intermediate_size=8, num_local_experts=1))
    module.limit, module.alpha = LIMIT, ALPHA
    theirs = module._apply_gate(torch.stack((gate, up), dim=-1).flatten(-2))
    assert got.dtype == dtype
    assert error(got, exact) <= 2 * error(theirs, exact)


def test_swiglu_keeps_its_inputs_and_takes_strided_views():
    gate_up = torch.randn(4, 2 * F) * 8
    kept = gate_up.clone()
    strided = swiglu(gate_up[:, 0::2], gate_up[:, 1::2], LIMIT, ALPHA)
    assert torch.equal(gate_up, kept)
    assert torch.equal(strided, swiglu(kept[:, 0::2].clone(), kept[:, 1::2].clone(), LIMIT, ALPHA))
    # no value is clamped here, so a clamp that returned its argument would be seen
    small = torch.full((2, 4), 0.5)
    swiglu(small, small, LIMIT, ALPHA)
    assert torch.equal(small, torch.full((2, 4), 0.5))


def test_gated_reads_interleaved_rows_and_both_biases(packed, routed):
    x = routed[0].double()
    weight, bias = weights(packed)[0][0].double(), packed.w13_bias[0].double()
    kept = x.clone(), weight.clone(), bias.clone()
    h = x.numpy() @ weight.numpy().T + bias.numpy()
    np.testing.assert_allclose(
        gated(x, weight, bias, LIMIT, ALPHA).numpy(), naive_swiglu(h[:, 0::2], h[:, 1::2]), rtol=1e-12, atol=1e-10
    )
    assert all(torch.equal(now, before) for now, before in zip((x, weight, bias), kept, strict=True))


# --- routing


def test_routing_is_that_of_transformers():
    torch.manual_seed(4)
    config = GptOssConfig(hidden_size=D, num_local_experts=E, num_experts_per_tok=K)
    router = GptOssTopKRouter(config)
    torch.nn.init.normal_(router.weight)
    torch.nn.init.normal_(router.bias)
    x = torch.randn(T, D)
    with torch.inference_mode():
        _, scores, indices = router(x)
        index, prob = route(x, router.weight, router.bias, K)
    assert torch.equal(index, indices) and torch.equal(prob, scores)


@pytest.mark.parametrize("top_k", [1, 2, E])
def test_the_softmax_is_over_the_selected_experts(top_k):
    torch.manual_seed(5)
    x, weight, bias = torch.randn(T, D).double(), torch.randn(E, D).double(), torch.randn(E).double() * 9
    index, prob = route(x, weight, bias, top_k)
    logits = (x @ weight.T + bias).numpy()
    order = np.argsort(-logits, axis=1)[:, :top_k]
    assert np.array_equal(index.numpy(), order)
    exponent = np.exp(np.take_along_axis(logits, order, 1) - logits.max(1, keepdims=True))
    np.testing.assert_allclose(prob.numpy(), exponent / exponent.sum(1, keepdims=True), rtol=1e-12)


def test_tied_logits_share_their_probability():
    # experts 1 and 3 tie on top, 0 and 4 for what is left
    index, prob = route(torch.zeros(T, D), torch.zeros(E, D), torch.tensor([0.0, 2.0, -1.0, 2.0, 0.0]), 3)
    assert all(set(row[:2]) == {1, 3} and row[2] in (0, 4) for row in index.tolist())
    assert torch.equal(prob[:, 0], prob[:, 1])
    e2 = float(np.exp(2.0))
    torch.testing.assert_close(prob, torch.tensor([[e2, e2, 1.0]]).expand(T, 3) / (2 * e2 + 1))


def test_tokens_of_finds_every_choice_of_an_expert(routed):
    index = routed[1]
    seen = 0
    for e in range(E):
        token, slot = rows_of(index, e)
        assert (index[token, slot] == e).all() and token.tolist() == sorted(set(token.tolist()))
        seen += len(token)
    assert seen == index.numel()
    assert all(part.numel() == 0 for part in rows_of(index, E))


# --- block


@pytest.fixture(params=["definition", "fastest"])
def kernel(request):
    """The definition, and what models run."""
    return {"definition": experts_torch, "fastest": experts_op.run}[request.param]


def test_the_example_reaches_both_clamps(packed, routed):
    h = routed[0] @ weights(packed)[0][0].T + packed.w13_bias[0].float()
    for part in (h[:, 0::2], h[:, 1::2]):
        assert (part > LIMIT).any() and (part < -LIMIT).any() and (part.abs() < LIMIT).any()
    for name in ("w13_bias", "w2_bias"):
        assert (getattr(packed, name) != 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_block_is_its_definition(packed, routed, kernel, dtype):
    x, index, prob = routed[0].to(dtype), routed[1], routed[2]
    exact = naive_block(x, index, prob, packed)
    got = kernel(x, index, prob, packed, LIMIT, ALPHA)
    assert got.dtype == dtype and got.shape == x.shape
    with torch.inference_mode():
        theirs = transformers_experts(packed, dtype)(x, index, prob.to(dtype))
    ratio = error(got, exact) / error(theirs, exact)
    assert ratio <= 2, f"{ratio:.2f} times the error of transformers in {dtype}"
    # and transformers itself is near the definition: both mean the same layout
    assert error(theirs, exact) <= 8 * torch.finfo(dtype).eps * np.linalg.norm(exact)


def test_the_block_changes_nothing_it_is_given(packed, routed, kernel):
    given = [*routed, *(getattr(packed, f.name) for f in fields(packed))]
    kept = [tensor.clone() for tensor in given]
    kernel(*routed, packed, LIMIT, ALPHA)
    assert all(torch.equal(now, before) for now, before in zip(given, kept, strict=True))


def test_experts_without_a_token_are_not_read(packed, routed, kernel):
    x, _, prob = routed
    index = torch.tensor([[3, 1]]).repeat(T, 1)
    clean = kernel(x, index, prob, packed, LIMIT, ALPHA)
    for e in (0, 2, 4):
        packed.w13_scale[e] = packed.w2_bias[e] = float("nan")
    assert torch.equal(kernel(x, index, prob, packed, LIMIT, ALPHA), clean)
    assert clean.isfinite().all()


def test_only_hit_experts_are_unpacked(packed, routed, monkeypatch):
    x, _, prob = routed
    unpacked = []
    unpack = int4.unpack
    monkeypatch.setattr(int4, "unpack", lambda words: unpacked.append(words.shape) or unpack(words))
    experts_torch(x, torch.tensor([[3, 1]]).repeat(T, 1), prob, packed, LIMIT, ALPHA)
    assert unpacked == [packed.w13_packed.shape[1:], packed.w2_packed.shape[1:]] * 2


def test_one_token_and_no_token(packed, routed, kernel):
    x, index, prob = (part[:1] for part in routed)
    exact = naive_block(x, index, prob, packed)
    torch.testing.assert_close(
        kernel(x, index, prob, packed, LIMIT, ALPHA), torch.from_numpy(exact).float(), rtol=1e-5, atol=1e-5
    )
    nothing = kernel(x[:0], index[:0], prob[:0], packed, LIMIT, ALPHA)
    assert nothing.shape == (0, D)


def test_a_token_does_not_depend_on_its_neighbours(packed, routed, kernel):
    x, index, prob = (part.double() if part.is_floating_point() else part for part in routed)
    order = torch.randperm(T, generator=torch.Generator().manual_seed(6))
    whole = kernel(x, index, prob, packed, LIMIT, ALPHA)
    shuffled = kernel(x[order], index[order], prob[order], packed, LIMIT, ALPHA)
    torch.testing.assert_close(shuffled, whole[order], rtol=1e-12, atol=1e-12)
