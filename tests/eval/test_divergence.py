"""Perplexity, KL divergence and agreement against a float64 numpy twin, and against transformers' logits."""

import copy
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.errors import InputError
from gptoss_quantize.eval import divergence
from gptoss_quantize.eval.divergence import PerToken, check_pair, compare_hidden, evaluate, summarize

N, S, D, V = 6, 11, 48, 97
EPS = torch.finfo(torch.float32).eps


@pytest.fixture
def pair() -> dict[str, torch.Tensor]:
    """Final hidden states and heads of two models that differ in both, and the tokens."""
    torch.manual_seed(0)
    baseline, head = torch.randn(N, S, D), torch.randn(V, D) * 0.5
    return {
        "baseline": baseline,
        "candidate": baseline + 0.15 * torch.randn(N, S, D),
        "baseline_head_VD": head,
        "candidate_head_VD": head + 0.05 * torch.randn(V, D),
        "ids_NS": torch.randint(V, (N, S)),
    }


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log probabilities over the last dimension."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def twin(base_logits: np.ndarray, cand_logits: np.ndarray, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Per-token values [N, S - 1] from logits [N, S, V], by the definitions of the module docstring."""
    log_p, log_q = log_softmax(base_logits[:, :-1]), log_softmax(cand_logits[:, :-1])
    following = ids[:, 1:, None]
    return {
        "nll": -np.take_along_axis(log_q, following, -1)[..., 0],
        "baseline_nll": -np.take_along_axis(log_p, following, -1)[..., 0],
        "kl": (np.exp(log_p) * (log_p - log_q)).sum(-1),
        "same_top": (log_p.argmax(-1) == log_q.argmax(-1)).astype(float),
        "confidence": np.exp(log_p.max(-1)),
    }


def twin_summary(tokens: dict[str, np.ndarray]) -> dict[str, float]:
    """Every number of `summarize`, sequences being the independent observations."""

    def mean(values: np.ndarray) -> float:
        return float(values.mean(1).mean())

    def error(values: np.ndarray) -> float:
        return float(values.mean(1).std(ddof=1) / math.sqrt(len(values)))

    nll, base, kl, top = (tokens[name] for name in ("nll", "baseline_nll", "kl", "same_top"))
    quantiles = {
        "kl_" + name: np.quantile(kl, q)
        for name, q in (("median", 0.5), ("p90", 0.9), ("p99", 0.99), ("p999", 0.999))
    }
    return {
        "tokens": kl.size,
        "sequences": len(kl),
        "baseline_perplexity": math.exp(mean(base)),
        # the error of exp(m) is exp(m) times the error of m
        "baseline_perplexity_se": math.exp(mean(base)) * error(base),
        "perplexity": math.exp(mean(nll)),
        "perplexity_se": math.exp(mean(nll)) * error(nll),
        "log_perplexity_ratio": mean(nll) - mean(base),
        "log_perplexity_ratio_se": error(nll - base),
        "kl_mean": mean(kl),
        "kl_mean_se": error(kl),
        **quantiles,
        "kl_max": kl.max(),
        "top1_agreement": mean(top),
        "top1_agreement_se": error(top),
    }


# --- per token


def compare(baseline, baseline_head_VD, candidate, candidate_head_VD, ids_NS):
    (tokens,) = compare_hidden(baseline, baseline_head_VD, [(candidate, candidate_head_VD)], ids_NS)
    return tokens


def test_candidates_do_not_touch_each_other(pair):
    head = pair["baseline_head_VD"]
    others = [(pair["candidate"], pair["candidate_head_VD"]), (pair["baseline"], head)]
    first, second = compare_hidden(pair["baseline"], head, others, pair["ids_NS"])
    for name in PerToken.__slots__:
        assert torch.equal(getattr(first, name), getattr(compare(**pair), name))
    assert second.kl.abs().max() < 1e-6


