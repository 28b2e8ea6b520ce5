"""What a run writes: the outer tensors, hidden states below the first layer, and one shard per layer.

Tensors outside the experts are copied as they are, or stored in 8 bits (`dense` is "source" or "int8").
"""

from typing import Any

import torch
from torch.nn import functional

from gptoss_quantize.calibration.text import Tokens
from gptoss_quantize.checkpoint import Checkpoint, dense_shapes, q8_names
from gptoss_quantize.kernels import int8
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


def columns_beside_groups(source: Checkpoint) -> tuple[str, int] | None:
    """Return the first matrix that groups of 32 columns do not divide, with its columns."""
    shapes = dense_shapes(source.config).items()
    return next(((n, s[-1]) for n, s in shapes if q8_names(n, s) and s[-1] % int8.GROUP_SIZE), None)


def _stored(name: str, tensor: torch.Tensor, dense: str) -> dict[str, torch.Tensor]:
    """Return what is written for a tensor outside the experts: itself, or its codes and scales."""
    if dense != "int8" or not (names := q8_names(name, tuple(tensor.shape))):
        return {name: tensor}
    return {stored: part for (stored, _), part in zip(names, int8.quantize(tensor), strict=True)}


def write_outer(source: Checkpoint, dense: str, output: Output) -> dict[str, Any]:
    """Write the first shard: embedding, final norm and head."""
    tensors: dict[str, torch.Tensor] = {}
    for name in dense_shapes(source.config):
        if not name.startswith("model.layers."):
            tensors |= _stored(name, source.dense(name), dense)
    return output.write_shard(1, tensors)


def write_layer(
    source: Checkpoint, index: int, dense: str, result: LayerResult, output: Output, ranks: Ranks
) -> None:
    """Write a layer's shard on the rank whose turn it is, and its report and the state on rank 0."""
    owner = index % ranks.count
    solved = gather_tensors(ranks, owner, {k: v.cpu() for k, v in result.tensors.items()})
    shard = None
    if ranks.rank == owner:
        prefix = f"model.layers.{index}."
        tensors: dict[str, torch.Tensor] = {}
        for name, tensor in (source.layer(index) | solved).items():
            tensors |= _stored(prefix + name, tensor, dense)
        shard = output.write_shard(index + 2, tensors)
    output.note(everyone(ranks, shard)[owner])
    output.state["layers"].append(result.report)
    if ranks.rank == 0:
        output.save_state()
    # hidden states of this layer are overwritten only when the state says that it is done
    everyone(ranks, None)
