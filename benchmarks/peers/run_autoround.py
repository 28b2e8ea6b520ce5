"""AutoRound on the experts of a gpt-oss model, measured, then written back dequantized.

Usage (environment: requirements-autoround.txt): run_autoround.py MODEL_DIR TOKENS.npy OUT_DIR
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from peer_common import Peer, SourceModel, describe, export_dequantized, finish, measure, parse_job
from peer_weights import ExpertLinear, bits_of, dequantize_gptq


def reader(packed: SourceModel):
    """How to read one expert matrix out of AutoRound's own format (AutoGPTQ's packing, no g_idx)."""

    def read(layer: int, expert: int, projection: str) -> ExpertLinear:
        prefix = f"model.layers.{layer}.mlp.experts.{expert}.{projection}."
        qweight, qzeros, scales = (packed.get(prefix + name) for name in ("qweight", "qzeros", "scales"))
        columns = qweight.shape[0] * 8
        g_idx = torch.arange(columns) // (columns // scales.shape[0])
        weight = dequantize_gptq(qweight, qzeros, scales, g_idx)
        bias = packed.get(prefix + "bias").float()
        return ExpertLinear(weight, bias, bits_of(qweight, qzeros, scales), bits_of(qweight, scales))

    return read


def packed_directory(directory: Path) -> Path:
    """AutoRound puts its files into a folder named after the model and the bits."""
    found = sorted({path.parent for path in directory.rglob("*.safetensors")})
    if len(found) != 1:
        raise SystemExit(f"expected one folder of safetensors under {directory}, found {found}")
    return found[0]


def main() -> None:
    """Measure, read back, report."""
    job = parse_job("AutoRound on gpt-oss experts", ("auto-round-50", "auto-round-200", "rtn"), (64, 32))
    cost = measure(job, "worker_autoround.py", {})
    packed = SourceModel(packed_directory(job.packed))
    fidelity = export_dequantized(job, Peer(reader(packed), halves=False, others=packed, rescales=False))
    finish(job, {**describe(job, "auto-round", "auto-round"), **cost, **fidelity})


if __name__ == "__main__":
    main()
