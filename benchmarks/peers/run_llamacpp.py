"""llama.cpp's Q4_0 or IQ4_NL (4.5 bits) with an importance matrix, measured, then written back dequantized.

Usage (environment: requirements-llamacpp.txt): run_llamacpp.py MODEL_DIR TOKENS.npy OUT_DIR --method iq4_nl
LLAMA_CPP_SOURCE and LLAMA_CPP_BUILD name the unpacked sources and the build folder (see README.md).
"""

import os
import re
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import torch
from gguf import GGUFReader
from gguf.quants import dequantize

sys.path.insert(0, str(Path(__file__).resolve().parent))

from peer_common import Peer, describe, export_dequantized, finish, measure, parse_job
from peer_weights import ExpertLinear

GGUF_NAMES = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}
PEERS = Path("/work/peers")
SOURCE = PEERS / "src/llama_cpp_python-0.3.36/vendor/llama.cpp"


def reader(path: Path, expected_type: str):
    """How to read one expert matrix out of a GGUF file."""
    tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}

    @lru_cache(maxsize=6)
    def stacked(name: str) -> torch.Tensor:
        tensor = tensors[name]
        return torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())

    def read(layer: int, expert: int, projection: str) -> ExpertLinear:
        name = f"blk.{layer}.{GGUF_NAMES[projection]}"
        tensor = tensors[f"{name}.weight"]
        if tensor.tensor_type.name != expected_type:
            raise SystemExit(f"{tensor.name} is {tensor.tensor_type.name}, expected {expected_type}")
        weight, bias = stacked(f"{name}.weight"), stacked(f"{name}.bias")
        bits = tensor.n_bytes * 8 // weight.shape[0]
        return ExpertLinear(weight[expert], bias[expert], bits, bits)

    return read


def notes(log: str) -> Iterator[str]:
    """What llama-imatrix said about experts it saw too little of."""
    for line in log.splitlines():
        if re.search(r"partial data|missing data|no data", line):
            yield line.strip()[:200]


def main() -> None:
    """Measure, read back, report."""
    job = parse_job("llama.cpp on gpt-oss experts", ("iq4_nl", "q4_0"), (32,))
    paths = {
        "LLAMA_CPP_SOURCE": os.environ.get("LLAMA_CPP_SOURCE", str(SOURCE)),
        "LLAMA_CPP_BUILD": os.environ.get("LLAMA_CPP_BUILD", str(PEERS / "llama.cpp-build")),
    }
    cost = measure(job, "worker_llamacpp.py", paths)
    expected = job.method.upper()
    peer = Peer(reader(job.packed / "quantized.gguf", expected), halves=False, others=None, rescales=False)
    fidelity = export_dequantized(job, peer)
    seen = list(notes((job.packed / "worker.log").read_text(errors="replace")))
    about = {**describe(job, "llama.cpp", None), "version": "llama-cpp-python 0.3.36 (vendored llama.cpp)"}
    finish(job, {**about, **cost, **fidelity, "imatrix_notes": seen[:20], "imatrix_note_count": len(seen)})


if __name__ == "__main__":
    main()
