"""What a folder means, decided once: which weight files, and what config.json says of them.

`open_weights` gives stored name -> file. A folder may hold an index with its shards, shards without an index
(model-0000i-of-0000N), a single file, or several of these. One that holds a whole model is taken; two that hold
different models are refused with both named, since transformers, vLLM and others differ in which they take. Files
that an index does not name are leftovers: every reader goes by the index, and so do we, and say so.

Everything that follows is handed this reading, transformers included (`stock`).
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gptoss_quantize.config import ModelConfig, parse_config, read_json, rope_frequencies
from gptoss_quantize.config_keys import normalized
from gptoss_quantize.errors import InputError
from gptoss_quantize.layouts import LAYOUTS, Layout, quantization_config
from gptoss_quantize.shards import ShardFile, Weights, same_bytes

# names of our own first
INDEX_NAMES = tuple(sorted({layout.index_name for layout in LAYOUTS.values()}))
SINGLE_NAME = "model.safetensors"
ADAPTER_NAMES = ("adapter_model.safetensors", "adapter_model.bin")
_INDEX_REMEDY = "get the index and all files it names from the source again"
_SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)\.safetensors")
_ROTARY = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.(original_)?inv_freq")


def read_config(path: Path) -> tuple[ModelConfig, list[str]]:
    """Return (the checked architecture of a folder, notes on what was read otherwise than it is written)."""
    where = str(path / "config.json")
    raw, notes = normalized(read_json(path / "config.json"), where)
    return parse_config(raw, where), notes


# ---- weight files


@dataclass(frozen=True, slots=True)
class _Set:
    """One candidate for the weights of a folder."""

    words: str
    shard_of: Mapping[str, ShardFile]

    @property
    def files(self) -> set[Path]:
        return {shard.path for shard in self.shard_of.values()}


def open_weights(path: Path) -> tuple[dict[str, ShardFile], list[str]]:
    """Return (stored name -> open file, notes); InputError where a folder holds no model, or two different ones."""
    if not path.is_dir():
        raise InputError(f"{path}: not a directory; expected a Hugging Face gpt-oss directory")
    found = sorted(p for p in path.glob("*.safetensors") if p.name not in ADAPTER_NAMES and p.exists())
    indexes = [path / name for name in INDEX_NAMES if (path / name).is_file()]
    indexes += sorted(p for p in path.glob("*.safetensors.index.json") if p.name not in INDEX_NAMES)
    adapter = (path / "adapter_config.json").is_file()
    if not found and not indexes:
        raise InputError(_nothing(path, adapter))
    if adapter:
        raise InputError(
            f"{path}: holds a model ({(found or indexes)[0].name}) and an adapter (adapter_config.json); transformers"
            " would merge the adapter in silence, others would not see it: move the adapter's files to a folder of "
            "their own and give it with --adapter, or move them away"
        )
    notes: list[str] = []
    sets = _candidates(path, found, indexes, notes)
    if not sets:
        raise InputError(
            f"{path}: {len(found)} weight files without an index, first {found[0].name}; which of them make up "
            f"the model cannot be told: expected {SINGLE_NAME}, an index, or shards model-00001-of-0000N.safetensors"
        )
    first = sets[0]
    for other in sets[1:]:
        _same_model(path, first, other)
        notes.append(f"{path}: {first.words} and {other.words} hold the same weights twice")
    used = {file.name for one in sets for file in one.files}
    if unread := [file.name for file in found if file.name not in used]:
        notes.append(
            f"{path}: {len(unread)} weight file(s) are not read, since {first.words} does not name them: {unread[0]}"
        )
    return dict(first.shard_of), notes


def _candidates(path: Path, found: list[Path], indexes: list[Path], notes: list[str]) -> list[_Set]:
    """Return every set of files that may be the model, an index before others; shards count where no index does."""
    sets, dead = [], []
    for index in indexes:
        weight_map = _weight_map(index)
        if all((path / file).exists() for file in weight_map.values()):
            sets.append(_Set(f"the index {index.name}", _indexed(index, weight_map)))
        else:
            dead.append((index, weight_map))
    indexed = bool(sets)
    if (path / SINGLE_NAME) in found and not any((path / SINGLE_NAME) in one.files for one in sets):
        sets.append(_single(path / SINGLE_NAME))
    groups = {} if indexed else _groups([file for file in found if _SHARD.fullmatch(file.name)])
    for (stem, count), files in sorted(groups.items()):
        alone = not sets and not dead and len(groups) == 1
        if whole := _without_index(path, stem, count, files, notes, alone=alone):
            sets.append(whole)
    if not sets and not dead and len(found) == 1:
        sets.append(_single(found[0]))
    for index, weight_map in dead:
        if not sets:
            # raises: the message names the first file that is missing
            _indexed(index, weight_map)
        notes.append(f"{index} names files that are not there, and is not read")
    return sets


def _single(file: Path) -> _Set:
    shard = ShardFile(file)
    return _Set(f"the file {file.name}", dict.fromkeys(shard.tensors, shard))


def _nothing(path: Path, adapter: bool) -> str:
    if adapter:
        return f"{path}: is an adapter, not a model; give the base model as MODEL and this folder with --adapter"
    pickles = sorted(p.name for p in path.glob("*.bin")) + sorted(p.name for p in path.glob("*.pt*"))
    if pickles:
        return (
            f"{path}: {pickles[0]} is a pickle, which can run any code when it is read; convert it: load the model "
            "with transformers and save it with save_pretrained, which writes safetensors"
        )
    return f"{path}: no weights; expected {SINGLE_NAME} or one of {', '.join(INDEX_NAMES)}; download them"


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: no weight_map of tensor names to file names; {_INDEX_REMEDY}")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".."):
            raise InputError(f"{index}: {name} points to {file!r}, which is no file name; {_INDEX_REMEDY}")
    return weight_map


def _indexed(index: Path, weight_map: dict[str, str]) -> dict[str, ShardFile]:
    """Return the tensors of an index; InputError where it and its files do not agree."""
    path, shards = index.parent, {}
    for name, file in weight_map.items():
        if file not in shards:
            shards[file] = ShardFile(path / file)
        if name not in shards[file].tensors:
            raise InputError(
                f"{path / file}: {name} is missing, though {index.name} places it there; {_INDEX_REMEDY}"
            )
    for file, shard in shards.items():
        if extra := sorted(shard.tensors.keys() - weight_map.keys()):
            raise InputError(f"{path / file}: {extra[0]} is not in {index.name}; {_INDEX_REMEDY}")
    return {name: shards[file] for name, file in weight_map.items()}


def _groups(files: list[Path]) -> dict[tuple[str, int], dict[int, Path]]:
    """Return (stem, number of shards) -> shard number -> file."""
    groups: dict[tuple[str, int], dict[int, Path]] = defaultdict(dict)
    for file in files:
        match = _SHARD.fullmatch(file.name)
        assert match is not None
        groups[match[1], int(match[3])][int(match[2])] = file
    return dict(groups)


def _without_index(
    path: Path, stem: str, count: int, files: dict[int, Path], notes: list[str], *, alone: bool
) -> _Set | None:
    """Return shards that have no index, None where some are missing (InputError where they are `alone`)."""
    # some tools count from 0
    start = 0 if 0 in files else 1
    if missing := sorted(set(range(start, start + count)) - files.keys()):
        if not alone:
            return None
        name = next(iter(files.values())).name
        raise InputError(
            f"{path}: {name} is there, but shard {missing[0]} of {count} is not, and no index; get the missing "
            f"files, and {stem}.safetensors.index.json, from the source"
        )
    shard_of: dict[str, ShardFile] = {}
    for number in sorted(files):
        shard = ShardFile(files[number])
        for name in shard.tensors:
            if name in shard_of:
                raise InputError(
                    f"{path}: {name} is in {shard_of[name].path.name} and in {shard.path.name}; the shards are of "
                    "two models, or saved twice: get them from the source again"
                )
            shard_of[name] = shard
    words = f"the {count} shard(s) {stem}-*-of-{count:05d}"
    notes.append(f"{path}: {words} are read without an index")
    return _Set(words, shard_of)


def _same_model(path: Path, one: _Set, other: _Set) -> None:
    """Raise InputError unless two sets of weights are equal, byte for byte."""
    only = sorted(one.shard_of.keys() ^ other.shard_of.keys())
    differ = (
        only[:1]
        or [
            name
            for name in sorted(one.shard_of)
            if not same_bytes((one.shard_of[name], name), (other.shard_of[name], name))
        ][:1]
    )
    if differ:
        raise InputError(
            f"{path}: holds two different models: {one.words} ({len(one.shard_of)} tensors in {len(one.files)} "
            f"file(s)) and {other.words} ({len(other.shard_of)} tensors), which differ in {differ[0]}; transformers "
            "and others differ in which they read. Keep one, and move the other to a folder of its own"
        )


# ---- what the weights say about the config


def settle(
    config: ModelConfig, weights: Weights, layout: Layout, where: str
) -> tuple[ModelConfig, Weights, list[str]]:
    """Return config and weights that agree: what is stored counts for the head and for the experts' format.

    The raw config is what transformers gets, so it says the same.
    """
    notes: list[str] = []
    raw = dict(config.raw)
    weights = _without_rotary(config, weights, where, notes)
    if config.tied and "lm_head.weight" in weights and "model.embed_tokens.weight" in weights:
        if weights.equal("lm_head.weight", "model.embed_tokens.weight"):
            weights = weights.without({"lm_head.weight"})
        else:
            raw["tie_word_embeddings"] = False
            config = replace(config, tied=False)
            notes.append(
                f"{where}: tie_word_embeddings is true, but an lm_head.weight is stored that is not the embedding; "
                "the stored head counts, as in transformers 5"
            )
    _quantization(raw, layout, where, notes)
    return replace(config, raw=raw), weights, notes


def _without_rotary(config: ModelConfig, weights: Weights, where: str, notes: list[str]) -> Weights:
    """Leave stored rotary frequencies out: they follow from the config, and no reader takes them from the file."""
    found = {name for name in weights.names() if _ROTARY.fullmatch(name)}
    expected = rope_frequencies(config)[0]
    for name in sorted(found):
        stored = weights.read(name).float()
        if stored.shape != expected.shape or not torch.allclose(stored, expected, rtol=1e-2, atol=1e-8):
            notes.append(
                f"{where}: {name} is stored with other frequencies than the rope settings give; the settings count, "
                "as in transformers"
            )
            break
    return weights.without(found) if found else weights


def _quantization(raw: dict[str, Any], layout: Layout, where: str, notes: list[str]) -> None:
    """Make quantization_config say what the experts are."""
    raw.pop("compression_config", None)
    said = raw.get("quantization_config")
    method = said.get("quant_method") if isinstance(said, dict) else None
    if layout.config is None:
        if raw.pop("quantization_config", None):
            notes.append(f"{where}: quantization_config ({method}) is left over: the weights are not quantized")
        return
    if layout.packed:
        return
    if method != layout.config(0).get("quant_method"):
        raw["quantization_config"] = quantization_config(layout)
        was = f"says {method}" if said else "is missing"
        notes.append(f"{where}: quantization_config {was}; the experts are {layout.name}, and are read so")
