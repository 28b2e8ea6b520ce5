"""Transformers' predictions: our packed loader, and transformers' own model of what we read in a folder (`stock`)."""

from pathlib import Path

import torch
from torch import nn

from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.files import Progress, no_progress
from gptoss_quantize.loading import load
from gptoss_quantize.runtimes.stock import stock_model


def packed(path: Path, dtype: torch.dtype) -> nn.Module:
    """Return one of our int4 checkpoints as a model, experts packed."""
    return load(path, dtype=dtype)


def plain(checkpoint: Checkpoint | Path, dtype: torch.dtype) -> nn.Module:
    """Return a checkpoint as stock transformers loads exactly its files; MXFP4 is dequantized by transformers."""
    return stock_model(checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint(checkpoint), dtype)


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
