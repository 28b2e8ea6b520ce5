"""Where in the model the error arises: routing and expert outputs of a candidate and the baseline, by layer.

Both models run in step over the same tokens. In every layer each candidate is asked twice:

    clean       the baseline's residual stream goes into the candidate's norm and experts, with the baseline's
                routing: the error of these weights alone
    running     the candidate's own stream and routing: with the errors of the layers before

    error of a block   = sum |y_cand - y_base|^2 / sum |y_base|^2    over tokens; 1 is as bad as no output at all
    error of an expert = the same for its own output on the tokens that the baseline routes to it (clean input)
    router KL          = KL of the softmax over all experts' logits, baseline against candidate (running), in nats
    top-k agreement    = share of the baseline's chosen experts that the candidate chooses too (running)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from gptoss_quantize.config import ModelConfig
from gptoss_quantize.eval.trees import Layout, Stream
from gptoss_quantize.kernels.experts import rows_of
from gptoss_quantize.model import EXPERT_BLOCK, expert_act, mlp_input
from gptoss_quantize.source import Expert, Source


def expert_output(x_TD: torch.Tensor, expert: Expert, config: ModelConfig) -> torch.Tensor:
    """Return one expert's output [T, D] in float32, in blocks; products in the dtype of x."""
    if not len(x_TD):
        return x_TD.new_empty(0, x_TD.shape[1], dtype=torch.float32)
    parts = []
    for x in x_TD.split(EXPERT_BLOCK):
        parts.append(functional.linear(expert_act(x, expert, config), expert.down, expert.down_bias).float())
    return torch.cat(parts)


def router_logits(x_TD: torch.Tensor, layer: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the router's logits over all experts [T, E], in float32."""
    return functional.linear(x_TD.float(), layer["mlp.router.weight"].float(), layer["mlp.router.bias"].float())


def agreement(base_TK: torch.Tensor, cand_TK: torch.Tensor) -> float:
    """Return the share of the experts in `base_TK` that are in the same row of `cand_TK`."""
    return float((base_TK[:, :, None] == cand_TK[:, None, :]).any(2).double().mean())


def router_kl(base_TE: torch.Tensor, cand_TE: torch.Tensor) -> float:
    """Return the mean KL divergence in nats of router logits [T, E]."""
    log_p, log_q = (torch.log_softmax(logits.double(), dim=-1) for logits in (base_TE, cand_TE))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def relative_error(got: torch.Tensor, exact: torch.Tensor) -> float | None:
    """Return sum |got - exact|^2 / sum |exact|^2; None where there is nothing to compare with."""
    scale = float(exact.double().square().sum())
    return float((got.double() - exact.double()).square().sum()) / scale if scale else None


@dataclass(slots=True)
class _Side:
    """One model inside a layer: its stream, what its experts see, and their outputs as they are added up."""

    stream: Stream
    x: torch.Tensor
    index: torch.Tensor
    prob: torch.Tensor
    logits: torch.Tensor
    out: torch.Tensor

    @classmethod
    def of(cls, stream: Stream) -> "_Side":
        """Return the side of a stream that has attended."""
        x, index, prob = stream.routed()
        return cls(stream, x.to(stream.dtype), index, prob, router_logits(x, stream.layer), torch.zeros_like(x))

    def add(self, expert: Expert, number: int) -> None:
        """Add an expert's output for the tokens that this model routes to it."""
        token, slot = rows_of(self.index, number)
        y = expert_output(self.x[token], expert, self.stream.config)
        self.out.index_add_(0, token, y * self.prob[token, slot, None])


@torch.inference_mode()
def compare_experts(
    baseline: Source,
    candidates: list[Source],
    layout: Layout,
    dtype: torch.dtype = torch.float32,
    on_layer: Callable[[], None] = lambda: None,
) -> list[list[dict[str, Any]]]:
    """Return per candidate one entry per layer: tokens, candidate_tokens, expert_error [E] each, topk_agreement,
    router_kl, error_clean and error_running (definitions in the module's docstring). The baseline runs once.
    """
    base = Stream(baseline, layout, dtype)
    others = [Stream(candidate, layout, dtype) for candidate in candidates]
    results: list[list[dict[str, Any]]] = [[] for _ in candidates]
    for index in range(baseline.config.layers):
        base.attend(index)
        for other in others:
            other.attend(index)
        for found, entry in zip(results, _layer(base, others, index), strict=True):
            found.append(entry)
        on_layer()
    return results


def _layer(base_stream: Stream, streams: list[Stream], index: int) -> list[dict[str, Any]]:
    """Return the entries of one layer, and add every model's expert outputs to its stream."""
    base, sides = _Side.of(base_stream), [_Side.of(stream) for stream in streams]
    # the baseline's residual stream through each candidate's own norm
    clean = [mlp_input(base_stream.h, s.layer, s.config).to(s.dtype) for s in streams]
    clean_out = [torch.zeros_like(base.out) for _ in streams]
    errors: list[list[float | None]] = [[] for _ in streams]
    E = base_stream.config.experts
    for number in range(E):
        token, slot = rows_of(base.index, number)
        weights = base_stream.source.expert(index, number, base_stream.dtype)
        exact = expert_output(base.x[token], weights, base_stream.config)
        base.out.index_add_(0, token, exact * base.prob[token, slot, None])
        for side, x, out, error in zip(sides, clean, clean_out, errors, strict=True):
            weights = side.stream.source.expert(index, number, side.stream.dtype)
            got = expert_output(x[token], weights, side.stream.config)
            out.index_add_(0, token, got * base.prob[token, slot, None])
            error.append(relative_error(got, exact))
            side.add(weights, number)
    entries = []
    for side, out, error in zip(sides, clean_out, errors, strict=True):
        entries.append(
            {
                "tokens": torch.bincount(base.index.flatten(), minlength=E).cpu().tolist(),
                "candidate_tokens": torch.bincount(side.index.flatten(), minlength=E).cpu().tolist(),
                "expert_error": error,
                "topk_agreement": agreement(base.index, side.index),
                "router_kl": router_kl(base.logits, side.logits),
                "error_clean": relative_error(out, base.out),
                "error_running": relative_error(side.out, base.out),
            }
        )
        side.stream.h += side.out
    base_stream.h += base.out
    return entries
