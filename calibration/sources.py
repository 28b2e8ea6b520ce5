"""Where text comes from: files, the packaged default, and Hugging Face `datasets`, as one stream of rows.

A row is what one place of a source holds, not yet looked at (`calibration.rows` does that): its fields by name, or
the text of a text file. Sources are read lazily and in a given order, so that a budget of tokens touches only as
much of a large file as it needs:

    .txt, .md, also .gz      in order: one document, handed out in pieces; shuffled: cut at blank lines into
                             passages of at least 4 kB, each a document of its own
    .jsonl, .ndjson, also .gz   one row per line
    .json, also .gz          an array of rows, an object that holds one ({"data": [...]}), or one row per line;
                             the file is held in memory, its rows are parsed one by one
    .parquet                 shuffled by row group, then by row inside the group
    hf:NAME[:CONFIG][@SPLIT]   a `datasets` name or a local data set folder (`calibration.hub`)

A row that cannot be read is handed on with the reason (`error`); what makes a whole source unreadable is an
InputError. Orders come from the raw stream of a private PCG64, which numpy guarantees to be the same on every
platform and in every version (its `shuffle` and `permutation` are not); no global random state is read or changed.
"""

import gzip
import json
import tempfile
import zlib
from array import array
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gptoss_quantize.calibration.source_rows import (
    LINE_SUFFIXES,
    SUFFIXES,
    TEXT_SUFFIXES,
    Row,
    columns,
    first_line,
    shuffled,
)
from gptoss_quantize.errors import InputError

PACKAGED = {
    "default": ("gptoss_quantize.calibration", "calibration.jsonl.gz", "default calibration text"),
    "heldout": ("gptoss_quantize.eval", "heldout.jsonl.gz", "default held-out text"),
}
PASSAGE, PASSAGE_LIMIT = 4096, 65536
UNPACKED_IN_MEMORY = 64 << 20
# what holds the rows of a .json file that is an object: `datasets` and most tools, the Hub's viewer, LMFlow
ROWS_UNDER = ("data", "rows", "examples", "instances", "train")
UTF16 = (b"\xff\xfe", b"\xfe\xff")


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


def read_rows(source: str, *, fields: Collection[str], column: str | None, seed: int | None) -> Iterator[Row]:
    """Return the rows of a source, in its order, or shuffled where there is a seed.

    fields: the names that anything is done with; a table is read in these columns only (or in `column`), and one
    without any of them is refused at once.
    """
    wanted = {*fields} if column is None else {*fields, column}
    if source.startswith("hf:"):
        # it brings pandas, fsspec and aiohttp in: over a second that other sources need not wait for
        from gptoss_quantize.calibration.hub import rows_of_dataset  # noqa: PLC0415

        return rows_of_dataset(source, wanted, column, seed)
    path = _packaged(source) if source in PACKAGED else Path(source)
    name = path.name.lower()
    if path.is_dir():
        raise InputError(f"{source}: is a folder, a file was expected; hf:{source} reads a data set folder")
    if not name.endswith(SUFFIXES):
        raise InputError(f"{source}: {_unknown_kind(name)}")
    if not path.is_file():
        raise InputError(f"{source}: no such file; check the path (relative to {Path.cwd()})")
    if path.stat().st_size == 0:
        raise InputError(f"{source}: the file is empty; expected text")
    if name.endswith(".parquet"):
        return _from_parquet(path, wanted, column, seed)
    kind = name.removesuffix(".gz")
    if kind.endswith(TEXT_SUFFIXES):
        return _from_text(path, seed)
    rows = _from_json(path, seed, lines=kind.endswith(LINE_SUFFIXES))
    return (replace(row, whole=True) for row in rows) if source in PACKAGED else rows


def is_plain_text(source: str) -> bool:
    """Say whether a source is a text file, which has no columns."""
    kind = source.lower().removesuffix(".gz")
    return source not in PACKAGED and not source.startswith("hf:") and kind.endswith(TEXT_SUFFIXES)


def _unknown_kind(name: str) -> str:
    known = ", ".join(SUFFIXES)
    expected = f"expected a file in {known}, hf:NAME[:CONFIG][@SPLIT] for a `datasets` name, or the word default"
    packers = {".zst": "unzstd", ".xz": "unxz", ".bz2": "bunzip2", ".zip": "unzip"}
    for end, unpack in packers.items():
        if name.endswith(end):
            return f"packed in a way that is not read here; unpack it with `{unpack}` first; {expected}"
    if name.endswith((".csv", ".tsv", ".arrow")):
        return (
            f"not a kind of text that is known here; put it into a folder of its own, hf:FOLDER reads it; {expected}"
        )
    return f"not a kind of text that is known here; {expected}"


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
        kind = "utf-16" if data.startswith(UTF16) else "latin1"
        raise InputError(
            f"{path}: line {line}: byte 0x{data[error.start]:02x} is not UTF-8; expected UTF-8 text; "
            f"convert it, for example with `iconv -f {kind} -t utf-8 {path.name}`"
        ) from error


def _from_json(path: Path, seed: int | None, *, lines: bool) -> Iterator[Row]:
    """Yield the rows of a JSON file: by line, or, where it begins as an array (`lines`: or an object), as a whole."""
    with _opened(path) as file:
        first = next((line for line in file if not line.isspace()), b"")
        if first.startswith(UTF16):
            _decode(first, path, 1)
        start = first.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
        whole = False
        if start == b"[" or (start == b"{" and not lines):
            # a first line that is whole, with another one below, is JSON lines, whatever the file is called
            content = parse_json(first)
            more = any(not line.isspace() for line in file)
            whole = isinstance(content, JsonError) or not (more or _is_conversation(content))
        file.seek(0)
        yield from _from_json_document(file, path, seed) if whole else _from_json_lines(file, path, seed)


