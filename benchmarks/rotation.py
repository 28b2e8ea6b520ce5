"""An orthogonal rotation of the residual stream before quantizing: does it help weight-only int4 with groups?

Usage: rotation.py MODEL OUT [--tokens 16384] [--eval-tokens 6144] [--layers 3,12,21] [--kind hadamard|random]

Norm weights are folded into what reads them, then an orthogonal matrix Q is folded into embedding, attention, router,
experts and head: W_in diag(norm) Q for what reads the stream, Q^T W_out for what writes it. The function and the file
format stay as they are, and outlier channels are spread over all. OUT/rotated-KIND is the model, in bfloat16.
Printed: the block errors (benchmarks/blocks.py) of both models under RTN and GPTQ at groups of 32 and 64, and what
rounding the rotated model's own tensors to bfloat16 costs without any quantization.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch

from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.eval.divergence import evaluate
from gptoss_quantize.quantize.recipes import RECIPES
from gptoss_quantize.source import Expert

sys.path.insert(0, str(Path(__file__).resolve().parent))

from blocks import block_error, collect, load_ids, quantized, rewrite, routed, target_of

READERS = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "router.weight")


def hadamard(size: int) -> torch.Tensor:
    """Return the Sylvester Hadamard matrix of a power of two, orthonormal."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix / math.sqrt(size)


def orthogonal(size: int, kind: str, seed: int = 0) -> torch.Tensor:
    """Return an orthogonal matrix [D, D] in float64: random, or random signs times Hadamard (x) a random small one.

    2880 = 64 * 45 and 576 = 64 * 9: the power of two gets the Hadamard matrix, the odd rest a random one.
    """
    generator = torch.Generator().manual_seed(seed)
    power = size & -size if kind == "hadamard" else 1
    rest = torch.randn(size // power, size // power, generator=generator, dtype=torch.float64)
    rotation = torch.kron(torch.linalg.qr(rest).Q.contiguous(), hadamard(power))
    signs = torch.randint(0, 2, (size,), generator=generator) * 2 - 1
    return signs[:, None] * rotation


def rotate_dense(source: Checkpoint, name: str, tensor: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Return a tensor outside the experts with norm and rotation folded in."""
    wide, prefix = tensor.double(), ".".join(name.split(".")[:3])
    if name.endswith("norm.weight"):
        return torch.ones_like(tensor)
    if name.endswith(("lm_head.weight", *READERS)):
        which = "post_attention_layernorm" if "router" in name else "input_layernorm"
        norm = "model.norm.weight" if "lm_head" in name else f"{prefix}.{which}.weight"
        wide = wide * source.dense(norm).double() @ rotation
    elif name in ("model.embed_tokens.weight",) or name.endswith("o_proj.bias"):
        wide = wide @ rotation
    elif name.endswith("o_proj.weight"):
        wide = rotation.T @ wide
    return wide.to(tensor.dtype)


def rotate(source: Checkpoint, dest: Path, rotation: torch.Tensor) -> None:
    """Write the rotated model; a tied one cannot be rotated, since only the head takes the final norm."""
    if source.config.tied:
        raise SystemExit("embedding and head are tied: the final norm cannot be folded")

    def expert(layer: int, _: int, e: Expert) -> Expert:
        gamma = source.dense(f"model.layers.{layer}.post_attention_layernorm.weight").double()
        gate_up = (e.gate_up.double() * gamma) @ rotation
        return Expert(gate_up, e.gate_up_bias, rotation.T @ e.down.double(), e.down_bias.double() @ rotation)

    rewrite(source, dest, lambda name, tensor: rotate_dense(source, name, tensor, rotation), expert)


def main() -> None:
    """Rotate, quantize a few layers of both models, print and write the block errors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--eval-tokens", type=int, default=6144)
    parser.add_argument("--layers", default="3,12,21")
    parser.add_argument("--kind", choices=("hadamard", "random"), default="hadamard")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    original, rotated = Checkpoint(args.model), args.out / f"rotated-{args.kind}"
    if not rotated.exists():
        rotate(original, rotated, orthogonal(original.config.hidden, args.kind))
    layers, ids = [int(x) for x in args.layers.split(",")], load_ids(args.model, args.tokens, args.eval_tokens)
    (noise,) = evaluate(original, [Checkpoint(rotated)], ids[1], torch.float32)
    record = {"kind": args.kind, "layers": layers, "kl_of_the_rotated_model": noise["kl_mean"], "rows": {}}
    print(f"KL(original || rotated in bfloat16) = {noise['kl_mean']:.5f}")
    print("| method | group | original | rotated | ratio |\n|---|---:|---:|---:|---:|")
    blocks = {name: collect(Checkpoint(path), ids, layers) for name, path in (("o", args.model), ("r", rotated))}
    for method, group in (("rtn-signed", 32), ("rtn-signed", 64), ("gptq", 32), ("gptq", 64)):
        target = target_of("int4", group, RECIPES[method])
        means = {}
        for name, source in (("o", original), ("r", Checkpoint(rotated))):
            results = [quantized(b, source, routed(b, source), target) for b in blocks[name]]
            errors = [block_error(b, source, r, target) for b, r in zip(blocks[name], results, strict=True)]
            means[name] = math.exp(sum(map(math.log, errors)) / len(errors))
        record["rows"][f"{method} {group}"] = means
        print(
            f"| {method} | {group} | {means['o']:.5f} | {means['r']:.5f} | {means['r'] / means['o']:.3f} |",
            flush=True,
        )
        (args.out / f"rotation-{args.kind}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
