"""Memory as a budget: how many experts are solved at a time, and where a layer's tokens live, resolved once per run.

A layer needs the inputs of its experts [T, D], the block output [T, D] in float32, its own small tensors, the packed
result, and for every expert that is being solved its weights with some arrays of their size and its Hessians. What
does not fit beside one expert moves to a file below OUT.partial (`Spill`); what does not fit even then is refused.
Hidden states are on disk always, where a resumed run finds them.

The resolved numbers go into state.json and are used again when a run is resumed, unless it is given another --memory.
Codes do not depend on them: sums are float32 over blocks of fixed size, whatever the budget.
"""

import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

import psutil
import torch

from gptoss_quantize.calibration.moments import BLOCK_TOKENS
from gptoss_quantize.config import ModelConfig
from gptoss_quantize.errors import InputError
from gptoss_quantize.layouts import dense_shapes
from gptoss_quantize.machine import free_memory, release_memory
from gptoss_quantize.model import BATCH_TOKENS
from gptoss_quantize.units import gib

DEFAULT_SHARE = 0.6  # of what is free
CARD_SHARE = 0.85  # of what is free on a card
POLISH_CHUNK = 512  # tokens whose logits a polish has in memory at a time
# more experts at a time than this make nothing faster: their arrays only leave the cache
USEFUL_BYTES = 512 << 20
# what one batch of attention needs for each of its elements: about ten copies in up to four bytes
_ATTENTION_BYTES = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What a budget was resolved to; `bytes` is the limit for the whole process."""

    bytes: int
    experts_at_once: int
    states: str  # memory or disk: expert inputs and block output of the layer
    accumulate: str = "float32"
    block_tokens: int = BLOCK_TOKENS
    batch_tokens: int = BATCH_TOKENS

    def solving(self, config: ModelConfig) -> int:
        """Return what the experts that are solved at a time need."""
        return self.experts_at_once * solve_bytes(config)


def solve_bytes(config: ModelConfig) -> int:
    """Return what one expert needs while it is solved: weights, five arrays of their size, Hessians, factors."""
    D, F = config.hidden, config.intermediate
    # the weights twice: those of the next expert are read meanwhile
    return 4 * (2 * 3 * F * D + 5 * 2 * F * D + 7 * max(D, F) ** 2)


def _fixed_bytes(config: ModelConfig) -> int:
    """Return what a layer needs beside tokens and solved experts: its dense tensors, the packed result, a batch."""
    D, F, q = config.hidden, config.intermediate, config.heads * config.head_dim
    prefix = "model.layers.0."
    dense = sum(4 * _size(shape) for name, shape in dense_shapes(config).items() if name.startswith(prefix))
    packed = config.experts * (3 * D * F * 5 // 8 + 2 * (2 * F + D))
    attention = BATCH_TOKENS * (D + q) * _ATTENTION_BYTES
    block = BLOCK_TOKENS * (2 * F + D) * 12
    return dense + packed + attention + block


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def token_bytes(config: ModelConfig, tokens: int, dtype: torch.dtype) -> tuple[int, int]:
    """Return (routing, states): bytes that stay in memory, and bytes that may live on disk."""
    return tokens * config.top_k * 12, tokens * config.hidden * (dtype.itemsize + 4)


def _kept_bytes(config: ModelConfig, tokens: int, dtype: torch.dtype, ranks: int) -> int:
    """Return what the outputs of a rank's experts take while they wait for those of the ranks before it."""
    return tokens * config.top_k * config.hidden * dtype.itemsize // ranks


def needed(
    config: ModelConfig,
    tokens: int,
    dtype: torch.dtype,
    base: int,
    experts_at_once: int = 1,
    states: str = "disk",
    ranks: int = 1,
) -> int:
    """Return about what a run needs: `base` is the process without a model."""
    routing, arrays = token_bytes(config, tokens, dtype)
    if ranks > 1:
        routing += _kept_bytes(config, tokens, dtype, ranks)
    if states == "disk":
        # dropped after each block or batch of tokens, whichever expert they go to
        _, arrays = token_bytes(config, min(tokens, BATCH_TOKENS), dtype)
    # embedding and head are copied before the first layer, both in one file
    vocabulary = 2 * 2 * config.vocab * config.hidden
    layer = routing + arrays + _fixed_bytes(config) + experts_at_once * solve_bytes(config)
    return base + max(vocabulary, layer)


def limit_bytes(budget: int | None, base: int, processes: int = 1) -> int:
    """Return what a process of `base` bytes may take: its budget, or without one its share of what is free."""
    return budget if budget is not None else base + int(DEFAULT_SHARE * free_memory() / processes)


