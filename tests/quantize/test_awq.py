"""AWQ folds: the function must not change, with every bias alive; and a search that cannot make things worse."""

import pytest
import torch

from gptoss_quantize.config import parse_config
from gptoss_quantize.kernels.experts import route
from gptoss_quantize.model import expert_act, moe
from gptoss_quantize.quantize import awq
from gptoss_quantize.source import Expert

D, F, E, T = 192, 320, 6, 400
CONFIG = parse_config(
    {
        "model_type": "gpt_oss",
        "hidden_size": D,
        "intermediate_size": F,
        "num_hidden_layers": 1,
        "num_local_experts": E,
        "num_experts_per_tok": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "vocab_size": 100,
    },
    "test",
)


def layer(seed: int = 0, outliers: bool = False):
    """Return (normed input without the norm weight [T, D], dense tensors, experts), all biases non-zero."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    def stored(tensor):
        return tensor.bfloat16().float()

    experts = [
        Expert(stored(normal(2 * F, D) * 0.08), stored(normal(2 * F)), stored(normal(D, F) * 0.05), stored(normal(D)))
        for _ in range(E)
    ]
    norm = torch.exp(normal(D) * 0.3)
    if outliers:
        norm[::17] *= 12
    dense = {
        "post_attention_layernorm.weight": norm.bfloat16(),
        "mlp.router.weight": (normal(E, D) * 0.3).bfloat16(),
        "mlp.router.bias": (normal(E) * 0.5).bfloat16(),
    }
    return normal(T, D), dense, experts


def block(x, norm, router, bias, experts):
    x = x * norm.float()
    index, prob = route(x, router.float(), bias.float(), CONFIG.top_k)
    return moe(x, index, prob, experts, CONFIG)


def scaled(expert, scale):
    return Expert(expert.gate_up * scale, expert.gate_up_bias, expert.down, expert.down_bias)


def wanted(generator, size, low=0.25, high=4.0):
    return torch.exp(torch.empty(size).uniform_(0, 1, generator=generator) * torch.tensor(high / low).log()) * low


def test_input_fold_with_the_exact_scale_leaves_the_experts_unchanged():
    x, dense, experts = layer()
    scale, norm, _ = awq.fold_input(wanted(torch.Generator().manual_seed(1), D), *list(dense.values())[:2])
    assert float(scale.max() / scale.min()) > 8
    for expert in experts:
        want = expert_act(x * dense["post_attention_layernorm.weight"].float(), expert, CONFIG)
        got = expert_act(x * norm.float(), scaled(expert, scale), CONFIG)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_folding_alone_changes_the_block_by_no_more_than_bf16_noise_in_the_router():
    x, dense, experts = layer()
    norm, router, bias = dense.values()
    want = block(x, norm, router, bias, experts)
    scale, new_norm, new_router = awq.fold_input(wanted(torch.Generator().manual_seed(2), D), norm, router)
    folded = [
        scaled(awq.fold_down(e, wanted(torch.Generator().manual_seed(i), F, 1.0))[0], scale)
        for i, e in enumerate(experts)
    ]
    got = block(x, new_norm, new_router, bias, folded)
    # the yardstick: the original with its router rounded once more, by random relative errors of half a bf16 ulp
    generator = torch.Generator().manual_seed(3)
    noise = 1 + torch.empty(E, D).uniform_(-(2.0**-9), 2.0**-9, generator=generator)
    noisy = block(x, norm, router.float() * noise, bias, experts)
    yardstick = float((noisy - want).square().mean())
    assert yardstick > 0
    assert float((got - want).square().mean()) < 3 * yardstick + 1e-6


def test_powers_of_two_fold_bit_exactly():
    x, dense, _ = layer()
    norm, router, bias = dense.values()
    generator = torch.Generator().manual_seed(4)
    two = 2.0 ** torch.randint(-2, 3, (D,), generator=generator)
    scale, new_norm, new_router = awq.fold_input(two, norm, router)
    assert torch.equal(scale, two)
    assert torch.equal(new_norm.float() * two, norm.float())
    index, prob = route(x * norm.float(), router.float(), bias.float(), 2)
    moved, moved_prob = route(x * new_norm.float(), new_router.float(), bias.float(), 2)
    assert torch.equal(index, moved)
    torch.testing.assert_close(prob, moved_prob)


@pytest.mark.parametrize("bias", ["random", "minus one", "near minus one"])
def test_down_fold_is_exact_with_the_rounded_bias(bias):
    x, _, experts = layer()
    x = x * 0.3  # no clamp binds
    expert = experts[0]
    if bias == "minus one":
        expert.gate_up_bias[1::2] = -1
    elif bias == "near minus one":
        expert.gate_up_bias[1::2] = (-1 + torch.randint(-3, 4, (F,)) / 256).bfloat16().float()
    folded, t = awq.fold_down(expert, wanted(torch.Generator().manual_seed(5), F, 1.0))
    assert bool((t >= 1).all())
    if bias != "near minus one":
        assert float((t > 1.05).float().mean()) > 0.5, "the fold must really happen"
    assert torch.equal(folded.gate_up_bias, folded.gate_up_bias.bfloat16().float())
    want = expert_act(x, expert, CONFIG) @ expert.down.T
    got = expert_act(x, folded, CONFIG) @ folded.down.T
    assert float((got - want).abs().max() / want.abs().max()) < 1e-5
    # the usual fold, bias divided like the weights, is wrong
    naive = Expert(folded.gate_up, expert.gate_up_bias.clone(), folded.down, folded.down_bias)
    naive.gate_up_bias[1::2] /= t
    wrong = expert_act(x, naive, CONFIG) @ naive.down.T
    if bias == "random":
        assert float((wrong - want).abs().max() / want.abs().max()) > 0.05


def samples_of(x, dense):
    index, prob = route(x, dense["mlp.router.weight"].float(), dense["mlp.router.bias"].float(), CONFIG.top_k)
    found = []
    for e in range(E):
        token, slot = torch.where(index == e)
        found.append(awq.Sample(x[token], prob[token, slot].square()))
    return found


def test_search_helps_with_outlier_channels_and_reports_its_gain():
    x, dense, experts = layer(outliers=True)
    x = x * dense["post_attention_layernorm.weight"].float()
    fold = awq.search_input(samples_of(x, dense), iter(experts), x.abs().mean(0), dense, CONFIG, 64)
    assert fold.alpha > 0
    assert fold.gain < 0.8
    assert fold.norm.dtype == torch.bfloat16


def test_search_keeps_the_original_when_nothing_helps(monkeypatch):
    x, dense, experts = layer()
    monkeypatch.setattr(awq, "nearest", lambda weight, fold, group, dtype, grid: weight.to(dtype))
    fold = awq.search_input(samples_of(x, dense), iter(experts), x.abs().mean(0), dense, CONFIG, 64)
    assert (fold.alpha, fold.gain) == (0.0, 1.0)
    assert bool((fold.scale == 1).all())
    assert fold.norm is dense["post_attention_layernorm.weight"]
    same, t, beta, gain = awq.search_down(
        samples_of(x, dense)[0], experts[0], CONFIG, 64, torch.zeros(F, dtype=torch.bool)
    )
    assert same is experts[0]
    assert (beta, gain) == (0.0, 1.0)
    assert bool((t == 1).all())


def test_search_down_helps_and_leaves_clamped_neurons_alone():
    x, _, experts = layer(seed=7)
    expert = experts[0]
    # half the neurons hardly fire
    expert.gate_up[0::4] *= 0.05
    expert.gate_up_bias[0::4] = 0.02
    clamped = torch.zeros(F, dtype=torch.bool)
    clamped[:40] = True
    folded, t, beta, gain = awq.search_down(awq.Sample(x, torch.ones(T)), expert, CONFIG, 64, clamped)
    assert beta > 0
    assert gain < 0.95
    assert bool((t[:40] == 1).all())
    assert torch.equal(folded.gate_up[1:80:2], expert.gate_up[1:80:2])
    empty = awq.Sample(x[:0], torch.ones(0))
    assert awq.search_down(empty, expert, CONFIG, 64, clamped)[0] is expert


def test_magnitude_floor_keeps_dead_channels_finite():
    candidates = awq.input_candidates(torch.tensor([0.0, 1.0, 2.0, 1e-9]))
    assert bool(torch.isfinite(candidates).all())
    assert bool((candidates > 0).all())
    assert torch.equal(candidates[0], torch.ones(4))


def test_strength_weakens_the_folds_that_were_found():
    x, dense, experts = layer(outliers=True)
    x = x * dense["post_attention_layernorm.weight"].float()
    found = [
        awq.search_input(samples_of(x, dense), iter(experts), x.abs().mean(0), dense, CONFIG, 64, strength)
        for strength in (1.0, 0.5)
    ]
    assert found[1].alpha == found[0].alpha / 2 > 0
    assert found[1].gain == found[0].gain
    # both are stored as bfloat16 norms, so the square root holds to that
    torch.testing.assert_close(found[1].scale.log(), found[0].scale.log() / 2, rtol=0, atol=0.02)
    expert, free = experts[0], torch.zeros(F, dtype=torch.bool)
    expert.gate_up[0::4] *= 0.05
    sample = awq.Sample(x, torch.ones(T))
    (_, full, beta, _), (_, half, weak, _) = (
        awq.search_down(sample, expert, CONFIG, 64, free, strength) for strength in (1.0, 0.5)
    )
    assert weak == beta / 2 > 0
    moved = (full > 1.1) & (half > 1.1)
    assert int(moved.sum()) > 50
    assert float((half[moved].log() * 2 / full[moved].log() - 1).abs().median()) < 0.1
