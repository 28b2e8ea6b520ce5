"""Token sequences that share a beginning, run through a streamed model once: the engine of every measurement here.

A multiple-choice item is one context and several continuations; a chat turn is a prompt and its answer; a passage is
its first token and the rest. All are *trees*: a context, and branches that follow it without seeing each other. Token
j is visible to token i when it comes no later and lies in the context or in the same branch:

    visible(i, j) = position_j <= position_i  and  branch_j in (context, branch_i)  [and inside the sliding window]

Positions go on from the context in every branch, so each branch sees exactly what it would see alone, and what was
computed for the context is shared by all of them; nothing is approximated. Trees of similar length are padded to one
batch for attention only; norms, routers and experts work on the flat list of real tokens.

Shapes: T tokens of all trees, P predictions (one per branch token), D hidden, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from gptoss_quantize.model import (
    BATCH_TOKENS,
    attention,
    embed,
    logits,
    mlp_input,
    moe,
    rms_norm,
    rope_tables,
    router,
)
from gptoss_quantize.source import Source

CHUNK_ELEMENTS = 1 << 24


@dataclass(frozen=True, slots=True)
class Tree:
    """One context of at least one token, and the token sequences that follow it, none of them empty."""

    context: tuple[int, ...]
    branches: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if not self.context or not all(self.branches):
            raise ValueError("a tree needs a context, and branches of at least one token each")

    def __len__(self) -> int:
        return len(self.context) + sum(map(len, self.branches))

    @property
    def depth(self) -> int:
        """The number of positions: context and the longest branch."""
        return len(self.context) + max(map(len, self.branches), default=0)


@dataclass(frozen=True, slots=True)
class Layout:
    """Trees flattened in their order: one entry per token, and one per prediction."""

    ids: torch.Tensor  # [T] token ids
    position: torch.Tensor  # [T] position inside the sequence
    branch: torch.Tensor  # [T] 0 for the context, k for the k-th branch
    bounds: torch.Tensor  # [trees + 1] where each tree begins
    source: torch.Tensor  # [P] the row of T that predicts
    target: torch.Tensor  # [P] the token id that is predicted
    owner: torch.Tensor  # [P] the tree that it belongs to
    depth: int

    @property
    def trees(self) -> int:
        return len(self.bounds) - 1


def lay_out(trees: Sequence[Tree]) -> Layout:
    """Return the flat form of trees; predictions come in the order of trees, branches and tokens."""
    ids: list[int] = []
    position: list[int] = []
    branch: list[int] = []
    source: list[int] = []
    target: list[int] = []
    owner: list[int] = []
    for number, tree in enumerate(trees):
        base, size = len(ids), len(tree.context)
        ids += tree.context
        position += range(size)
        branch += [0] * size
        for k, tokens in enumerate(tree.branches, 1):
            start = len(ids)
            # the first token of a branch is predicted by the last one of the context
            source += [base + size - 1, *range(start, start + len(tokens) - 1)]
            target += tokens
            owner += [number] * len(tokens)
            ids += tokens
            position += range(size, size + len(tokens))
            branch += [k] * len(tokens)
    return Layout(
        ids=torch.tensor(ids),
        position=torch.tensor(position),
        branch=torch.tensor(branch),
        bounds=torch.tensor([0, *accumulate(map(len, trees))]),
        source=torch.tensor(source),
        target=torch.tensor(target),
        owner=torch.tensor(owner),
        depth=max(tree.depth for tree in trees),
    )


@dataclass(frozen=True, slots=True)
class Batch:
    """Trees of similar length, padded: which flat row stands where, and who sees whom."""

    row: torch.Tensor  # [N, S] row of the flat list, 0 where padded
    real: torch.Tensor  # [N, S]
    position: torch.Tensor  # [N, S]
    visible: torch.Tensor  # [N, 1, S, S] without any window

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device."""
        return Batch(*(getattr(self, name).to(device) for name in self.__slots__))

    def windowed(self, window: int | None) -> torch.Tensor:
        """Return the visibility [N, 1, S, S] under a sliding window of so many tokens."""
        if window is None or int(self.position.max()) < window:
            return self.visible
        distance = self.position[:, None, :, None] - self.position[:, None, None, :]
        return self.visible & (distance < window)


