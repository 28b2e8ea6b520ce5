"""Progress for files and machines: a line for each step of each phase on stderr, as it happens, plain or as JSON.

A terminal gets bars (`terminal.py`). `quantize | tee log`, docker, CI and nohup get lines:

    gptq int4 group 64: layer 3/30, 0:00:26 gone, 0:03:54 left

`--log-format json` makes every line of stderr an object, also messages, warnings and errors. Keys: `time` (UTC, ISO
8601), `event` (progress or message); of progress `phase`, `news` (what a phase has to say, or null), `done`, `total`
(null where not known), `seconds` and `left` (null until it can be told); of a message `text`.
"""

import io
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime, timedelta
from typing import Any, TextIO

from gptoss_quantize.progress import Progress, name_of

# a phase of many steps (bytes of a file) has a line this often, in seconds
PAUSE = 10.0
# and one of at most so many steps has a line for each
FEW = 200

_FORMAT: ContextVar[str] = ContextVar("log format", default="auto")


def log_format() -> str:
    """Return auto, plain or json."""
    return _FORMAT.get()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class JsonLines(io.TextIOBase):
    """A text stream that writes each line it is given as an object of event `message` to another stream."""

    encoding = "utf-8"

    def __init__(self, to: TextIO):
        self._to = to
        self._rest = ""

    def write(self, text: str) -> int:
        """Take text; every line that is whole goes on at once. What a bar would overwrite is dropped."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            if said := line.rstrip("\r").rpartition("\r")[2].strip():
                self.event("message", text=said)
        return len(text)

    def event(self, kind: str, **facts: Any) -> None:
        """Write one object."""
        self._to.write(json.dumps({"time": _now(), "event": kind, **facts}, ensure_ascii=False) + "\n")
        self._to.flush()

    def flush(self) -> None:
        """Do nothing: whole lines have gone on already."""

    def finish(self) -> None:
        """Send what has no newline at its end."""
        if self._rest:
            self.write("\n")

    def isatty(self) -> bool:
        """Return False."""
        return False

    def fileno(self) -> int:
        """Return the other stream's."""
        return self._to.fileno()


def choose(name: str) -> None:
    """Use a log format from here on; `terminal.log_session` ends it."""
    _FORMAT.set(name)
    if name == "json":
        sys.stderr = JsonLines(sys.stderr)


@contextmanager
def restored() -> Iterator[None]:
    """Put stderr and its format back afterwards."""
    stream, token = sys.stderr, _FORMAT.set("auto")
    try:
        yield
    finally:
        if isinstance(sys.stderr, JsonLines):
            sys.stderr.finish()
        sys.stderr = stream
        _FORMAT.reset(token)


class _Phase:
    """When a phase began, and what was told of it last."""

    def __init__(self, done: int):
        self.began = self.told = time.monotonic()
        self.first = done  # of a resumed run, not 0

    def left(self, now: float, done: int, total: int) -> float | None:
        steps = done - self.first
        return (now - self.began) / steps * (total - done) if steps > 0 and total else None


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


@contextmanager
def lines() -> Iterator[Progress]:
    """Yield a receiver that writes a line for each step, in the format that was chosen."""
    known: dict[str, _Phase] = {}

    def show(phase: str, done: int, total: int) -> None:
        name, now = name_of(phase), time.monotonic()
        at = known.get(name)
        begins = at is None or done < at.first
        if at is None or begins:
            at = known[name] = _Phase(done)
        if not begins and total > FEW and done < total and now - at.told < PAUSE:
            return
        at.told = now
        left = at.left(now, done, total)
        if isinstance(sys.stderr, JsonLines):
            sys.stderr.event(
                "progress",
                phase=name,
                news=phase[len(name) :].strip(" ()") or None,
                done=done,
                total=total or None,
                seconds=round(now - at.began, 1),
                left=None if left is None else round(left, 1),
            )
            return
        words = f"{phase} {done}/{total}" if total else f"{phase} {done}"
        if not begins:
            words += f", {_clock(now - at.began)} gone" + ("" if left is None else f", {_clock(left)} left")
        sys.stderr.write(words + "\n")
        sys.stderr.flush()

    yield show
