"""What a checkpoint is and what it costs: content hash, kinship to a baseline, bits per weight, bytes by part."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.errors import InputError

REPORT_NAME = "quantization_report.json"
# quantized attention keeps a cosine above 0.99, weights of another training run have one near 0
LEAST_COSINE = 0.9
PROBE_ROWS = 256
READ_BYTES = 1 << 24


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
    file = path / REPORT_NAME
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
