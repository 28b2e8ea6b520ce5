"""Perplexity and KL divergence of candidates against the unquantized model, on the same tokens.

Both models are streamed layer by layer; only final hidden states [T, D] and one output head are kept. For every
position but the last of a sequence:
    nll     = -log p(next token)                      perplexity = exp(mean nll)
    KL      = sum_v p_base(v) (log p_base(v) - log p_cand(v))    in nats, over the full vocabulary
    top-1   = whether both models prefer the same token
Neighbouring tokens are correlated, so standard errors are taken over sequences: each sequence's mean is one
observation. They are None with fewer than two sequences.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.errors import InputError
from gptoss_quantize.model import hidden_states, logits

CHUNK_ELEMENTS = 1 << 24


@dataclass(slots=True)
class PerToken:
    """One value per predicted position, [N, S - 1] each, float32 on the CPU."""

    nll: torch.Tensor
    baseline_nll: torch.Tensor
    kl: torch.Tensor
    same_top: torch.Tensor


def _mean_and_error(values_NS: torch.Tensor) -> tuple[float, float | None]:
    """Return (mean, standard error of the mean over sequences)."""
    per_sequence = values_NS.double().mean(1)
    error = float(per_sequence.std() / math.sqrt(len(per_sequence))) if len(per_sequence) > 1 else None
    return float(per_sequence.mean()), error


@torch.inference_mode()
def compare_hidden(
    baseline: torch.Tensor,
    baseline_head_VD: torch.Tensor,
    candidates: list[tuple[torch.Tensor, torch.Tensor]],
    ids_NS: torch.Tensor,
) -> list[PerToken]:
    """Return per-token comparisons of each candidate (hidden states [N, S, D], head [V, D]) with the baseline.

    The baseline's distribution over the vocabulary is computed once per chunk of tokens, for all candidates.
    """
    N, S = ids_NS.shape
    base = baseline[:, :-1].flatten(0, 1)
    others = [(hidden[:, :-1].flatten(0, 1), head) for hidden, head in candidates]
    following = ids_NS[:, 1:].reshape(-1, 1)
    values = torch.empty(len(others), 4, len(following))
    step = max(1, CHUNK_ELEMENTS // baseline_head_VD.shape[0])
    for start in range(0, len(following), step):
        part = slice(start, start + step)
        log_p = torch.log_softmax(logits(base[part], baseline_head_VD), dim=-1)
        p, top, next_p = log_p.exp(), log_p.argmax(-1), log_p.gather(1, following[part])
        for value, (hidden, head) in zip(values, others, strict=True):
            log_q = torch.log_softmax(logits(hidden[part], head), dim=-1)
            value[0, part] = -log_q.gather(1, following[part]).squeeze(1)
            value[1, part] = -next_p.squeeze(1)
            value[3, part] = (top == log_q.argmax(-1)).float()
            value[2, part] = torch.sub(log_p, log_q, out=log_q).mul_(p).sum(-1)
    return [PerToken(*value.view(4, N, S - 1)) for value in values]


def summarize(tokens: PerToken) -> dict[str, Any]:
    """Return perplexities, KL (mean, median, p90, p99, p99.9, max) and top-1 agreement with standard errors."""
    nll, nll_error = _mean_and_error(tokens.nll)
    base, base_error = _mean_and_error(tokens.baseline_nll)
    kl, kl_error = _mean_and_error(tokens.kl)
    top, top_error = _mean_and_error(tokens.same_top)
    _, gap_error = _mean_and_error(tokens.nll - tokens.baseline_nll)
    sorted_kl = tokens.kl.flatten().double()
    quantiles = torch.quantile(sorted_kl, torch.tensor([0.5, 0.9, 0.99, 0.999], dtype=torch.float64)).tolist()
    return {
        "tokens": tokens.kl.numel(),
        "sequences": tokens.kl.shape[0],
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


def evaluate(
    baseline: Checkpoint,
    candidates: list[Checkpoint],
    ids_NS: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    on_layer: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Return a summary per candidate, all on the same tokens [N, S]; the baseline runs once.

    `on_layer` is called after every decoder layer of every model.
    """
    for candidate in candidates:
        check_pair(baseline, candidate, ids_NS)
    base = hidden_states(baseline, ids_NS, dtype, lambda _: on_layer())
    others = [
        (hidden_states(candidate, ids_NS, dtype, lambda _: on_layer()), candidate.head().to(dtype))
        for candidate in candidates
    ]
    compared = compare_hidden(base, baseline.head().to(dtype), others, ids_NS)
    return [summarize(tokens) for tokens in compared]
