"""What a run writes: the outer tensors, hidden states below the first layer, and one shard per layer.

Tensors outside the experts are stored as `dense` says (`layouts.DENSE`): as they are, or in 8 bits.
"""

from typing import Any

import torch
from torch.nn import functional

from gptoss_quantize.calibration.text import Tokens
from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.layouts import Dense, dense_shapes
from gptoss_quantize.model import batches
from gptoss_quantize.quantize.layer import LayerResult
from gptoss_quantize.quantize.output import HiddenFile, Output
from gptoss_quantize.quantize.ranks import Ranks, everyone, gather_tensors


def write_embedded(source: Checkpoint, tokens: Tokens, hidden: HiddenFile) -> None:
    """Write the hidden states below the first layer: the embedding of every token."""
    table = source.dense("model.embed_tokens.weight")
    for batch in batches(*tokens.ids.shape):
        hidden.write(batch, functional.embedding(tokens.ids[batch], table).float())
    hidden.flush()


def write_outer(source: Checkpoint, dense: Dense, output: Output) -> dict[str, Any]:
    """Write the first shard: embedding, final norm and head."""
    tensors: dict[str, torch.Tensor] = {}
    for name in dense_shapes(source.config):
        if not name.startswith("model.layers."):
            tensors |= dense.store(name, source.dense(name))
    return output.write_shard(1, tensors)


def write_layer(
    source: Checkpoint, index: int, dense: Dense, result: LayerResult, output: Output, ranks: Ranks
) -> None:
    """Write a layer's shard on the rank whose turn it is, and its report and the state on rank 0."""
    owner = index % ranks.count
    solved = gather_tensors(ranks, owner, {k: v.cpu() for k, v in result.tensors.items()})
    shard = None
    if ranks.rank == owner:
        prefix = f"model.layers.{index}."
        tensors: dict[str, torch.Tensor] = {}
        for name, tensor in (source.layer(index) | solved).items():
            tensors |= dense.store(prefix + name, tensor)
        shard = output.write_shard(index + 2, tensors)
    output.note(everyone(ranks, shard)[owner])
    output.state["layers"].append(result.report)
    if ranks.rank == 0:
        output.save_state()
    # hidden states of this layer are overwritten only when the state says that it is done
    everyone(ranks, None)
