"""What the experiments share: layers of a model on real text, quantized and judged alone; and rewritten models.

Every layer is calibrated on what the original model gives it, so layers do not depend on each other: a few of them,
spread over the model, are enough to compare recipes. Judged is the *block error*: the squared error of the whole
routed block's output, router included, over its squared norm, on tokens of documents that calibration has not seen.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from gptoss_quantize.calibration.capture import Routed
from gptoss_quantize.calibration.text import TextSpec, load_following, load_tokenizer, load_tokens
from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.layouts import PARTS, pick_layout
from gptoss_quantize.machine import Clock, compute_dtype
from gptoss_quantize.model import attend, batches, embed, mlp_input, moe, rope_tables, router
from gptoss_quantize.quantize.layer import LayerResult, Target, calibrated_layer
from gptoss_quantize.quantize.recipes import Recipe
from gptoss_quantize.source import Expert

JUDGED = 12288  # held-out tokens that fidelity.py judges on


@dataclass(slots=True)
class Block:
    """The residual stream before the experts of one layer, of calibration and of held-out tokens, and the tensors."""

    index: int
    dense: dict[str, torch.Tensor]
    calibration: torch.Tensor  # [T, D] float32
    heldout: torch.Tensor  # [T', D] float32
    wanted: torch.Tensor  # [T', D] float32, what the block adds to the held-out tokens


def load_ids(model: Path, tokens: int, eval_tokens: int, seq_len: int = 512) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the packaged (calibration, held-out) token ids, each [N, S].

    The first JUDGED held-out tokens are left out: what a recipe was chosen on must not judge it too.
    """
    tokenizer = load_tokenizer(model)
    held = TextSpec(source="heldout", tokens=JUDGED, seq_len=seq_len, shuffle=False)
    rest = load_following(held, tokenizer, eval_tokens)
    if rest is None or rest.tokens < eval_tokens:
        raise SystemExit(f"the held-out text ends before {JUDGED} + {eval_tokens} tokens; give fewer --eval-tokens")
    return load_tokens(TextSpec(tokens=tokens, seq_len=seq_len), tokenizer).ids, rest.ids


@torch.inference_mode()
def collect(source: Checkpoint, ids: tuple[torch.Tensor, torch.Tensor], layers: list[int]) -> list[Block]:
    """Return the wanted layers of the unquantized model on both sets of tokens."""
    config, dtype, found = source.config, compute_dtype("cpu"), []
    calibration, heldout = ids
    h = embed(source, torch.cat((calibration, heldout)))
    rope = rope_tables(config, h.shape[1])
    for i in range(max(layers) + 1):
        dense = source.layer(i)
        for batch in batches(*h.shape[:2]):
            h[batch] = attend(h[batch], dense, config, i, rope, dtype)
        flat = h.flatten(0, 1)
        split = calibration.numel()
        before = flat.clone() if i in layers else None
        x = mlp_input(flat, dense, config)
        out = moe(x.to(dtype), *router(x, dense, config), source.experts(i, dtype), config)
        if before is not None:
            found.append(Block(i, dense, before[:split].clone(), before[split:].clone(), out[split:].clone()))
        h += out.view_as(h)
    return found


def routed(block: Block, source: Checkpoint) -> Routed:
    """Return what the experts see of the calibration tokens."""
    x = mlp_input(block.calibration, block.dense, source.config)
    return Routed(x.to(compute_dtype("cpu")), *router(x, block.dense, source.config), torch.zeros_like(x))


@torch.inference_mode()
def quantized(block: Block, source: Checkpoint, seen: Routed, target: Target) -> LayerResult:
    """Return the layer quantized by a recipe, `seen` being what the experts see (`routed`)."""
    return calibrated_layer(source, block.index, block.dense, seen, target, source.config.experts, Clock())


def experts_of(result: LayerResult, target: Target, experts: int, dtype: torch.dtype) -> list[Expert]:
    """Return a quantized layer's experts, dequantized."""

    def read(name: str, index: int | None) -> torch.Tensor:
        tensor = result.tensors[name.removeprefix("model.layers.0.")]
        return tensor if index is None else tensor[index]

    out = []
    for e in range(experts):
        gate_up, down = (target.layout.weight(read, 0, e, part, dtype) for part in PARTS)
        biases = (target.layout.bias(read, 0, e, part).to(dtype) for part in PARTS)
        out.append(Expert(gate_up, next(biases), down, next(biases)))
    return out


@torch.inference_mode()
def block_error(block: Block, source: Checkpoint, result: LayerResult, target: Target) -> float:
    """Return |block output - original's|^2 / |original's|^2 on the held-out tokens."""
    config = source.config
    dense = block.dense | result.tensors
    x = mlp_input(block.heldout, dense, config)
    dtype = compute_dtype("cpu")
    got = moe(x.to(dtype), *router(x, dense, config), experts_of(result, target, config.experts, dtype), config)
    return float((got - block.wanted).square().sum() / block.wanted.square().sum())


def target_of(name: str, group_size: int, recipe: Recipe) -> Target:
    """Return the output format for a recipe."""
    return Target(recipe, *pick_layout(name, group_size))


def rewrite(
    source: Checkpoint,
    dest: Path,
    dense: Callable[[str, torch.Tensor], torch.Tensor] = lambda _, tensor: tensor,
    expert: Callable[[int, int, Expert], Expert] = lambda _, __, expert: expert,
) -> None:
    """Write a changed copy of a model with bfloat16 experts, layer by layer; names given to `dense` are full ones."""
    final, dest = dest, dest.with_name(dest.name + ".partial")
    shutil.rmtree(dest, ignore_errors=True)
    dest.mkdir(parents=True)
    config, weight_map = source.config, {}
    outer = [n for n in source.shapes() if not n.startswith("model.layers.")]
    for number in range(config.layers + 1):
        if number == 0:
            tensors = {name: dense(name, source.dense(name)) for name in outer}
        else:
            prefix = f"model.layers.{number - 1}."
            tensors = {prefix + n: dense(prefix + n, t) for n, t in source.layer(number - 1).items()}
            changed = [expert(number - 1, e, x) for e, x in enumerate(source.experts(number - 1))]
            for name, parts in (
                ("gate_up_proj", [e.gate_up.T for e in changed]),
                ("gate_up_proj_bias", [e.gate_up_bias for e in changed]),
                ("down_proj", [e.down.T for e in changed]),
                ("down_proj_bias", [e.down_bias for e in changed]),
            ):
                tensors[f"{prefix}mlp.experts.{name}"] = torch.stack([p.bfloat16() for p in parts])
        file = f"model-{number + 1:05d}-of-{config.layers + 1:05d}.safetensors"
        save_file({k: v.contiguous() for k, v in tensors.items()}, dest / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (dest / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    raw = {k: v for k, v in config.raw.items() if k not in ("quantization_config", "gptoss_quantize")}
    (dest / "config.json").write_text(json.dumps(raw, indent=1))
    for path in source.path.iterdir():
        if path.suffix in (".json", ".jinja") and "index" not in path.name and path.name != "config.json":
            shutil.copyfile(path, dest / path.name)
    dest.rename(final)
