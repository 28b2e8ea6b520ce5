"""Progress for people to look at: bars on stderr, since stdout is for results, or in the cell of a notebook."""

import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import Any

from rich.console import Console
from rich.markup import escape as markup
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from gptoss_quantize.errors import InputError
from gptoss_quantize.logged import choose, lines, log_format, restored
from gptoss_quantize.progress import Progress, name_of, silent

NOTEBOOK_SHELL = "ZMQInteractiveShell"
# seconds between two updates of a notebook's cell: each travels to the browser
NOTEBOOK_PAUSE = 0.2
# libraries with bars of their own, and what their switches are called; transformers' switch turns the hub's as well
BARS = {
    "transformers.utils.logging": "progress_bar",
    "datasets.utils": "progress_bars",
    "huggingface_hub.utils": "progress_bars",
}

# no emoji: `cuda:x:` and paths are shown as they are
console = Console(stderr=True, emoji=False)


def tell(progress: Progress | bool | None, words: str, *, alarm: bool = False) -> None:
    """Say something now: on the terminal where a bar is shown there, else (an alarm only) as a Python warning."""
    if progress is True:
        start = "[bold red]SUSPECT:[/bold red] " if alarm else ""
        console.print(start + markup(words), soft_wrap=True, highlight=False)
    elif alarm:
        warnings.warn(words, stacklevel=3)


@contextmanager
def showing(progress: Progress | bool | None) -> Iterator[Progress]:
    """Yield the receiver that `progress=` stands for: itself, a bar for True, nothing for None and False."""
    if progress is True:
        with notebook() if in_notebook() else bars() if has_bars() else lines() as shown, others_quiet():
            yield shown
    elif not progress:
        yield silent
    elif callable(progress):
        yield progress
    else:
        raise InputError(f"progress {progress!r}: expected a function of (phase, done, total), True or None")


def choose_log(name: str) -> None:
    """Say progress and messages as auto, plain or json, until the session ends."""
    choose(name)
    # a message is one object, however long
    console.soft_wrap = name == "json"


@contextmanager
def log_session() -> Iterator[None]:
    """Run one command line: what it chooses about messages ends with it."""
    with restored():
        try:
            yield
        finally:
            console.soft_wrap = False


def has_bars() -> bool:
    """Return whether progress is a bar: on a terminal that can move its cursor, where nobody asked for lines."""
    return log_format() == "auto" and console.is_terminal and not console.is_dumb_terminal


@contextmanager
def others_quiet() -> Iterator[None]:
    """Keep bars of the libraries that are loaded out of ours while it lasts; those that were off stay off."""
    before = []
    for name, word in BARS.items():
        if (module := sys.modules.get(name)) is not None:
            before.append((module, word, _shown(module)))
    for module, word, _ in before:
        getattr(module, f"disable_{word}")()
    try:
        yield
    finally:
        for module, word, shown in before:
            getattr(module, f"{'enable' if shown else 'disable'}_{word}")()


def _shown(module: Any) -> bool:
    if hasattr(module, "is_progress_bar_enabled"):
        return bool(module.is_progress_bar_enabled())
    return not module.are_progress_bars_disabled()


@contextmanager
def bars() -> Iterator[Progress]:
    """Yield a receiver that shows a bar for every phase, with time spent and time left."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
    )
    tasks: dict[str, TaskID] = {}
    with RichProgress(*columns, console=console) as shown:

        def show(phase: str, done: int, total: int) -> None:
            name = name_of(phase)
            if name not in tasks:
                tasks[name] = shown.add_task(phase, total=total or None)
            shown.update(tasks[name], description=phase, completed=done, total=total or None)

        yield show


def in_notebook() -> bool:
    """Return whether this process is the kernel of a notebook."""
    # imported by whoever runs a notebook, never by us
    python = sys.modules.get("IPython")
    shell = python.get_ipython() if python is not None else None
    return type(shell).__name__ == NOTEBOOK_SHELL


@contextmanager
def notebook() -> Iterator[Progress]:
    """Yield a receiver that shows a bar for every phase in the cell that runs; needs no widgets."""
    ipython: Any = sys.modules["IPython"].display
    cell = ipython.display(ipython.HTML(""), display_id=True)
    started = time.monotonic()
    rows: dict[str, str] = {}
    last = 0.0

    def show(phase: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        value = f'value="{done}" max="{total}"' if total else ""
        count = f"{done}/{total}" if total else str(done)
        rows[name_of(phase)] = f"<progress {value}></progress> {escape(phase)} {count}, {now - started:.0f} s"
        if now - last >= NOTEBOOK_PAUSE or done == total:
            last = now
            cell.update(ipython.HTML("<br>".join(rows.values())))

    try:
        yield show
    finally:
        cell.update(ipython.HTML("<br>".join(rows.values())))
