"""The checkpoint being written: shards under a temporary name, state after every layer, one rename at the end.

`OUT.partial/` holds finished shards, two files of hidden states and `state.json`. Each file is written under a
temporary name, flushed to disk and renamed, and state.json comes last; so after a crash at any moment it describes
whole files only, and `--resume` goes on from there. `OUT` itself appears in one rename, complete, or not at all.
"""

import fcntl
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from gptoss_quantize.errors import InputError
from gptoss_quantize.shards import ShardFile

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
STEM = "gptoss-int4"
POLISHED_NAME = "polished.safetensors"
REPORT_NAME = "quantization_report.json"


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn a full or failing disk into a message that says how to go on."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path}: writing failed ({error}); free some space and run the same command with --resume"
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that the file is either the old one or the whole new one."""
    temporary = path.with_name(path.name + ".tmp")
    with _writing(path):
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(value, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


def checksum(path: Path) -> int:
    """Return the CRC-32 of a file."""
    value = 0
    with path.open("rb", buffering=0) as file:
        while piece := file.read(1 << 24):
            value = zlib.crc32(piece, value)
    return value


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


def _sync_folder(path: Path) -> None:
    """Wait until renames in a folder are on disk."""
    place = os.open(path, os.O_RDONLY)
    try:
        os.fsync(place)
    finally:
        os.close(place)


def _state_of_report(report: dict[str, Any], index: dict[str, Any]) -> dict[str, Any]:
    """Return the state of a run that was finished but for its name: it was stopped after the state was deleted."""
    same = {name: report[name] for name in ("settings", "layers", "crc32", "bytes", "polish", "source_is_mxfp4")}
    return same | {
        "sanity": report.get("sanity"),
        "weight_map": index["weight_map"],
        "seconds": report["seconds_by_phase"],
        "elapsed": report["seconds"],
        "peak_rss_mib": report["peak_rss_mib"],
        "budget": report["memory"],
    }


class HiddenFile:
    """Hidden states [N, S, D] in float32 on disk, read and written by slices of sequences."""

    def __init__(self, path: Path, shape: tuple[int, int, int]):
        self.path, self.shape = path, shape
        with _writing(path):
            path.touch()

    def _place(self, part: slice) -> tuple[int, tuple[int, int, int]]:
        _, positions, hidden = self.shape
        return part.start * positions * hidden * 4, (part.stop - part.start, positions, hidden)

    def read(self, part: slice) -> torch.Tensor:
        """Return sequences part.start..part.stop-1 as float32 [n, S, D]."""
        start, shape = self._place(part)
        data = torch.empty(shape, dtype=torch.float32)
        with self.path.open("rb", buffering=0) as file:
            file.seek(start)
            view, done = memoryview(data.numpy().data).cast("B"), 0
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    raise InputError(f"{self.path}: ends early; the run cannot be resumed, start with --overwrite")
                done += count
        return data

    def write(self, part: slice, hidden_NSD: torch.Tensor) -> None:
        """Write float32 sequences at their place."""
        start, _ = self._place(part)
        with _writing(self.path), self.path.open("r+b", buffering=0) as file:
            file.seek(start)
            view, done = memoryview(hidden_NSD.contiguous().numpy().data).cast("B"), 0
            while done < len(view):
                done += file.write(view[done:])

    def flush(self) -> None:
        """Wait until the data is on disk."""
        with _writing(self.path), self.path.open("r+b") as file:
            os.fsync(file.fileno())


def check_name(dest: Path, overwrite: bool, report: str, foreign: str) -> None:
    """Raise InputError for a final name that is taken, or with `overwrite` holds no `report` of ours ("foreign")."""
    if not os.path.lexists(dest):
        return
    if not overwrite:
        raise InputError(f"{dest}: already exists; choose another name or pass --overwrite")
    plain = dest.is_dir() and not dest.is_symlink()
    if not plain or (any(dest.iterdir()) and not (dest / report).is_file()):
        raise InputError(
            f"{dest}: {foreign} (no {report}), so --overwrite does not delete it; choose another name or remove it "
            "yourself"
        )


def publish(partial: Path, dest: Path) -> None:
    """Give the finished directory its name; what stood there is deleted last."""
    replaced = dest.with_name(dest.name + ".replaced")
    if dest.exists():
        if replaced.exists():
            shutil.rmtree(replaced)
        dest.rename(replaced)
    partial.rename(dest)
    if replaced.exists():
        shutil.rmtree(replaced)


class Output:
    """A checkpoint under construction at `OUT.partial`; `finish` turns it into OUT."""

    def __init__(
        self,
        dest: Path,
        shards: int,
        settings: dict[str, Any],
        *,
        stem: str = STEM,
        resume: bool,
        overwrite: bool,
        state: dict[str, Any] | None = None,
    ):
        """Begin or take over a run; with `state`, join one that another process began."""
        self.dest, self.shards, self.settings, self.stem = Path(os.path.abspath(dest)), shards, settings, stem
        self.state: dict[str, Any]
        self.partial = self.dest.parent / (self.dest.name + ".partial")
        if state is not None:
            self.state = state
            return
        if resume and overwrite:
            raise InputError("--resume and --overwrite contradict each other; give one of them")
        if not (resume and self.partial.exists()):
            self._check_dest(overwrite)
        self.state = {
            "settings": settings,
            "overwrite": overwrite,
            "layers": [],
            "weight_map": {},
            "crc32": {},
            "bytes": 0,
            "seconds": {},
        }
        if self.partial.exists():
            with alone(self.partial):
                self._take_over(resume, overwrite)
        elif resume:
            raise InputError(f"{self.partial}: nothing to resume; run without --resume")
        if resume:
            # a run that was to replace OUT still is
            begun = bool(self.state.get("overwrite"))
            if not begun and os.path.lexists(self.dest):
                raise InputError(
                    f"{self.dest}: already exists, and this run was not begun with --overwrite; move it away and run "
                    "the same command again"
                )
            self._check_dest(begun)
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
            (self.partial / ".writable").write_bytes(b"")
            (self.partial / ".writable").unlink()
        except OSError as error:
            raise InputError(f"{self.partial}: cannot be written ({error}); choose another place for OUT") from None

    def _take_over(self, resume: bool, overwrite: bool) -> None:
        """Go on with an unfinished run, or drop it, or refuse to choose."""
        if resume:
            self.state = self._load_state()
        elif overwrite:
            shutil.rmtree(self.partial)
        else:
            raise InputError(
                f"{self.partial}: an unfinished run; continue it with --resume or drop it with --overwrite"
            )

    def _check_dest(self, overwrite: bool) -> None:
        """Refuse a final name that is taken, or whose replacement would delete what is not ours."""
        dest = self.dest
        for name in ("source", "adapter"):
            for place in (dest, self.partial):
                if (path := self.settings.get(name)) and Path(path).resolve().is_relative_to(place.resolve()):
                    raise InputError(f"{place}: holds the {name} {path}; choose another place for OUT")
        check_name(dest, overwrite, REPORT_NAME, "not a checkpoint that gptoss-quantize wrote")

    def _load_state(self) -> dict[str, Any]:
        path = self.partial / "state.json"
        report = self.partial / REPORT_NAME
        if not path.exists() and not report.exists():
            return self.state
        try:
            if path.exists():
                state = json.loads(path.read_text(encoding="utf-8"))
            else:
                index = json.loads((self.partial / self.index_name).read_text(encoding="utf-8"))
                state = _state_of_report(json.loads(report.read_text(encoding="utf-8")), index)
        except (ValueError, OSError) as error:
            raise InputError(f"{path}: unreadable ({error}); start again with --overwrite") from None
        before, now = state["settings"], json.loads(json.dumps(self.settings))
        if changed := sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k)):
            listed = "; ".join(f"{k} was {before.get(k)!r}, is {now.get(k)!r}" for k in changed)
            raise InputError(
                f"{self.partial}: cannot resume, the run has changed: {listed}. "
                "Use the same command, or start again with --overwrite"
            )
        for name in sorted(set(state["weight_map"].values())):
            try:
                stored = set(ShardFile(self.partial / name).tensors)
            except InputError:
                stored = set()
            whole = stored == {tensor for tensor, shard in state["weight_map"].items() if shard == name}
            # names first: they tell a foreign or truncated file without reading all of it
            known = (state["crc32"][name], state.get("crc32_next", {}).get(name))
            if not whole or checksum(self.partial / name) not in known:
                raise InputError(f"{self.partial / name}: changed since it was written; start again with --overwrite")
        return state

    @property
    def index_name(self) -> str:
        """Return the file name of the index."""
        return f"{self.stem}.safetensors.index.json"

    def shard_name(self, number: int) -> str:
        """Return the file name of shard `number`, counted from 1."""
        return f"{self.stem}-{number:05d}-of-{self.shards:05d}.safetensors"

    def write_shard(self, number: int, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Write one shard whole, or fail without a trace of it under its final name; return what to `note`."""
        name = self.shard_name(number)
        crc = self.write_file(self.partial / name, tensors)
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        return {"name": name, "tensors": list(tensors), "crc32": crc, "bytes": size}

    def change_shard(self, number: int, changes: dict[str, torch.Tensor]) -> None:
        """Replace tensors of a finished shard by others of the same shape and dtype; the file is whole always."""
        shard = self.shard_name(number)
        tensors = load_file(self.partial / shard)
        for name, tensor in changes.items():
            if (tensor.shape, tensor.dtype) != (tensors[name].shape, tensors[name].dtype):
                raise ValueError(f"{name}: {tensor.shape}, {tensor.dtype} cannot replace {tensors[name].shape}")

        def announce(crc: int) -> None:
            # after a crash the file is the old or the new one, and the state knows both
            self.state["crc32_next"] = {shard: crc}
            self.save_state()

        self.state["crc32"][shard] = self.write_file(self.partial / shard, tensors | changes, announce)

    def write_file(
        self, path: Path, tensors: dict[str, torch.Tensor], before: Callable[[int], None] = lambda _: None
    ) -> int:
        """Write a safetensors file whole, or fail without a trace of it under its final name; return its CRC.

        `before` is called with the CRC just before the file gets its name.
        """
        temporary = path.with_name(path.name + ".tmp")
        try:
            with _writing(path):
                save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, metadata={"format": "pt"})
                with temporary.open("rb") as file:
                    os.fsync(file.fileno())
                crc = checksum(temporary)
                before(crc)
                temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        return crc

    def note(self, shard: dict[str, Any]) -> None:
        """Take a written shard into the state, whichever process wrote it."""
        self.state["weight_map"] |= dict.fromkeys(shard["tensors"], shard["name"])
        self.state["crc32"][shard["name"]] = shard["crc32"]
        self.state["bytes"] += shard["bytes"]

    def hidden(self, which: int, shape: tuple[int, int, int]) -> HiddenFile:
        """Return one of the two hidden-state files (which is 0 or 1)."""
        return HiddenFile(self.partial / f"hidden-{which % 2}.bin", shape)

    def save_state(self) -> None:
        """Record what is whole by now."""
        with _writing(self.partial):
            _sync_folder(self.partial)
        write_json(self.partial / "state.json", self.state)

    def finish(self, source: Path, config: dict[str, Any], report: dict[str, Any]) -> None:
        """Write index, config, report and tokenizer files, then rename the directory to its final name."""
        for name in COPIED:
            if (source / name).is_file():
                with _writing(self.partial / name):
                    shutil.copyfile(source / name, self.partial / name)
        total = {"total_size": self.state["bytes"]}
        weight_map = dict(sorted(self.state["weight_map"].items()))
        write_json(self.partial / self.index_name, {"metadata": total, "weight_map": weight_map})
        write_json(self.partial / "config.json", config)
        write_json(self.partial / REPORT_NAME, report)
        with _writing(self.partial):
            _sync_folder(self.partial)
        # the state last; a run that is interrupted even later is resumed from the report
        for leftover in ("hidden-0.bin", "hidden-1.bin", POLISHED_NAME, "state.json"):
            (self.partial / leftover).unlink(missing_ok=True)
        with _writing(self.dest):
            publish(self.partial, self.dest)
