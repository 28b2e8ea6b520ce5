"""Perplexity and KL divergence of candidates against the unquantized model, on the same tokens.

Both models are streamed layer by layer; only final hidden states [T, D] and one output head are kept. For every
position but the last of a sequence:
    nll     = -log p(next token)                      perplexity = exp(mean nll)
    KL      = sum_v p_base(v) (log p_base(v) - log p_cand(v))    in nats, over the full vocabulary
    top-1   = whether both models prefer the same token
    confidence = the baseline's largest probability
Neighbouring tokens are correlated, so standard errors are taken over sequences, as of a ratio of two sums (values
and their number, Cochran 1977, 6.4): with sequences of equal length, each sequence's mean is one observation. They
are None with fewer than two sequences.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.errors import InputError
from gptoss_quantize.model import hidden_states, logits
from gptoss_quantize.source import Source, placed

CHUNK_ELEMENTS = 1 << 24
CONFIDENCE_EDGES = (0.0, 0.2, 0.5, 0.8, 0.95, 1.0)
RESAMPLES = 2000


@dataclass(slots=True)
class PerToken:
    """One value per predicted position, [N, S - 1] or [P] each, float32 on the CPU."""

    nll: torch.Tensor
    baseline_nll: torch.Tensor
    kl: torch.Tensor
    same_top: torch.Tensor
    confidence: torch.Tensor


def _sums(values: torch.Tensor, owner: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (sum of the values, number of values) per sequence, float64 [N]; `owner` [P] says whose each is."""
    values = values.double()
    if owner is None:
        return values.sum(1), torch.full((len(values),), float(values.shape[1]), dtype=torch.float64)
    sequences = int(owner.max()) + 1
    counts = torch.bincount(owner, minlength=sequences).double()
    return torch.zeros(sequences, dtype=torch.float64).index_add_(0, owner, values), counts


def _mean_and_error(values: torch.Tensor, owner: torch.Tensor | None = None) -> tuple[float, float | None]:
    """Return (mean, standard error of the mean over sequences)."""
    sums, counts = _sums(values, owner)
    sequences, mean = len(sums), sums.sum() / counts.sum()
    if sequences < 2:
        return float(mean), None
    spread = (sums - mean * counts).square().sum() * sequences / (sequences - 1)
    return float(mean), float(spread.sqrt() / counts.sum())


@torch.inference_mode()
def compare_hidden(
    baseline: torch.Tensor,
    baseline_head_VD: torch.Tensor,
    candidates: list[tuple[torch.Tensor, torch.Tensor]],
    ids_NS: torch.Tensor,
) -> list[PerToken]:
    """Return per-token comparisons [N, S - 1] of each candidate (hidden [N, S, D], head [V, D]) with the baseline."""
    N, S = ids_NS.shape
    others = [(hidden[:, :-1].flatten(0, 1), head) for hidden, head in candidates]
    flat = compare_states(baseline[:, :-1].flatten(0, 1), baseline_head_VD, others, ids_NS[:, 1:].reshape(-1))
    return [PerToken(*(getattr(tokens, name).view(N, S - 1) for name in PerToken.__slots__)) for tokens in flat]


