"""Files written tensor by tensor: a file of any size needs the memory of one chunk, one expert's matrix at most.

A writer gets a list of `PendingTensor`s: what a header says about each, and a function that yields its bytes in
order. The directory around them appears whole or not at all (`files.staged`).
"""

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gptoss_quantize.files import Progress, no_progress, write_json
from gptoss_quantize.shards import DTYPES

INDEX_NAME = "model.safetensors.index.json"
_NAME_OF = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class PendingTensor:
    """One tensor to be written: its header entry, and its bytes on demand (C order, chunk after chunk)."""

    name: str
    shape: tuple[int, ...]
    kind: Any  # a torch dtype for safetensors, a gguf.GGMLQuantizationType for GGUF
    chunks: Callable[[], Iterable[torch.Tensor]]


def write_chunks(file: Any, entry: PendingTensor, nbytes: int) -> None:
    """Write the bytes of one tensor; a number of bytes that the header does not promise is a bug of ours."""
    written = 0
    for chunk in entry.chunks():
        data = chunk.contiguous().reshape(-1).view(torch.uint8)
        written += file.write(memoryview(data.numpy().data))
    if written != nbytes:
        raise RuntimeError(f"{entry.name}: {written} bytes written, its header promises {nbytes}")


def write_safetensors(path: Path, entries: list[PendingTensor]) -> None:
    """Write one safetensors file, the largest dtypes first as the format's alignment asks."""
    ordered = sorted(entries, key=lambda entry: -entry.kind.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    sizes = []
    for entry in ordered:
        nbytes = entry.kind.itemsize * torch.Size(entry.shape).numel()
        offsets = [place, place + nbytes]
        header[entry.name] = {"dtype": _NAME_OF[entry.kind], "shape": list(entry.shape), "data_offsets": offsets}
        place += nbytes
        sizes.append(nbytes)
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for entry, nbytes in zip(ordered, sizes, strict=True):
            write_chunks(file, entry, nbytes)
        file.flush()
        os.fsync(file.fileno())


def write_shards(folder: Path, shards: list[list[PendingTensor]], stem: str, on_shard: Progress = no_progress) -> int:
    """Write `STEM-0000i-of-0000N.safetensors` and their index; return the bytes of all tensors."""
    weight_map: dict[str, str] = {}
    total = 0
    for number, entries in enumerate(shards, 1):
        name = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / name, entries)
        weight_map |= {entry.name: name for entry in entries}
        total += sum(entry.kind.itemsize * torch.Size(entry.shape).numel() for entry in entries)
        on_shard(number, len(shards))
    index_name = INDEX_NAME if stem == "model" else f"{stem}.safetensors.index.json"
    write_json(folder / index_name, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return total
