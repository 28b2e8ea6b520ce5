"""Files of other tools rescued into ours: which rows are the gate is found out, not assumed.

Three tools use one name for two things (`foreign.py`). The answer comes from, in this order:

1. `--split`, when the user knows, or the key that our own exports write (`gate_up_split`);
2. the likelihood of real text under both readings. A wrong reading permutes the rows that enter the activation
   and costs nats, not hundredths, so a thousand tokens settle it. What the metadata suggests (which tool wrote the
   file) is reported beside it. Where the two readings are too close to tell, the file is refused, not guessed.

Codes and scales are then copied: the import rounds nothing.
"""

import math
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from gptoss_quantize import __version__
from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.errors import InputError
from gptoss_quantize.files import Progress, no_progress, staged, write_json
from gptoss_quantize.kernels import ggml
from gptoss_quantize.layouts import INT4, expert_shapes, quantization_config
from gptoss_quantize.model import hidden_states, logits
from gptoss_quantize.model_card import EXPORT_REPORT, write_card
from gptoss_quantize.prompts import check_ids
from gptoss_quantize.runtimes.export_hf import dense_shards, plain_config, write_float
from gptoss_quantize.runtimes.export_legacy import SPLIT_KEY
from gptoss_quantize.runtimes.foreign import JOINED, SPLITS, Foreign
from gptoss_quantize.runtimes.staging import PendingTensor, write_shards
from gptoss_quantize.source import Source

# nats per token; a wrong reading of the demo model costs more than 1
CLEAR_NATS = 0.1


def suggested_split(quantization: dict[str, Any]) -> tuple[str | None, str]:
    """Return (what the metadata suggests or None, why): the writer's name, which is no proof."""
    meta = quantization.get("meta") or {}
    if meta.get(SPLIT_KEY) in SPLITS:
        return meta[SPLIT_KEY], f"meta.{SPLIT_KEY}"
    writer = " ".join(map(str, meta.get("quantizer") or [])).lower()
    if "gptqmodel" in writer:
        return "halves", "written by GPTQModel"
    if "autoround_version" in quantization or quantization.get("quant_method") == "auto-round":
        return "interleaved", "written by AutoRound"
    if quantization.get("quant_method") == "compressed-tensors":
        # 0.14.0.1; the snapshot of 2026-08-22 split halves
        return "interleaved", "compressed-tensors, as llm-compressor 0.14 writes it"
    return None, "nothing in config.json says"


@torch.inference_mode()
def sequence_nll(source: Source, ids_NS: torch.Tensor, on_layer: Callable[[int], None]) -> torch.Tensor:
    """Return the mean negative log-likelihood of each sequence [N], in nats per token."""
    hidden = hidden_states(source, ids_NS, on_layer=on_layer)
    head = source.head().float()
    out = [functional.cross_entropy(logits(hidden[n, :-1], head), ids_NS[n, 1:]) for n in range(len(ids_NS))]
    return torch.stack(out).double()


def detect_split(path: Path, ids_NS: torch.Tensor, on_layer: Progress = no_progress) -> dict[str, Any]:
    """Return {"split", "because", "nll" per reading, "metadata"}; InputError when the text cannot tell."""
    first = Foreign(path, SPLITS[0])
    if first.projections == JOINED:
        return {"split": SPLITS[0], "because": "gate and up are one matrix", "metadata": None, "nll": None}
    suggestion, why = suggested_split(first.quantization or {})
    if why == f"meta.{SPLIT_KEY}":
        return {"split": suggestion, "because": why, "metadata": suggestion, "nll": None}
    readings = [Foreign(path, split) for split in SPLITS]
    check_ids(ids_NS, readings[0].config.vocab, f"{path}: the text")
    total = sum(reading.config.layers for reading in readings)
    nll = []
    for number, reading in enumerate(readings):
        before = number * reading.config.layers

        def report(layer: int, before: int = before) -> None:
            on_layer(before + layer + 1, total)

        nll.append(sequence_nll(reading, ids_NS, report))
    gap = nll[1] - nll[0]
    mean, error = float(gap.mean()), float(gap.std() / math.sqrt(len(gap))) if len(gap) > 1 else 0.0
    means = {split: float(value.mean()) for split, value in zip(SPLITS, nll, strict=True)}
    if abs(mean) < max(CLEAR_NATS, 4 * error):
        raise InputError(
            f"{path}: real text is about as likely under both readings of gate_proj ({means['interleaved']:.3f} and "
            f"{means['halves']:.3f} nats per token), so it cannot tell which one is meant ({why}); look it up and "
            "pass --split interleaved (gate_proj = even rows) or --split halves (gate_proj = first half)"
        )
    return {
        "split": SPLITS[0] if mean > 0 else SPLITS[1],
        "because": "likelihood of real text",
        "metadata": suggestion,
        "metadata_source": why,
        "nll": means,
        "nll_difference_se": error,
    }


