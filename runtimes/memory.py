"""What each runtime takes of a card's memory for a checkpoint of ours, whether that fits, and what to change if not.

To the bytes of the weights a runtime adds, as read in its source: padding of expert matrices, whole cache blocks, and
for windowed layers a window and a batch instead of the whole context. What it needs beside that (CUDA context,
workspaces, graphs) is an estimate, and is called one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gptoss_quantize.config import ModelConfig
from gptoss_quantize.errors import InputError
from gptoss_quantize.layouts import misfit
from gptoss_quantize.sizes import dense_total, expert_bytes
from gptoss_quantize.units import GIB, gib


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
    in_ram: tuple[str, ...]  # parts that never go to the card
    offloads: bool  # whether the experts of some layers may stay in RAM, and be computed there


RUNTIMES = {
    # vLLM 0.33 with our plugin: humming pads rows to 256 and columns to 128; SlidingWindowSpec.max_memory_usage_bytes
    "vLLM": Runtime(
        pad_rows=256, pad_columns=128, group_size=None, cache_block=16, batch=2048 - 1, extra_blocks=1,
        overhead=GIB, utilization=0.95, dense=("source", "int8"), in_ram=(), offloads=False,
    ),
    # llama.cpp: Q4_0 has groups of 32; llama_kv_cache_iswa pads to 256 cells, one micro-batch of 512, whose logits of
    # 201,088 float32 are 0.38 GiB of the overhead; llama-model.cpp keeps the input layer on the CPU (`dev_input`);
    # --n-cpu-moe N keeps ffn_*_exps of the first N layers there, biases too (LLM_FFN_EXPS_REGEX in common.h)
    "llama.cpp": Runtime(
        pad_rows=1, pad_columns=1, group_size=32, cache_block=256, batch=512, extra_blocks=0,
        overhead=GIB, utilization=0.97, dense=("source", "int8"), in_ram=("embedding",), offloads=True,
    ),
}  # fmt: skip


# our own loader, for one user: no padding, transformers' cache as long as the context, windows of their own length.
# torch's CUDA context and workspaces, and 32-bit logits of a batch, are the estimate
OURS = Runtime(
    pad_rows=1, pad_columns=1, group_size=None, cache_block=1, batch=0, extra_blocks=0,
    overhead=GIB, utilization=0.97, dense=("source", "int8"), in_ram=(), offloads=False,
)  # fmt: skip
FIT_CONTEXT = 32768
BITS = (4, 3.5, 3, 2.5, 2)  # of codes; halves are mixtures


def size_to_fit(config: ModelConfig, memory: int, context: int | None = None) -> int:
    """Return the bytes that weight files may have so that `load` and a conversation fit `memory` bytes.

    `context` tokens; None: 32,768, or what the model was made for. InputError where nothing is left for weights.
    """
    tokens = min(FIT_CONTEXT, config.max_positions) if context is None else context
    if tokens > config.max_positions:
        raise InputError(
            f"--context {tokens}: the model was made for {config.max_positions} tokens (max_position_embeddings); "
            "ask for that many or fewer"
        )
    cache = sum(kv_bytes(config, tokens, OURS).values())
    room = int(memory * OURS.utilization) - OURS.overhead - cache
    if room <= 0:
        raise InputError(
            f"--fit {gib(memory)}: {tokens} tokens of context take {gib(cache)}, and about {gib(OURS.overhead)} are "
            "for what runs it; nothing is left for weights: give more, or a shorter --context"
        )
    return room


def fewer_bits(
    config: ModelConfig, group_size: int, memory: int, dense_dtype: Callable[[str], str]
) -> list[dict[str, Any]]:
    """Return, for codes of 4 bits and fewer on average, the bytes of all weights and the longest context beside them.

    For our own loader on a card of `memory` bytes, with attention, embedding and head in 8 bits where the model can
    have that; 0 tokens where nothing fits.
    """
    rows: list[dict[str, Any]] = []
    dense = dense_total(config, "source" if misfit(config, "int8") else "int8", dense_dtype)
    limit = int(memory * OURS.utilization)
    for bits in BITS:
        row = {"bits": bits, "bits_per_weight": bits + 16 / group_size}
        row["bytes"] = dense + expert_bytes(config, group_size, bits=bits)
        rows.append(row | {"context": longest_context(config, group_size, dense, limit, OURS, bits)})
    return rows


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def weights_on_card(config: ModelConfig, dense: str, dense_dtype: Callable[[str], str], runtime: Runtime) -> int:
    """Return the bytes of everything outside the experts that a runtime puts on the card."""
    # a tied embedding is the output head as well
    return dense_total(config, dense, dense_dtype, () if config.tied else runtime.in_ram)


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
    config: ModelConfig,
    group_size: int,
    dense_bytes: int,
    context: int,
    runtime: Runtime,
    value_bytes: int = 2,
    bits: float = 4,
) -> dict[str, int]:
    """Return what a runtime needs for one sequence of `context` tokens, by part; `total` is the sum.

    `bits` are those of a code, on average.
    """
    stored_group = runtime.group_size or group_size
    plain = expert_bytes(config, stored_group, bits=bits)
    cache = kv_bytes(config, context, runtime, value_bytes)
    parts = {
        "experts": plain,
        "padding": expert_bytes(config, stored_group, runtime.pad_rows, runtime.pad_columns, bits) - plain,
        "other weights": dense_bytes,
        "KV cache, full layers": cache["full"],
        "KV cache, windowed layers": cache["sliding"],
        "runtime (estimate)": runtime.overhead,
    }
    return parts | {"total": sum(parts.values())}


def longest_context(
    config: ModelConfig, group_size: int, dense_bytes: int, room: int, runtime: Runtime, bits: float = 4
) -> int:
    """Return the longest context, in whole cache blocks, whose total stays within `room` bytes; 0 if none does."""
    low, high = 0, _up(config.max_positions, runtime.cache_block) // runtime.cache_block
    while low < high:
        middle = (low + high + 1) // 2
        need = card(config, group_size, dense_bytes, middle * runtime.cache_block, runtime, bits=bits)["total"]
        low, high = (middle, high) if need <= room else (low, middle - 1)
    return min(low * runtime.cache_block, config.max_positions)


def offload(config: ModelConfig, group_size: int, total: int, room: int, runtime: Runtime) -> dict[str, int] | None:
    """Return for how many layers the experts must stay in RAM so that the rest fits the card, and their bytes.

    {"layers": 0, "bytes": 0} where everything fits; None where a runtime cannot do it, or it is not enough.
    """
    layer = expert_bytes(config, runtime.group_size or group_size) // config.layers
    layers = max(0, -(-(total - room) // layer))
    if layers > (config.layers if runtime.offloads else 0):
        return None
    return {"layers": layers, "bytes": layers * layer}


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
    `offload` is what `offload` returns.
    """
    rows = []
    for name, runtime in RUNTIMES.items():
        room = int(gpu_memory * runtime.utilization)
        form = dense if dense in runtime.dense else "source"
        weights = weights_on_card(config, form, dense_dtype, runtime)
        for context in contexts:
            parts = card(config, group_size, weights, context, runtime)
            row = {"runtime": name, "context": context, "dense": form, "parts": parts, "room": room}
            row["loads"] = dense in runtime.dense
            row["fits"] = parts["total"] <= room
            row["offload"] = offload(config, group_size, parts["total"], room, runtime)
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
    now = weights_on_card(config, dense, dense_dtype, runtime)
    options: list[tuple[str, int]] = []
    small = weights_on_card(config, "int8", dense_dtype, runtime)
    if dense != "int8" and "int8" in runtime.dense:
        options.append(("--dense int8", card(config, group_size, small, context, runtime)["total"]))
    options.append(("8-bit KV cache", card(config, group_size, now, context, runtime, 1)["total"]))
    if dense != "int8" and "int8" in runtime.dense:
        both = card(config, group_size, small, context, runtime, 1)["total"]
        options.append(("--dense int8 and 8-bit KV cache", both))
    found = [{"change": text, "total": total, "fits": total <= room} for text, total in options]
    longest = longest_context(config, group_size, now, room, runtime)
    if longest:
        found.append({"change": f"context of {longest:,} tokens", "tokens": longest, "total": room, "fits": True})
    needed = card(config, group_size, now, context, runtime)["total"] / runtime.utilization
    found.append({"change": f"a card of {needed / GIB:.1f} GiB or more", "total": int(needed), "fits": True})
    return found


