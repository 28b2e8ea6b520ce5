"""One decoder layer: original experts and routed tokens in, packed tensors, report and block output out.

The block output that goes on to the next layer is the *original* model's: every layer is calibrated on what the
original would see. Within an expert, down_proj is calibrated on what the quantized gate_up really gives it.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional

from gptoss_quantize.calibration.moments import Moments, MomentSums, token_blocks
from gptoss_quantize.checkpoint import Checkpoint, Expert
from gptoss_quantize.config import ModelConfig
from gptoss_quantize.kernels.experts import gated, route, tokens_of
from gptoss_quantize.model import expert_act
from gptoss_quantize.quantize import awq
from gptoss_quantize.quantize.formats import Format
from gptoss_quantize.quantize.recipes import Recipe
from gptoss_quantize.quantize.solve import Solution, solve
from gptoss_quantize.quantize.stream import chunks, stream_experts

SAMPLE_TOKENS = 256


@dataclass(slots=True)
class Routed:
    """What the experts of one layer see: inputs and routing of all calibration tokens."""

    x: torch.Tensor  # [T, D] in the compute dtype
    index: torch.Tensor  # [T, K]
    prob: torch.Tensor  # [T, K] float32
    out: torch.Tensor  # [T, D] float32, zeros: the original block output is added up here
    drop: Callable[[], None] = lambda: None  # takes x and out out of memory, where they are on disk
    make_room: Callable[[], None] = lambda: None  # called after each batch of experts
    experts: range | None = None  # those that are quantized here; None: all
    later: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] | None = None  # see `add`
    gather: Callable[[Any], list[Any]] = lambda value: [value]  # the values of all ranks, in their order

    def add(self, rows_n: torch.Tensor, y_nD: torch.Tensor, prob_n: torch.Tensor) -> None:
        """Add an expert's weighted output to the block's, or keep it where other ranks' experts come first."""
        if self.later is None:
            self.out.index_add_(0, rows_n, y_nD.float().mul_(prob_n[:, None]))
        else:
            self.later.append((rows_n, y_nD, prob_n))

    def add_kept(self) -> None:
        """Add what was kept, in its order."""
        kept, self.later = self.later or [], None
        for rows, y, prob in kept:
            self.add(rows, y, prob)


@dataclass(slots=True)
class LayerResult:
    """The quantized layer: tensors by their name inside the layer, and a report entry."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)


class Clock:
    """Seconds per phase, added up over layers."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


def _store(
    fmt: Format, tensors: dict[str, torch.Tensor], experts: int, expert: int, pair: tuple[Solution, Solution], at: int
) -> None:
    """Add an expert, item `at` of its solved batch, to the layer's stored tensors."""
    for name, part in zip(("gate_up", "down"), pair, strict=True):
        fmt.store(tensors, experts, expert, name, part.codes[at], part.scale[at], part.bias[at])


def round_layer(
    source: Checkpoint,
    index: int,
    recipe: Recipe,
    fmt: Format,
    clock: Clock,
    experts: range | None = None,
    weigh: bool = False,
) -> LayerResult:
    """Return a layer quantized by plain rounding, without activations; `experts` are all without it.

    `weigh`: leave [sum of squared weight errors, sum of squared weights] in the report under "weight_error".
    """
    result, sums = LayerResult(), [0.0, 0.0]
    for e in range(source.config.experts) if experts is None else experts:
        with clock("read"):
            expert = source.expert(index, e)
        with clock("solve"):
            gate_up = solve(expert.gate_up[None], expert.gate_up_bias[None], None, recipe, fmt.group_size, fmt.grid)
            down = solve(expert.down[None], expert.down_bias[None], None, recipe, fmt.group_size, fmt.grid)
            _store(fmt, result.tensors, source.config.experts, e, (gate_up, down), 0)
        if weigh:
            for part, weight in ((gate_up, expert.gate_up), (down, expert.down)):
                sums[0] += float((part.weight(0, weight.dtype) - weight).square().sum())
                sums[1] += float(weight.square().sum())
    if weigh:
        result.report["weight_error"] = sums
    return result


