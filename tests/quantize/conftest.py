"""Processes that are killed: a run in a child, stopped by SIGKILL before any operation on files that one chooses."""

import faulthandler
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

# what the interpreter reports of work on files: opening, copying, renaming, deleting, making folders
WATCHED = ("open", "os.rename", "os.remove", "os.mkdir", "shutil.copyfile")


class Child:
    """Runs work in a forked process with one thread; `below` is the folder whose operations are counted."""

    def __init__(self, below: Path):
        self.below = str(below)

    def run(self, work: Callable[[], object], kill_at: int | None = None) -> int:
        """Return how many operations the work did; with `kill_at`, kill it just before that one (counted from 0)."""
        reader, writer = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(reader)
            self._work(work, kill_at, writer)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            said = pipe.read()
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code == (0 if kill_at is None else -signal.SIGKILL), said or f"exit code {code}"
        return int(said or 0)

    def _work(self, work: Callable[[], object], kill_at: int | None, writer: int) -> None:
        faulthandler.disable()
        done = 0

        def watch(event: str, args: tuple) -> None:
            nonlocal done
            if event in WATCHED and any(isinstance(a, str | Path) and str(a).startswith(self.below) for a in args):
                if done == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                done += 1

        code = 1
        try:
            torch.set_num_threads(1)
            sys.addaudithook(watch)
            work()
            os.write(writer, str(done).encode())
            code = 0
        finally:
            if code:
                os.write(writer, traceback.format_exc().encode())
            os._exit(code)


@pytest.fixture
def child(tmp_path) -> Child:
    """Return what runs work in a child process, and may kill it at an operation on files in `tmp_path`."""
    return Child(tmp_path)


@pytest.fixture
def full_disk() -> Callable:
    """Return a context in which no file grows beyond some bytes: a real write that fails."""

    @contextmanager
    def limited(left: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (left, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited
