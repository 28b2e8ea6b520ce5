"""Where text comes from: files, the packaged default, and Hugging Face `datasets`, as one stream of records.

A record is one document: a text, or a conversation (`messages`) that still has to be rendered. Sources are
read lazily and in a given order, so that a budget of tokens touches only as much of a large file as it needs:

    .txt, .txt.gz      in order: one document, handed out in pieces; shuffled: cut at blank lines into
                       passages of at least 4 kB, each a document of its own
    .jsonl, .jsonl.gz  one object per line, `text` (or a column that is named) or `messages`
    .parquet           the same as columns; shuffled by row group, then by row inside the group
    hf:NAME[:CONFIG][@SPLIT]   a `datasets` name or a local data set folder; the split is `train` unless named

Orders come from the raw stream of a private PCG64, which numpy guarantees to be the same on every platform
and in every version (its `shuffle` and `permutation` are not); no global random state is read or changed.
"""

import gzip
import json
import tempfile
import zlib
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gptoss_quantize.errors import InputError

SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")
PACKAGED = {
    "default": ("gptoss_quantize.calibration", "calibration.jsonl.gz", "default calibration text"),
    "heldout": ("gptoss_quantize.eval", "heldout.jsonl.gz", "default held-out text"),
}
PASSAGE, PASSAGE_LIMIT = 4096, 65536
UNPACKED_IN_MEMORY = 64 << 20


@dataclass(frozen=True, slots=True)
class Record:
    """One document, or the next piece of the one before (`continued`), and where it was found."""

    value: Any
    where: str
    continued: bool = False


def default_calibration_path() -> Path:
    """Return the packaged calibration text: public-domain and PostgreSQL-licensed prose (data/NOTICE)."""
    return _packaged("default")


def default_heldout_path() -> Path:
    """Return the packaged text for evaluation; no paragraph of it is in the calibration text."""
    return _packaged("heldout")


def _packaged(name: str) -> Path:
    package, file, what = PACKAGED[name]
    path = Path(str(files(package) / "data" / file))
    if not path.is_file():
        raise InputError(f"{path}: the packaged {what} is missing; reinstall gptoss-quantize")
    return path


def describe(source: str) -> str:
    """Return the words for a source in reports."""
    if source in PACKAGED:
        return f"{PACKAGED[source][2]} of gptoss-quantize (Jargon File 4.4.7, PostgreSQL 15 documentation)"
    return source


def read_records(source: str, *, column: str | None, prefer: str, seed: int | None) -> Iterator[Record]:
    """Return the records of a source, in its order, or shuffled where there is a seed.

    `prefer` is the column that is taken where both `text` and `messages` exist and `column` names none.
    """
    choice = (column,) if column is not None else (prefer, "messages" if prefer == "text" else "text")
    if source.startswith("hf:"):
        return _from_datasets(source, choice, seed)
    path = _packaged(source) if source in PACKAGED else Path(source)
    name = path.name.lower()
    if not name.endswith(SUFFIXES):
        raise InputError(
            f"{source}: not a kind of text that is known here; expected a file in {', '.join(SUFFIXES)}, "
            "hf:NAME[:CONFIG][@SPLIT] for a `datasets` name, or the word default"
        )
    if path.is_dir():
        raise InputError(f"{source}: is a folder, a file was expected; hf:{source} reads a data set folder")
    if not path.is_file():
        raise InputError(f"{source}: no such file; check the path (relative to {Path.cwd()})")
    if path.stat().st_size == 0:
        raise InputError(f"{source}: the file is empty; expected text")
    if name.endswith(".parquet"):
        return _from_parquet(path, choice, seed)
    return _from_json_lines(path, choice, seed) if ".jsonl" in name else _from_text(path, seed)


