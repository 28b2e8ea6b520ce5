"""A checkpoint as an ordinary Hugging Face directory: dequantized bf16 or fp16, or MXFP4 in OpenAI's layout.

bf16 is the fallback that every runtime loads. A weight is code times scale, eleven significant bits at most, and
bfloat16 has eight: some weights (a fifth, in tests) are rounded, by up to 2^-8 of their value; they are counted.
float16 has the eleven bits and holds every weight of a checkpoint of ours exactly (a product above 65504 is refused).
Everything outside the experts is copied bit for bit, in the dtype it has.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.errors import InputError
from gptoss_quantize.files import Progress, no_progress, write_json
from gptoss_quantize.layouts import FLOAT, MXFP4, dense_shapes, expert_shapes, layer_of, quantization_config
from gptoss_quantize.runtimes.staging import PendingTensor, write_shards
from gptoss_quantize.source import StoredSource


def plain_config(checkpoint: StoredSource, dtype: torch.dtype) -> dict[str, Any]:
    """Return config.json without quantization, for weights of `dtype`."""
    dropped = ("quantization_config", "gptoss_quantize", "torch_dtype")
    raw = {key: value for key, value in checkpoint.config.raw.items() if key not in dropped}
    return raw | {"dtype": str(dtype).removeprefix("torch.")}


def dense_shards(checkpoint: StoredSource) -> tuple[list[PendingTensor], list[list[PendingTensor]]]:
    """Return (tensors outside the layers, tensors of each layer outside its experts), all copied as stored."""
    outer: list[PendingTensor] = []
    layers: list[list[PendingTensor]] = [[] for _ in range(checkpoint.config.layers)]
    for name, shape in dense_shapes(checkpoint.config).items():
        # float32 holds int8 code times scale exactly
        entry = PendingTensor(name, shape, checkpoint.dense_dtype(name), partial(_copied, checkpoint, name))
        layer = layer_of(name)
        place = outer if layer is None else layers[layer]
        place.append(entry)
    return outer, layers


def _copied(checkpoint: StoredSource, name: str) -> list[torch.Tensor]:
    return [checkpoint.dense(name)]


class Rounding:
    """What it cost to write weights in a narrower dtype: how many changed, and by how much at most."""

    def __init__(self, dtype: torch.dtype):
        self.dtype, self.weights, self.rounded, self.worst = dtype, 0, 0, 0.0

    def __call__(self, exact: torch.Tensor, where: str) -> torch.Tensor:
        """Return float32 weights in the dtype, counting what changed; InputError when one would be infinite."""
        narrow = exact.to(self.dtype)
        error = (narrow.float() - exact).abs()
        if not bool(torch.isfinite(error).all()):
            raise InputError(
                f"{where}: weights up to {float(exact.abs().max()):.0f} overflow float16; use --dtype bfloat16"
            )
        self.weights += exact.numel()
        self.rounded += int((error > 0).sum())
        relative = torch.where(exact == 0, 0.0, error / exact.abs())
        self.worst = max(self.worst, float(relative.max()))
        return narrow

    def record(self) -> dict[str, Any]:
        """Return the counts for the report."""
        return {
            "dtype": str(self.dtype).removeprefix("torch."),
            "expert_weights": self.weights,
            "rounded_weights": self.rounded,
            "largest_relative_rounding": self.worst,
        }


def write_float(
    checkpoint: StoredSource, folder: Path, dtype: torch.dtype, on_shard: Progress = no_progress
) -> dict[str, Any]:
    """Write a dequantized directory (experts in `dtype`, everything else as stored) and return what it cost."""
    rounding = Rounding(dtype)
    outer, layers = dense_shards(checkpoint)
    fused = expert_shapes(checkpoint.config, FLOAT)

    def matrices(layer: int, part: str) -> Iterator[torch.Tensor]:
        for number, expert in enumerate(checkpoint.experts(layer)):
            exact = getattr(expert, part)
            yield rounding(
                exact.T if exact.dim() == 2 else exact, f"{checkpoint.path}: layer {layer} expert {number}"
            )

    for layer, entries in enumerate(layers):
        base = f"model.layers.{layer}.mlp.experts."
        for name, part in (("gate_up_proj", "gate_up"), ("down_proj", "down")):
            entries.append(PendingTensor(base + name, fused[base + name], dtype, partial(matrices, layer, part)))
            entries.append(_biases(checkpoint, layer, part))
    total = write_shards(folder, [outer, *layers], "model", on_shard)
    write_json(folder / "config.json", plain_config(checkpoint, dtype))
    checkpoint.side.write(folder)
    return {"bytes": total, **rounding.record()}


def _biases(checkpoint: StoredSource, layer: int, part: str) -> PendingTensor:
    """Return the fused biases of a layer in their stored dtype."""
    name = f"model.layers.{layer}.mlp.experts.{part}_proj_bias"
    E, _ = shape = expert_shapes(checkpoint.config, FLOAT)[name]
    stored = checkpoint.expert_bias(layer, 0, part).dtype
    return PendingTensor(
        name, shape, stored, lambda: (checkpoint.expert_bias(layer, e, part).to(stored) for e in range(E))
    )


def write_mxfp4(checkpoint: Checkpoint, folder: Path, on_shard: Progress = no_progress) -> dict[str, Any]:
    """Write OpenAI's MXFP4 layout, blocks and scales bit for bit; InputError for another expert format."""
    if checkpoint.layout is not MXFP4:
        if checkpoint.layout is FLOAT:
            raise InputError(
                f"{checkpoint.path}: its experts are {checkpoint.layout.name}, and MXFP4 needs codes for them: "
                "gptoss-quantize quantize --format mxfp4 (--method rtn, where they are MXFP4 values already)"
            )
        raise InputError(
            f"{checkpoint.path}: its experts are {checkpoint.layout.name}; codes with free scales have no "
            "MXFP4 form without a second rounding. Quantize the original to MXFP4 instead, or use --to bf16"
        )
    outer, layers = dense_shards(checkpoint)
    E = checkpoint.config.experts

    def slices(name: str) -> Iterator[torch.Tensor]:
        return (checkpoint.read(name, e) for e in range(E))

    for name, shape in expert_shapes(checkpoint.config, MXFP4).items():
        entry = PendingTensor(name, shape, checkpoint.info(name).dtype, partial(slices, name))
        layers[int(name.split(".")[2])].append(entry)
    total = write_shards(folder, [outer, *layers], "model", on_shard)
    config = plain_config(checkpoint, torch.bfloat16)
    config["quantization_config"] = checkpoint.config.raw.get("quantization_config") or quantization_config(MXFP4)
    write_json(folder / "config.json", config)
    checkpoint.side.write(folder)
    return {"bytes": total}
