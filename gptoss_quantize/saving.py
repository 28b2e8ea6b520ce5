"""`save_pretrained` of a packed model: a directory in our layout, which `load` reads to the same logits bit for bit.

Experts are written as they lie in memory, in codes and scales; everything else by the values that the model has now,
in the dtype of the directory it was loaded from where that holds them exactly, else in the model's own. So a norm or
a router that somebody changed is kept, in float32 if need be. What our layout has no place for is refused: modules of
an adapter that was not merged, a resized embedding, experts of another kind.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.dense_int8 import Int8Embedding, Int8Linear
from gptoss_quantize.errors import InputError
from gptoss_quantize.files import save_tensors, staged, write_json
from gptoss_quantize.kernels.experts import PackedExperts
from gptoss_quantize.layouts import Layout, dense_shapes, layer_of
from gptoss_quantize.model_card import QUANTIZATION_REPORT, write_card
from gptoss_quantize.packed_experts import PackedExpertsModule, stored_parts

GENERATION = "generation_config.json"
ADAPTED = "save an adapter by itself (PEFT's save_pretrained), or merge it before quantizing (--adapter)"


def save_packed(model: nn.Module, checkpoint: Checkpoint, dest: Path) -> list[str]:
    """Write a loaded model to the directory `dest` and return the names of the tensors that had been changed.

    `checkpoint` is what it was loaded from: config, tokenizer and licence are its. InputError where DEST is taken, or
    where the model holds what the layout does not.
    """
    experts, dense, changed = _experts(model, checkpoint), _dense(model, checkpoint), []
    for name, tensor in dense.items():
        stored = checkpoint.read(name)
        if not torch.equal(tensor, stored.to(tensor.dtype)):
            changed.append(name)
        dense[name] = _narrowed(tensor, stored.dtype)
    parts: list[dict[str, torch.Tensor]] = [{} for _ in range(1 + checkpoint.config.layers)]
    for name, tensor in dense.items():
        layer = layer_of(name)
        parts[0 if layer is None else 1 + layer][name] = tensor
    stem = checkpoint.layout.shard_stem
    weight_map: dict[str, str] = {}
    sums: dict[str, int] = {}
    total = 0
    with staged(dest, "save_pretrained", overwrite=None, inputs=(checkpoint.path,)) as folder:
        for number, tensors in enumerate(parts, 1):
            name = f"{stem}-{number:05d}-of-{len(parts):05d}.safetensors"
            whole = tensors if number == 1 else tensors | _stored(checkpoint.layout, experts[number - 2], number - 2)
            sums[name] = save_tensors(folder / name, whole)
            weight_map |= dict.fromkeys(whole, name)
            total += sum(tensor.nbytes for tensor in whole.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / checkpoint.layout.index_name, index)
        write_json(folder / "config.json", checkpoint.config.raw)
        checkpoint.side.write(folder)
        _write_generation(model, checkpoint.path, folder)
        _write_report(checkpoint.path, folder, {"crc32": sums, "bytes": total, "changed": changed})
        write_card(folder)
        # as it was written, or not at all
        Checkpoint(folder)
    return changed


def _dense(model: nn.Module, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Return stored name -> tensor of everything outside the experts; InputError for what has no place there."""
    state = {name: tensor for name, tensor in model.state_dict().items() if "rotary" not in name}
    out: dict[str, torch.Tensor] = {}
    for name, shape in dense_shapes(checkpoint.config).items():
        if checkpoint.dense_layout.packs(name):
            path = name.removesuffix(".weight")
            module = model.get_submodule(path)
            if not isinstance(module, Int8Linear | Int8Embedding):
                raise InputError(f"{path} is {type(module).__name__}, was 8-bit when it was loaded; {ADAPTED}")
            found = (state.pop(f"{path}.codes"), state.pop(f"{path}.scale"))
            out |= dict(zip(checkpoint.dense_layout.parts(name, shape), found, strict=True))
            continue
        tensor = state.pop(name, None)
        if tensor is None:
            raise InputError(f"{name} is no longer in the model; {ADAPTED}")
        if tuple(tensor.shape) != shape:
            raise InputError(
                f"{name} has shape {list(tensor.shape)}, and was loaded with {list(shape)}; change the size of the "
                "unquantized model, and quantize that"
            )
        out[name] = tensor
    _check_rest(model, checkpoint, state)
    return {name: tensor.detach().cpu() for name, tensor in out.items()}


def _check_rest(model: nn.Module, checkpoint: Checkpoint, state: dict[str, torch.Tensor]) -> None:
    """Raise InputError for tensors that are left over, but for a head that is the embedding."""
    if checkpoint.config.tied:
        embedding, head = model.get_submodule("model.embed_tokens"), model.get_submodule("lm_head")
        for part in ("weight", "codes", "scale"):
            ours, own = getattr(embedding, part, None), state.pop(f"lm_head.{part}", None)
            if own is not None and (ours is None or not torch.equal(own, ours)):
                raise InputError(
                    f"{type(head).__name__} lm_head is no longer the embedding; untie the base, quantize that"
                )
    if state:
        raise InputError(f"{next(iter(state))} is in the model, and our layout has no place for it; {ADAPTED}")


def _narrowed(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor in a dtype that holds it exactly, else as it is."""
    narrow = tensor.to(dtype)
    return narrow if torch.equal(narrow.to(tensor.dtype), tensor) else tensor


def _experts(model: nn.Module, checkpoint: Checkpoint) -> list[PackedExpertsModule]:
    found = []
    for i in range(checkpoint.config.layers):
        module = model.get_submodule(f"model.layers.{i}.mlp.experts")
        if not isinstance(module, PackedExpertsModule):
            raise InputError(
                f"model.layers.{i}.mlp.experts is {type(module).__name__}, was packed when it was loaded; {ADAPTED}"
            )
        found.append(module)
    return found


def _stored(layout: Layout, module: PackedExpertsModule, layer: int) -> dict[str, torch.Tensor]:
    """Return the stored tensors of a layer's experts."""
    experts, out = module.experts(), {}
    count = experts.w13_packed.shape[0] if isinstance(experts, PackedExperts) else experts.place.shape[1]
    for e in range(count):
        one = experts.of(e)
        for part, name in zip(stored_parts(layout, layer), PackedExperts.__slots__, strict=True):
            # a copy: views of one mapped file share their memory, which safetensors refuses
            out[f"model.layers.{layer}.mlp.experts.{e}.{part}"] = getattr(one, name).cpu().clone()
    return out


def _write_generation(model: Any, source: Path, folder: Path) -> None:
    """Write generation_config.json anew where somebody changed the model's."""
    before = GenerationConfig.from_pretrained(source) if (source / GENERATION).is_file() else GenerationConfig()
    if model.generation_config.to_diff_dict() != before.to_diff_dict():
        model.generation_config.save_pretrained(folder)


def _write_report(source: Path, folder: Path, facts: dict[str, Any]) -> None:
    """Write the report of the quantization with what is true of the new files, where there is one."""
    if (source / QUANTIZATION_REPORT).is_file():
        report = json.loads((source / QUANTIZATION_REPORT).read_text(encoding="utf-8"))
        write_json(folder / QUANTIZATION_REPORT, report | facts)
