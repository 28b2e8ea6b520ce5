"""Vectors that other people's packers made, for every test of a packing."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

GOLDEN = Path(__file__).resolve().parents[1] / "goldens" / "packing.json"


@pytest.fixture(scope="module")
def golden() -> dict:
    """Codes and words of AutoGPTQ 0.7.1 and AutoAWQ 0.2.9: goldens/make_packing.py's record as tensors."""

    def tensor(entry: dict) -> torch.Tensor:
        flat = np.frombuffer(bytes.fromhex(entry["hex"]), dtype=np.dtype(entry["dtype"]).newbyteorder("<"))
        return torch.from_numpy(flat.reshape(entry["shape"]).astype(entry["dtype"]))

    record = json.loads(GOLDEN.read_text(encoding="utf-8"))
    out = {name: tensor(record[name]) for name in ("codes", "scales")}
    for packer in ("gptq", "awq"):
        out[packer] = {name: tensor(entry) for name, entry in record[packer].items()}
    return out
