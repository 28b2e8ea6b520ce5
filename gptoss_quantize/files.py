"""What is written appears whole or not at all, and nothing of the user's is ever deleted: the one place for both.

A directory is written under another name (`partial_of`) and gets its own in one rename; a file likewise. Every
directory that we write holds a mark, `.gptoss-quantize.json`. It says what wrote it and, once finished, which files
are ours. Only a marked directory is ever deleted, file by file, only where the user said --overwrite, and only if it
holds nothing else: a name that we did not write is refused and named.

Where OUT is a mount point (`docker run -v`), a rename cannot reach it: the unfinished directory then lies inside, and
its files move up one by one, config.json and the mark last.
"""

import fcntl
import json
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from gptoss_quantize import __version__
from gptoss_quantize.errors import InputError

MARK = ".gptoss-quantize.json"
# tokenizer, templates and licence, which go with the weights wherever these go
COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
    "USAGE_POLICY",
)
# what a directory under construction may hold
UNFINISHED = (
    *COPIED,
    "*.safetensors",
    "*.safetensors.index.json",
    "shard-*",
    "config.json",
    "*_report.json",
    "state.json",
    "hidden-?.bin",
    "spill.bin",
    ".shared",
    ".writable",
    "model.gguf",
    "Modelfile",
    "README.md",
    "*.tmp",
    MARK,
)
# these say that a directory is a checkpoint, so they come last where no rename can bring all at once
LAST = ("config.json", MARK)

Progress = Callable[[int, int], None]


def no_progress(done: int, total: int) -> None:
    """Show nothing."""


# ---- one file


