"""GPTQModel's GPTQ on the experts of a gpt-oss model, measured, then written back dequantized.

Usage (environment: requirements-gptqmodel.txt): run_gptqmodel.py MODEL_DIR TOKENS.npy OUT_DIR
"""

import csv
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from peer_common import Peer, SourceModel, describe, export_dequantized, finish, measure, parse_job
from peer_weights import ExpertLinear, bits_of, dequantize_gptq


def reader(packed: SourceModel):
    """How to read one expert matrix out of GPTQModel's files."""

    def read(layer: int, expert: int, projection: str) -> ExpertLinear:
        prefix = f"model.layers.{layer}.mlp.experts.{expert}.{projection}."
        names = ("qweight", "qzeros", "scales", "g_idx")
        qweight, qzeros, scales, g_idx = (packed.get(prefix + name) for name in names)
        weight = dequantize_gptq(qweight, qzeros, scales, g_idx)
        bias = packed.get(prefix + "bias").float()
        return ExpertLinear(weight, bias, bits_of(qweight, qzeros, scales, g_idx), bits_of(qweight, scales))

    return read


def rtn_fallbacks(directory: Path, log: str) -> dict[str, int]:
    """How many expert matrices GPTQModel gave up on and rounded to nearest, from its own log."""
    with (directory / "quant_log.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    return {
        "modules": len(rows),
        "rtn_fallback": len(set(re.findall(r"Module `([^`]+)` -> Using `rtn`", log))),
    }


def main() -> None:
    """Measure, read back, report."""
    job = parse_job("GPTQModel on gpt-oss experts", ("gptq", "gptq-desc-act"), (64, 32))
    # without it GPTQModel 7.7 stops on a machine of two cores
    cost = measure(job, "worker_gptqmodel.py", {"GPTQMODEL_CPU_WORKERS": "2"})
    packed = SourceModel(job.packed)
    fidelity = export_dequantized(job, Peer(reader(packed), halves=True, others=packed, rescales=False))
    notes = rtn_fallbacks(job.packed, (job.packed / "worker.log").read_text(errors="replace"))
    finish(job, {**describe(job, "gptqmodel", "gptqmodel"), **cost, **fidelity, **notes})


if __name__ == "__main__":
    main()