def resolve(
    config: ModelConfig,
    tokens: int,
    dtype: torch.dtype,
    budget: int | None,
    *,
    threads: int,
    base: int | None = None,
    ranks: int = 1,
    processes: int = 1,
) -> Budget:
    """Return the resolved budget; InputError when not even one expert fits.

    `budget` is the limit in bytes, None for the default share of what is free. Tokens stay in memory if one expert
    for every thread fits beside them. `ranks` share the work, `processes` of them this machine.
    """
    base = psutil.Process().memory_info().rss if base is None else base
    limit = limit_bytes(budget, base, processes)
    each = solve_bytes(config)
    useful = min(config.experts, max(threads, USEFUL_BYTES // each))
    enough = min(threads, useful)
    candidates = [(count, "memory") for count in range(useful, enough, -1)]
    candidates += [(count, states) for count in range(enough, 0, -1) for states in ("memory", "disk")]
    for count, states in candidates:
        if needed(config, tokens, dtype, base, count, states, ranks) <= limit:
            return Budget(bytes=limit, experts_at_once=count, states=states)
    least = needed(config, tokens, dtype, base, ranks=ranks)
    named = "--memory" if budget is not None else f"{DEFAULT_SHARE:.0%} of the free memory,"
    raise InputError(
        f"{named} {gib(limit)}: one expert of this model at a time with {tokens} tokens needs about {gib(least)}; "
        "give more (--memory), or fewer calibration tokens (--tokens)"
    )


def polish_bytes(
    config: ModelConfig, tokens: int, step_tokens: int, group_size: int | None, dtype: torch.dtype, base: int
) -> int:
    """Return about what a process of `base` bytes needs for a polish: nearly all of it grows with the whole model.

    Scales are kept seven times: start, unit, step, gradient, Adam's two, best. `group_size` None: no free scales
    (MXFP4). `dtype` is that of matrix products.
    Before the steps the original model runs over all `tokens`: the stream in float32, and what a layer makes of it.
    """
    D, F, pairs = config.hidden, config.intermediate, step_tokens * config.top_k
    scales = 0 if group_size is None else config.experts * 3 * D * F // group_size
    kept = pairs * dtype.itemsize * (2 * F + D) + step_tokens * 4 * D
    vocabulary = config.vocab * ((2 + dtype.itemsize) * D + 4 * 4 * POLISH_CHUNK)
    steps = config.layers * (28 * scales + kept) + vocabulary + tokens * dtype.itemsize * D
    return base + max(steps, tokens * 16 * D) + _fixed_bytes(config)


def resolve_card(
    config: ModelConfig, tokens: int, dtype: torch.dtype, limit: int, ranks: int = 1, processes: int = 1
) -> Budget:
    """Return the budget of a card with `limit` bytes: tokens live there, and as many experts as fit beside them.

    At most a quarter of a rank's experts at a time, so that reading, copying and solving overlap, and at most what
    three copies in this machine's memory, shared by `processes`, allow: being read, pinned, and pinned before.
    """
    routing, arrays = token_bytes(config, tokens, dtype)
    if ranks > 1:
        routing += _kept_bytes(config, tokens, dtype, ranks)
    fixed, each = routing + arrays + _fixed_bytes(config), solve_bytes(config)
    if (count := (limit - fixed) // each) < 1:
        raise InputError(
            f"--device cuda with {gib(limit)}: one expert of this model at a time with {tokens} tokens needs about "
            f"{gib(fixed + each)}; give more (--memory), fewer calibration tokens (--tokens), or --device cpu"
        )
    host = int(DEFAULT_SHARE * free_memory() / processes) // (3 * 4 * 3 * config.hidden * config.intermediate)
    useful = max(1, min(config.experts // ranks // 4, host))
    return Budget(bytes=limit, experts_at_once=min(useful, count), states="memory")


def memory_needs(config: ModelConfig, tokens: int, dtype: torch.dtype) -> dict[str, int | str | None]:
    """Return what a run needs at least, and what the default budget would make of the memory that is free now."""
    base = psutil.Process().memory_info().rss
    plan: dict[str, int | str | None] = {"least": needed(config, tokens, dtype, base), "peak": None}
    try:
        found = resolve(config, tokens, dtype, None, threads=torch.get_num_threads(), base=base)
    except InputError:
        return plan
    peak = needed(config, tokens, dtype, base, found.experts_at_once, found.states)
    return plan | {"experts_at_once": found.experts_at_once, "states": found.states, "peak": peak}


def make_room(drop: Callable[[], None], limit: int) -> None:
    """Drop what is on disk, and give freed memory back where the process has more than `limit` bytes."""
    drop()
    if psutil.Process().memory_info().rss > limit:
        release_memory()


def _take_space(file: IO[bytes], size: int) -> None:
    """Make a file `size` bytes long that are really there; OSError where they are not to be had."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
        return
    piece = bytes(1 << 20)
    for start in range(0, size, len(piece)):
        file.write(piece[: size - start])
    file.flush()


class Spill:
    """Tensors in a file without a name: mapped, so they are used like any other, and dropped from memory on request.

    The space is taken at once, so that a full disk is an error here and no crash later; the file is unlinked at once,
    so that nothing stays behind, however the process ends.
    """

    def __init__(self, folder: Path, size: int):
        path = folder / "spill.bin"
        try:
            with TemporaryFile(dir=folder) as file:
                _take_space(file, size)
                self._map = mmap.mmap(file.fileno(), size)
        except OSError as error:
            raise InputError(
                f"{path}: {gib(size)} for the tokens of a layer cannot be taken ({error}); free some space and run "
                "the same command with --resume, or with --resume and more --memory"
            ) from None
        self._used = 0

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return the next tensor of zeros in the file."""
        count = _size(shape)
        start = self._used
        self._used += -(-count * dtype.itemsize // mmap.PAGESIZE) * mmap.PAGESIZE
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=start).view(shape)

    def release(self) -> None:
        """Drop the pages from memory; the data stays in the file, and in the system's cache while there is room."""
        # not on Windows, which takes a file's pages back by itself
        if hasattr(self._map, "madvise"):
            self._map.madvise(mmap.MADV_DONTNEED)


def token_arrays(
    shapes: list[tuple[tuple[int, ...], torch.dtype]], states: str, folder: Path, device: str
) -> tuple[list[torch.Tensor], Callable[[], None]]:
    """Return (tensors of zeros, a function that drops them from memory): in memory, or in a file below `folder`."""
    if states == "memory" or device != "cpu":
        return [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype in shapes], lambda: None
    size = sum(-(-_size(shape) * dtype.itemsize // mmap.PAGESIZE) * mmap.PAGESIZE for shape, dtype in shapes)
    spill = Spill(folder, size)
    return [spill.tensor(shape, dtype) for shape, dtype in shapes], spill.release
