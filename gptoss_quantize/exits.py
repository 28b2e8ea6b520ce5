"""How the command line ends: what is the user's or the system's is one message and an exit code."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.markup import escape

from gptoss_quantize.atomic import remedy_for
from gptoss_quantize.errors import InputError
from gptoss_quantize.terminal import console


class StoppedError(Exception):
    """Ctrl-C, as an exception that typer does not handle its own way: silently, or as exit code 1."""


@contextmanager
def one_message() -> Iterator[None]:
    """Turn what stops a command into one message and its exit code."""
    for stream in (sys.stdout, sys.stderr):
        # a terminal that is not UTF-8, or a path that is none: shown with escapes, not as a traceback
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
        sys.stdout.flush()
    except InputError as error:
        _refuse(str(error))
    except BrokenPipeError:
        # who read our output has seen enough; what is left in the buffer must go nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno is None:
            raise
        # no place of ours foresaw this one; it is the system's answer about a file all the same
        where = f"{error.filename}: " if error.filename else ""
        _refuse(f"{where}{error.strerror or error}; {remedy_for(error)}")
    except (MemoryError, RuntimeError) as error:
        # torch has no exception of its own for it
        if not isinstance(error, MemoryError) and "can't allocate memory" not in str(error):
            raise
        _refuse("not enough memory; free some, ask for less (--tokens), or correct the sizes in config.json")
    except (StoppedError, KeyboardInterrupt):
        console.print("interrupted; nothing stands under the final name, continue with --resume where offered")
        sys.exit(130)


def _refuse(message: str) -> None:
    console.print(f"[red]refused:[/red] {escape(message)}", soft_wrap=True, highlight=False)
    sys.exit(1)