def _is_conversation(content: Any) -> bool:
    """Say whether an array is one row, a conversation, and not an array of rows."""
    first = content[0] if isinstance(content, list) and content else None
    return isinstance(first, dict) and bool(first.keys() & {"role", "from"})


def parse_json(text: str | bytes) -> Any:
    """Return what JSON stands for; a JsonError (no exception) that says why where it is none."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        return JsonError(f"{error.msg}, column {error.colno}")
    except (ValueError, RecursionError) as error:  # digits without end, bytes that are no text; nested without end
        return JsonError(first_line(error))


@dataclass(frozen=True, slots=True)
class JsonError:
    """Why a text is not JSON."""

    reason: str


def _row(text: str, where: str) -> Row:
    value = parse_json(text)
    if isinstance(value, JsonError):
        expected = 'expected one object per line, such as {"text": "..."}'
        return Row(None, where, error=f"not JSON ({value.reason}); {expected}; correct or delete the line")
    return Row(value, where)


def _from_json_lines(file: IO[bytes], path: Path, seed: int | None) -> Iterator[Row]:
    starts, numbers, at = array("Q"), array("Q"), 0
    for number, line in enumerate(file, 1):
        if not line.isspace():
            starts.append(at)
            numbers.append(number)
        at += len(line)
    for i in shuffled(len(starts), seed):
        file.seek(starts[i])
        where = f"{path}: line {numbers[i]}"
        try:
            text = _decode(file.readline(), path, numbers[i])
        except InputError as error:
            yield Row(None, where, error=str(error).removeprefix(f"{where}: "))
            continue
        yield _row(text, where)


def _from_json_document(file: IO[bytes], path: Path, seed: int | None) -> Iterator[Row]:
    """Yield the rows of a file that is one JSON array, or an object that holds one; each is named by its line."""
    text = _decode(file.read(), path, 1)
    start = _start_of_rows(text)
    if start is None:  # an object that is itself the only row
        value = parse_json(text)
        if isinstance(value, JsonError):
            raise InputError(
                f"{path}: not JSON ({value.reason}); expected an array of rows; correct or write it again"
            )
        yield Row(value, f"{path}: line 1")
        return
    starts, ends = _elements(text, start, path)
    lines = np.cumsum([1, *(text.count("\n", a, b) for a, b in zip([0, *starts], starts, strict=False))])[1:]
    for i in shuffled(len(starts), seed):
        row = _row(text[starts[i] : ends[i]], f"{path}: line {lines[i]}, row {i}")
        # the Hub's viewer puts each row under "row"
        inner = row.value.get("row") if isinstance(row.value, dict) else None
        yield Row(inner, row.where) if isinstance(inner, dict) else row


_DECODER = json.JSONDecoder()
_SPACE = " \t\n\r"


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in _SPACE:
        at += 1
    return at


def _start_of_rows(text: str) -> int | None:
    """Return where the array of rows begins: the text itself, or the first known key's; None where there is none."""
    at = _skip(text, 0)
    if text[at : at + 1] == "[":
        return at
    value = parse_json(text)
    if not isinstance(value, dict):
        return None
    key = next((k for k in ROWS_UNDER if isinstance(value.get(k), list)), None)
    if key is None or not all(isinstance(row, dict) for row in value[key]):
        return None
    at += 1
    while True:  # the keys of the object in turn; it is known to be valid JSON
        name, at = _DECODER.raw_decode(text, _skip(text, at))
        at = _skip(text, _skip(text, at) + 1)
        if name == key:
            return at
        at = _skip(text, _DECODER.raw_decode(text, at)[1]) + 1


def _elements(text: str, start: int, path: Path) -> "tuple[array[int], array[int]]":
    """Return the starts and ends of an array's elements."""
    starts, ends, at = array("Q"), array("Q"), _skip(text, start + 1)
    while text[at : at + 1] != "]":
        try:
            end = _DECODER.raw_decode(text, at)[1]
            after = _skip(text, end)
            if text[after : after + 1] not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' or ']'", text, after)
        except (ValueError, RecursionError) as error:
            place = f"line {text.count(chr(10), 0, at) + 1}, row {len(starts)}"
            raise InputError(
                f"{path}: {place}: not JSON ({first_line(error)}); expected an array of rows; correct the file, or "
                "write one row per line (.jsonl), where a bad one can be skipped"
            ) from error
        starts.append(at)
        ends.append(end)
        at = _skip(text, after + 1) if text[after] == "," else after
    if start == _skip(text, 0) and (rest := _skip(text, at + 1)) < len(text):
        place = f"line {text.count(chr(10), 0, rest) + 1}"
        raise InputError(f"{path}: {place}: more text after the end of the array of rows; expected one array")
    return starts, ends


def _from_text(path: Path, seed: int | None) -> Iterator[Row]:
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
            if seed is None:
                yield Row({"text": text}, where, continued=i > 0, whole=True)
            else:
                yield Row({"text": text.strip("\n")}, where, whole=True)


def _from_parquet(path: Path, wanted: Collection[str], column: str | None, seed: int | None) -> Iterator[Row]:
    try:
        with pq.ParquetFile(path) as file:
            names = columns(file.schema_arrow.names, wanted, column, str(path))
            before = np.cumsum([0, *(file.metadata.row_group(g).num_rows for g in range(file.num_row_groups))])
            for g in shuffled(file.num_row_groups, seed):
                group = file.read_row_group(g, columns=names)
                for i in shuffled(group.num_rows, seed, g):
                    row = {name: group.column(name)[i].as_py() for name in names}
                    yield Row(row, f"{path}: row {before[g] + i}")
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{path}: not a readable parquet file ({first_line(error)}); write or fetch it again"
        ) from error
