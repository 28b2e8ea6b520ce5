"""Reading safetensors without mmap: the same bytes as the reference reader, and nothing from a damaged file."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptoss_quantize import shards
from gptoss_quantize.errors import InputError
from gptoss_quantize.shards import DTYPES, ShardFile


@pytest.fixture
def file(tmp_path) -> Path:
    """Return a file with a tensor of every dtype and a scalar."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randint(0, 100, (3, 5, 7), generator=generator).to(dtype) for name, dtype in DTYPES.items()
    }
    tensors |= {"scalar": torch.tensor(3.5), "metadata": torch.ones(2)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    return tmp_path / "x.safetensors"


def test_reads_what_safetensors_reads(file):
    expected, shard = load_file(file), ShardFile(file)
    assert shard.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        info = shard.tensors[name]
        assert (info.dtype, info.shape) == (tensor.dtype, tuple(tensor.shape))
        assert torch.equal(shard.read(name), tensor)
    for name in DTYPES:
        for i in range(3):
            assert torch.equal(shard.read(name, i), expected[name][i])


def test_a_read_is_a_copy_of_its_own(file):
    shard = ShardFile(file)
    shard.read("F32").zero_()
    assert shard.read("F32").abs().sum() > 0
    # unmapped: the file may go once the tensor is read
    tensor = shard.read("F32")
    before = tensor.clone()
    file.write_bytes(b"")
    assert torch.equal(tensor, before)


def test_short_reads_are_continued(file, monkeypatch):
    expected = load_file(file)["F64"]

    class Slow:
        def __init__(self, inner):
            self.inner = inner

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.inner.close()

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def readinto(self, view):
            return self.inner.readinto(view[:13])

    shard = ShardFile(file)
    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *args, **kwargs: Slow(opened(self, *args, **kwargs)))
    assert torch.equal(shard.read("F64"), expected)


def refused(call, *words: str) -> None:
    with pytest.raises(InputError) as error:
        call()
    missing = [word for word in words if word not in str(error.value)]
    assert not missing, f"{missing} not in: {error.value}"


@pytest.mark.parametrize("keep", [0, 4, 8, 60, 400, -1])
def test_truncated(file, keep):
    file.write_bytes(file.read_bytes()[:keep])
    refused(lambda: ShardFile(file), str(file), "truncated or damaged", "download it again")


def test_trailing_bytes(file):
    file.write_bytes(file.read_bytes() + b"more")
    refused(lambda: ShardFile(file), str(file), "truncated or damaged", "download it again")


def test_unknown_dtype(tmp_path):
    save_file({"w": torch.ones(4, dtype=torch.complex64)}, tmp_path / "x.safetensors")
    refused(lambda: ShardFile(tmp_path / "x.safetensors"), "x.safetensors", "w has dtype C64", "BF16")


def test_missing_and_not_a_file(tmp_path):
    refused(lambda: ShardFile(tmp_path / "no"), str(tmp_path / "no"), "is missing", "download it again")
    refused(lambda: ShardFile(tmp_path), str(tmp_path), "cannot be read")


def test_every_flipped_bit_of_the_header_is_seen(file):
    whole = file.read_bytes()
    expected = ShardFile(file).tensors
    end = 8 + int.from_bytes(whole[:8], "little")
    free = whole.index(b'"__metadata__"'), whole.index(b"}", whole.index(b'"__metadata__"'))
    accepted = 0
    for bit in range(0, 8 * end, 7):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        try:
            found = ShardFile(file).tensors
        except InputError as error:
            assert str(file) in str(error)
            continue
        accepted += 1
        # a changed name is seen by the checkpoint, which knows all names; else only free text may change
        assert found.keys() != expected.keys() or free[0] < bit // 8 < free[1], f"bit {bit}"
    assert accepted < end / 7


@pytest.mark.parametrize("change", ["touched", "same size", "shorter", "replaced", "deleted"])
def test_file_that_changes_after_it_was_opened(file, change):
    shard, whole = ShardFile(file), file.read_bytes()
    stat = file.stat()
    if change == "touched":
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    elif change == "same size":
        file.write_bytes(whole[:-1] + b"x")
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1000))
    elif change == "shorter":
        file.write_bytes(whole[:-1])
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif change == "replaced":
        other = file.with_name("other")
        other.write_bytes(whole)
        os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        other.replace(file)
    else:
        file.unlink()
    words = ("reading F32 failed",) if change == "deleted" else ("changed while it was being read", "start again")
    refused(lambda: shard.read("F32"), str(file), *words)


def test_file_that_ends_early(file, monkeypatch):
    shard = ShardFile(file)
    last = max(shard.tensors, key=lambda name: shard.tensors[name].start)
    os.truncate(file, file.stat().st_size - 1)
    monkeypatch.setattr(shards, "_fingerprint", lambda stat: shard._stat)
    refused(lambda: shard.read(last), str(file), f"ends inside {last}", "download it again")