def import_checkpoint(
    path: Path, dest: Path, decision: dict[str, Any], *, to: str, overwrite: bool, on_shard: Progress = no_progress
) -> dict[str, Any]:
    """Write another tool's checkpoint as ours (`to` "int4") or dequantized ("bf16"), and return the report."""
    source = Foreign(path, decision["split"])
    with staged(dest, "import", overwrite=overwrite, inputs=(path,)) as folder:
        if to == "bf16":
            facts = write_float(source, folder, torch.bfloat16, on_shard)
        else:
            facts = _write_int4(source, folder, on_shard)
        report = {
            "version": __version__,
            "source": str(path.resolve()),
            "layout": source.layout,
            "to": to,
            "reading": decision,
            "dequantized_outside_experts": len(source.packed_dense),
            "notes": source.notes,
            **facts,
        }
        write_json(folder / EXPORT_REPORT, report)
        write_card(folder)
        if to == "int4":
            _check(source, Checkpoint(folder))
    return report


def _write_int4(source: Foreign, folder: Path, on_shard: Progress) -> dict[str, Any]:
    config = source.config
    first = source.packed(0, 0)
    group_size = config.hidden // first["w13_weight_scale"].shape[1]
    shapes = expert_shapes(config, INT4, group_size)
    counts = {"scales": 0, "scales_inexact_in_float16": 0, "scales_inexact_in_bfloat16": 0}

    # the file is in order of experts within each dtype: each is converted once for its words, once for the rest
    converted = lru_cache(maxsize=1)(source.packed)

    def tensor(layer: int, expert: int, suffix: str) -> Iterator[torch.Tensor]:
        value = converted(layer, expert)[suffix]
        if suffix.endswith("_scale"):
            counts["scales"] += value.numel()
            counts["scales_inexact_in_float16"] += ggml.float16_scale(value)[1]
            counts["scales_inexact_in_bfloat16"] += int((value.bfloat16().float() != value.float()).sum())
        yield value

    outer, layers = dense_shards(source)
    for layer, entries in enumerate(layers):
        for expert in range(config.experts):
            for suffix, like in first.items():
                name = f"model.layers.{layer}.mlp.experts.{expert}.{suffix}"
                entries.append(PendingTensor(name, shapes[name], like.dtype, partial(tensor, layer, expert, suffix)))
    total = write_shards(folder, [outer, *layers], INT4.shard_stem, on_shard)
    marker = {"version": __version__, "format": INT4.name, "method": "imported", "group_size": group_size}
    settings = {"quantization_config": quantization_config(INT4, group_size), "gptoss_quantize": marker}
    write_json(folder / "config.json", plain_config(source, torch.bfloat16) | settings)
    source.side.write(folder)
    return {"bytes": total, "group_size": group_size, **counts}


def _check(source: Foreign, written: Checkpoint) -> None:
    """Raise RuntimeError unless the first and last expert of every layer dequantize to the source's weights."""
    for layer in range(source.config.layers):
        for number in {0, source.config.experts - 1}:
            exact, got = source.expert(layer, number), written.expert(layer, number)
            if not all(torch.equal(getattr(exact, part), getattr(got, part)) for part in exact.__slots__):
                raise RuntimeError(f"{written.path}: layer {layer} expert {number} is not what {source.path} holds")
