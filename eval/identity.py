"""What a checkpoint is and what it costs: content hash, kinship to a baseline, bits per weight, bytes by part."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.errors import InputError
from gptoss_quantize.model_card import QUANTIZATION_REPORT

# quantized attention keeps a cosine above 0.99, weights of another training run have one near 0
LEAST_COSINE = 0.9
PROBE_ROWS = 256
READ_BYTES = 1 << 24
# fields of the config that no shape of a tensor shows
COMPUTED_WITH = ("sliding_window", "layer_types", "rope", "rms_eps", "swiglu_limit", "swiglu_alpha", "top_k", "heads")


def fingerprint(checkpoint: Checkpoint) -> str:
    """Return the SHA-256 over config.json, the weight files and the adapter: the name of a model in the cache."""
    digest = hashlib.sha256()
    adapter = [] if checkpoint.adapter is None else sorted(checkpoint.adapter.path.glob("adapter_*"))
    for path in [checkpoint.path / "config.json", *checkpoint.files(), *adapter]:
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            while block := file.read(READ_BYTES):
                digest.update(block)
    return digest.hexdigest()


def check_kinship(baseline: Checkpoint, candidate: Checkpoint) -> None:
    """Raise InputError when the candidate's weights outside the experts are not (nearly) the baseline's.

    Compared are rows of the embedding and the query projections of the first, middle and last layer: no
    quantization of the experts changes them.
    """
    last = baseline.config.layers - 1
    names = ["model.embed_tokens.weight"]
    names += [f"model.layers.{i}.self_attn.q_proj.weight" for i in sorted({0, last // 2, last})]
    for name in names:
        ours, theirs = (c.dense(name)[:PROBE_ROWS].float().flatten() for c in (baseline, candidate))
        cosine = float(functional.cosine_similarity(ours, theirs, dim=0))
        if cosine < LEAST_COSINE:
            raise InputError(
                f"{candidate.path}: {name} is not the baseline's (cosine {cosine:.2f}, expected at least "
                f"{LEAST_COSINE}); a candidate must be made from the baseline {baseline.path}: give the model "
                "that it was made from (--baseline), with the same --adapter if there was one"
            )


def config_differences(baseline: Checkpoint, candidate: Checkpoint) -> list[str]:
    """Return what the two configs say differently of how to compute: the same weights would mean another model."""
    out = []
    for name in COMPUTED_WITH:
        ours, theirs = getattr(baseline.config, name), getattr(candidate.config, name)
        if ours != theirs:
            out.append(f"{name} is {_short(theirs)}, the baseline's {_short(ours)}")
    return out


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:56] + " ..."


def adapter_difference(baseline: Checkpoint, candidate: Checkpoint) -> str | None:
    """Return that one of the two was made with an adapter and the other without, None where they are alike.

    A candidate says so in its quantization report; where it has none, nothing is known and nothing said.
    """
    settings = _made_by(candidate.path)["quantized_settings"]
    if settings is None:
        return None
    theirs = settings.get("adapter")
    ours = None if baseline.adapter is None else str(baseline.adapter.path.resolve())
    if theirs is not None and ours is None:
        return (
            f"it was made with the adapter {theirs}, and the baseline has none: what the fine-tuning changed counts "
            f"as error; give the baseline the same adapter (--adapter {theirs})"
        )
    if theirs is None and ours is not None:
        return (
            f"it was made without an adapter, and the baseline has {ours}: what the fine-tuning changed counts as "
            "error; leave --adapter out, or quantize with it"
        )
    if ours is not None and baseline.adapter is not None:
        files = sorted(baseline.adapter.path.glob("adapter_*"))
        if {path.name: path.stat().st_size for path in files} != {
            name: entry[0] for name, entry in settings.get("adapter_files", {}).items()
        }:
            return f"it was made with another adapter, {theirs}, than the baseline's {ours}"
    return None


def pair_warnings(baseline: Checkpoint, candidate: Checkpoint, name: str) -> list[str]:
    """Return what makes a comparison of the two mean less than it seems to, one sentence each."""
    found = [f"{name}: {difference}" for difference in config_differences(baseline, candidate)]
    if (words := adapter_difference(baseline, candidate)) is not None:
        found.append(f"{name}: {words}")
    return found


def part_of(name: str) -> str:
    """Return the part of the model that a tensor belongs to."""
    if ".experts." in name:
        return "experts"
    if "router" in name:
        return "routers"
    if "self_attn" in name:
        return "attention"
    return "norms" if "norm" in name else "embedding and head"


def cost(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what a checkpoint takes: exact bits per weight, bytes by part, and what its own report says.

    bits_per_expert_weight counts the experts' matrices with their scales, without biases; bits_per_weight is every
    stored bit of the file's tensors over every parameter of the unquantized model.
    """
    config = checkpoint.config
    parts: dict[str, int] = {}
    matrix_bytes = 0
    for name in checkpoint.names():
        size = checkpoint.info(name).nbytes
        parts[part_of(name)] = parts.get(part_of(name), 0) + size
        if part_of(name) == "experts" and "bias" not in name:
            matrix_bytes += size
    weights = config.layers * config.experts * 3 * config.hidden * config.intermediate
    parameters = sum(int(torch.Size(shape).numel()) for shape in checkpoint.shapes().values())
    return {
        "format": checkpoint.expert_format,
        "group_size": checkpoint.group_size or None,
        "parameters": parameters,
        "bits_per_expert_weight": 8 * matrix_bytes / weights,
        "bits_per_weight": 8 * sum(parts.values()) / parameters,
        "bytes": sum(parts.values()),
        "bytes_by_part": parts,
        **_made_by(checkpoint.path),
    }


def _made_by(path: Path) -> dict[str, Any]:
    """Return method, time and memory from the quantization report beside the weights, None where there is none."""
    keys = {"method": None, "seconds": None, "peak_rss_mib": None, "calibration": None, "settings": None}
    file = path / QUANTIZATION_REPORT
    if not file.is_file():
        return {f"quantized_{key}" if key != "method" else key: value for key, value in keys.items()}
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        return {
            "method": report["settings"]["method"],
            "quantized_seconds": report["seconds"],
            "quantized_peak_rss_mib": report["peak_rss_mib"],
            "quantized_calibration": report["calibration"],
            "quantized_settings": report["settings"],
        }
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(
            f"{file}: not a report of gptoss-quantize ({error!r}); restore it from the quantization, or delete it"
        ) from error
