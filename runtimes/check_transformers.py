"""Transformers' predictions: our packed loader, and an ordinary directory by `from_pretrained`."""

from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from gptoss_quantize.files import Progress, no_progress
from gptoss_quantize.loading import load


def packed(path: Path, dtype: torch.dtype) -> nn.Module:
    """Return one of our int4 checkpoints as a model, experts packed."""
    return load(path, dtype=dtype)


def plain(path: Path, dtype: torch.dtype, *, mxfp4: bool = False) -> nn.Module:
    """Return a directory as stock transformers loads it; MXFP4 is dequantized by transformers where it must."""
    # its dequantization ends in bfloat16, which holds MXFP4 exactly
    model: nn.Module = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16 if mxfp4 else dtype)
    return model.to(dtype).eval()


@torch.inference_mode()
def log_probs(
    model: nn.Module, ids_NS: torch.Tensor, positions: list[int], on_sequence: Progress = no_progress
) -> torch.Tensor:
    """Return the log-probabilities [N * positions, V] predicted after each position."""
    out = []
    for n, row in enumerate(ids_NS):
        logits = model(row[None], use_cache=False).logits[0, positions]
        out.append(torch.log_softmax(logits.float(), dim=-1))
        on_sequence(n + 1, len(ids_NS))
    return torch.cat(out)