def llamacpp_command(
    gguf: str,
    config: ModelConfig,
    group_size: int,
    dense: str,
    gpu_memory: int,
    contexts: tuple[int, ...],
    dense_dtype: Callable[[str], str],
) -> dict[str, Any]:
    """Return the llama.cpp command line for an exported file, with the experts that do not fit the card left in RAM.

    The longest context that fits whole where that is the shortest asked for, or longer; else the middle one of
    those asked for, with `--n-cpu-moe`.
    """
    runtime = RUNTIMES["llama.cpp"]
    weights, room = weights_on_card(config, dense, dense_dtype, runtime), int(gpu_memory * runtime.utilization)
    longest = longest_context(config, group_size, weights, room, runtime)
    asked = sorted(contexts)
    context = min(asked[-1], longest) if longest >= asked[0] else asked[len(asked) // 2]
    total = card(config, group_size, weights, context, runtime)["total"]
    found = offload(config, group_size, total, room, runtime)
    everything = dense_total(config, dense, dense_dtype) - weights + total
    record: dict[str, Any] = {"context": context, "offload": found, "without_card": everything}
    on_card = f" -ngl 99 --n-cpu-moe {found['layers']}" if found and found["layers"] else " -ngl 99"
    return record | {"command": f"llama-server -m {gguf}/model.gguf -c {context}{on_card if found else ''}"}


def serve_command(
    out: str,
    config: ModelConfig,
    group_size: int,
    dense: str,
    gpu_memory: int,
    context: int,
    dense_dtype: Callable[[str], str],
) -> dict[str, str]:
    """Return the vLLM command line for the written checkpoint, and why it has the options that it has."""
    runtime = RUNTIMES["vLLM"]
    weights = dense_total(config, dense, dense_dtype)
    longest = longest_context(config, group_size, weights, int(gpu_memory * runtime.utilization), runtime)
    options = f"--max-model-len {min(context, longest)} --gpu-memory-utilization {runtime.utilization}"
    without = "does not load the file" if dense == "int8" else "needs --moe-backend humming, or drops the biases"
    return {
        "command": f"vllm serve {out} {options}"
        if longest
        else f"(no vLLM command: the weights do not fit {gpu_memory / GIB:.1f} GiB)",
        "why": "where vLLM runs: pip install 'gptoss-quantize[vllm]', whose plugin adds the experts' biases, by "
        f"humming or our Triton kernels (docs/vllm.md; on a card by source). vLLM without it {without}",
        "two_cards": "--tensor-parallel-size 2"
        if config.intermediate // 2 % group_size == 0
        else "--tensor-parallel-size 2 --enable-expert-parallel (halves of a row hold no whole groups of "
        f"{group_size}; --group-size 32 needs no expert parallelism)",
    }