@torch.inference_mode()
def compare_states(
    base: torch.Tensor,
    baseline_head_VD: torch.Tensor,
    others: list[tuple[torch.Tensor, torch.Tensor]],
    target_P: torch.Tensor,
) -> list[PerToken]:
    """Return per-token comparisons [P] of each candidate (states [P, D], head [V, D]) with the baseline's [P, D].

    The baseline's distribution over the vocabulary is computed once per chunk of tokens, for all candidates, where
    the heads are; states may lie elsewhere.
    """
    device = baseline_head_VD.device
    following = target_P[:, None].to(device)
    values = torch.empty(len(others), len(PerToken.__slots__), len(following))
    step = max(1, CHUNK_ELEMENTS // baseline_head_VD.shape[0])
    for start in range(0, len(following), step):
        part = slice(start, start + step)
        log_p = torch.log_softmax(logits(base[part].to(device), baseline_head_VD), dim=-1)
        p, next_p = log_p.exp(), log_p.gather(1, following[part])
        highest, top = log_p.max(-1)
        for kept, (hidden, head) in zip(values, others, strict=True):
            value = torch.empty(len(PerToken.__slots__), len(next_p), device=device)
            log_q = torch.log_softmax(logits(hidden[part].to(device), head), dim=-1)
            value[0] = -log_q.gather(1, following[part]).squeeze(1)
            value[1] = -next_p.squeeze(1)
            value[3] = (top == log_q.argmax(-1)).float()
            value[2] = torch.sub(log_p, log_q, out=log_q).mul_(p).sum(-1)
            value[4] = highest.exp()
            kept[:, part] = value.cpu()
    return [PerToken(*value) for value in values]


def summarize(tokens: PerToken, owner: torch.Tensor | None = None) -> dict[str, Any]:
    """Return perplexities, KL (mean, median, p90, p99, p99.9, max) and top-1 agreement with standard errors.

    `owner` [P] says which sequence a token belongs to where values are flat; rows are sequences without it.
    """
    nll, nll_error = _mean_and_error(tokens.nll, owner)
    base, base_error = _mean_and_error(tokens.baseline_nll, owner)
    kl, kl_error = _mean_and_error(tokens.kl, owner)
    top, top_error = _mean_and_error(tokens.same_top, owner)
    _, gap_error = _mean_and_error(tokens.nll - tokens.baseline_nll, owner)
    sorted_kl = tokens.kl.flatten().double()
    quantiles = torch.quantile(sorted_kl, torch.tensor([0.5, 0.9, 0.99, 0.999], dtype=torch.float64)).tolist()
    return {
        "tokens": tokens.kl.numel(),
        "sequences": tokens.kl.shape[0] if owner is None else int(owner.max()) + 1,
        "baseline_perplexity": math.exp(base),
        "baseline_perplexity_se": None if base_error is None else math.exp(base) * base_error,
        "perplexity": math.exp(nll),
        "perplexity_se": None if nll_error is None else math.exp(nll) * nll_error,
        "log_perplexity_ratio": nll - base,
        "log_perplexity_ratio_se": gap_error,
        "kl_mean": kl,
        "kl_mean_se": kl_error,
        "kl_median": quantiles[0],
        "kl_p90": quantiles[1],
        "kl_p99": quantiles[2],
        "kl_p999": quantiles[3],
        "kl_max": float(sorted_kl.max()),
        "top1_agreement": top,
        "top1_agreement_se": top_error,
    }


def details(tokens: PerToken, owner: torch.Tensor, confidence: float = 0.95, seed: int = 0) -> dict[str, Any]:
    """Return what `summarize` leaves out, for flat values [P] and the sequence of each, `owner` [P].

    kl_mean_interval        percentiles of the mean over resampled sequences; None with fewer than two
    rms_probability_change  root mean square of p_cand(next token) - p_base(next token)
    buckets                 tokens, KL, top-1 agreement and gap in nll by the baseline's confidence
    """
    sums, counts = (part.numpy() for part in _sums(tokens.kl, owner))
    interval = None
    if len(sums) > 1:
        drawn = np.random.default_rng(seed).integers(len(sums), size=(RESAMPLES, len(sums)))
        means = sums[drawn].sum(1) / counts[drawn].sum(1)
        edge = (1 - confidence) / 2
        interval = np.quantile(means, [edge, 1 - edge]).tolist()
    change = (-tokens.nll.double()).exp() - (-tokens.baseline_nll.double()).exp()
    buckets = []
    for low, high in pairwise(CONFIDENCE_EDGES):
        inside = (tokens.confidence >= low) & ((tokens.confidence < high) | (high == 1))
        count = int(inside.sum())
        row: dict[str, Any] = {"from": low, "to": high, "tokens": count}
        for name, values in (
            ("kl_mean", tokens.kl),
            ("top1_agreement", tokens.same_top),
            ("nll_gap", tokens.nll - tokens.baseline_nll),
        ):
            row[name] = float(values[inside].double().mean()) if count else None
        buckets.append(row)
    return {
        "kl_mean_interval": interval,
        "rms_probability_change": float(change.square().mean().sqrt()),
        "buckets": buckets,
    }


def check_pair(baseline: Checkpoint, candidate: Checkpoint, ids_NS: torch.Tensor) -> None:
    """Raise InputError when the candidate cannot be a derivative of the baseline, or the text is not for them."""
    for name in ("vocab", "hidden", "intermediate", "layers", "experts", "top_k"):
        ours, theirs = getattr(baseline.config, name), getattr(candidate.config, name)
        if ours != theirs:
            raise InputError(
                f"{candidate.path}: {name} is {theirs}, the baseline {baseline.path} has {ours}; "
                "a candidate must be made from the baseline it is compared with"
            )
    if int(ids_NS.max()) >= baseline.config.vocab:
        raise InputError(
            f"{baseline.path}: the text has token id {int(ids_NS.max())}, the vocabulary ends at "
            f"{baseline.config.vocab - 1}; tokenizer and model do not belong together"
        )


def heads(baseline: Source, candidates: list[Source], dtypes: list[torch.dtype]) -> list[torch.Tensor]:
    """Return the output heads [V, D], the baseline's first, each in its dtype; a candidate's that is the baseline's
    is the same tensor (2.3 GB in float32 for gpt-oss-20b).
    """
    stored = baseline.head()
    first, out = stored.to(dtypes[0]), []
    for candidate, dtype in zip(candidates, dtypes[1:], strict=True):
        own = candidate.head()
        out.append(first if dtype == dtypes[0] and torch.equal(own, stored) else own.to(dtype))
    return [first, *out]


def evaluate(
    baseline: Checkpoint,
    candidates: list[Checkpoint],
    ids_NS: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    on_layer: Callable[[], None] = lambda: None,
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """Return a summary per candidate, all on the same tokens [N, S]; the baseline runs once.

    `on_layer` is called after every decoder layer of every model. Layers, experts, activations and the head are on
    `device`; between models, final hidden states wait on the processor.
    """
    for candidate in candidates:
        check_pair(baseline, candidate, ids_NS)
    models = [placed(model, device) for model in (baseline, *candidates)]
    states = [hidden_states(model, ids_NS, dtype, lambda _: on_layer()).cpu() for model in models]
    base, *others = zip(states, heads(models[0], models[1:], [dtype] * len(models)), strict=True)
    compared = compare_hidden(*base, others, ids_NS)
    return [summarize(tokens) for tokens in compared]
