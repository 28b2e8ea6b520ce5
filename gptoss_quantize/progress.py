"""One way to say how far a work is: `progress(phase, done, total)`, called at its start and after each step.

`phase` names the work and what is counted ("gptq int4 group 64: layer"). What stands behind it in brackets is news
and may change from call to call ("polish: step (KL 0.0313)"). `total` is 0 where it is not known. Interrupting the
work from inside the call, by an exception, is allowed: an unfinished run is left as Ctrl-C leaves it.
"""

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

Progress: TypeAlias = Callable[[str, int, int], object]


def silent(phase: str, done: int, total: int) -> None:
    """Show nothing."""


def name_of(phase: str) -> str:
    """Return a phase without its news."""
    return phase.partition(" (")[0]


def phases(progress: Progress) -> Callable[[str], Callable[[int, int], None]]:
    """Return a function from a phase to its own `update(done, total)`."""

    def start(phase: str) -> Callable[[int, int], None]:
        def update(done: int, total: int) -> None:
            progress(phase, done, total)

        return update

    return start


def counter(progress: Progress, phase: str, total: int) -> Callable[[], None]:
    """Announce a phase of `total` steps and return the function to call after each of them."""
    progress(phase, 0, total)
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        progress(phase, done, total)

    return step


def counters(progress: Progress) -> Callable[[str, int], Callable[[], None]]:
    """Return `counter` for one receiver, to be handed down to what starts several phases."""
    return partial(counter, progress)
