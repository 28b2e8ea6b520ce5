"""The documents of a source, and the count of what was used, cut, empty and skipped on the way.

A row that cannot be used (no JSON, no known shape, refused by the chat template) is skipped, counted and named.
When many are, the text is not what it is taken for, and reading stops with an InputError that names the first:

* as soon as more than half of the first 100 rows are bad: at the 51st;
* at the end (of the text, or when the budget is met), where two or more and over 5 % of the rows read are bad;
* at the end, where no row at all could be used.

Null and empty rows are counted apart: they are no fault.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from gptoss_quantize.calibration.messages import RowError
from gptoss_quantize.calibration.rows import FIELDS, Conversation, document
from gptoss_quantize.calibration.sources import Row, is_plain_text, read_rows
from gptoss_quantize.errors import InputError

FIRST_ROWS, NAMED = 100, 3
BAD_SHARE = 0.05
KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(slots=True)
class Counts:
    """What became of the rows of a source, as far as it was read."""

    rows: int = 0
    empty: int = 0
    skipped: int = 0
    named: list[str] = field(default_factory=list)
    conversations: int = 0
    cut: int = 0
    cut_at: int | None = None  # tokens of the longest conversation or text that a cut left
    messages_left_out: int = 0
    first_left_out: str | None = None

    def skip(self, source: str, where: str, reason: str) -> None:
        """Count a bad row; InputError when these are most of the first 100."""
        self.skipped += 1
        if len(self.named) < NAMED:
            self.named.append(f"{where}: {reason}" if not reason.startswith(where) else reason)
        if self.rows <= FIRST_ROWS and self.skipped > FIRST_ROWS // 2:
            raise self._many(source)

    def finish(self, source: str) -> None:
        """Raise InputError where too many of the rows read were bad."""
        good = self.rows - self.skipped - self.empty
        if self.skipped and (good <= 0 or (self.skipped > 1 and self.skipped > BAD_SHARE * self.rows)):
            raise self._many(source)

    def _many(self, source: str) -> InputError:
        more = f"\n  and {self.skipped - len(self.named)} more" if self.skipped > len(self.named) else ""
        return InputError(
            f"{source}: {self.skipped} of the {self.rows} rows read cannot be used (one bad row, or 5 %, would be "
            "skipped); correct or delete them, or name the column that holds the text or the messages (--column); "
            "the first:\n  " + "\n  ".join(self.named) + more
        )

    def record(self) -> dict[str, Any]:
        """Return what a report says about the rows."""
        return {
            "conversations": self.conversations,
            "documents_cut": self.cut,
            "cut_at": self.cut_at,
            "rows_empty": self.empty,
            "rows_skipped": self.skipped,
            "skipped": list(self.named),
            "messages_left_out": self.messages_left_out,
        }

    def line(self) -> str:
        """Return the words for what was cut, skipped and left out; empty where nothing was."""
        parts = []
        if self.cut:
            parts.append(f"{self.cut:,} cut at {self.cut_at:,} tokens")
        if self.skipped:
            parts.append(f"{_rows(self.skipped)} skipped ({self.named[0]})")
        if self.empty:
            parts.append(f"{_rows(self.empty)} empty")
        if self.messages_left_out:
            parts.append(
                f"{self.messages_left_out:,} messages that the chat template does not write ({self.first_left_out})"
            )
        return "; ".join(parts)


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count:,} rows"


def read_documents(
    source: str, *, column: str | None, prefer: str, seed: int | None, counts: Counts
) -> Iterator[tuple[Row, str | Conversation]]:
    """Yield each row that holds something with its text or conversation, and count the others.

    The reader of the documents calls `counts.skip` for what it cannot render, and `counts.finish` at its end.
    """
    column = None if is_plain_text(source) else column
    for row in read_rows(source, fields=FIELDS, column=column, seed=seed):
        if row.continued:
            # pieces of one text, blank ones in between included
            if row.value["text"]:
                yield row, row.value["text"]
            continue
        counts.rows += 1
        if row.error is not None:
            counts.skip(source, row.where, row.error)
            continue
        try:
            found = document(row.value, column, prefer)
            if isinstance(found, str):
                found.encode()
        except (RowError, UnicodeEncodeError) as error:
            reason = (
                "half of a surrogate pair, which is no text" if isinstance(error, UnicodeEncodeError) else str(error)
            )
            counts.skip(source, row.where, reason)
            continue
        if found is None:
            counts.empty += 1
        else:
            yield row, found


def checked_left_out(conversation: Conversation, lost: list[int], where: str, counts: Counts) -> None:
    """Count messages that a template leaves out; RowError where the role of one is known nowhere."""
    for i in lost:
        role = conversation.messages[i]["role"]
        if role not in KNOWN_ROLES:
            raise RowError(f"message {i}: the chat template does not write the role {role!r}; correct or delete it")
        counts.messages_left_out += 1
        counts.first_left_out = counts.first_left_out or f"{where}: message {i}, {role}"
