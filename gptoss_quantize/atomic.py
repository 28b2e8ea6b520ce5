"""One file is written whole or not at all: under another name, flushed to disk, renamed. Imports no torch by itself.

What stops a write is told apart: a full disk, a place that may not be written, a limit, a failing disk. Each has its
own remedy, and how to go on afterwards depends on the command (`going_on`).
"""

import errno
import hashlib
import json
import os
import re
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from gptoss_quantize.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    import torch

TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
# tokenizer, templates and licence, which go with the weights wherever these go
COPIED = (
    *TOKENIZER,
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
    "LICENSE.md",
    "LICENSE.txt",
    "NOTICE",
    "USAGE_POLICY",
)

Progress = Callable[[int, int], None]


def no_progress(done: int, total: int) -> None:
    """Show nothing."""


_AGAIN: ContextVar[str] = ContextVar("again", default="run the same command again")
_PLACE = {errno.EACCES, errno.EPERM, errno.EROFS}


@contextmanager
def going_on(words: str) -> Iterator[None]:
    """Say in messages of the block how its command goes on after a write that failed."""
    token = _AGAIN.set(words)
    try:
        yield
    finally:
        _AGAIN.reset(token)


def remedy_for(error: Exception) -> str:
    """Return what helps against an error of the operating system, and how the command then goes on."""
    number = error.errno if isinstance(error, OSError) else None
    # safetensors tells the number in its words only
    if number is None and (told := re.search(r"os error (\d+)", str(error))):
        number = int(told[1])
    again = _AGAIN.get()
    if number in (errno.ENOSPC, errno.EDQUOT):
        return f"free some space and {again}"
    if number == errno.EFBIG:
        return f"raise the limit on a file's size (ulimit -f), or that of the file system, and {again}"
    if number in _PLACE:
        return f"it may not be written: change its permissions and {again}, or choose another place to write to"
    if number in (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP):
        return "choose another place to write to"
    return f"check the disk (dmesg, df), and {again}"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a write that fails into a message that says why, and how to go on."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: writing failed ({error}); {remedy_for(error)}") from error


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that the file is either the old one or the whole new one."""
    write_text(path, json.dumps(value, indent=1))


def write_text(path: Path, text: str) -> None:
    """Write a text so that the file is either the old one or the whole new one."""
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


def save_tensors(
    path: Path, tensors: "dict[str, torch.Tensor]", before: Callable[[int], None] = lambda crc: None
) -> int:
    """Write a safetensors file whole, or fail without a trace of it under its name; return its CRC-32.

    Its permissions are those that the umask gives. `before` is called with the CRC just before the file is renamed.
    """
    # here, so that what only looks at places answers at once
    from safetensors.torch import save_file  # noqa: PLC0415

    temporary = path.with_name(path.name + ".tmp")
    try:
        with writing(path):
            with temporary.open("wb") as file:
                mode = os.fstat(file.fileno()).st_mode & 0o777
            # safetensors writes a file of its own with mode 0600
            save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, metadata={"format": "pt"})
            temporary.chmod(mode)
            # for writing: Windows flushes no other
            with temporary.open("r+b") as file:
                os.fsync(file.fileno())
            crc = checksum(temporary)
            before(crc)
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return crc


def checksum(path: Path) -> int:
    """Return the CRC-32 of a file."""
    value = 0
    with path.open("rb", buffering=0) as file:
        while piece := file.read(1 << 24):
            value = zlib.crc32(piece, value)
    return value


def sync_folder(path: Path) -> None:
    """Wait until renames in a folder are on disk; Windows, which opens no folders, has no such thing."""
    if os.name == "nt":
        return
    place = os.open(path, os.O_RDONLY)
    try:
        os.fsync(place)
    finally:
        os.close(place)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder; the lock is gone when this one ends, however it ends.

    The folder itself is locked, since it is renamed in the end. Where a system cannot, a file in the user's temporary
    directory stands for its path.
    """
    taken = f"{folder}: another process is writing it; wait for its end, or stop it"
    if fcntl is None:
        name = hashlib.sha256(os.path.normcase(os.path.realpath(folder)).encode(errors="surrogateescape")).hexdigest()
        lock = FileLock(Path(tempfile.gettempdir(), f"gptoss-quantize-{name[:16]}.lock"), timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise InputError(taken) from None
        try:
            yield
        finally:
            lock.release()
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(taken) from None
        yield
    finally:
        os.close(handle)