def test_per_token_values_are_their_definitions(pair):
    exact = twin(
        (pair["baseline"].double() @ pair["baseline_head_VD"].double().T).numpy(),
        (pair["candidate"].double() @ pair["candidate_head_VD"].double().T).numpy(),
        pair["ids_NS"].numpy(),
    )
    got = compare(**pair)
    # a logit is a sum of D products of order 1; a log probability adds the rounding of one more sum
    tolerance = 4 * D * EPS
    for name in PerToken.__slots__:
        value = getattr(got, name)
        assert value.shape == (N, S - 1) and value.dtype == torch.float32, name
        np.testing.assert_allclose(value.numpy(), exact[name], atol=tolerance, rtol=0, err_msg=name)
    # the example is not a trivial one
    assert exact["kl"].mean() > 0.1 and 0.2 < exact["same_top"].mean() < 0.95


@pytest.mark.parametrize("tokens_at_once", [1, 7, N * (S - 1)])
def test_chunks_do_not_show(pair, monkeypatch, tokens_at_once):
    whole = compare(**pair)
    monkeypatch.setattr(divergence, "CHUNK_ELEMENTS", tokens_at_once * V)
    parts = compare(**pair)
    for name in PerToken.__slots__:
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), atol=4 * D * EPS, rtol=0)


def test_a_vocabulary_beyond_the_chunk_is_still_compared(pair, monkeypatch):
    monkeypatch.setattr(divergence, "CHUNK_ELEMENTS", V - 1)
    assert compare(**pair).kl.shape == (N, S - 1)


def test_identical_models_have_no_divergence_and_full_agreement(pair):
    pair |= {"candidate": pair["baseline"].clone(), "candidate_head_VD": pair["baseline_head_VD"].clone()}
    tokens = compare(**pair)
    assert tokens.kl.abs().max() < 1e-6
    assert torch.equal(tokens.nll, tokens.baseline_nll)
    summary = summarize(tokens)
    assert abs(summary["kl_mean"]) < 1e-6 and summary["top1_agreement"] == 1
    assert summary["perplexity"] == summary["baseline_perplexity"] and summary["log_perplexity_ratio"] == 0


def test_inputs_are_not_changed(pair):
    kept = {name: tensor.clone() for name, tensor in pair.items()}
    compare(**pair)
    assert all(torch.equal(pair[name], kept[name]) for name in pair)


# --- summary


def test_the_summary_is_that_of_numpy(pair):
    tokens = compare(**pair)
    exact = twin_summary({name: getattr(tokens, name).double().numpy() for name in PerToken.__slots__})
    got = summarize(tokens)
    assert got.keys() == exact.keys()
    for name, value in exact.items():
        # the numbers are float64 from float32 tokens; only the gap of two means is subtracted in float32
        assert got[name] == pytest.approx(value, rel=1e-6, abs=1e-9), name


def test_standard_errors_are_over_sequences():
    # tokens of a sequence that say the same are one observation, however many they are
    per_sequence = torch.tensor([1.0, 2.0, 3.0, 4.0])
    expected = per_sequence.std() / 2
    for length in (1, 100):
        values = per_sequence[:, None].expand(4, length)
        summary = summarize(PerToken(values, values, values, values, values))
        for name in ("kl_mean_se", "top1_agreement_se"):
            assert summary[name] == pytest.approx(float(expected))
        assert summary["perplexity_se"] == pytest.approx(math.exp(2.5) * float(expected))
        # the two models are compared on the same tokens: no difference, no error
        assert summary["log_perplexity_ratio_se"] == 0


def test_one_sequence_has_no_standard_error():
    summary = summarize(PerToken(*torch.rand(5, 1, 20)))
    errors = {name: value for name, value in summary.items() if name.endswith("_se")}
    assert set(errors.values()) == {None}
    assert errors.keys() == {
        f"{name}_se"
        for name in ("baseline_perplexity", "perplexity", "log_perplexity_ratio", "kl_mean", "top1_agreement")
    }
    assert all(math.isfinite(value) for name, value in summary.items() if name not in errors)


