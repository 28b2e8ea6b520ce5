"""The Triton experts on a real card: errors against float64, the same bits every time, CUDA graphs, time.

Usage: gpu_check.py [--json FILE] [--sweep SECONDS] [--only PART ...] [--small]    FILE: $OUT/gpu.json, else gpu.json

Runs from a checkout with torch and triton alone: nothing needs to be installed. Sizes are gpt-oss-20b's layer (hidden
and intermediate 2880, 32 experts, top-4), weights random. --small: a tiny layer and few tokens, to try the script
itself. --sweep: after that, times candidate tiles by number of tokens for at most so many seconds, to set CONFIGS.

Times are medians of `triton.testing.do_bench` (which flushes the L2 cache) of replays of a CUDA graph, except where
called eager. `GB/s` is the size of the packed experts that are hit over the time; beside it the rate of a large
device copy, bytes read and written. Exits 1 if anything is wrong.
"""

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def use_checkout() -> None:
    """Make gptoss_quantize importable from this checkout: lay the folders out as the wheel does, by links."""
    package = Path(tempfile.mkdtemp(), "gptoss_quantize")
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "kernels").symlink_to(ROOT / "kernels")
    sys.path.insert(0, str(package.parent))


use_checkout()

import torch  # noqa: E402  after the path is set
import triton  # noqa: E402
from triton.testing import do_bench  # noqa: E402

from gptoss_quantize.kernels import experts_triton as et  # noqa: E402
from gptoss_quantize.kernels import int4, planes  # noqa: E402
from gptoss_quantize.kernels.experts import PackedExperts, experts_torch  # noqa: E402

CLAMP = (7.0, 1.702)
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


Bits = tuple[int, int]


