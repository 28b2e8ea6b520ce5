"""What survives of a fine-tune in MXFP4: round-to-nearest against GPTQ on the same grid.

Usage: fine_tune.py MODEL OUT [--rank 16] [--strength 0.05] [--tokens 32768] [--eval-tokens 12288]

Makes, in OUT: `base`, MODEL's experts on the MXFP4 grid, which plays OpenAI's release; `tuned`, the base plus a
random low-rank delta on every expert matrix, `strength` times its Frobenius norm, in bfloat16, which plays a merged
fine-tune; and the tuned model quantized to MXFP4 again in several ways. A weight of the release is a grid point, and
a delta below half a step is rounded away: plain rounding gives the release back. So two divergences are measured for
each: KL(tuned || quantized), what of the fine-tune was lost, and KL(base || quantized), how far from the release.
Prints a Markdown table; OUT/fine_tune.json holds the numbers.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from gptoss_quantize import api
from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.eval.divergence import evaluate
from gptoss_quantize.source import Expert

sys.path.insert(0, str(Path(__file__).resolve().parent))

from blocks import load_ids, rewrite

# method, and fields of its recipe that differ
WAYS: dict[str, tuple[str, list[str]]] = {
    "RTN, floor rule (OCP)": ("rtn", []),
    "RTN, ceil rule": ("rtn", ["scale=ceil"]),
    "scales searched, no feedback": ("gptq", ["gptq=false", "sweeps=0", "asymmetric=0"]),
    "GPTQ (ours)": ("gptq", []),
}


def low_rank(shape: torch.Size, rank: int, generator: torch.Generator) -> torch.Tensor:
    """Return a random matrix of a rank, with unit Frobenius norm."""
    left = torch.randn(shape[0], rank, generator=generator)
    right = torch.randn(rank, shape[1], generator=generator)
    delta = left @ right
    return delta / delta.norm()


def quantize(model: Path, dest: Path, way: tuple[str, list[str]], tokens: int) -> None:
    """Quantize to MXFP4 unless it is there already."""
    if not dest.exists():
        api.quantize(model, dest, way[0], "mxfp4", recipe=way[1], tokens=tokens)


def main() -> None:
    """Make the models, quantize, evaluate against both, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--strength", type=float, default=0.05)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--eval-tokens", type=int, default=12288)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    base = args.out / "base"
    kind = f"{args.rank}-{args.strength}"
    tuned = args.out / f"tuned-{kind}"
    quantize(args.model, base, ("rtn", []), args.tokens)
    if not tuned.exists():
        generator = torch.Generator().manual_seed(0)

        def tune(_layer: int, _expert: int, expert: Expert) -> Expert:
            moved = []
            for weight in (expert.gate_up, expert.down):
                delta = low_rank(weight.shape, args.rank, generator)
                moved.append(weight + args.strength * weight.norm() * delta)
            return Expert(moved[0], expert.gate_up_bias, moved[1], expert.down_bias)

        rewrite(Checkpoint(base), tuned, expert=tune)
    candidates = {"the release itself": base}
    for number, (name, way) in enumerate(WAYS.items()):
        candidates[name] = args.out / f"mxfp4-{kind}-{args.tokens}-{number}"
        quantize(tuned, candidates[name], way, args.tokens)
    _, ids = load_ids(args.model, args.tokens, args.eval_tokens)
    opened = [Checkpoint(path) for path in candidates.values()]
    to_tuned = evaluate(Checkpoint(tuned), opened, ids, torch.float32)
    to_base = evaluate(Checkpoint(base), opened, ids, torch.float32)
    rows = {n: {"tuned": t, "base": b} for n, t, b in zip(candidates, to_tuned, to_base, strict=True)}
    record = {"rank": args.rank, "strength": args.strength, "tokens": args.tokens, "rows": rows}
    (args.out / "fine_tune.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print("| MXFP4 | KL(tuned \\|\\| it) | top-1 with tuned | KL(base \\|\\| it) |\n|---|---:|---:|---:|")
    for name, row in rows.items():
        mine, theirs = row["tuned"], row["base"]
        print(f"| {name} | {mine['kl_mean']:.4f} | {100 * mine['top1_agreement']:.1f} % | {theirs['kl_mean']:.4f} |")


if __name__ == "__main__":
    main()
