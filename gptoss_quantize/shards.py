"""One safetensors file, read with pread instead of mmap, or mapped where that is asked for.

safetensors checks the header once (offsets, gaps, length). The bytes are then read with ordinary reads, for two
reasons: mapped pages count as resident memory until the file is unmapped, and a file that shrinks while it is
mapped kills the process with SIGBUS, where a read gives an error that can be explained.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from gptoss_quantize.errors import InputError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies in its file: dtype, shape, first byte and number of bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int


def _fingerprint(stat: os.stat_result) -> tuple[int, int, int]:
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


class ShardFile:
    """A checked safetensors file: `tensors` maps names to their place, `read` returns a copy."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with safe_open(path, framework="pt"):
                pass
            self._stat = _fingerprint(path.stat())
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
        except FileNotFoundError:
            raise InputError(f"{path}: the index names this file, but it is missing; download it again") from None
        except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(
                f"{path}: not a whole safetensors file ({error}); it is truncated or damaged, download it again"
            ) from None
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error})") from None
        self.tensors: dict[str, TensorInfo] = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] not in DTYPES:
                raise InputError(f"{path}: {name} has dtype {entry['dtype']}; expected one of {sorted(DTYPES)}")
            begin, end = entry["data_offsets"]
            self.tensors[name] = TensorInfo(
                DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + begin, end - begin
            )

    def map(self) -> torch.Tensor:
        """Return the whole file as uint8, mapped into memory: nothing is read until it is used, nothing copied.

        The file must stay as it is while the tensor lives. Raises InputError when it changed since it was opened.
        """
        try:
            if _fingerprint(self.path.stat()) != self._stat:
                raise InputError(
                    f"{self.path}: the file changed since it was opened (size, time or inode); "
                    "stop whatever writes it and start again"
                )
            # a private mapping: the file is only read
            return torch.from_file(str(self.path), shared=False, size=self._stat[0], dtype=torch.uint8)
        except (OSError, RuntimeError) as error:
            raise InputError(f"{self.path}: cannot be mapped into memory ({error})") from None

    def read(self, name: str, index: int | None = None) -> torch.Tensor:
        """Return a copy of a tensor, or of its `index`-th slice along the first dimension.

        Raises InputError when the file changed since it was opened or ends early.
        """
        info = self.tensors[name]
        shape, start, nbytes = info.shape, info.start, info.nbytes
        if index is not None:
            nbytes //= shape[0]
            shape, start = shape[1:], start + index * nbytes
        data = torch.empty(nbytes, dtype=torch.uint8)
        view = memoryview(data.numpy().data)
        try:
            with self.path.open("rb", buffering=0) as file:
                if _fingerprint(os.fstat(file.fileno())) != self._stat:
                    raise InputError(
                        f"{self.path}: the file changed while it was being read (size, time or inode); "
                        "stop whatever writes it and start again"
                    )
                file.seek(start)
                done = 0
                while done < nbytes:
                    count = file.readinto(view[done : done + (1 << 30)])
                    if not count:
                        raise InputError(f"{self.path}: ends inside {name}; the file is truncated, download it again")
                    done += count
        except OSError as error:
            raise InputError(f"{self.path}: reading {name} failed ({error})") from None
        return data.view(info.dtype).reshape(shape)


class Weights:
    """The stored tensors of a model, whichever of its files they lie in."""

    def __init__(self, shard_of: dict[str, ShardFile]):
        self._shard_of = shard_of

    def __contains__(self, name: object) -> bool:
        return name in self._shard_of

    def names(self) -> list[str]:
        """Return the names of all stored tensors, sorted."""
        return sorted(self._shard_of)

    def info(self, name: str) -> TensorInfo:
        """Return dtype, shape and place of a stored tensor."""
        return self._shard_of[name].tensors[name]

    def shard(self, name: str) -> ShardFile:
        """Return the open file that a tensor lies in."""
        return self._shard_of[name]

    def file(self, name: str) -> Path:
        """Return the file that a tensor lies in."""
        return self._shard_of[name].path

    def files(self) -> list[Path]:
        """Return the weight files, sorted."""
        return sorted({shard.path for shard in self._shard_of.values()})

    def read(self, name: str, index: int | None = None) -> torch.Tensor:
        """Return a stored tensor (or one slice of it) as stored; NaN and infinity are refused."""
        tensor = self._shard_of[name].read(name, index)
        # one pass: the extremes are NaN or infinite exactly when some element is
        if tensor.is_floating_point() and tensor.numel() and not all(map(torch.isfinite, torch.aminmax(tensor))):
            bad = int((~torch.isfinite(tensor)).sum())
            where = "" if index is None else f"[{index}]"
            raise InputError(
                f"{self.file(name)}: {name}{where} holds {bad} NaN or infinite values of "
                f"{tensor.numel()}; the source is damaged or diverged in training, fix it first"
            )
        return tensor
