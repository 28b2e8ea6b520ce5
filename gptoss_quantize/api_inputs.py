"""What the public functions share: how they take models, amounts and names, and refuse what they do not know."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch

from gptoss_quantize.adapter import Adapter
from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.errors import InputError
from gptoss_quantize.hub import resolve
from gptoss_quantize.machine import compute_dtype
from gptoss_quantize.progress import Progress
from gptoss_quantize.terminal import tell
from gptoss_quantize.units import parse_size

Place: TypeAlias = str | Path
Places: TypeAlias = Place | Sequence[Place] | Mapping[str, Place]
Show: TypeAlias = Progress | bool | None
DTYPES: dict[str, torch.dtype | None] = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


def known(option: str, value: Any, values: Sequence[Any] | Mapping[str, Any]) -> Any:
    """Return a value that is one of `values`; InputError that lists them for any other."""
    if value not in values:
        raise InputError(f"{option} {value}: expected one of {', '.join(map(str, values))}")
    return value


def at_least(least: float, **amounts: float | None) -> None:
    """Raise InputError for the first amount below `least`; None is an amount that is not given."""
    for name, value in amounts.items():
        if value is not None and value < least:
            raise InputError(f"--{name.replace('_', '-')} {value}: expected at least {least}")


def products(dtype: str, device: str = "cpu") -> torch.dtype:
    """Return the dtype of matrix products on a device that a name stands for."""
    known("--dtype", dtype, DTYPES)
    return DTYPES[dtype] or compute_dtype(device)


def size(value: int | str, option: str) -> int:
    """Return bytes for a number of bytes or a size such as "12GiB"."""
    if isinstance(value, str):
        return parse_size(value, option)
    if value < 1:
        raise InputError(f"{option} {value}: expected a number of bytes, or a size such as 12GiB")
    return value


def words(value: str | Sequence[str]) -> list[str]:
    """Return names given as a list, or in one string with commas between."""
    return [name.strip() for name in (value.split(",") if isinstance(value, str) else value) if name.strip()]


def open_checkpoint(model: Place, adapter: Place | None = None, revision: str | None = None) -> Checkpoint:
    """Return a checked checkpoint for a directory or hub name, with an optional LoRA adapter, likewise."""
    return Checkpoint(resolve(str(model), revision), None if adapter is None else Adapter.open(resolve(str(adapter))))


def tell_notes(progress: Show, *checkpoints: Checkpoint) -> None:
    """Say what was read otherwise than the folders say at first sight."""
    for checkpoint in checkpoints:
        for note in checkpoint.notes:
            tell(progress, f"note: {note}")
