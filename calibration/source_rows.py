"""What all sources of text share: a row and where it was found, orders, columns.

Orders come from the raw stream of a private PCG64, which numpy guarantees to be the same on every platform and in
every version (its `shuffle` and `permutation` are not); no global random state is read or changed.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from gptoss_quantize.errors import InputError

TEXT_SUFFIXES = (".txt", ".md")
LINE_SUFFIXES = (".jsonl", ".ndjson")
SUFFIXES = (*(s + end for s in (*TEXT_SUFFIXES, *LINE_SUFFIXES, ".json") for end in ("", ".gz")), ".parquet")


@dataclass(frozen=True, slots=True)
class Row:
    """What one place of a source holds, and where that is.

    value: the fields by name; for a line of JSON whatever it holds; for a text file {"text": ...}.
    continued: the next piece of the document before (text files in their order).
    error: why there is no value; the row is to be skipped and counted.
    whole: never to be cut: a passage of a text file, or a document of the packaged texts.
    """

    value: Any
    where: str
    continued: bool = False
    error: str | None = None
    whole: bool = False


def columns(names: Iterable[str], wanted: Collection[str], column: str | None, where: str) -> list[str]:
    """Return the columns of a table to read; InputError where it lacks the named one, or all that are known."""
    names = list(names)
    if column is not None and column not in names:
        raise InputError(f"{where}: no column {column!r}, only {names}; name the one that holds the text (--column)")
    found = [name for name in names if name in wanted]
    if not found:
        raise InputError(
            f"{where}: no column 'messages' or 'text', nor another that is known, only {names}; "
            "name the one that holds the text or the messages (--column)"
        )
    return found


def shuffled(count: int, seed: int | None, *key: int) -> Iterable[int]:
    """Return 0..count-1, in order without a seed, else in the order that the seed (and key) stand for."""
    if seed is None:
        return range(count)
    keys = np.random.PCG64([seed, *key]).random_raw(count)
    return (int(i) for i in np.argsort(keys, kind="stable"))


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
