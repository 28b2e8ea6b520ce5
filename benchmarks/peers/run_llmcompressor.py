"""llm-compressor's GPTQ or AWQ on the experts of a gpt-oss model, measured, then written back dequantized.

Usage (environment: requirements-llmcompressor.txt): run_llmcompressor.py MODEL_DIR TOKENS.npy OUT_DIR
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from peer_common import Peer, SourceModel, describe, export_dequantized, finish, measure, parse_job
from peer_weights import ExpertLinear, bits_of, dequantize_compressed_tensors

METHODS = ("gptq", "gptq-routed", "awq", "awq-router")


def reader(packed: SourceModel):
    """How to read one expert matrix out of a compressed-tensors file."""

    def read(layer: int, expert: int, projection: str) -> ExpertLinear:
        prefix = f"model.layers.{layer}.mlp.experts.{expert}.{projection}."
        words, scale = packed.get(prefix + "weight_packed"), packed.get(prefix + "weight_scale")
        weight = dequantize_compressed_tensors(words, scale)
        payload = bits_of(words, scale)
        return ExpertLinear(
            weight,
            packed.get(prefix + "bias").float(),
            payload + bits_of(packed.get(prefix + "weight_shape")),
            payload,
        )

    return read


def main() -> None:
    """Measure, read back, report."""
    job = parse_job("llm-compressor on gpt-oss experts", METHODS, (64, 32))
    cost = measure(job, "worker_llmcompressor.py", {})
    packed = SourceModel(job.packed)
    rescales = job.method.startswith("awq")
    fidelity = export_dequantized(job, Peer(reader(packed), halves=False, others=packed, rescales=rescales))
    finish(job, {**describe(job, "llm-compressor", "llmcompressor"), **cost, **fidelity})


if __name__ == "__main__":
    main()
