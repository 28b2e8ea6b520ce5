"""Rows of Hugging Face `datasets`: hf:NAME[:CONFIG][@SPLIT], for a name on the Hub or a local data set folder.

What is large or remote is streamed, so that a terabyte costs what the budget of tokens costs: the files of a
stream (its shards) are put in an order by seed, four of them are read in turn, and rows are drawn by seed from a
buffer of 1,024 of them. Small local folders, data sets saved with `save_to_disk`, and, without a network, the
cache are tables whose rows are all there: these are shuffled as a whole. Both orders depend on the seed and the
data alone, and they differ from each other.

A split may be sliced by rows (`train[1000:2000]`); a slice in per cent needs the number of rows, and reads all.
"""

import re
from collections.abc import Collection, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from gptoss_quantize.calibration.source_rows import SUFFIXES, Row, columns, first_line, shuffled
from gptoss_quantize.errors import InputError

BUFFER, AT_ONCE = 1024, 4
STREAM_OVER = 1 << 30  # bytes of a local folder
SLICE = re.compile(r"^(?P<split>[^\[\]+]+)\[(?P<start>\d*):(?P<stop>\d*)\]$")
_KEYS_BUFFER, _KEYS_SHARDS = 1, 2  # so that the two orders of one seed are not the same numbers


def rows_of_dataset(source: str, wanted: Collection[str], column: str | None, seed: int | None) -> Iterator[Row]:
    """Return the rows of a data set, in its order, or shuffled where there is a seed."""
    name, _, split = source.removeprefix("hf:").partition("@")
    name, _, config = name.partition(":")
    if not name:
        raise InputError(f"{source}: names no data set; expected hf:NAME[:CONFIG][@SPLIT]")
    try:
        rows, first, last = _load(name, config or None, split or "train")
    except Exception as error:  # the hub, httpx, fsspec, pyarrow and builders raise what they like
        raise InputError(
            f"{source}: the data set cannot be loaded ({type(error).__name__}: {first_line(error)}); "
            "expected hf:NAME[:CONFIG][@SPLIT] in reach; without a network, set HF_HUB_OFFLINE=1 to "
            "read the cache, or give a file "
            f"({', '.join(SUFFIXES)}) or the word default"
        ) from error
    if rows.column_names is not None:  # a stream may not know them before its first row
        rows = rows.select_columns(columns(rows.column_names, wanted, column, source))
    if isinstance(rows, datasets.Dataset):
        return (Row(rows[i], f"{source}: row {i}") for i in shuffled(len(rows), seed))
    return _guarded(_streamed(rows, source, seed, first, last), source)


def _load(name: str, config: str | None, split: str) -> tuple[Any, int, int | None]:
    """Return (rows, first, last): a table as it is, or a stream whose rows from first up to last are meant."""
    folder = Path(name)
    if folder.is_dir() and (folder / "dataset_dict.json").is_file():
        return datasets.load_from_disk(name)[split], 0, None
    if folder.is_dir() and (folder / "state.json").is_file():
        return datasets.load_from_disk(name), 0, None
    if not _to_be_streamed(folder) or "%" in split:
        return datasets.load_dataset(name, config, split=split), 0, None
    first, last = 0, None
    if match := SLICE.match(split):
        split, first = match["split"], int(match["start"] or 0)
        last = int(match["stop"]) if match["stop"] else None
    return datasets.load_dataset(name, config, split=split, streaming=True), first, last


def _to_be_streamed(folder: Path) -> bool:
    if folder.exists():
        return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) > STREAM_OVER
    return not datasets.config.HF_HUB_OFFLINE


def _streamed(rows: Any, source: str, seed: int | None, first: int, last: int | None) -> Iterator[Row]:
    if seed is None or (first, last) != (0, None):
        numbered = (Row(row, f"{source}: row {first + i}") for i, row in enumerate(islice(iter(rows), first, last)))
        yield from numbered if seed is None else _drawn(numbered, seed)
        return
    yield from _drawn(_interleaved(rows, source, seed), seed)


def _interleaved(rows: Any, source: str, seed: int) -> Iterator[Row]:
    """Yield rows from AT_ONCE shards in turn, the shards in the order of the seed."""
    count = rows.num_shards
    waiting = iter(list(shuffled(count, seed, _KEYS_SHARDS)))

    def shard(s: int) -> Iterator[Row]:
        part = rows.shard(count, s) if count > 1 else rows
        where = f"{source}: file {s}, row" if count > 1 else f"{source}: row"
        return (Row(row, f"{where} {i}") for i, row in enumerate(part))

    running = [shard(s) for s in islice(waiting, AT_ONCE)]
    while running:
        for part in list(running):
            row = next(part, None)
            if row is not None:
                yield row
                continue
            running.remove(part)
            running.extend(shard(s) for s in islice(waiting, 1))


def _drawn(rows: Iterator[Row], seed: int) -> Iterator[Row]:
    """Yield rows from a buffer, each drawn by seed and replaced by the next one that comes."""
    draws = np.random.PCG64([seed, _KEYS_BUFFER])
    buffer = list(islice(rows, BUFFER))
    for row in rows:
        i = int(draws.random_raw()) % len(buffer)
        yield buffer[i]
        buffer[i] = row
    yield from (buffer[i] for i in shuffled(len(buffer), seed, _KEYS_BUFFER))


def _guarded(rows: Iterator[Row], source: str) -> Iterator[Row]:
    """Yield rows; a stream that breaks off is an InputError. Only reading is guarded, not what is done with a row."""
    while True:
        try:
            row = next(rows, None)
        except Exception as error:  # whatever fsspec, aiohttp, pyarrow or a builder raises
            raise InputError(
                f"{source}: the stream broke off ({type(error).__name__}: {first_line(error)}); try again, or fetch "
                "the data set first (`hf download --repo-type dataset`) and name its folder"
            ) from error
        if row is None:
            return
        yield row
