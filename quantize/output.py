"""The checkpoint being written: shards under a temporary name, state after every layer, one rename at the end.

`OUT.partial/` holds finished shards, two files of hidden states and `state.json`. Each file is written under a
temporary name, flushed to disk and renamed, and state.json comes last; so after a crash at any moment it describes
whole files only, and `--resume` goes on from there. `OUT` itself appears in one rename, complete, or not at all.
What may be deleted, and how a directory gets its name, is decided in `gptoss_quantize.files`.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from gptoss_quantize.errors import InputError
from gptoss_quantize.files import (
    MARK,
    alone,
    check_dest,
    check_resumable,
    checksum,
    drop_unfinished,
    finish_mark,
    is_free,
    make_partial,
    partial_of,
    place_of,
    publish,
    read_mark,
    remove,
    save_tensors,
    sync_folder,
    take_back,
    write_json,
    writing,
)
from gptoss_quantize.model_card import QUANTIZATION_REPORT as REPORT_NAME
from gptoss_quantize.model_card import write_card
from gptoss_quantize.shards import ShardFile
from gptoss_quantize.tokenizer_files import SideFiles

POLISHED_NAME = "polished.safetensors"


def _state_of_report(report: dict[str, Any], index: dict[str, Any]) -> dict[str, Any]:
    """Return the state of a run that was finished but for its name: it was stopped after the state was deleted."""
    same = {name: report[name] for name in ("settings", "layers", "crc32", "bytes", "polish")}
    return same | {
        "sanity": report.get("sanity"),
        "mixture": report.get("mixture"),
        "weight_map": index["weight_map"],
        "seconds": report["seconds_by_phase"],
        "elapsed": report["seconds"],
        "peak_rss_mib": report["peak_rss_mib"],
        "budget": report["memory"],
    }


def chosen_before(dest: Path) -> dict[str, Any] | None:
    """Return the bits that an unfinished run of `dest` chose for its size, None where there is none."""
    partial = partial_of(place_of(dest))
    for name in ("state.json", REPORT_NAME):
        try:
            # what is broken or does not fit is refused when the run is taken over
            found = json.loads((partial / name).read_text(encoding="utf-8"))["mixture"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        return found if isinstance(found, dict) else None
    return None


# what a run depends on, and is no option
WAYS_BACK = {
    "version": "Continue it with the version that began it (pip install gptoss-quantize=={})",
    "source_files": "Put back the files that the run began with: the model was written anew since",
    "adapter_files": "Put back the files that the run began with: the adapter was written anew since",
    "native_kernels": "Continue it where the compiled kernels are as they were",
    "device": "Name the device that it began on (--device {})",
    "calibration": "Give the text that it began with (--calibration, --tokens, --seq-len, --seed)",
}


def _way_back(changed: list[str], before: dict[str, Any]) -> str:
    """Return how to make a run the same again whose settings have `changed`."""
    # an option that differs explains what else does
    if not changed or not set(changed) <= WAYS_BACK.keys():
        return "Use the same command"
    name = next(name for name in WAYS_BACK if name in changed)
    return WAYS_BACK[name].format(before.get(name))


def _change(name: str, before: Any, now: Any) -> str:
    """Return the words for one setting that changed; of files, only those that did."""
    if name.endswith("_files") and isinstance(before, dict) and isinstance(now, dict):
        files = [file for file in sorted(before.keys() | now.keys()) if before.get(file) != now.get(file)]
        before, now = ({file: value.get(file) for file in files[:3]} for value in (before, now))
    return f"{name} was {before!r}, is {now!r}"


class HiddenFile:
    """Hidden states [N, S, D] in float32 on disk, read and written by slices of sequences."""

    def __init__(self, path: Path, shape: tuple[int, int, int]):
        self.path, self.shape = path, shape
        with writing(path):
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
        with writing(self.path), self.path.open("r+b", buffering=0) as file:
            file.seek(start)
            view, done = memoryview(hidden_NSD.contiguous().numpy().data).cast("B"), 0
            while done < len(view):
                done += file.write(view[done:])

    def flush(self) -> None:
        """Wait until the data is on disk."""
        with writing(self.path), self.path.open("r+b") as file:
            os.fsync(file.fileno())


class Output:
    """A checkpoint under construction at `OUT.partial`; `finish` turns it into OUT."""

    def __init__(
        self,
        dest: Path,
        shards: int,
        settings: dict[str, Any],
        *,
        stem: str,
        resume: bool,
        overwrite: bool,
        state: dict[str, Any] | None = None,
    ):
        """Begin or take over a run; with `state`, join one that another process began."""
        self.dest, self.shards, self.settings, self.stem = place_of(dest), shards, settings, stem
        self.state: dict[str, Any]
        self.partial = partial_of(self.dest)
        if state is not None:
            self.state = state
            return
        if resume and overwrite:
            raise InputError("--resume and --overwrite contradict each other; give one of them")
        self.state = {"settings": settings, "layers": [], "weight_map": {}, "crc32": {}, "bytes": 0, "seconds": {}}
        if resume:
            self._take_over()
        else:
            check_dest(self.dest, overwrite=overwrite, inputs=self._inputs)
            drop_unfinished(self.partial, overwrite)
        make_partial(self.partial, "quantize", overwrite=overwrite)

    @property
    def _inputs(self) -> tuple[Path, ...]:
        return tuple(Path(path) for name in ("source", "adapter") if (path := self.settings.get(name)))

    def abandon(self) -> None:
        """Delete a run in which nothing has been written yet."""
        if all(path.name == MARK for path in self.partial.iterdir()):
            remove(self.partial)

    def _take_over(self) -> None:
        """Go on with an unfinished run; what it was begun with, --overwrite too, still holds."""
        check_resumable(self.partial, self.dest)
        with alone(self.partial):
            take_back(self.partial, self.dest)
            self.state = self._load_state()
        begun = bool((read_mark(self.partial) or {}).get("overwrite"))
        if not begun and not is_free(self.dest):
            raise InputError(
                f"{self.dest}: already exists, and this run was not begun with --overwrite; move it away and run "
                "the same command again"
            )
        check_dest(self.dest, overwrite=begun, inputs=self._inputs)

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
            listed = "; ".join(_change(k, before.get(k), now.get(k)) for k in changed)
            raise InputError(
                f"{self.partial}: cannot resume, the run has changed: {listed}. "
                f"{_way_back(changed, before)}, or start again with --overwrite"
                f" ({len(state['layers'])} finished layer(s) are lost)"
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
        crc = save_tensors(self.partial / name, tensors)
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

        self.state["crc32"][shard] = save_tensors(self.partial / shard, tensors | changes, announce)

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
        with writing(self.partial):
            sync_folder(self.partial)
        write_json(self.partial / "state.json", self.state)

    def finish(self, side: SideFiles, config: dict[str, Any], report: dict[str, Any]) -> None:
        """Write index, config, report and tokenizer files, then rename the directory to its final name."""
        side.write(self.partial)
        total = {"total_size": self.state["bytes"]}
        weight_map = dict(sorted(self.state["weight_map"].items()))
        write_json(self.partial / self.index_name, {"metadata": total, "weight_map": weight_map})
        write_json(self.partial / "config.json", config)
        write_json(self.partial / REPORT_NAME, report)
        write_card(self.partial)
        # the state goes last; a run that is interrupted even later is resumed from the report
        for leftover in ("hidden-0.bin", "hidden-1.bin", POLISHED_NAME, "state.json"):
            (self.partial / leftover).unlink(missing_ok=True)
        finish_mark(self.partial)
        with writing(self.partial):
            sync_folder(self.partial)
        with writing(self.dest):
            publish(self.partial, self.dest)
