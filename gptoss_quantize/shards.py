"""One safetensors file, read with pread instead of mmap, or mapped where that is asked for.

safetensors checks the header once (offsets, gaps, length). The bytes are then read with ordinary reads, for two
reasons: mapped pages count as resident memory until the file is unmapped, and a file that shrinks while it is
mapped kills the process with SIGBUS, where a read gives an error that can be explained.
"""

import json
import os
from collections.abc import Callable, Mapping
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
    # nothing of ours has these: known so that the layout that has them can be named
    "BOOL": torch.bool,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# bytes of two tensors that are compared at a time
_PIECE = 1 << 24


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies in its file: dtype, shape, first byte and number of bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int


# models come from the hub, from a copy, and from one's own training
_AGAIN = "download it again (or copy or save it again, where the model comes from elsewhere)"


def _gone(path: Path) -> str:
    return f"it is a link to {os.readlink(path)}, which is gone" if path.is_symlink() else "it is missing"


def _why_not_whole(path: Path) -> str:
    """Return what a file that is no safetensors file is, and what helps."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return "its path is not UTF-8, and safetensors cannot open it: rename the directory"
    with path.open("rb") as file:
        start = file.read(40)
    if start.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS, not the file: run `git lfs pull` in its directory"
    if start.startswith(b"PK"):
        return "it is a pickle of torch.save under another name: save it with safe_serialization=True"
    return f"it is truncated or damaged, {_AGAIN}"


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
            raise InputError(f"{path}: the index names this file, but {_gone(path)}; {_AGAIN}") from None
        except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: not a whole safetensors file ({error}); {_why_not_whole(path)}") from None
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error}); make it a readable file, or {_AGAIN}") from None
        self.tensors: dict[str, TensorInfo] = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] not in DTYPES:
                raise InputError(
                    f"{path}: {name} has dtype {entry['dtype']}; expected one of {sorted(DTYPES)}; convert it to BF16"
                )
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
                        raise InputError(f"{self.path}: ends inside {name}; the file is truncated, {_AGAIN}")
                    done += count
        except OSError as error:
            raise InputError(f"{self.path}: reading {name} failed ({error}); check the disk, or {_AGAIN}") from None
        return data.view(info.dtype).reshape(shape)


ReadStored = Callable[[str, "int | None"], torch.Tensor]  # (stored name, index along the first dimension or None)


@dataclass(frozen=True, slots=True)
class Made:
    """How a tensor of the model comes from stored ones: most often it is one of them, under its own name."""

    parts: tuple[str, ...]  # stored names
    info: TensorInfo  # what it looks like; where it lies is known for a single part only
    read: Callable[[ReadStored, "int | None"], torch.Tensor]

    @classmethod
    def stored(cls, name: str, info: TensorInfo) -> "Made":
        """Return a tensor that is stored as it is."""
        return cls((name,), info, lambda read, index: read(name, index))


class Weights:
    """The tensors of a model by the names that the model has for them, whichever files hold what they are made of.

    `shard_of` maps stored names to files; `made` maps the model's names (all stored ones without it).
    """

    def __init__(self, shard_of: Mapping[str, ShardFile], made: Mapping[str, Made] | None = None):
        self._shard_of = dict(shard_of)
        if made is None:
            made = {name: Made.stored(name, shard.tensors[name]) for name, shard in shard_of.items()}
        self._made = dict(made)

    def __contains__(self, name: object) -> bool:
        return name in self._made

    @property
    def plain(self) -> bool:
        """Return whether every tensor is stored as it is, under its own name."""
        return all(made.parts == (name,) for name, made in self._made.items())

    def names(self) -> list[str]:
        """Return the names of all tensors, sorted."""
        return sorted(self._made)

    def without(self, names: set[str]) -> "Weights":
        """Return the same without some tensors."""
        return Weights(self._shard_of, {name: made for name, made in self._made.items() if name not in names})

    def info(self, name: str) -> TensorInfo:
        """Return dtype, shape and place of a tensor."""
        return self._made[name].info

    def shard(self, name: str) -> ShardFile:
        """Return the open file that a tensor, or the first part of it, lies in."""
        return self._shard_of[self._made[name].parts[0]]

    def file(self, name: str) -> Path:
        """Return the file that a tensor, or the first part of it, lies in."""
        return self._shard_of[self._made[name].parts[0]].path

    def files(self) -> list[Path]:
        """Return the weight files, sorted."""
        return sorted({self._shard_of[part].path for made in self._made.values() for part in made.parts})

    def read(self, name: str, index: int | None = None) -> torch.Tensor:
        """Return a tensor (or one slice of it); NaN and infinity are refused."""
        return self._made[name].read(self._read_stored, index)

    def equal(self, one: str, other: str) -> bool:
        """Return whether two tensors that are stored as they are hold the same bytes in one dtype and shape."""
        names = [self._made[name].parts[0] for name in (one, other)]
        return same_bytes(*((self._shard_of[name], name) for name in names))

    def _read_stored(self, name: str, index: int | None = None) -> torch.Tensor:
        shard = self._shard_of[name]
        tensor = shard.read(name, index)
        # one pass: the extremes are NaN or infinite exactly when some element is
        if tensor.dtype in _FLOATS and tensor.numel() and not all(map(torch.isfinite, torch.aminmax(tensor))):
            bad = int((~torch.isfinite(tensor)).sum())
            where = "" if index is None else f"[{index}]"
            raise InputError(
                f"{shard.path}: {name}{where} holds {bad} NaN or infinite values of "
                f"{tensor.numel()}; the source is damaged or diverged in training, fix it first"
            )
        return tensor


def same_bytes(one: tuple[ShardFile, str], other: tuple[ShardFile, str]) -> bool:
    """Return whether two stored tensors, each (file, name), are equal in dtype, shape and every byte."""
    infos = [shard.tensors[name] for shard, name in (one, other)]
    if (infos[0].dtype, infos[0].shape) != (infos[1].dtype, infos[1].shape):
        return False
    if os.path.samefile(one[0].path, other[0].path) and infos[0].start == infos[1].start:
        return True
    with one[0].path.open("rb") as first, other[0].path.open("rb") as second:
        first.seek(infos[0].start)
        second.seek(infos[1].start)
        left = infos[0].nbytes
        while left > 0:
            pieces = [file.read(min(left, _PIECE)) for file in (first, second)]
            if pieces[0] != pieces[1] or not pieces[0]:
                return False
            left -= len(pieces[0])
    return True
