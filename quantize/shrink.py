"""Hessians of experts that saw few tokens, pulled towards the layer's: an ablation, off in every recipe.

    H_e <- (1 - r) H_e + r tr(H_e) / tr(H) H,   r = shrink * K / (n_eff + shrink * K),   H = sum_e n_e H_e / sum_e n_e
The numbers that speak for the damping of `gptq.damp_` instead stand in docs/lab-notes.md.
"""

from dataclasses import replace

import torch

from gptoss_quantize.calibration.moments import Moments


def shrunk(stats: list[Moments], shrink: float) -> list[Moments]:
    """Return the moments of a batch of experts, each Hessian shrunk towards the token-weighted mean of the batch."""
    total = sum(s.tokens for s in stats)
    if not total:
        return stats
    pooled = torch.zeros_like(stats[0].hessian)
    for s in stats:
        pooled.add_(s.hessian, alpha=s.tokens / total)

    def trace(hessian: torch.Tensor) -> torch.Tensor:
        return hessian.sum() if hessian.dim() == 1 else hessian.diagonal().sum()

    out = []
    for s in stats:
        pull = shrink * s.hessian.shape[-1]
        rate = pull / (s.effective_tokens + pull)
        # an expert without any tokens takes the layer's Hessian as it is
        size = trace(s.hessian) / trace(pooled) if s.tokens else 1.0
        out.append(replace(s, hessian=(1 - rate) * s.hessian + rate * size * pooled))
    return out
