"""Every step of the recipe switched off by itself: what each is worth.

Usage: ablation.py MODEL OUT.json [--layers 4,12,20,28] [--tokens 32768] [--eval-tokens 8192] [--only NAME ...]

A few layers, spread over the model, are quantized with each variant and judged by the block error on held-out text
(benchmarks/blocks.py). The table shows the geometric mean over layers relative to the whole recipe; above 1 means
that the step earns its place. Rows that OUT.json already has for the same settings are kept, so an interrupted run
goes on.
"""

import argparse
import json
import math
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.quantize.recipes import RECIPES, override

sys.path.insert(0, str(Path(__file__).resolve().parent))

from blocks import Block, block_error, collect, load_ids, quantized, routed, target_of

WHOLE = "the whole recipe (gptq)"
ALL_TOKENS = "every token to every expert"  # as llm-compressor calibrates by default
# row -> (method, settings)
ROWS: dict[str, tuple[str, list[str]]] = {
    WHOLE: ("gptq", []),
    "scales signed full range, no search": ("gptq", ["scale=signed"]),
    "scales absmax / 7.5": ("gptq", ["scale=absmax"]),
    "no error feedback (search + sweep)": ("gptq", ["gptq=false", "asymmetric=0"]),
    "no act-order": ("gptq", ["act_order=false"]),
    "no extra damping for starved experts": ("gptq", ["damping_starved=0"]),
    "damping 0.01, none for starved experts": ("gptq", ["damping=0.01", "damping_starved=0"]),
    "tokens not weighted": ("gptq", ["token_power=0"]),
    "tokens weighted by p^2": ("gptq", ["token_power=2"]),
    "not centred, no bias correction": ("gptq", ["centre=false"]),
    "no sweep": ("gptq", ["sweeps=0"]),
    "two sweeps": ("gptq", ["sweeps=2"]),
    "no asymmetric target": ("gptq", ["asymmetric=0"]),
    "asymmetric target 0.5": ("gptq", ["asymmetric=0.5"]),
    "asymmetric target 1.0": ("gptq", ["asymmetric=1"]),
    ALL_TOKENS: ("gptq", ["token_power=0"]),
    "awq+gptq (half the fold)": ("awq+gptq", []),
    "awq+gptq, the whole fold": ("awq+gptq", ["awq_strength=1"]),
    "awq+gptq, a quarter of the fold": ("awq+gptq", ["awq_strength=0.25"]),
    "awq+gptq, half, gate_up alone": ("awq+gptq", ["awq_down=false"]),
    "awq": ("awq", []),
    "rtn-signed": ("rtn-signed", []),
    "rtn": ("rtn", []),
}


def run_row(blocks: list[Block], source: Checkpoint, name: str, group_size: int) -> dict[str, object]:
    """Return the block errors of one variant."""
    method, settings = ROWS[name]
    recipe = override(RECIPES[method], settings)
    target, started = target_of("int4", group_size, recipe), time.perf_counter()
    errors = []
    for block in blocks:
        seen = routed(block, source)
        if name == ALL_TOKENS:
            tokens, experts = len(seen.x), source.config.experts
            seen.index, seen.prob = (
                torch.arange(experts).repeat(tokens, 1),
                torch.full((tokens, experts), 1 / experts),
            )
        errors.append(block_error(block, source, quantized(block, source, seen, target), target))
    return {
        "settings": [method, *settings],
        "errors": errors,
        "error": math.exp(sum(map(math.log, errors)) / len(errors)),
        "seconds": round(time.perf_counter() - started, 1),
    }


def table(rows: dict[str, dict[str, object]]) -> str:
    """Return the rows as a Markdown table, relative to the whole recipe."""
    whole = float(str(rows[WHOLE]["error"]))
    lines = ["| variant | block error | relative |", "|---|---:|---:|"]
    for name, row in rows.items():
        error = float(str(row["error"]))
        lines.append(f"| {name} | {error:.5f} | {error / whole:.3f} |")
    return "\n".join(lines)


def main() -> None:
    """Collect the layers once, run every row, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", default="4,12,20,28")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--eval-tokens", type=int, default=8192)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--only", action="append", choices=list(ROWS))
    args = parser.parse_args()
    source = Checkpoint(args.model)
    layers = [int(part) for part in args.layers.split(",")]
    settings = {
        "model": str(args.model.resolve()),
        "layers": layers,
        "tokens": args.tokens,
        "eval_tokens": args.eval_tokens,
        "group_size": args.group_size,
        "recipe": asdict(RECIPES["gptq"]),
    }
    record = {"settings": settings, "rows": {}}
    if args.out.exists():
        before = json.loads(args.out.read_text())
        record = before if before["settings"] == settings else record
    blocks = collect(source, load_ids(args.model, args.tokens, args.eval_tokens), layers)
    for name in dict.fromkeys([WHOLE, *args.only]) if args.only else ROWS:
        if name not in record["rows"]:
            record["rows"][name] = run_row(blocks, source, name, args.group_size)
            args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            print(name, record["rows"][name], flush=True)
    print(table(record["rows"]))


if __name__ == "__main__":
    main()
