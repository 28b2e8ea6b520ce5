"""What a quantized model takes on disk, from shapes alone, to the byte.

Counted are the tensors that `quantize` writes, and the header that safetensors puts before them. What a runtime adds
in the memory of a card stands in `runtimes.memory`.
"""

import json
from collections.abc import Callable
from typing import Any

import torch

from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.config import ModelConfig
from gptoss_quantize.layouts import DENSE, INT4, WIDTHS, Layout, codes_suffix, dense_shapes
from gptoss_quantize.shards import DTYPES

# safetensors' names and bytes, in the order in which it sorts dtypes: widest alignment first
DTYPE_BYTES = {"I64": 8, "F64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I8": 1, "U8": 1}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Stored = tuple[str, str, tuple[int, ...]]  # name, dtype, shape


def dense_dtype_of(source: Checkpoint | None) -> Callable[[str], str]:
    """Return a function from the name of a tensor outside the experts to its stored dtype; BF16 where it has none.

    A matrix that a checkpoint keeps in 8 bits has none, and nothing has where there is no checkpoint.
    """
    if source is None:
        return lambda name: "BF16"
    stored = set(source.names())
    return lambda name: _NAMES[source.info(name).dtype] if name in stored else "BF16"


def shard_tensors(
    config: ModelConfig,
    group_size: int,
    dense: str,
    dense_dtype: Callable[[str], str],
    layout: Layout = INT4,
) -> list[list[Stored]]:
    """Return the tensors of every shard that `quantize` writes: first the outer ones, then one shard per layer.

    `dense_dtype` gives the stored dtype of a tensor outside the experts; `dense` is "source" or "int8".
    """
    shards: list[list[Stored]] = [[] for _ in range(config.layers + 1)]
    for name, shape in dense_shapes(config).items():
        shard = shards[int(name.split(".")[2]) + 1 if name.startswith("model.layers.") else 0]
        for stored, (size, allowed) in DENSE[dense].parts(name, shape).items():
            packed = DENSE[dense].packs(name)
            shard.append((stored, _written(allowed, torch.float16) if packed else dense_dtype(name), size))
    for i in range(config.layers):
        for name, (shape, allowed) in layout.stored(config, group_size, i).items():
            full = f"model.layers.{i}.mlp.experts.{name}"
            shards[i + 1].append((full, _written(allowed, torch.bfloat16), shape))
    return shards


def _written(allowed: tuple[torch.dtype, ...], floating: torch.dtype) -> str:
    """Return safetensors' name of the dtype that is written where these may be read."""
    dtype = floating if floating in allowed else allowed[0]
    return next(name for name, known in DTYPES.items() if known == dtype)


def tensor_bytes(stored: Stored) -> int:
    """Return the bytes of a tensor's data."""
    size = DTYPE_BYTES[stored[1]]
    for length in stored[2]:
        size *= length
    return size


def header_bytes(shard: list[Stored]) -> int:
    """Return the bytes of the safetensors header with its length field: compact JSON, padded to 8 bytes.

    Tensors are sorted by dtype, widest first, then by name.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at, order = 0, list(DTYPE_BYTES)
    for name, dtype, shape in sorted(shard, key=lambda t: (order.index(t[1]), t[0])):
        size = tensor_bytes((name, dtype, shape))
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    length = len(json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-length // 8) * 8


def part_of(name: str) -> str:
    """Return the part of the model that a stored tensor is counted under."""
    if ".mlp.experts." in name:
        codes = {codes_suffix(bits): "expert codes" for bits in WIDTHS}
        kinds = codes | {"_scale": "expert scales", "_bias": "expert biases"}
        return next(part for end, part in kinds.items() if name.endswith(end))
    if ".self_attn." in name:
        return "attention"
    if ".mlp.router." in name:
        return "routers"
    if "embed_tokens" in name:
        return "embedding"
    return "output head" if name.startswith("lm_head") else "norms"


def disk(shards: list[list[Stored]]) -> dict[str, Any]:
    """Return the exact bytes of the weight files: by part, by file, in all."""
    parts: dict[str, int] = {}
    for shard in shards:
        for stored in shard:
            part = part_of(stored[0])
            parts[part] = parts.get(part, 0) + tensor_bytes(stored)
    files = [header_bytes(shard) + sum(map(tensor_bytes, shard)) for shard in shards]
    headers = sum(files) - sum(parts.values())
    return {"parts": parts | {"file headers": headers}, "files": files, "total": sum(files)}


def expert_bytes(
    config: ModelConfig, group_size: int, pad_rows: int = 1, pad_columns: int = 1, bits: float = 4
) -> int:
    """Return the bytes of all expert codes, scales and biases, matrices padded to multiples; `bits` on average."""
    total = 0
    for rows, columns in ((2 * config.intermediate, config.hidden), (config.hidden, config.intermediate)):
        R, C = -(-rows // pad_rows) * pad_rows, -(-columns // pad_columns) * pad_columns
        total += int(R * C * bits / 8) + 2 * R * -(-C // group_size) + 2 * R
    return config.layers * config.experts * total


def dense_total(
    config: ModelConfig, dense: str, dense_dtype: Callable[[str], str], left_out: tuple[str, ...] = ()
) -> int:
    """Return the bytes of everything outside the experts, but for the tensors of the parts in `left_out`."""
    shards = shard_tensors(config, 32, dense, dense_dtype)
    return sum(
        tensor_bytes(t)
        for shard in shards
        for t in shard
        if ".mlp.experts." not in t[0] and part_of(t[0]) not in left_out
    )