@contextmanager
def writing(path: Path, remedy: str = "free some space and run the same command with --resume") -> Iterator[None]:
    """Turn a full or failing disk into a message that says how to go on."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: writing failed ({error}); {remedy}") from error


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that the file is either the old one or the whole new one."""
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(value, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


def save_tensors(
    path: Path, tensors: dict[str, torch.Tensor], before: Callable[[int], None] = lambda crc: None
) -> int:
    """Write a safetensors file whole, or fail without a trace of it under its name; return its CRC-32.

    Its permissions are those that the umask gives. `before` is called with the CRC just before the file is renamed.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with writing(path):
            with temporary.open("wb") as file:
                mode = os.fstat(file.fileno()).st_mode & 0o777
            # safetensors writes a file of its own with mode 0600
            save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, metadata={"format": "pt"})
            temporary.chmod(mode)
            with temporary.open("rb") as file:
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
    """Wait until renames in a folder are on disk."""
    place = os.open(path, os.O_RDONLY)
    try:
        os.fsync(place)
    finally:
        os.close(place)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder; the lock is gone when this one ends, however it ends."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder}: another process is writing it; wait for its end, or stop it") from None
        yield
    finally:
        os.close(handle)


# ---- whose directory it is


def read_mark(folder: Path) -> dict[str, Any] | None:
    """Return what the mark in a folder says, or None where there is none that can be read."""
    try:
        mark = json.loads((folder / MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return mark if isinstance(mark, dict) and "command" in mark else None


def put_mark(folder: Path, command: str, **more: Any) -> None:
    """Mark a folder under construction as ours; `command` is what writes it."""
    write_json(folder / MARK, {"command": command, "version": __version__, **more})


def finish_mark(folder: Path, **more: Any) -> None:
    """Write the names of all that the folder holds by now into its mark: these are ours, and no others."""
    mark = read_mark(folder) or {}
    known = [p.name for p in folder.iterdir() if any(fnmatch(p.name, pattern) for pattern in UNFINISHED)]
    files = sorted({*known, *more.pop("files", []), MARK})
    write_json(folder / MARK, mark | more | {"files": files})


def strangers(folder: Path) -> list[str]:
    """Return the names in a marked folder that are not ours, sorted."""
    mark = read_mark(folder) or {}
    patterns = mark.get("files", UNFINISHED)
    folders = mark.get("folders", [])
    return sorted(
        path.name
        for path in folder.iterdir()
        if not (
            (path.name in folders and path.is_dir() and not path.is_symlink() and _why_not_ours(path) is None)
            or (
                (path.is_file() or path.is_symlink())
                and any(fnmatch(path.name, pattern) or path.name == pattern for pattern in patterns)
            )
        )
    )


def _why_not_ours(folder: Path) -> str | None:
    """Return why a directory must not be deleted, None where all of it is ours."""
    if folder.is_symlink() or not folder.is_dir():
        return "is not a directory"
    if read_mark(folder) is None:
        return f"was not written by gptoss-quantize (no {MARK} in it)"
    if found := strangers(folder):
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        return f"holds {found[0]}{more}, which gptoss-quantize did not write"
    return None


def check_ours(folder: Path, remedy: str = "choose another name, or move it away yourself") -> None:
    """Raise InputError unless every file in a directory is ours, so that --overwrite may delete it."""
    if why := _why_not_ours(folder):
        raise InputError(f"{folder}: {why}, so --overwrite does not delete it; {remedy}")


def remove(folder: Path) -> None:
    """Delete a directory of ours, file by file; InputError, and nothing deleted, where something else is in it."""
    check_ours(folder)
    # its parts first, the mark last: what is left of an interrupted removal is still ours
    for path in sorted(folder.iterdir(), key=lambda path: path.name == MARK):
        if path.is_dir() and not path.is_symlink():
            remove(path)
        else:
            path.unlink()
    folder.rmdir()


# ---- one directory


def is_mount(dest: Path) -> bool:
    """Return whether a directory lies on another file system than its parent, where no rename can reach it."""
    return dest.is_dir() and not dest.is_symlink() and (
        os.path.ismount(dest) or dest.stat().st_dev != dest.parent.stat().st_dev
    )  # fmt: skip


def partial_of(dest: Path) -> Path:
    """Return where a directory is written until it is finished."""
    return dest / ".partial" if is_mount(dest) else dest.with_name(dest.name + ".partial")


def _replaced(dest: Path) -> Path:
    return dest.with_name(dest.name + ".replaced")


def _is_empty(dest: Path) -> bool:
    """Return whether a directory holds nothing (of a mount point: but our unfinished work, and lost+found)."""
    own = {".partial", "lost+found"} if is_mount(dest) else set()
    return dest.is_dir() and not dest.is_symlink() and not [p for p in dest.iterdir() if p.name not in own]


def check_dest(dest: Path, *, overwrite: bool, inputs: tuple[Path, ...] = ()) -> None:
    """Raise InputError for a final name that is taken, or whose replacement would delete what is not ours.

    An existing empty directory is free. `inputs` are what is read: DEST must not hold them.
    """
    partial = partial_of(dest)
    for path in inputs:
        if any(path.resolve().is_relative_to(place.resolve()) for place in (dest, partial)):
            raise InputError(f"{dest}: holds the input {path}; choose another place to write to")
    if not os.path.lexists(dest) or _is_empty(dest):
        return
    if not overwrite:
        raise InputError(f"{dest}: already exists; choose another name or pass --overwrite")
    if is_mount(dest):
        raise InputError(f"{dest}: is a mount point that holds something already; empty it, or mount another place")
    check_ours(dest)
    if os.path.lexists(_replaced(dest)):
        check_ours(_replaced(dest))


def make_partial(partial: Path, command: str, **more: Any) -> None:
    """Make a marked directory for unfinished work, if it is not there; InputError where it cannot be written."""
    try:
        partial.mkdir(parents=True, exist_ok=True)
        (partial / ".writable").write_bytes(b"")
        (partial / ".writable").unlink()
        if read_mark(partial) is None:
            put_mark(partial, command, **more)
    except (OSError, InputError) as error:
        raise InputError(f"{partial}: cannot be written ({error}); choose another place to write to") from None


def publish(partial: Path, dest: Path) -> None:
    """Give the finished directory its name; what stood there, ours and checked before, is deleted last."""
    replaced = _replaced(dest)
    if partial.parent == dest:
        for path in sorted(partial.iterdir(), key=lambda path: (path.name in LAST, path.name == MARK, path.name)):
            path.rename(dest / path.name)
        partial.rmdir()
        return
    if dest.exists() and not _is_empty(dest):
        if os.path.lexists(replaced):
            remove(replaced)
        dest.rename(replaced)
    # an empty directory gives way
    partial.rename(dest)
    if replaced.exists() and _why_not_ours(replaced) is None:
        remove(replaced)


def take_back(partial: Path, dest: Path) -> None:
    """Undo the beginning of a `publish` that was interrupted half way, on a mount point."""
    if partial.parent == dest:
        for name in (read_mark(partial) or {}).get("files", []):
            if name != MARK and (dest / name).is_file():
                (dest / name).rename(partial / name)


@contextmanager
def staged(
    dest: Path, command: str, *, overwrite: bool, inputs: tuple[Path, ...] = (), folders: tuple[str, ...] = ()
) -> Iterator[Path]:
    """Yield the directory DEST.partial; it becomes DEST when the block ends well, and goes away otherwise.

    InputError when DEST is taken (with `overwrite`: when not all of it is ours), holds one of the `inputs`, or cannot
    be written, and when an unfinished directory of that name is there (with `overwrite`: when that is not all ours).
    """
    dest = Path(os.path.abspath(dest))
    partial = partial_of(dest)
    check_dest(dest, overwrite=overwrite, inputs=inputs)
    if os.path.lexists(partial):
        drop_unfinished(partial, overwrite)
    make_partial(partial, command, folders=list(folders))
    try:
        with alone(partial), writing(dest, "free some space and run it again"):
            yield partial
            finish_mark(partial)
            publish(partial, dest)
    finally:
        if partial.exists():
            with suppress(InputError, OSError):
                remove(partial)


def drop_unfinished(partial: Path, overwrite: bool) -> None:
    """Delete an unfinished directory of ours where the user said so; InputError that says what it is otherwise."""
    command = (read_mark(partial) or {}).get("command")
    if not overwrite:
        what = f"an unfinished `{command}`" if command else "not written by gptoss-quantize"
        on = "continue it with --resume, or drop it with --overwrite" if command == "quantize" else (
            "drop it with --overwrite" if command else "move it away"
        )  # fmt: skip
        raise InputError(f"{partial}: {what}; {on}")
    check_ours(partial)
    with alone(partial):
        remove(partial)
