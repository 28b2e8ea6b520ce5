"""Several processes on one quantization, started by torchrun or accelerate launch: who does what.

Sequences are divided over the ranks for attention and routing, experts for everything else, and finished layers for
writing. Instead of partial moments the ranks exchange what the experts see: [T, D] numbers a layer, where moments
would be three [K, K] matrices an expert. So every expert's sums run over the same tokens in the same order as in one
process, the block output is added up in the order of experts, and the checkpoint is the same to the bit for any
number of ranks. All ranks must see the same folder OUT.partial: hidden states lie there, each rank reads and writes
its own sequences. CPU tensors go through gloo, CUDA tensors through NCCL.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist

from gptoss_quantize.errors import InputError

# a rank may solve for long while the others wait; one that dies closes its connections and is noticed at once
TIMEOUT = timedelta(hours=6)
ROWS = 8192  # sent at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """This process among all: `rank` of `count`, and how many of them share this machine."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1

    def share(self, items: int, rank: int | None = None) -> range:
        """Return the items of a rank (this one without it): contiguous, in order, sizes differing by one at most."""
        rank = self.rank if rank is None else rank
        return range(rank * items // self.count, (rank + 1) * items // self.count)


SINGLE = Ranks()


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """Join the group that the launcher's environment describes while it lasts; SINGLE without a launcher."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield SINGLE
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise InputError(f"WORLD_SIZE is {count}, but {', '.join(missing)} not set; start with torchrun")
    ranks = Ranks(
        rank=int(os.environ["RANK"]),
        count=count,
        local_rank=int(os.environ.get("LOCAL_RANK", os.environ["RANK"])),
        local_count=int(os.environ.get("LOCAL_WORLD_SIZE", count)),
    )
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    with _lost():
        dist.init_process_group(backend, rank=ranks.rank, world_size=count, timeout=TIMEOUT)
    try:
        yield ranks
    finally:
        dist.destroy_process_group()


@contextmanager
def _lost() -> Iterator[None]:
    """Turn a broken connection into a message that says how to go on."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ConnectionError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"the ranks cannot talk to each other any more ({first}); if one has ended, its own message says why. "
            "Start the same command again with --resume, with any number of ranks"
        ) from error


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return a view of a contiguous tensor's bytes, which every backend can send."""
    return tensor.view(torch.uint8) if tensor.dim() else tensor.view(1).view(torch.uint8)


def _broadcast_rows(tensor: torch.Tensor, source: int, drop: Callable[[], None]) -> None:
    """Send rows from one rank to all, piece by piece, with `drop` after each: it may be larger than memory."""
    for rows in tensor.split(ROWS):
        dist.broadcast(_bytes(rows), src=source)
        drop()


def exchange_rows(
    ranks: Ranks,
    tensors: list[torch.Tensor],
    items: int,
    rows_per_item: int,
    drop: Callable[[], None] = lambda: None,
) -> None:
    """Complete tensors of which every rank has filled the rows of its share of `items`."""
    with _lost():
        for rank in range(ranks.count if ranks.count > 1 else 0):
            part = ranks.share(items, rank)
            for tensor in tensors if len(part) else []:
                rows = tensor[part.start * rows_per_item : part.stop * rows_per_item]
                _broadcast_rows(rows, rank, drop)


def in_turn(
    ranks: Ranks, tensor: torch.Tensor, add: Callable[[], None], drop: Callable[[], None] = lambda: None
) -> None:
    """Let one rank after the other add to a tensor, in their order; all have the sum afterwards."""
    for rank in range(ranks.count):
        if rank == ranks.rank:
            add()
        if ranks.count > 1:
            with _lost():
                _broadcast_rows(tensor, rank, drop)


def gather_tensors(ranks: Ranks, owner: int, mine: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return on `owner` the tensors of all ranks, elsewhere those of this rank; what the owner has is not sent.

    Of tensors that hold all experts every rank has filled the rows of its share, and the owner gets these.
    """
    if ranks.count == 1:
        return mine
    described = everyone(ranks, [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in mine.items()])
    there = {name for name, _, _ in described[owner]}
    found = dict(mine)
    with _lost():
        for rank, tensors in enumerate(described):
            for name, dtype, shape in tensors if rank != owner else []:
                fused = name.startswith("mlp.experts.") and not name.split(".")[2].isdigit()
                if name in there and not fused:
                    continue
                rows = ranks.share(shape[0], rank) if fused else range(shape[0])
                part = slice(rows.start, rows.stop)
                if ranks.rank == owner:
                    if name not in found:
                        found[name] = torch.empty(shape, dtype=dtype)
                    dist.recv(_bytes(found[name][part]), src=rank)
                elif ranks.rank == rank:
                    dist.send(_bytes(mine[name][part].contiguous()), dst=owner)
    return found


def everyone(ranks: Ranks, value: Any) -> list[Any]:
    """Return the values of all ranks, in their order; also a barrier."""
    if ranks.count == 1:
        return [value]
    values: list[Any] = [None] * ranks.count
    with _lost():
        dist.all_gather_object(values, value)
    return values


def same_everywhere(ranks: Ranks, mine: dict[str, Any], first: dict[str, Any]) -> None:
    """Raise InputError on all ranks where one sees other options or files than rank 0."""
    differing = sorted(name for name in mine if mine[name] != first.get(name))
    for rank, names in enumerate(everyone(ranks, differing)):
        if names:
            raise InputError(
                f"rank {rank} sees another {', '.join(names)} than rank 0; all ranks need the same options and files"
            )


def check_shared(folder: Path, ranks: Ranks) -> None:
    """Raise InputError on all ranks unless they all see rank 0's folder: hidden states and shards pass through it."""
    if ranks.count == 1:
        return
    mark = everyone(ranks, uuid4().hex)[0]
    path = folder / ".shared"
    if ranks.rank == 0:
        path.write_text(mark, encoding="utf-8")
    everyone(ranks, None)
    seen = everyone(ranks, path.is_file() and path.read_text(encoding="utf-8") == mark)
    if ranks.rank == 0:
        path.unlink()
    if not all(seen):
        raise InputError(
            f"rank {seen.index(False)} does not see rank 0's {folder}; "
            "ranks on several machines need OUT on a file system that they share"
        )


def from_first(ranks: Ranks, make: Callable[[], Any]) -> Any:
    """Return what rank 0 makes, on every rank; what it refuses is refused by all."""
    if ranks.count == 1:
        return make()
    message: list[Any] = [None, None]
    refused: InputError | None = None
    if ranks.rank == 0:
        try:
            message[0] = make()
        except InputError as error:
            refused, message[1] = error, str(error)
    with _lost():
        dist.broadcast_object_list(message, src=0)
    if refused is not None:
        raise refused
    if message[1] is not None:
        raise InputError(f"rank 0 refused: {message[1]}")
    return message[0]
