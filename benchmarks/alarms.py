"""The smallest faults of a runtime, one layer each, and which alarms of `verify` and `compare` see them.

    python benchmarks/alarms.py MODEL CANDIDATE [--sequences 4] [--seq-len 256] [--positions 16] [--window 128]

MODEL is an unquantized model (the demo model), CANDIDATE a checkpoint made from it. A fault is put between the file
and the computation, in MODEL and CANDIDATE alike: the runtime reads both wrongly in the same way, so that what the
unquantized model shows is as large as the fault itself. Printed for every fault: KL, its median and largest position,
top-1, and the verdicts that `verify` gives where the runtime computes in float32, in bfloat16, or with int8
activations: first with the noise of a right runtime (relative alarm), then with its own (absolute alarm).
The last column is what `verify` says of the file, if it was written so (`eval.kinship`).

--window replaces the model's sliding window, since a window longer than the text cannot be seen by anything.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gptoss_quantize.calibration.text import TextSpec, load_tokenizer, load_tokens
from gptoss_quantize.checkpoint import Checkpoint, Expert
from gptoss_quantize.model import hidden_states, logits
from gptoss_quantize.runtimes.agreement import Agreement, compare, verdict
from gptoss_quantize.runtimes.verify import spread

# what right models show where the activations are int8: docs/verdicts.md
Damage = Callable[[int, int, Expert], Expert]


def random_expert(layer: int, number: int) -> Damage:
    """One expert's matrices are random numbers of the same size."""

    def damage(at: int, expert: int, weights: Expert) -> Expert:
        if (at, expert) != (layer, number):
            return weights
        generator = torch.Generator().manual_seed(0)

        def noise(like: torch.Tensor) -> torch.Tensor:
            return torch.randn(like.shape, generator=generator).mul_(like.float().std()).to(like.dtype)

        return replace(weights, gate_up=noise(weights.gate_up), down=noise(weights.down))

    return damage


def random_experts(at: int, expert: int, weights: Expert) -> Expert:
    """Every expert is random numbers."""
    return random_expert(at, expert)(at, expert, weights)


def no_biases(layer: int) -> Damage:
    """The experts' biases of one layer are dropped, as vLLM's default kernel does in all of them."""
    return lambda at, expert, w: (
        w
        if at != layer
        else replace(w, gate_up_bias=torch.zeros_like(w.gate_up_bias), down_bias=torch.zeros_like(w.down_bias))
    )


def halves(layer: int) -> Damage:
    """The interleaved gate and up rows of one layer are read as halves."""

    def cut(rows: torch.Tensor) -> torch.Tensor:
        return torch.stack(rows.chunk(2), dim=1).flatten(0, 1)

    return lambda at, expert, w: (
        w if at != layer else replace(w, gate_up=cut(w.gate_up), gate_up_bias=cut(w.gate_up_bias))
    )


class Faulty(Checkpoint):
    """A checkpoint whose experts arrive damaged."""

    damage: Damage | None = None

    def expert(self, layer: int, expert: int, dtype: torch.dtype = torch.float32) -> Expert:
        """Return one expert's weights, damaged."""
        weights = super().expert(layer, expert, dtype)
        return weights if self.damage is None else self.damage(layer, expert, weights)


def predicted(checkpoint: Checkpoint, ids: torch.Tensor, at: list[int], dtype: torch.dtype) -> torch.Tensor:
    """Return the logits [P, V] at the positions compared."""
    hidden = hidden_states(checkpoint, ids, dtype)[:, at].flatten(0, 1)
    return logits(hidden, checkpoint.head().to(dtype))


def faults(layers: int, window: int) -> dict[str, tuple[Damage | None, int]]:
    """Return name -> (damage of experts, sliding window)."""
    middle = layers // 2
    return {
        "none": (None, window),
        "all experts random": (random_experts, window),
        f"expert 0 of layer {middle} random": (random_expert(middle, 0), window),
        f"expert 0 of layer {layers - 1} (the last) random": (random_expert(layers - 1, 0), window),
        f"biases of layer {middle} dropped": (no_biases(middle), window),
        f"halves in layer {middle}": (halves(middle), window),
        "window one shorter": (None, window - 1),
    }


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one row per fault."""
    spec = TextSpec(source="heldout", tokens=args.sequences * args.seq_len, seq_len=args.seq_len, shuffle=False)
    ids = load_tokens(spec, load_tokenizer(args.model)).ids
    at = spread(args.seq_len, args.positions)
    models = {"baseline": Faulty(args.model), "candidate": Faulty(args.candidate)}
    right: dict[tuple[str, torch.dtype], torch.Tensor] = {}
    rows = []
    layers = models["baseline"].config.layers
    for name, (damage, window) in faults(layers, args.window).items():
        found: dict[tuple[str, torch.dtype], Agreement] = {}
        for who, model in models.items():
            model.damage = damage
            model.config = replace(model.config, sliding_window=window)
            for dtype in (torch.float32, torch.bfloat16):
                got = predicted(model, ids, at, dtype)
                right.setdefault((who, dtype), got)
                found[who, dtype] = compare(right[who, torch.float32], got)
        row: dict[str, Any] = {"fault": name}
        for dtype in (torch.float32, torch.bfloat16):
            precision = "float32" if dtype == torch.float32 else "16 bit"
            noise = compare(right["baseline", torch.float32], right["baseline", dtype])
            got = found["candidate", dtype]
            row[precision] = got.record() | {
                "relative": verdict(got, noise, precision),
                "absolute": verdict(got, found["baseline", dtype], precision),
                "baseline": found["baseline", dtype].record(),
            }
        rows.append(row)
        shown = row["float32"]
        print(
            f"{name:40} KL {shown['kl']:.2e} median {shown['kl_median']:.1e} max {shown['kl_max']:.1e} "
            f"top-1 {100 * shown['top1']:.1f} | bf16 KL {row['16 bit']['kl']:.2e} | "
            + " ".join(f"{p}: {row[p]['relative']}/{row[p]['absolute']}" for p in ("float32", "16 bit")),
            flush=True,
        )
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("candidate", type=Path)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--positions", type=int, default=16)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = measure(args)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
