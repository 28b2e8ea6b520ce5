"""A checkpoint in AutoGPTQ's layout (v1 or v2) or AutoAWQ's GEMM layout, for loaders that want those names.

One linear layer per expert and projection, `...mlp.experts.E.{gate_proj,up_proj,down_proj}`, with the codes of the
checkpoint untouched and its scales in float16. gate_proj holds the even rows of gate_up_proj (the true gate), up_proj
the odd ones; config.json records that, since readers disagree on it (`imports.py`). No runtime of today loads these
experts by itself (docs/runtimes.md); the layouts serve loaders of one's own and the importers of other tools.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gptoss_quantize import __version__
from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.errors import InputError
from gptoss_quantize.files import Progress, no_progress, write_json
from gptoss_quantize.kernels import ggml, int4, legacy
from gptoss_quantize.layouts import INT4
from gptoss_quantize.runtimes.export_hf import dense_shards, plain_config
from gptoss_quantize.runtimes.staging import PendingTensor, write_shards

SPLIT_KEY = "gate_up_split"
INTERLEAVED = "interleaved"
# projection -> the part of an expert, and its rows there
PROJECTIONS = {
    "gate_proj": ("gate_up", slice(0, None, 2)),
    "up_proj": ("gate_up", slice(1, None, 2)),
    "down_proj": ("down", slice(None)),
}
_KEEP = ["self_attn", "router", "lm_head"]


def _gptq_config(group_size: int, version: int) -> dict[str, Any]:
    return {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": group_size,
        "sym": True,
        "desc_act": False,
        "lm_head": False,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
        "dynamic": {r"-:.*self_attn.*": {}, r"-:.*router.*": {}},
        "meta": {"quantizer": [f"gptoss-quantize:{__version__}"], SPLIT_KEY: INTERLEAVED},
    }


def _awq_config(group_size: int) -> dict[str, Any]:
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": _KEEP,
        "meta": {"quantizer": [f"gptoss-quantize:{__version__}"], SPLIT_KEY: INTERLEAVED},
    }


def linear_tensors(
    packed_RW: torch.Tensor, scale_RG: torch.Tensor, layout: str
) -> dict[str, Callable[[], torch.Tensor]]:
    """Return suffix -> tensor of one linear layer in a layout: "gptq", "gptq_v2" or "awq"."""
    rows, groups = scale_RG.shape
    scales = scale_RG.to(torch.float16).T.contiguous
    if layout == "awq":
        return {
            "qweight": lambda: legacy.awq_qweight(int4.unpack(packed_RW)),
            "qzeros": lambda: legacy.awq_qzeros(groups, rows),
            "scales": scales,
        }
    columns = packed_RW.shape[1] * int4.CODES_PER_WORD
    version = 1 if layout == "gptq" else 2
    return {
        "qweight": lambda: legacy.gptq_qweight(packed_RW),
        "qzeros": lambda: legacy.gptq_qzeros(groups, rows, version=version),
        "scales": scales,
        "g_idx": lambda: legacy.group_index(columns, columns // groups),
    }


def linear_shapes(rows: int, columns: int, group_size: int, layout: str) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Return suffix -> (shape, dtype) of one linear layer in a layout."""
    groups = columns // group_size
    common = {
        "qzeros": ((groups, rows // 8), torch.int32),
        "scales": ((groups, rows), torch.float16),
    }
    if layout == "awq":
        return {"qweight": ((columns, rows // 8), torch.int32), **common}
    return {"qweight": ((columns // 8, rows), torch.int32), **common, "g_idx": ((columns,), torch.int32)}


def _entries(checkpoint: Checkpoint, layer: int, expert: int, layout: str) -> Iterator[PendingTensor]:
    config = checkpoint.config
    base = f"model.layers.{layer}.mlp.experts.{expert}."

    def tensor(part: str, rows: slice, suffix: str) -> Iterator[torch.Tensor]:
        name = checkpoint.layout.base(layer, expert, part)
        scale = checkpoint.read(name + "_weight_scale")[rows]
        if inexact := ggml.float16_scale(scale)[1]:
            raise InputError(
                f"{checkpoint.path}: {inexact} of {scale.numel()} scales of {name}_weight_scale are not "
                f"exact in float16, which {layout} stores them in; quantize again with gptoss-quantize, which "
                "chooses scales that both can hold, or use --to bf16"
            )
        packed = checkpoint.read(name + "_weight_packed")[rows]
        yield linear_tensors(packed, scale, layout)[suffix]()

    def bias(part: str, rows: slice) -> Iterator[torch.Tensor]:
        yield checkpoint.expert_bias(layer, expert, part)[rows]

    sizes = {
        "gate_proj": (config.intermediate, config.hidden),
        "up_proj": (config.intermediate, config.hidden),
        "down_proj": (config.hidden, config.intermediate),
    }
    for projection, (part, rows) in PROJECTIONS.items():
        name = f"{base}{projection}."
        shapes = linear_shapes(*sizes[projection], checkpoint.group_size, layout)
        for suffix, (shape, dtype) in shapes.items():
            yield PendingTensor(name + suffix, shape, dtype, partial(tensor, part, rows, suffix))
        stored = checkpoint.info(checkpoint.layout.base(layer, expert, part) + "_bias").dtype
        yield PendingTensor(name + "bias", sizes[projection][:1], stored, partial(bias, part, rows))


def write_legacy(
    checkpoint: Checkpoint, folder: Path, layout: str, on_shard: Progress = no_progress
) -> dict[str, Any]:
    """Write a directory in layout "gptq", "gptq_v2" or "awq"; InputError when the experts are not int4 of ours."""
    config = checkpoint.config
    if checkpoint.layout is not INT4:
        raise InputError(
            f"{checkpoint.path}: its experts are {checkpoint.layout.name}, not int4; quantize it first "
            "(gptoss-quantize quantize), or use --to bf16"
        )
    if config.hidden % 8 or config.intermediate % 8:
        raise InputError(f"{checkpoint.path}: {layout} packs eight outputs a word; use --to bf16")
    outer, layers = dense_shards(checkpoint)
    for layer, entries in enumerate(layers):
        for expert in range(config.experts):
            entries += _entries(checkpoint, layer, expert, layout)
    # not model-*.safetensors: stock transformers would load that with random experts and only warn
    total = write_shards(folder, [outer, *layers], f"gptoss-{layout}", on_shard)
    quantization = (
        _awq_config(checkpoint.group_size)
        if layout == "awq"
        else _gptq_config(checkpoint.group_size, 1 if layout == "gptq" else 2)
    )
    settings = plain_config(checkpoint, torch.float16) | {"quantization_config": quantization}
    write_json(folder / "config.json", settings)
    checkpoint.side.write(folder)
    return {"bytes": total, "layout": layout}