def batches_of(layout: Layout, batch_tokens: int = BATCH_TOKENS) -> Iterator[Batch]:
    """Yield the trees, shortest first, in batches of at most `batch_tokens` padded tokens (or one tree)."""
    lengths = layout.bounds.diff()
    order = torch.argsort(lengths, stable=True)
    start = 0
    while start < len(order):
        stop = start + 1
        while stop < len(order) and (stop + 1 - start) * int(lengths[order[stop]]) <= batch_tokens:
            stop += 1
        chosen = order[start:stop]
        width = int(lengths[chosen[-1]])
        offset = torch.arange(width)
        real = offset < lengths[chosen][:, None]
        row = torch.where(real, layout.bounds[chosen][:, None] + offset, 0)
        position = torch.where(real, layout.position[row], 0)
        branch = torch.where(real, layout.branch[row], -1)
        earlier = position[:, :, None] >= position[:, None, :]
        related = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])
        yield Batch(row, real, position, (earlier & related & real[:, None, :])[:, None])
        start = stop


class Stream:
    """One model on one layout, a decoder layer at a time: `attend(i)`, then `mlp(i)`, then the next layer.

    `h` is the float32 residual stream [T, D]. Weights are read when a layer needs them and dropped after it. All of
    it happens on the device that the source's tensors are on.
    """

    def __init__(self, source: Source, layout: Layout, dtype: torch.dtype = torch.float32):
        self.source, self.config, self.dtype = source, source.config, dtype
        self.h = embed(source, layout.ids)
        self.rope = rope_tables(source.config, layout.depth, str(self.h.device))
        self.batches = [batch.to(self.h.device) for batch in batches_of(layout)]
        self.layer: dict[str, torch.Tensor] = {}

    def attend(self, index: int) -> None:
        """Read layer `index` (without its experts) and add its attention output to the residual stream."""
        self.layer = self.source.layer(index)
        window = self.config.window(index)
        for batch in self.batches:
            x = rms_norm(self.h[batch.row], self.layer["input_layernorm.weight"], self.config.rms_eps)
            cos, sin = (table[batch.position][:, None] for table in self.rope)
            out = attention(x.to(self.dtype), self.layer, self.config, None, (cos, sin), batch.windowed(window))
            self.h[batch.row[batch.real]] += out[batch.real].float()

    def routed(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return (expert input [T, D], expert indices [T, K], probabilities [T, K]) of the layer attended last."""
        x = mlp_input(self.h, self.layer, self.config)
        return (x, *router(x, self.layer, self.config))

    def mlp(self, index: int) -> None:
        """Add the expert block's output to the residual stream."""
        x, chosen, prob = self.routed()
        self.h += moe(x.to(self.dtype), chosen, prob, self.source.experts(index, self.dtype), self.config)

    def final(self) -> torch.Tensor:
        """Return the normed final hidden states [T, D]."""
        return rms_norm(self.h, self.source.dense("model.norm.weight"), self.config.rms_eps)


@torch.inference_mode()
def predicting_states(
    source: Source,
    layout: Layout,
    dtype: torch.dtype = torch.float32,
    on_layer: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """Return the final hidden states [P, D] (float32) that predict `layout.target`, streaming the model.

    They stay on the device that the source's tensors are on.
    """
    stream = Stream(source, layout, dtype)
    for index in range(source.config.layers):
        stream.attend(index)
        stream.mlp(index)
        on_layer()
    return stream.final()[layout.source.to(stream.h.device)]


@torch.inference_mode()
def target_logprobs(
    hidden_PD: torch.Tensor, head_VD: torch.Tensor, target_P: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (log-probability of each target [P] in nats, whether it is the most probable token [P]), on the CPU.

    The products run where the head is.
    """
    value, greedy = torch.empty(len(target_P)), torch.empty(len(target_P), dtype=torch.bool)
    step = max(1, CHUNK_ELEMENTS // head_VD.shape[0])
    for start in range(0, len(target_P), step):
        part = slice(start, start + step)
        scores, target = logits(hidden_PD[part].to(head_VD.device), head_VD), target_P[part].to(head_VD.device)
        chosen = scores.gather(1, target[:, None]).squeeze(1)
        value[part] = (chosen - torch.logsumexp(scores, dim=-1)).cpu()
        greedy[part] = (scores.argmax(-1) == target).cpu()
    return value, greedy