def shuffled(count: int, seed: int | None, *key: int) -> Iterable[int]:
    """Return 0..count-1, in order without a seed, else in the order that the seed (and key) stand for."""
    if seed is None:
        return range(count)
    keys = np.random.PCG64([seed, *key]).random_raw(count)
    return (int(i) for i in np.argsort(keys, kind="stable"))


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for random access; gzip is unpacked into memory or, if large, a temporary file."""
    try:
        if path.suffix.lower() != ".gz":
            with path.open("rb") as file:
                yield file
            return
        with tempfile.SpooledTemporaryFile(max_size=UNPACKED_IN_MEMORY) as unpacked:
            _unpack(path, unpacked)
            yield unpacked
    except PermissionError as error:
        raise InputError(f"{path}: not readable ({error.strerror}); change its permissions") from error


def _unpack(path: Path, target: IO[bytes]) -> None:
    try:
        with gzip.open(path, "rb") as packed:
            while block := packed.read(1 << 20):
                target.write(block)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(
            f"{path}: not a whole gzip file ({error}); fetch it again, or drop .gz if it is plain text"
        ) from error
    target.seek(0)


def _decode(data: bytes, path: Path, line: int) -> str:
    """Return the text of bytes that begin in a given line; newlines become the same on every platform."""
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise InputError(
            f"{path}: line {line}: byte 0x{data[error.start]:02x} is not UTF-8; expected UTF-8 text; "
            f"convert it, for example with `iconv -f latin1 -t utf8 {path.name}`"
        ) from error


def _from_json_lines(path: Path, choice: tuple[str, ...], seed: int | None) -> Iterator[Record]:
    with _opened(path) as file:
        starts, numbers, at = array("Q"), array("Q"), 0
        for number, line in enumerate(file, 1):
            if not line.isspace():
                starts.append(at)
                numbers.append(number)
            at += len(line)
        for i in shuffled(len(starts), seed):
            file.seek(starts[i])
            where = f"{path}: line {numbers[i]}"
            text = _decode(file.readline(), path, numbers[i])
            try:
                row = json.loads(text)
            except json.JSONDecodeError as error:
                raise InputError(
                    f"{where}: not JSON ({error.msg}, column {error.colno}); expected one object per line, "
                    'such as {"text": "..."}; correct or delete the line'
                ) from error
            if not isinstance(row, dict):
                raise InputError(f'{where}: a {type(row).__name__}; expected an object, such as {{"text": "..."}}')
            yield Record(row[_pick(row, choice, where)], where)


def _from_text(path: Path, seed: int | None) -> Iterator[Record]:
    with _opened(path) as file:
        starts, numbers, at, size = array("Q", [0]), array("Q", [1]), 0, 0
        for number, line in enumerate(file, 1):
            at, size = at + len(line), size + len(line)
            if (size >= PASSAGE and line.isspace()) or size >= PASSAGE_LIMIT:
                starts.append(at)
                numbers.append(number + 1)
                size = 0
        starts.append(at)
        for i in shuffled(len(numbers), seed):
            file.seek(starts[i])
            text = _decode(file.read(starts[i + 1] - starts[i]), path, numbers[i])
            where = f"{path}: line {numbers[i]}"
            yield Record(text, where, continued=i > 0) if seed is None else Record(text.strip("\n"), where)


def _from_parquet(path: Path, choice: tuple[str, ...], seed: int | None) -> Iterator[Record]:
    try:
        with pq.ParquetFile(path) as file:
            column = _pick(file.schema_arrow.names, choice, str(path))
            before = np.cumsum([0, *(file.metadata.row_group(g).num_rows for g in range(file.num_row_groups))])
            for g in shuffled(file.num_row_groups, seed):
                rows = file.read_row_group(g, columns=[column]).column(0)
                for i in shuffled(len(rows), seed, g):
                    yield Record(rows[i].as_py(), f"{path}: row {before[g] + i}, column {column!r}")
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{path}: not a readable parquet file ({_first_line(error)}); write or fetch it again"
        ) from error


def _from_datasets(source: str, choice: tuple[str, ...], seed: int | None) -> Iterator[Record]:
    # it brings pandas, fsspec and aiohttp in: over a second that other sources need not wait for
    import datasets  # noqa: PLC0415

    name, _, split = source.removeprefix("hf:").partition("@")
    name, _, config = name.partition(":")
    if not name:
        raise InputError(f"{source}: names no data set; expected hf:NAME[:CONFIG][@SPLIT]")
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train")
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise InputError(
            f"{source}: the data set cannot be loaded ({type(error).__name__}: {_first_line(error)}); "
            "expected hf:NAME[:CONFIG][@SPLIT] in reach or in the cache; without a network, give a file "
            f"({', '.join(SUFFIXES)}) or the word default"
        ) from error
    column = _pick(rows.column_names, choice, source)
    rows = rows.select_columns([column])
    for i in shuffled(len(rows), seed):
        yield Record(rows[i][column], f"{source}: row {i}, column {column!r}")


def _pick(columns: Iterable[str], choice: tuple[str, ...], where: str) -> str:
    columns = list(columns)
    for name in choice:
        if name in columns:
            return name
    expected = " or ".join(repr(name) for name in choice)
    raise InputError(f"{where}: no column {expected}, only {columns}; name the one that holds the text (--column)")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
