"""What the experts of a layer see: attend, route, and hand an expert its tokens, block by block.

The inputs and the output of a layer may be larger than memory: they may lie in a mapped file, and whoever walks over
them lets go of the pages after each block. `Routed` does that by itself.

Shapes: N sequences, S positions, T = N * S tokens, D hidden, K experts per token, n tokens of one block.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from gptoss_quantize.calibration.moments import token_blocks
from gptoss_quantize.config import ModelConfig
from gptoss_quantize.kernels.experts import route, rows_of
from gptoss_quantize.model import attend, mlp_input, rope_tables, router

SAMPLE_TOKENS = 256


class Hidden(Protocol):
    """Hidden states [N, S, D] in float32, by slices of sequences."""

    def read(self, part: slice) -> torch.Tensor:
        """Return sequences part.start..part.stop-1."""
        ...

    def write(self, part: slice, hidden_NSD: torch.Tensor) -> None:
        """Put sequences at their place."""
        ...


@dataclass(slots=True)
class Block:
    """Some tokens of one expert."""

    rows: torch.Tensor  # [n], which tokens
    x: torch.Tensor  # [n, D], their input in the compute dtype
    prob: torch.Tensor  # [n], the router's probability for the expert


@dataclass(slots=True)
class Sample:
    """Calibration tokens routed to one expert, with their weight in the block output error."""

    x: torch.Tensor  # [n, D], original input
    weight: torch.Tensor  # [n], squared router probability, scaled up to all tokens of the expert


@dataclass(slots=True)
class Routed:
    """Inputs and routing of all calibration tokens of a layer, and the original block output, which is added up."""

    x: torch.Tensor  # [T, D] in the compute dtype
    index: torch.Tensor  # [T, K]
    prob: torch.Tensor  # [T, K] float32
    out: torch.Tensor  # [T, D] float32, zeros at first
    drop: Callable[[], None] = lambda: None  # takes x and out out of memory, where they are on disk
    make_room: Callable[[], None] = lambda: None  # called after each batch of experts
    experts: range | None = None  # those that are quantized here; None: all
    later: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] | None = None  # see `add`
    gather: Callable[[Any], list[Any]] = lambda value: [value]  # the values of all ranks, in their order

    def rows_of(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (token rows [n], router probabilities [n]) of an expert."""
        token, slot = rows_of(self.index, expert)
        return token, self.prob[token, slot]

    def blocks(self, expert: int) -> Iterator[Block]:
        """Yield an expert's tokens in blocks, and drop each from memory when the next is asked for."""
        token, prob = self.rows_of(expert)
        for part in token_blocks(token.numel()):
            yield Block(token[part], self.x[token[part]], prob[part])
            self.drop()

    def inputs(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield (rows, inputs [n, D]) of all tokens, whatever their expert, and drop each block likewise."""
        for rows in token_blocks(len(self.x)):
            yield rows, self.x[rows]
            self.drop()

    def sample(self, expert: int) -> Sample:
        """Return at most SAMPLE_TOKENS of an expert's tokens, evenly spaced."""
        token, prob = self.rows_of(expert)
        count = token.numel()
        keep = torch.arange(0, count, max(1, -(-count // SAMPLE_TOKENS)), device=token.device)
        share = count / max(1, keep.numel())
        return Sample(self.x[token[keep]], prob[keep].square() * share)

    def mean_magnitude(self) -> torch.Tensor:
        """Return the mean of |x| over tokens [D], in float32, without a second copy of x."""
        total = torch.zeros(self.x.shape[1], dtype=torch.float64, device=self.x.device)
        for _, x in self.inputs():
            total += x.float().abs().sum(0)
        return (total / len(self.x)).float()

    def same_routing(
        self, seen: Callable[[torch.Tensor], torch.Tensor], router_ED: torch.Tensor, bias_E: torch.Tensor
    ) -> float:
        """Return the share of tokens that another router, on inputs changed by `seen`, sends to the same experts."""
        same = 0
        for rows, x in self.inputs():
            moved, _ = route(seen(x).float(), router_ED.float(), bias_E.float(), self.index.shape[1])
            same += int((moved.sort(-1).values == self.index[rows].sort(-1).values).all(-1).sum())
        return same / len(self.x)

    def add(self, block: Block, y_nD: torch.Tensor) -> None:
        """Add an expert's weighted output to the block's, or keep it where other ranks' experts come first."""
        if self.later is None:
            self._add(block.rows, y_nD, block.prob)
        else:
            self.later.append((block.rows, y_nD, block.prob))

    def add_kept(self) -> None:
        """Add what was kept, in its order."""
        kept, self.later = self.later or [], None
        for part in kept:
            self._add(*part)

    def _add(self, rows_n: torch.Tensor, y_nD: torch.Tensor, prob_n: torch.Tensor) -> None:
        self.out.index_add_(0, rows_n, y_nD.float().mul_(prob_n[:, None]))


def attend_and_route(
    routed: Routed,
    dense: dict[str, torch.Tensor],
    config: ModelConfig,
    index: int,
    hidden: tuple[Hidden, Hidden],
    batches: list[slice],
    positions: int,
) -> None:
    """Run the attention half of layer `index` over batches of sequences: fills x, index and prob of `routed`.

    `hidden` are the states before the layer and, written here, those after its attention; `dense` are its tensors
    outside the experts, on the device of `routed`.
    """
    before, after = hidden
    device, dtype = routed.x.device, routed.x.dtype
    rope = rope_tables(config, positions, str(device))
    for batch in batches:
        h = attend(before.read(batch).to(device), dense, config, index, rope, dtype)
        x = mlp_input(h.flatten(0, 1), dense, config)
        part = slice(batch.start * positions, batch.stop * positions)
        routed.x[part] = x.to(dtype)
        routed.index[part], routed.prob[part] = router(x, dense, config)
        after.write(batch, h.cpu())
        routed.drop()


def add_experts(routed: Routed, after: Hidden, batches: list[slice], positions: int) -> None:
    """Add the experts' output to the states after attention: what the next layer begins with."""
    for batch in batches:
        part = slice(batch.start * positions, batch.stop * positions)
        after.write(batch, after.read(batch) + routed.out[part].cpu().unflatten(0, (-1, positions)))
        routed.drop()
