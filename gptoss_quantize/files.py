"""What is written appears whole or not at all, and nothing of the user's is ever deleted: the one place for both.

A directory is written under another name (`partial_of`) and gets its own in one rename; a file likewise (`atomic`).
Every directory that we write holds a mark, `.gptoss-quantize.json`. It says what wrote it and, once finished, which
files are ours. Only a marked directory is ever deleted, file by file, only where the user said --overwrite, and only
if it holds nothing else: a name that we did not write is refused and named.

Where no rename can reach OUT, because it is a mount point (`docker run -v`) or lies in a directory that may not be
written, the unfinished directory lies inside, and its files move up one by one, config.json and the mark last.

Nothing here imports torch: where OUT cannot be written is said in the first tenth of a second (`check_begin`).
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from json import loads
from pathlib import Path
from typing import Any

from gptoss_quantize import __version__
from gptoss_quantize.atomic import (
    COPIED,
    TOKENIZER,
    Progress,
    alone,
    checksum,
    no_progress,
    remedy_for,
    save_tensors,
    sync_folder,
    write_json,
    write_text,
    writing,
)
from gptoss_quantize.errors import InputError
from gptoss_quantize.mounts import out_of_reach

__all__ = [
    "COPIED",
    "TOKENIZER",
    "Progress",
    "alone",
    "checksum",
    "no_progress",
    "save_tensors",
    "sync_folder",
    "write_json",
    "write_text",
    "writing",
]

MARK = ".gptoss-quantize.json"
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

# ---- whose directory it is


def read_mark(folder: Path) -> dict[str, Any] | None:
    """Return what the mark in a folder says, or None where there is none that can be read."""
    try:
        mark = loads((folder / MARK).read_text(encoding="utf-8"))
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


def add_to_mark(folder: Path, name: str) -> None:
    """Note that a file added to a finished folder is ours too; nothing where the folder has no mark."""
    mark = read_mark(folder)
    if mark is not None and "files" in mark and name not in mark["files"]:
        write_json(folder / MARK, mark | {"files": sorted([*mark["files"], name])})


def strangers(folder: Path) -> list[str]:
    """Return the names in a marked folder that are not ours, sorted."""
    mark = read_mark(folder) or {}
    patterns = mark.get("files", UNFINISHED)
    folders = mark.get("folders", [])
    own = _own_inside(folder)
    return sorted(
        path.name
        for path in folder.iterdir()
        if not (
            path.name in own
            or (path.name in folders and path.is_dir() and not path.is_symlink() and _why_not_ours(path) is None)
            or (
                (path.is_file() or path.is_symlink())
                and any(fnmatch(path.name, pattern) or path.name == pattern for pattern in patterns)
            )
        )
    )


def _why_not_ours(folder: Path) -> str | None:
    """Return why a directory must not be deleted, None where all of it is ours."""
    if folder.is_symlink():
        return f"is a link to {os.readlink(folder)}"
    if not folder.is_dir():
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


def _clear(folder: Path) -> None:
    """Delete what is ours in a checked directory: its parts first, the mark last, so that a rest of it stays ours."""
    own = _own_inside(folder)
    for path in sorted(folder.iterdir(), key=lambda path: path.name == MARK):
        if path.name in own:
            continue
        if path.is_dir() and not path.is_symlink():
            remove(path)
        else:
            path.unlink()


def remove(folder: Path) -> None:
    """Delete a directory of ours, file by file; InputError, and nothing deleted, where something else is in it."""
    check_ours(folder)
    _clear(folder)
    folder.rmdir()


# ---- one directory


def place_of(dest: Path) -> Path:
    """Return the absolute path that a directory is written to: where a link leads, if it leads to a free place."""
    dest = Path(os.path.abspath(dest))
    if dest.is_symlink() and dest.is_dir():
        real = Path(os.path.realpath(dest))
        return real if _is_empty(real) else dest
    return dest


def partial_of(dest: Path) -> Path:
    """Return where a directory is written until it is finished."""
    inside = dest / ".partial"
    # once begun inside, it goes on there
    if out_of_reach(dest) or (not dest.is_symlink() and read_mark(inside) is not None):
        return inside
    return dest.with_name(dest.name + ".partial")


def _replaced(dest: Path) -> Path:
    return dest.with_name(dest.name + ".replaced")


def _own_inside(dest: Path) -> set[str]:
    """Return what may lie in a place that no rename reaches, besides a result: unfinished work, and lost+found."""
    return {".partial", "lost+found"} if partial_of(dest).parent == dest else set()


def _half_published(dest: Path) -> set[str]:
    """Return the names in DEST that an interrupted `publish` has moved up already."""
    partial = dest / ".partial"
    names = (read_mark(partial) or {}).get("files", [])
    return {name for name in names if not os.path.lexists(partial / name)}


def _is_empty(dest: Path) -> bool:
    """Return whether a directory holds nothing but unfinished work of ours (and lost+found)."""
    if dest.is_symlink() or not dest.is_dir():
        return False
    names = {path.name for path in dest.iterdir()}
    own = _own_inside(dest) if names else set()
    return not names - own - (_half_published(dest) if own else set())


def is_free(dest: Path) -> bool:
    """Return whether nothing stands under a name yet, or an empty directory."""
    return not os.path.lexists(dest) or _is_empty(place_of(dest))


def check_dest(dest: Path, *, overwrite: bool | None, inputs: tuple[Path, ...] = ()) -> None:
    """Raise InputError for a final name that is taken, or whose replacement would delete what is not ours.

    An existing empty directory is free. `inputs` are what is read: DEST must not hold them. `overwrite` is None for a
    command without that option.
    """
    dest = place_of(dest)
    partial = partial_of(dest)
    for path in inputs:
        # realpath: of a link that leads to itself, too
        real = Path(os.path.realpath(path))
        if any(real.is_relative_to(os.path.realpath(place)) for place in (dest, partial)):
            raise InputError(f"{dest}: holds the input {path}; choose another place to write to")
    if is_free(dest):
        return
    if not overwrite:
        why = _why_not_ours(dest)
        what = "already exists" + (f" and {why}" if why else "")
        more = "" if overwrite is None or why else " or pass --overwrite"
        raise InputError(f"{dest}: {what}; choose another name{more}")
    check_ours(dest)
    if partial.parent != dest and os.path.lexists(_replaced(dest)):
        check_ours(_replaced(dest))


def check_begin(
    dest: Path, command: str, *, overwrite: bool | None, resume: bool = False, inputs: tuple[Path, ...] = ()
) -> None:
    """Raise InputError where `command` could not begin (or resume) writing DEST; nothing is written or deleted."""
    dest = place_of(dest)
    partial = partial_of(dest)
    check_utf8(dest)
    if resume and overwrite:
        raise InputError("--resume and --overwrite contradict each other; give one of them")
    if resume:
        check_resumable(partial, dest)
        return
    check_dest(dest, overwrite=overwrite, inputs=inputs)
    check_unfinished(partial, overwrite, command)
    above = next(path for path in (partial, *partial.parents) if os.path.lexists(path))
    with _cannot_write(partial):
        os.listdir(above)
        if not os.access(above, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(above))


def check_utf8(path: Path) -> None:
    """Raise InputError for a path that safetensors could not open."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise InputError(
            f"{path}: is not UTF-8, and safetensors cannot open it; rename or move the directory"
        ) from None


