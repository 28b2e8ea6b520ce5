"""What all commands share: console and progress bar, on stderr since stdout is for results, and common options."""

from enum import StrEnum

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

# no emoji: `cuda:x:` and paths are shown as they are
console = Console(stderr=True, emoji=False)


class Dtype(StrEnum):
    """Dtype of matrix products."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


def progress(disable: bool = False) -> Progress:
    """Return a progress bar with time spent and time left, on stderr."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
    )
    return Progress(*columns, console=console, disable=disable)