@dataclass(slots=True)
class _Job:
    """The constants of one calibrated layer."""

    config: ModelConfig
    routed: Routed
    recipe: Recipe
    fmt: Format
    clock: Clock
    input_scale: torch.Tensor | None  # [D], of the gate_up fold

    def tokens(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (token rows, router probabilities) of an expert."""
        token, slot = tokens_of(self.routed.index, expert)
        return token, self.routed.prob[token, slot]

    def seen(self, x: torch.Tensor) -> torch.Tensor:
        """Return the experts' input in the folded model."""
        return x if self.input_scale is None else (x.float() / self.input_scale).to(x.dtype)

    def sums(self, columns: int) -> MomentSums:
        """Return empty sums for a projection's input, of the kind that the recipe needs."""
        full = self.recipe.gptq or self.recipe.sweeps > 0
        return MomentSums(columns, centre=self.recipe.centre, diagonal=not full, compiled=self.recipe.native)

    def sample(self, expert: int) -> awq.Sample:
        """Return at most SAMPLE_TOKENS of an expert's tokens, evenly spaced."""
        token, prob = self.tokens(expert)
        count = token.numel()
        keep = torch.arange(0, count, max(1, -(-count // SAMPLE_TOKENS)), device=token.device)
        share = count / max(1, keep.numel())
        return awq.Sample(self.routed.x[token[keep]], prob[keep].square() * share)


def calibrated_layer(
    source: Checkpoint,
    index: int,
    dense: dict[str, torch.Tensor],
    routed: Routed,
    recipe: Recipe,
    fmt: Format,
    experts_at_once: int,
    clock: Clock,
) -> LayerResult:
    """Return a layer quantized on its routed tokens, and add its original block output to `routed.out`.

    `dense` are the layer's tensors outside the experts.
    """
    config = source.config
    job = _Job(config, routed, recipe, fmt, clock, None)
    result = LayerResult()
    device = routed.x.device
    mine = range(config.experts) if routed.experts is None else routed.experts
    if recipe.awq:
        with clock("awq search"):
            fold = awq.search_input(
                [job.sample(e) for e in mine],
                (_to(source.expert(index, e), device) for e in mine),
                _mean_magnitude(routed),
                dense,
                config,
                fmt.group_size,
                recipe.awq_strength,
                routed.gather,
            )
        job.input_scale = fold.scale if fold.alpha else None
        result.report["awq"] = {"alpha": fold.alpha, "gain": fold.gain}
        if fold.alpha:
            result.tensors["post_attention_layernorm.weight"] = fold.norm
            result.tensors["mlp.router.weight"] = fold.router
            result.report["awq"]["routing_unchanged"] = _same_routing(job, fold.router, dense["mlp.router.bias"])
    entries: list[dict[str, Any]] = []
    stream = stream_experts(source, index, chunks(mine, experts_at_once), device)
    while True:
        with clock("read"):
            chunk, originals = next(stream, (None, []))
        if chunk is None:
            break
        entries += _solve_chunk(job, chunk, originals, result)
        del originals
        routed.make_room()
    result.report["experts"] = entries
    return result


def _mean_magnitude(routed: Routed) -> torch.Tensor:
    """Return the mean of |x| over tokens [D], in float32, without a second copy of x."""
    count, width = routed.x.shape
    total = torch.zeros(width, dtype=torch.float64, device=routed.x.device)
    for rows in token_blocks(count):
        total += routed.x[rows].float().abs().sum(0)
        routed.drop()
    return (total / count).float()


def _same_routing(job: _Job, router: torch.Tensor, bias: torch.Tensor) -> float:
    """Return the share of tokens that the folded router sends to the same experts."""
    same, count = 0, len(job.routed.x)
    for rows in token_blocks(count):
        moved, _ = route(job.seen(job.routed.x[rows]).float(), router.float(), bias.float(), job.config.top_k)
        same += int((moved.sort(-1).values == job.routed.index[rows].sort(-1).values).all(-1).sum())
        job.routed.drop()
    return same / count


def _to(expert: Expert, where: torch.device | torch.dtype) -> Expert:
    return Expert(
        expert.gate_up.to(where), expert.gate_up_bias.to(where), expert.down.to(where), expert.down_bias.to(where)
    )


def _solve_chunk(job: _Job, chunk: range, originals: list[Expert], result: LayerResult) -> list[dict[str, Any]]:
    """Quantize a batch of experts; adds their tensors and original outputs to `result`, returns report entries."""
    recipe, clock, size = job.recipe, job.clock, job.fmt.group_size
    entries: list[dict[str, Any]] = [{"expert": e} for e in chunk]
    experts, folds = list(originals), [None] * len(chunk)
    if recipe.awq and recipe.awq_down:
        with clock("awq search"):
            experts, folds = _fold_down(job, chunk, originals, entries)
    with clock("moments"):
        stats = []
        for entry, e in zip(entries, chunk, strict=True):
            token, prob = job.tokens(e)
            sums = job.sums(job.config.hidden)
            for rows in token_blocks(token.numel()):
                sums.add(job.seen(job.routed.x[token[rows]]), prob[rows] ** recipe.token_power)
                job.routed.drop()
            stats.append(sums.finish(job.routed.x.device))
            entry |= {"tokens": stats[-1].tokens, "effective_tokens": round(stats[-1].effective_tokens, 1)}
    with clock("solve"):
        wide = [e.gate_up if job.input_scale is None else e.gate_up * job.input_scale for e in experts]
        biases = torch.stack([e.gate_up_bias for e in experts])
        gate_up = solve(torch.stack(wide), biases, stats, recipe, size, job.fmt.grid, job.routed.x.dtype)
    stats = [
        _down_moments(job, e, original, gate_up, at, folds[at])
        for at, (e, original) in enumerate(zip(chunk, originals, strict=True))
    ]
    with clock("solve"):
        biases = torch.stack([e.down_bias for e in experts])
        down = solve(
            torch.stack([e.down for e in experts]), biases, stats, recipe, size, job.fmt.grid, job.routed.x.dtype
        )
    with clock("report"):
        for at, entry in enumerate(entries):
            entry["output_error"] = _output_error(job, chunk[at], originals[at], gate_up, down, at)
            if retries := gate_up.retries[at] + down.retries[at]:
                entry["extra_damping"] = retries
            _store(job.fmt, result.tensors, job.config.experts, chunk[at], (gate_up, down), at)
    return entries


def _fold_down(
    job: _Job, chunk: range, originals: list[Expert], entries: list[dict[str, Any]]
) -> tuple[list[Expert], list[Any]]:
    """Return (experts with the up->down fold, their t [F]); notes beta and gain in the entries."""
    experts, folds = [], []
    for entry, e, original in zip(entries, chunk, originals, strict=True):
        token, _ = job.tokens(e)
        dtype = job.routed.x.dtype
        weight, bias = original.gate_up[1::2].to(dtype), original.gate_up_bias[1::2].to(dtype)
        clamped = torch.full((job.config.intermediate,), not token.numel(), device=weight.device)
        for rows in token_blocks(token.numel()):
            up = functional.linear(job.routed.x[token[rows]], weight, bias)
            # 2 % below the limit, so that rounding of the folded weights does not reach it either
            clamped |= (up.float().abs() >= 0.98 * job.config.swiglu_limit).any(0)
            job.routed.drop()
        folded, t, beta, gain = awq.search_down(
            job.sample(e), original, job.config, job.fmt.group_size, clamped, job.recipe.awq_strength
        )
        experts.append(folded)
        folds.append(t)
        entry["awq_down"] = {"beta": beta, "gain": gain, "clamped": int(clamped.sum())}
    return experts, folds


def _down_moments(
    job: _Job, e: int, original: Expert, gate_up: Solution, at: int, fold: torch.Tensor | None
) -> Moments:
    """Return the moments of down_proj's input; adds the original output of the expert to the block's.

    With full Hessians the input is what the quantized gate_up gives, with the drift from the original one.
    """
    token, prob = job.tokens(e)
    weighted = prob**job.recipe.token_power
    dtype = job.routed.x.dtype
    sums = job.sums(job.config.intermediate)
    full = not sums.diagonal
    cast = _to(original, dtype)
    weight, bias = gate_up.weight(at, dtype), gate_up.bias[at].to(dtype)
    for rows in token_blocks(token.numel()):
        x = job.routed.x[token[rows]]
        with job.clock("forward"):
            act = expert_act(x, cast, job.config)
            y = functional.linear(act, cast.down, cast.down_bias)
            job.routed.add(token[rows], y, prob[rows])
            if full:
                seen = gated(job.seen(x), weight, bias, job.config.swiglu_limit, job.config.swiglu_alpha)
        with job.clock("moments"):
            if fold is not None:
                act = (act.float() / fold).to(dtype)
            if full:
                sums.add(seen, weighted[rows], act)
            else:
                # an importance per column needs no quantized input, which would take one more forward pass
                sums.add(act, weighted[rows])
        job.routed.drop()
    with job.clock("moments"):
        return sums.finish(job.routed.x.device, paired=full)


def _quantized_act(job: _Job, x: torch.Tensor, gate_up: Solution, at: int) -> torch.Tensor:
    weight, bias = gate_up.weight(at, x.dtype), gate_up.bias[at].to(x.dtype)
    return gated(job.seen(x), weight, bias, job.config.swiglu_limit, job.config.swiglu_alpha)


def _output_error(job: _Job, e: int, original: Expert, gate_up: Solution, down: Solution, at: int) -> float | None:
    """Return |y - y_quantized|^2 / |y|^2 of the expert's output on sampled tokens; None without tokens."""
    sample = job.sample(e)
    if not sample.x.shape[0]:
        return None
    dtype = sample.x.dtype
    cast = _to(original, dtype)
    wanted = functional.linear(expert_act(sample.x, cast, job.config), cast.down, cast.down_bias).float()
    act = _quantized_act(job, sample.x, gate_up, at)
    got = functional.linear(act, down.weight(at, dtype), down.bias[at].to(dtype)).float()
    return float((got - wanted).square().sum() / wanted.square().sum())