def check_resumable(partial: Path, dest: Path) -> None:
    """Raise InputError unless an unfinished `quantize` stands there."""
    mark = read_mark(partial)
    if mark is not None and mark["command"] == "quantize":
        return
    if mark is not None:
        what = f"was left by `{mark['command']}`, not by quantize; run without --resume, with --overwrite to drop it"
    elif (finished := read_mark(dest)) is not None and "files" in finished:
        what = f"nothing to resume, {dest} is finished; run without --resume, with --overwrite to make it anew"
    else:
        what = "nothing to resume; run without --resume"
    raise InputError(f"{partial}: {what}")


@contextmanager
def _cannot_write(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        remedy = remedy_for(error)
        if "another place" not in remedy and "space" not in remedy:
            remedy = "choose another place to write to"
        raise InputError(f"{place}: cannot be written ({error}); {remedy}") from None


def make_partial(partial: Path, command: str, **more: Any) -> None:
    """Make a marked directory for unfinished work, if it is not there; InputError where it cannot be written."""
    with _cannot_write(partial):
        partial.mkdir(parents=True, exist_ok=True)
        (partial / ".writable").write_bytes(b"")
        (partial / ".writable").unlink()
    if read_mark(partial) is None:
        put_mark(partial, command, **more)


def publish(partial: Path, dest: Path) -> None:
    """Give the finished directory its name; what stood there, ours and checked before, is deleted last.

    Where no rename reaches DEST it is deleted first, file by file: what is new is whole until then, and `take_back`
    puts it together again if the moves are interrupted.
    """
    if partial.parent == dest:
        if not _is_empty(dest):
            check_ours(dest)
            _clear(dest)
        for path in sorted(partial.iterdir(), key=lambda path: (path.name in LAST, path.name == MARK, path.name)):
            path.rename(dest / path.name)
        sync_folder(dest)
        partial.rmdir()
        return
    replaced = _replaced(dest)
    if dest.exists() and not _is_empty(dest):
        if os.path.lexists(replaced):
            remove(replaced)
        dest.rename(replaced)
    try:
        # an empty directory gives way
        partial.rename(dest)
    except FileExistsError:
        # not on Windows; rmdir refuses one that is not empty
        dest.rmdir()
        partial.rename(dest)
    if replaced.exists() and _why_not_ours(replaced) is None:
        remove(replaced)


def take_back(partial: Path, dest: Path) -> None:
    """Undo the beginning of a `publish` that was interrupted half way, where no rename reaches DEST."""
    if partial.parent == dest:
        for name in _half_published(dest):
            if (dest / name).is_file():
                (dest / name).rename(partial / name)


@contextmanager
def staged(
    dest: Path, command: str, *, overwrite: bool | None, inputs: tuple[Path, ...] = (), folders: tuple[str, ...] = ()
) -> Iterator[Path]:
    """Yield the directory DEST.partial; it becomes DEST when the block ends well, and goes away otherwise.

    InputError when DEST is taken (with `overwrite`: when not all of it is ours), holds one of the `inputs`, or cannot
    be written, and when an unfinished directory of that name is there (with `overwrite`: when that is not all ours).
    `overwrite` is None for a command without that option.
    """
    dest = place_of(dest)
    partial = partial_of(dest)
    check_dest(dest, overwrite=overwrite, inputs=inputs)
    drop_unfinished(partial, overwrite, command)
    make_partial(partial, command, folders=list(folders))
    try:
        with alone(partial), writing(dest):
            yield partial
            finish_mark(partial)
            publish(partial, dest)
    finally:
        if partial.exists():
            with suppress(InputError, OSError):
                take_back(partial, dest)
                remove(partial)


def check_unfinished(partial: Path, overwrite: bool | None, command: str = "quantize") -> None:
    """Raise InputError for unfinished work that the user has not said to drop, or that is not ours."""
    if not os.path.lexists(partial) or (partial.is_dir() and not any(partial.iterdir())):
        return
    if overwrite:
        check_ours(partial)
        return
    left = (read_mark(partial) or {}).get("command")
    if left is None:
        raise InputError(f"{partial}: not written by gptoss-quantize; move it away, or choose another name")
    ways = ["continue it with --resume" if command == "quantize" else "continue it with `quantize --resume`"]
    ways = ways if left == "quantize" else []
    ways.append("drop it with --overwrite" if overwrite is not None else "delete it, or choose another name")
    raise InputError(f"{partial}: an unfinished `{left}`; {', or '.join(ways)}")


def drop_unfinished(partial: Path, overwrite: bool | None, command: str = "quantize") -> None:
    """Delete an unfinished directory of ours where the user said so; InputError that says what it is otherwise."""
    check_unfinished(partial, overwrite, command)
    if not os.path.lexists(partial) or read_mark(partial) is None:
        return
    with alone(partial):
        take_back(partial, partial.parent)
        remove(partial)