def test_quantiles_by_hand():
    kl = torch.arange(1000.0)[torch.randperm(1000, generator=torch.Generator().manual_seed(0))].view(10, 100)
    # exp(999) would overflow, so the negative log likelihoods are others
    summary = summarize(PerToken(kl / 999, kl / 999, kl, kl, kl))
    got = [summary[f"kl_{name}"] for name in ("median", "p90", "p99", "p999", "max")]
    assert got == pytest.approx([499.5, 899.1, 989.01, 998.001, 999])


# --- whole checkpoints


@pytest.fixture(scope="module")
def two_models(tiny, tmp_path_factory) -> tuple[Checkpoint, Checkpoint, dict[str, float], torch.Tensor]:
    """A tiny model, one with 2 % noise on every weight, what transformers and numpy say of the pair, and tokens."""
    base, ids = tiny.model(), tiny.ids(3, 40)
    noisy = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in noisy.parameters():
            parameter *= 1 + 0.02 * torch.randn(parameter.shape, generator=generator)
    path = tmp_path_factory.mktemp("noisy")
    noisy.save_pretrained(path)
    with torch.inference_mode():
        exact = twin(*(model(ids).logits.double().numpy() for model in (base, noisy)), ids.numpy())
    return Checkpoint(tiny.path("float32")), Checkpoint(path), twin_summary(exact), ids


def test_evaluate_says_what_transformers_logits_say(two_models):
    baseline, noisy, exact, ids = two_models
    layers = []
    same, other = evaluate(baseline, [baseline, noisy], ids, on_layer=lambda: layers.append(1))
    assert len(layers) == 3 * baseline.config.layers
    assert abs(same["kl_mean"]) < 1e-6 and abs(same["kl_max"]) < 1e-6 and same["top1_agreement"] == 1
    assert 0.001 < exact["kl_mean"] < 1
    # two float32 implementations agree to 1e-4 on logits (tests/root/test_model.py)
    for name, value in exact.items():
        assert other[name] == pytest.approx(value, rel=2e-3, abs=2e-4), name


def test_bfloat16_products_give_nearly_the_same_numbers(two_models):
    baseline, noisy, exact, ids = two_models
    same, other = evaluate(baseline, [baseline, noisy], ids, dtype=torch.bfloat16)
    assert same["kl_max"] == 0
    assert other["perplexity"] == pytest.approx(exact["perplexity"], rel=0.05)


def stub(checkpoint: Checkpoint, name: str, **changes: int) -> SimpleNamespace:
    """A checkpoint of another architecture, as far as `check_pair` looks."""
    return SimpleNamespace(path=Path(name), config=replace(checkpoint.config, **changes))


@pytest.mark.parametrize("field", ["vocab", "hidden", "intermediate", "layers", "experts", "top_k"])
def test_a_candidate_of_other_sizes_is_refused(two_models, field):
    baseline, ids = two_models[0], two_models[3]
    ours = getattr(baseline.config, field)
    other = stub(baseline, "other-model", **{field: ours + 1})
    with pytest.raises(InputError, match=f"^other-model: {field} is {ours + 1}, the baseline .* has {ours}; .*made"):
        check_pair(baseline, other, ids)


def test_text_of_another_tokenizer_is_refused_before_any_work(two_models):
    baseline, noisy, _, ids = two_models
    ids = ids.clone()
    ids[1, 2] = baseline.config.vocab
    layers = []
    with pytest.raises(InputError, match=r"token id 300, the vocabulary ends at 299; tokenizer and model"):
        evaluate(baseline, [noisy], ids, on_layer=lambda: layers.append(1))
    assert not layers
    check_pair(baseline, noisy, ids.clamp(max=baseline.config.vocab - 1))


def test_one_wrong_candidate_is_refused_before_any_work(two_models):
    baseline, noisy, _, ids = two_models
    layers = []
    with pytest.raises(InputError, match="layers is 4"):
        evaluate(baseline, [noisy, stub(baseline, "deep", layers=4)], ids, on_layer=lambda: layers.append(1))
    assert not layers
