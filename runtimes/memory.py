"""What each runtime takes of a card's memory for a checkpoint of ours, whether that fits, and what to change if not.

To the bytes of the weights a runtime adds, as read in its source: padding of expert matrices, whole cache blocks, and
for windowed layers a window and a batch instead of the whole context. What it needs beside that (CUDA context,
workspaces, graphs) is an estimate, and is called one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gptoss_quantize.config import ModelConfig
from gptoss_quantize.sizes import dense_total, expert_bytes
from gptoss_quantize.units import GIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """How a runtime lays a model out in memory; numbers read in its source unless said otherwise."""

    pad_rows: int  # of expert matrices
    pad_columns: int
    group_size: int | None  # that it stores; None: the checkpoint's
    cache_block: int  # tokens
    batch: int  # tokens that a windowed layer keeps beside its window
    extra_blocks: int
    overhead: int  # bytes, an estimate
    utilization: float  # share of the card that it may take
    dense: tuple[str, ...]  # forms of the other tensors that it loads


RUNTIMES = {
    # vLLM 0.33: humming pads rows to 256 and columns to 128; SlidingWindowSpec.max_memory_usage_bytes
    "vLLM": Runtime(
        pad_rows=256, pad_columns=128, group_size=None, cache_block=16, batch=2048 - 1, extra_blocks=1,
        overhead=GIB, utilization=0.95, dense=("source",),
    ),
    # llama.cpp: Q4_0 has groups of 32; llama_kv_cache_iswa pads to 256 cells, one micro-batch of 512
    "llama.cpp": Runtime(
        pad_rows=1, pad_columns=1, group_size=32, cache_block=256, batch=512, extra_blocks=0,
        overhead=GIB // 2, utilization=0.97, dense=("source", "int8"),
    ),
}  # fmt: skip


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def kv_bytes(config: ModelConfig, context: int, runtime: Runtime, value_bytes: int = 2) -> dict[str, int]:
    """Return the bytes of the KV cache of one sequence, for full and for windowed layers."""
    per_token = 2 * config.kv_heads * config.head_dim * value_bytes
    totals = {"full": 0, "sliding": 0}
    for i in range(config.layers):
        window = config.window(i)
        if window is None:
            totals["full"] += _up(context, runtime.cache_block) * per_token
            continue
        tokens = _up(min(window + runtime.batch, context), runtime.cache_block)
        totals["sliding"] += (tokens + runtime.extra_blocks * runtime.cache_block) * per_token
    return totals


def card(
    config: ModelConfig, group_size: int, dense_bytes: int, context: int, runtime: Runtime, value_bytes: int = 2
) -> dict[str, int]:
    """Return what a runtime needs for one sequence of `context` tokens, by part; `total` is the sum."""
    stored_group = runtime.group_size or group_size
    plain = expert_bytes(config, stored_group)
    cache = kv_bytes(config, context, runtime, value_bytes)
    parts = {
        "experts": plain,
        "padding": expert_bytes(config, stored_group, runtime.pad_rows, runtime.pad_columns) - plain,
        "other weights": dense_bytes,
        "KV cache, full layers": cache["full"],
        "KV cache, windowed layers": cache["sliding"],
        "runtime (estimate)": runtime.overhead,
    }
    return parts | {"total": sum(parts.values())}


def longest_context(config: ModelConfig, group_size: int, dense_bytes: int, room: int, runtime: Runtime) -> int:
    """Return the longest context, in whole cache blocks, whose total stays within `room` bytes; 0 if none does."""
    low, high = 0, _up(config.max_positions, runtime.cache_block) // runtime.cache_block
    while low < high:
        middle = (low + high + 1) // 2
        need = card(config, group_size, dense_bytes, middle * runtime.cache_block, runtime)["total"]
        low, high = (middle, high) if need <= room else (low, middle - 1)
    return min(low * runtime.cache_block, config.max_positions)


def fits(
    config: ModelConfig,
    group_size: int,
    dense: str,
    gpu_memory: int,
    contexts: tuple[int, ...],
    dense_dtype: Callable[[str], str],
) -> list[dict[str, Any]]:
    """Return a verdict per runtime and context: what it takes, whether it fits, and what to change if it does not.

    A runtime that does not load the form of `dense` is given for the form that it does load, with loads = False.
    """
    rows = []
    for name, runtime in RUNTIMES.items():
        room = int(gpu_memory * runtime.utilization)
        form = dense if dense in runtime.dense else "source"
        weights = dense_total(config, form, dense_dtype)
        for context in contexts:
            parts = card(config, group_size, weights, context, runtime)
            row = {"runtime": name, "context": context, "dense": form, "parts": parts, "room": room}
            row["loads"] = dense in runtime.dense
            row["fits"] = parts["total"] <= room
            row["changes"] = (
                [] if row["fits"] else _changes(config, group_size, dense_dtype, context, runtime, form, room)
            )
            rows.append(row)
    return rows


def _changes(
    config: ModelConfig,
    group_size: int,
    dense_dtype: Callable[[str], str],
    context: int,
    runtime: Runtime,
    dense: str,
    room: int,
) -> list[dict[str, Any]]:
    """Return what could be changed, each with the total that it leads to and whether that fits."""
    now = dense_total(config, dense, dense_dtype)
    options: list[tuple[str, int]] = []
    small = dense_total(config, "int8", dense_dtype)
    if dense != "int8" and "int8" in runtime.dense:
        options.append(("--dense int8", card(config, group_size, small, context, runtime)["total"]))
    options.append(("8-bit KV cache", card(config, group_size, now, context, runtime, 1)["total"]))
    if dense != "int8" and "int8" in runtime.dense:
        both = card(config, group_size, small, context, runtime, 1)["total"]
        options.append(("--dense int8 and 8-bit KV cache", both))
    found = [{"change": text, "total": total, "fits": total <= room} for text, total in options]
    longest = longest_context(config, group_size, now, room, runtime)
    if longest:
        found.append({"change": f"context of {longest} tokens", "total": room, "fits": True})
    needed = card(config, group_size, now, context, runtime)["total"] / runtime.utilization
    found.append({"change": f"a card of {needed / GIB:.1f} GiB or more", "total": int(needed), "fits": True})
    return found


def serve_command(
    out: str,
    config: ModelConfig,
    group_size: int,
    gpu_memory: int,
    context: int,
    dense_dtype: Callable[[str], str],
) -> dict[str, str]:
    """Return the vLLM command line for the written checkpoint, and why it has the options that it has."""
    runtime = RUNTIMES["vLLM"]
    weights = dense_total(config, "source", dense_dtype)
    longest = longest_context(config, group_size, weights, int(gpu_memory * runtime.utilization), runtime)
    options = f"--max-model-len {min(context, longest)} --gpu-memory-utilization {runtime.utilization}"
    return {
        "command": f"vllm serve {out} --moe-backend humming {options}"
        if longest
        else f"(no vLLM command: the weights do not fit {gpu_memory / GIB:.1f} GiB)",
        "why": "humming is the backend that adds the experts' biases: the one chosen by default on most cards "
        "(Triton) drops them without a word, and Marlin refuses a hidden size that is not a multiple of 128 "
        "(read in vLLM 0.33, not run)",
        "two_cards": "--tensor-parallel-size 2"
        if group_size == 32
        else "--enable-expert-parallel (halves of a row hold no whole groups of 64; --group-size 32 allows "
        "--tensor-parallel-size 2)",
    }