def layer(sizes: tuple[int, int, int], group: int, bits: Bits = (4, 4)) -> tuple[torch.Tensor, ...]:
    """Return random packed experts (E, D, F) on the card: the clamps bind, scales have both signs."""
    (experts, hidden, inner), made = sizes, []
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    for rows, columns, width in ((2 * inner, hidden, bits[0]), (hidden, inner, bits[1])):
        words = (experts, rows, planes.words(columns, width))
        made.append(torch.randint(-(2**31), 2**31, words, generator=generator, device="cuda", dtype=torch.int32))
        size = 2.0 ** (4 - width) * columns**-0.5
        made.append(int4.round_scale(draw(experts, rows, columns // group) * size).bfloat16())
        made.append(draw(experts, rows).bfloat16())
    return tuple(made)


def routed(tokens: int, choices: int, sizes: tuple[int, int, int], dtype: torch.dtype) -> Inputs:
    """Return random x [T, D], distinct experts [T, K], probabilities [T, K]; of many tokens half take expert 0."""
    generator = torch.Generator("cuda").manual_seed(tokens)
    x = torch.randn(tokens, sizes[1], generator=generator, device="cuda").to(dtype)
    logits = torch.randn(tokens, sizes[0], generator=generator, device="cuda")
    logits[: tokens // 2, 0] += 9
    values, index = torch.topk(logits, choices)
    return x, index, torch.softmax(values, -1).to(dtype)


def fits(config: et.Config, tokens: int, dtype: torch.dtype) -> bool:
    """Return whether a configuration is for so many tokens of a dtype."""
    name = next(name for name, known in et.table().items() if known is config)
    typed = config.path == "pairs" or name.startswith("float32") == (dtype == torch.float32)
    return typed and tokens <= {"pairs": 8, "direct": config.block_m, "sorted": 10**9}[config.path]


def error(out: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the relative error, root mean square."""
    return float((out.double() - wanted).norm() / wanted.norm())


def captured(call: Callable[[], torch.Tensor]) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """Return (a graph of the call, where it writes)."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph, out


def check(
    name: str, inputs: Inputs, weights: tuple[torch.Tensor, ...], wanted: torch.Tensor, bits: Bits
) -> dict[str, Any]:
    """Return the error of a configuration, whether three runs agree in every bit, and a graph with other inputs."""
    config = et.table()[name]
    runs = [et.run(config, *inputs, weights, CLAMP, bits) for _ in range(3)]
    held = tuple(tensor.clone() for tensor in inputs)
    held[0].zero_()
    held[1].copy_(held[1].flip(0))
    graph, out = captured(lambda: et.run(config, *held, weights, CLAMP, bits))  # type: ignore[arg-type]
    for mine, theirs in zip(held, inputs, strict=True):
        mine.copy_(theirs)
    out.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    return {
        "error": error(runs[0], wanted),
        "same bits": all(torch.equal(runs[0], other) for other in runs[1:]),
        "graph same bits": torch.equal(runs[0], out),
        "default": name == et.choose(len(inputs[0]), inputs[1].shape[1], len(weights[0]), inputs[0].dtype),
    }


def correctness(sizes: tuple[int, int, int], choices: int, counts: list[int]) -> list[dict[str, Any]]:
    """Return a row per group, bits, dtype, number of tokens and configuration."""
    rows = []
    cases = [*itertools.product((64, 32), ((4, 4),), (torch.bfloat16, torch.float16, torch.float32))]
    cases += itertools.product((64, 32), ((3, 3), (2, 2), (3, 4)), (torch.bfloat16,))
    for group, bits, dtype in cases:
        weights, usual = layer(sizes, group, bits), dtype == torch.bfloat16 and bits == (4, 4)
        for tokens in counts if usual else [t for t in counts if t in (1, 4, 64, 512)]:
            inputs = routed(tokens, choices, sizes, dtype)
            packed = PackedExperts(*weights)
            wanted = experts_torch(inputs[0].double(), inputs[1], inputs[2].double(), packed, *CLAMP)
            plain = error(experts_torch(*inputs, packed, *CLAMP), wanted)
            for name, config in et.table().items():
                if not fits(config, tokens, dtype):
                    continue
                row = {
                    "group": group,
                    "bits": bits,
                    "dtype": str(dtype)[6:],
                    "tokens": tokens,
                    "config": name,
                    "plain": plain,
                }
                row |= check(name, inputs, weights, wanted, bits)
                row["ok"] = row["same bits"] and row["graph same bits"] and row["error"] <= 2 * plain
                rows.append(row)
                print({key: f"{value:.2e}" if isinstance(value, float) else value for key, value in row.items()})
    return rows


def dense(weights: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Return bfloat16 (w13 [E, 2F, D], b13, w2 [E, D, F], b2)."""

    bits = PackedExperts(*weights).bits

    def unpacked(words: torch.Tensor, scale: torch.Tensor, width: int) -> torch.Tensor:
        return torch.stack([planes.weights(w, s, width, torch.bfloat16) for w, s in zip(words, scale, strict=True)])

    return unpacked(*weights[:2], bits[0]), weights[2], unpacked(*weights[3:5], bits[1]), weights[5]


def _activated(pre: torch.Tensor) -> torch.Tensor:
    gate, up = pre[:, 0::2].clamp(max=CLAMP[0]), pre[:, 1::2].clamp(-CLAMP[0], CLAMP[0])
    return (up + 1) * gate * torch.sigmoid(gate * CLAMP[1])


def bf16_loop(
    x: torch.Tensor, index: torch.Tensor, prob: torch.Tensor, full: tuple[torch.Tensor, ...]
) -> torch.Tensor:
    """Return the block by a loop over the experts hit, as transformers' eager module has it."""
    out = torch.zeros_like(x)
    for expert in torch.unique(index).tolist():
        token, slot = torch.where(index == expert)
        act = _activated(torch.nn.functional.linear(x[token], full[0][expert], full[1][expert]))
        y = torch.nn.functional.linear(act, full[2][expert], full[3][expert])
        out.index_add_(0, token, y * prob[token, slot, None])
    return out


def bf16_grouped(
    x: torch.Tensor, index: torch.Tensor, prob: torch.Tensor, full: tuple[torch.Tensor, ...]
) -> torch.Tensor:
    """Return the block by torch's grouped product of sorted tokens."""
    flat = index.flatten()
    order = torch.argsort(flat, stable=True)
    owner = flat[order]
    ends = torch.searchsorted(owner, torch.arange(len(full[0]), device=x.device), right=True).to(torch.int32)
    rows = x[order // index.shape[1]]
    act = _activated(torch._grouped_mm(rows, full[0].transpose(1, 2), offs=ends) + full[1][owner])
    y = torch._grouped_mm(act, full[2].transpose(1, 2), offs=ends) + full[3][owner]
    back = torch.empty_like(y)
    back[order] = y * prob.flatten()[order, None]
    return back.view(*index.shape, -1).sum(1)


def copy_rate() -> float:
    """Return the GB/s of a device copy of 1 GiB, bytes read and written."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / do_bench(lambda: target.copy_(source), return_mode="median") / 1e6


def bench(call: Callable[[], torch.Tensor], graph: bool = True, rep: int = 100) -> float:
    """Return milliseconds, of a replayed graph or eager."""
    if graph:
        call = captured(call)[0].replay  # type: ignore[assignment]
    return float(do_bench(call, warmup=rep // 4, rep=rep, return_mode="median"))


def timing(sizes: tuple[int, int, int], choices: int, counts: list[int]) -> list[dict[str, Any]]:
    """Return a row per number of tokens: ours, the plain paths, and the rate of reading the experts hit."""
    weights, small = layer(sizes, 64), {width: layer(sizes, 64, (width, width)) for width in (3, 2)}
    full, rows = dense(weights), []
    expert_bytes = sum(tensor[0].numel() * tensor.element_size() for tensor in weights)
    for tokens in counts:
        inputs = routed(tokens, choices, sizes, torch.bfloat16)
        hit = int(torch.unique(inputs[1]).numel())
        ours = bench(lambda: et.experts_triton(*inputs, *weights, *CLAMP))  # noqa: B023  called at once
        row = {
            "tokens": tokens,
            "experts hit": hit,
            "config": et.choose(tokens, choices, sizes[0], torch.bfloat16),
            "ours ms": ours,
            "ours eager ms": bench(lambda: et.experts_triton(*inputs, *weights, *CLAMP), graph=False),  # noqa: B023
            "bf16 loop eager ms": bench(lambda: bf16_loop(*inputs, full), graph=False),  # noqa: B023
            "experts_torch eager ms": bench(
                lambda: experts_torch(*inputs, PackedExperts(*weights), *CLAMP),  # noqa: B023
                graph=False,
            ),
            "GB/s": hit * expert_bytes / ours / 1e6,
            "TFLOP/s": 6 * tokens * choices * sizes[1] * sizes[2] / ours / 1e9,
        }
        try:
            row["bf16 grouped_mm ms"] = bench(lambda: bf16_grouped(*inputs, full))  # noqa: B023
        except (RuntimeError, AttributeError) as problem:
            row["bf16 grouped_mm ms"] = f"none: {str(problem)[:80]}"
        for name, config in et.table().items():
            if fits(config, tokens, torch.bfloat16):
                row[f"{name} ms"] = bench(lambda: et.run(config, *inputs, weights, CLAMP), rep=50)  # noqa: B023
        for width in (3, 2):
            fewer, bits = small[width], (width, width)
            row[f"{width} bits ms"] = bench(lambda: et.experts_triton(*inputs, *fewer, *CLAMP, *bits))  # noqa: B023
        rows.append(row)
        print({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})
    return rows


def candidates(tokens: int) -> Iterator[tuple[et.Config, list[et.Tile]]]:
    """Yield (path and sizes, tiles to try for either kernel) for a number of tokens."""
    tile = et.Tile
    if tokens <= 8:
        for words in (128, 64):
            yield (
                et.Config("pairs", tile(4, 4), tile(4, 4), words=words),
                [tile(rows, warps) for rows, warps in ((4, 4), (8, 4), (4, 2), (2, 2), (8, 8), (2, 4))],
            )
    if 2 < tokens <= 16:
        yield (
            replace(et.table()["direct-16"]),
            [tile(rows, warps, stages) for rows in (16, 32, 64) for warps in (2, 4) for stages in (3, 5)],
        )
    if tokens > 16:
        for block_m in (16, 32) if tokens < 256 else (64, 128):
            for first in (False, True):
                yield (
                    et.Config("sorted", tile(64, 4, 3), tile(64, 4, 3), block_m=block_m, scale_first=first),
                    [tile(rows, 8 if rows > 32 else 4, stages) for rows in (32, 64, 128) for stages in (3, 4)],
                )


def sweep(sizes: tuple[int, int, int], choices: int, counts: list[int], seconds: float) -> list[dict[str, Any]]:
    """Return the times of candidates, best first by number of tokens: tiles of gate_up, then of down beside the best.

    Each number of tokens has an equal share of the time; what it did not reach is not in the list.
    """
    weights, rows = layer(sizes, 64), []

    def ms(config: et.Config, inputs: Inputs) -> float:
        try:
            return bench(lambda: et.run(config, *inputs, weights, CLAMP), rep=20)
        except (triton.runtime.OutOfResources, RuntimeError):
            return float("inf")

    for place, tokens in enumerate(counts):
        inputs, stop = routed(tokens, choices, sizes, torch.bfloat16), time.monotonic() + seconds / len(counts)
        found: list[tuple[float, et.Config]] = []
        for config, tiles in candidates(tokens):
            best, least = config, float("inf")
            for part in ("gate_up", "down"):
                for option in tiles:
                    if time.monotonic() > stop:
                        break
                    now = replace(best, **{part: option})
                    taken = ms(now, inputs)
                    found.append((taken, now))
                    if taken < least:
                        best, least = now, taken
        found.sort(key=lambda pair: pair[0])
        print(f"sweep {place + 1}/{len(counts)}: {tokens} tokens, {len(found)} tried")
        for taken, config in found[:4]:
            print(f"  {taken:.4f} ms  {config}")
        rows += [{"tokens": tokens, "ms": taken, "config": str(config)} for taken, config in found]
    return rows


def main() -> int:
    """Run everything, write JSON after each part, return 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path(os.environ.get("OUT", "."), "gpu.json"))
    parser.add_argument("--sweep", type=float, default=0.0, metavar="SECONDS")
    parser.add_argument("--only", nargs="+", metavar="PART", help="correctness, copy, timing, sweep")
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    if why := et.problem():
        print(f"gpu_check: {why}")
        return 1
    sizes, choices = ((8, 192, 128), 2) if args.small else ((32, 2880, 2880), 4)
    counts = [1, 4, 8, 64] if args.small else [1, 4, 8, 64, 512, 4096]
    torch.backends.cuda.matmul.allow_tf32 = False
    start = time.monotonic()
    record: dict[str, Any] = {
        "card": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "sizes": {"experts": sizes[0], "hidden": sizes[1], "inner": sizes[2], "choices": choices},
    }
    parts: dict[str, Callable[[], Any]] = {
        "correctness": lambda: correctness(sizes, choices, counts),
        "copy GB/s": copy_rate,
        "timing": lambda: timing(sizes, choices, [*counts[:1], 2, *counts[1:3], 16, *counts[3:]]),
    }
    if args.sweep:
        parts["sweep"] = lambda: sweep(sizes, choices, [1, 4, 4096, 512, 8, 64][: 2 if args.small else 6], args.sweep)
    for name, part in parts.items():
        if args.only and name.split()[0] not in args.only:
            continue
        record[name] = part()
        record[f"{name} seconds"] = round(time.monotonic() - start, 1)
        args.json.write_text(json.dumps(record, indent=1), encoding="utf-8")
    checks = record.get("correctness", [])
    wrong = [row for row in checks if not row["ok"]]
    print(f"{record['card']}: copy {record.get('copy GB/s', 0):.0f} GB/s; {len(checks)} checks, wrong: {wrong}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
