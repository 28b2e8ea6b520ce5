"""The smallest faults of a runtime, one layer each, and which alarms of `verify` and `compare` see them.

    python benchmarks/alarms.py faults MODEL [--window 128] [--only WORD ...] [--json FILE]
    python benchmarks/alarms.py files MODEL CHECKPOINT ...

`faults`: MODEL is any checkpoint. Each fault is put between the file and the computation, as a runtime with that
fault would compute. Printed: its KL, median and largest position, top-1, and for every precision whether the absolute
alarms see it (a runtime that misreads the baseline in the same way has no others), and whether the relative one does
where the noise is MODEL's own in bfloat16 products. The KL ceiling and the least top-1 of `compare` come last.

`files`: what `verify` says of right checkpoints' experts against MODEL's: how far rounding moves them.

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
from gptoss_quantize.eval.verdict import CEILING_KL, LEAST_TOP1
from gptoss_quantize.model import hidden_states, logits
from gptoss_quantize.runtimes.agreement import LIMITS, alarm, bound, compare
from gptoss_quantize.runtimes.check_file import experts_row
from gptoss_quantize.runtimes.verify import VerifyRequest, spread

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
        "all experts random": (random_experts, window),
        f"expert 0 of layer {middle} random": (random_expert(middle, 0), window),
        f"expert 0 of layer {layers - 1} (the last) random": (random_expert(layers - 1, 0), window),
        f"biases of layer {middle} dropped": (no_biases(middle), window),
        f"halves in layer {middle}": (halves(middle), window),
        "window one shorter": (None, window - 1),
    }


def text_of(args: argparse.Namespace) -> torch.Tensor:
    """Return the token ids [N, S] that `verify` would take."""
    spec = TextSpec(source="heldout", tokens=args.sequences * args.seq_len, seq_len=args.seq_len, shuffle=False)
    return load_tokens(spec, load_tokenizer(args.model)).ids


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Print and return one row per fault."""
    ids, at, model = text_of(args), spread(args.seq_len, args.positions), Faulty(args.model)
    window = args.window or model.config.sliding_window
    model.config = replace(model.config, sliding_window=window)
    right = predicted(model, ids, at, torch.float32)
    noise = compare(right, predicted(model, ids, at, torch.bfloat16))
    rows = [{"fault": "none, bfloat16 products", **noise.record()}]
    print(f"noise in bfloat16: KL {noise.kl:.2e} median {noise.kl_median:.1e} max {noise.kl_max:.1e}", flush=True)
    for name, (damage, size) in faults(model.config.layers, window).items():
        if args.only and not any(word in name for word in args.only):
            continue
        model.damage = damage
        model.config = replace(model.config, sliding_window=size)
        got = compare(right, predicted(model, ids, at, torch.float32))
        seen = {precision: alarm(got, precision) for precision in LIMITS}
        row = {
            "fault": name,
            **got.record(),
            "absolute": seen,
            "relative": got.kl > bound(noise, got),
            "compare": got.kl > CEILING_KL or got.top1 < LEAST_TOP1,
        }
        rows.append(row)
        print(
            f"{name:40} KL {got.kl:.2e} median {got.kl_median:.1e} max {got.kl_max:.1e} top-1 {100 * got.top1:5.1f}"
            + " | "
            + ", ".join(f"{precision}: {'alarm' if why else 'silent'}" for precision, why in seen.items())
            + f" | relative: {row['relative']} | compare: {row['compare']}",
            flush=True,
        )
    return rows


def files(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Print and return what `verify` says of the experts of right checkpoints."""
    ids, baseline, rows = text_of(args), Checkpoint(args.model), []
    for path in args.checkpoints:
        asked = VerifyRequest(checkpoint=Checkpoint(path), baseline=baseline, ids=ids, positions=[0], texts=[])
        rows.append({"checkpoint": str(path), **experts_row(asked).record()})
        print(f"{path}: {rows[-1]['verdict']}: {rows[-1]['note']}", flush=True)
    return rows


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["faults", "files"])
    parser.add_argument("model", type=Path)
    parser.add_argument("checkpoints", type=Path, nargs="*")
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--positions", type=int, default=16)
    parser.add_argument("--window", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = measure(args) if args.what == "faults" else files(args)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
