"""One decoder layer: original experts and routed tokens in, packed tensors, report and block output out.

The block output that goes on to the next layer is the *original* model's: every layer is calibrated on what the
original would see. Within an expert, down_proj is calibrated on what the quantized gate_up really gives it.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.nn import functional

from gptoss_quantize.calibration.capture import Routed
from gptoss_quantize.calibration.moments import Moments, MomentSums
from gptoss_quantize.config import ModelConfig
from gptoss_quantize.kernels.experts import gated
from gptoss_quantize.kernels.grids import Grid
from gptoss_quantize.layouts import PARTS, Layout
from gptoss_quantize.machine import Clock
from gptoss_quantize.model import expert_act
from gptoss_quantize.quantize import awq
from gptoss_quantize.quantize.mxfp4_values import mxfp4_values
from gptoss_quantize.quantize.recipes import Recipe
from gptoss_quantize.quantize.solve import Solution, solve
from gptoss_quantize.quantize.stream import chunks, stream_experts
from gptoss_quantize.source import Expert, Source


@dataclass(frozen=True, slots=True)
class Target:
    """What a layer is turned into, and how: the same for all layers of a run."""

    recipe: Recipe
    layout: Layout
    group_size: int
    layer: int = 0  # which, where the layout is mixed

    def grid(self, part: str) -> Grid:
        """Return what codes and scales of a projection, "gate_up" or "down", may be."""
        layout = self.layout.at(self.layer, part)
        if layout.grid is None:
            raise ValueError(f"{layout.name} has no codes to solve for")
        return layout.grid

    def solve(
        self,
        part: str,
        weight_ENK: torch.Tensor,
        bias_EN: torch.Tensor,
        stats: list[Moments] | None,
        products: torch.dtype | None = None,
    ) -> Solution:
        """Return the quantized projection of E experts; see `quantize.solve`."""
        return solve(weight_ENK, bias_EN, stats, self.recipe, self.group_size, self.grid(part), products)

    def store(
        self, tensors: dict[str, torch.Tensor], place: tuple[int, int], pair: tuple[Solution, Solution], at: int
    ) -> None:
        """Add an expert, item `at` of its solved batch, to a layer's tensors; `place` is (expert, experts)."""
        for name, part in zip(PARTS, pair, strict=True):
            layout = self.layout.at(self.layer, name)
            layout.put(tensors, place, name, part.codes[at], part.scale[at], part.bias[at])


@dataclass(slots=True)
class LayerResult:
    """The quantized layer: tensors by their name inside the layer, and a report entry."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)


def round_layer(
    source: Source, index: int, target: Target, clock: Clock, experts: range | None = None
) -> LayerResult:
    """Return a layer quantized by plain rounding, without activations; `experts` are all without it.

    The report names the experts that are no MXFP4 values ("off_mxfp4_grid"), and has [sum of squared weight errors,
    sum of squared weights] of the others ("weight_error").
    """
    target, result, sums = replace(target, layer=index), LayerResult(), [0.0, 0.0]
    off: list[int] = []
    for e in range(source.config.experts) if experts is None else experts:
        with clock("read"):
            expert = source.expert(index, e)
        with clock("solve"):
            gate_up = target.solve("gate_up", expert.gate_up[None], expert.gate_up_bias[None], None)
            down = target.solve("down", expert.down[None], expert.down_bias[None], None)
            target.store(result.tensors, (e, source.config.experts), (gate_up, down), 0)
        with clock("report"):
            if not mxfp4_values(source, index, e, expert):
                off.append(e)
                continue
            for part, weight in ((gate_up, expert.gate_up), (down, expert.down)):
                sums[0] += float((part.weight(0, weight.dtype) - weight).square().sum())
                sums[1] += float(weight.square().sum())
    result.report |= {"weight_error": sums, "off_mxfp4_grid": off}
    return result


@dataclass(slots=True)
class _Layer:
    """The constants of one calibrated layer."""

    config: ModelConfig
    routed: Routed
    target: Target
    clock: Clock
    input_scale: torch.Tensor | None = None  # [D], of the gate_up fold

    @property
    def recipe(self) -> Recipe:
        return self.target.recipe

    @property
    def dtype(self) -> torch.dtype:
        return self.routed.x.dtype

    def seen(self, x: torch.Tensor) -> torch.Tensor:
        """Return the experts' input in the folded model."""
        return x if self.input_scale is None else (x.float() / self.input_scale).to(x.dtype)

    def sums(self, columns: int) -> MomentSums:
        """Return empty sums for a projection's input, of the kind that the recipe needs."""
        full = self.recipe.gptq or self.recipe.sweeps > 0
        return MomentSums(columns, centre=self.recipe.centre, diagonal=not full)

    def act(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """Return what a quantized gate_up gives down_proj for the original input x."""
        return gated(self.seen(x), weight, bias, self.config.swiglu_limit, self.config.swiglu_alpha)


def calibrated_layer(
    source: Source,
    index: int,
    dense: dict[str, torch.Tensor],
    routed: Routed,
    target: Target,
    experts_at_once: int,
    clock: Clock,
) -> LayerResult:
    """Return a layer quantized on its routed tokens, and add its original block output to `routed.out`.

    `dense` are the layer's tensors outside the experts.
    """
    target = replace(target, layer=index)
    layer, result = _Layer(source.config, routed, target, clock), LayerResult()
    device = routed.x.device
    mine = range(source.config.experts) if routed.experts is None else routed.experts
    if target.recipe.awq:
        with clock("awq search"):
            fold = awq.search_input(
                [routed.sample(e) for e in mine],
                (source.expert(index, e).to(device) for e in mine),
                routed.mean_magnitude(),
                dense,
                source.config,
                target.group_size,
                target.recipe.awq_strength,
                routed.gather,
                target.grid("gate_up"),
            )
        result.report["awq"] = {"alpha": fold.alpha, "gain": fold.gain}
        if fold.alpha:
            layer.input_scale = fold.scale
            result.tensors["post_attention_layernorm.weight"] = fold.norm
            result.tensors["mlp.router.weight"] = fold.router
            same = routed.same_routing(layer.seen, fold.router, dense["mlp.router.bias"])
            result.report["awq"]["routing_unchanged"] = same
    entries: list[dict[str, Any]] = []
    off = result.report["off_mxfp4_grid"] = []
    stream = stream_experts(source, index, chunks(mine, experts_at_once), device)
    while True:
        with clock("read"):
            chunk, originals = next(stream, (None, []))
        if chunk is None:
            break
        with clock("report"):
            off += [
                e for e, expert in zip(chunk, originals, strict=True) if not mxfp4_values(source, index, e, expert)
            ]
        entries += _solve_chunk(layer, chunk, originals, result)
        del originals
        routed.make_room()
    result.report["experts"] = entries
    return result


def _solve_chunk(layer: _Layer, chunk: range, originals: list[Expert], result: LayerResult) -> list[dict[str, Any]]:
    """Quantize a batch of experts; adds their tensors to `result` and original outputs, returns report entries."""
    recipe, clock, target = layer.recipe, layer.clock, layer.target
    entries: list[dict[str, Any]] = [{"expert": e} for e in chunk]
    experts: list[Expert] = list(originals)
    folds: list[torch.Tensor | None] = [None] * len(chunk)
    if recipe.awq and recipe.awq_down:
        with clock("awq search"):
            for at, (entry, e) in enumerate(zip(entries, chunk, strict=True)):
                experts[at], folds[at], entry["awq_down"] = _fold_down(layer, e, originals[at])
    with clock("moments"):
        stats = [_gate_up_moments(layer, e) for e in chunk]
    for entry, moments in zip(entries, stats, strict=True):
        entry |= {"tokens": moments.tokens, "effective_tokens": round(moments.effective_tokens, 1)}
    with clock("solve"):
        wide = [e.gate_up if layer.input_scale is None else e.gate_up * layer.input_scale for e in experts]
        biases = torch.stack([e.gate_up_bias for e in experts])
        gate_up = target.solve("gate_up", torch.stack(wide), biases, stats, layer.dtype)
        del wide
    stats, probes = [], []
    for at, (e, original) in enumerate(zip(chunk, originals, strict=True)):
        moments, probe = _run_expert(layer, e, original, (gate_up, at), folds[at])
        stats.append(moments)
        probes.append(probe)
    with clock("solve"):
        biases = torch.stack([e.down_bias for e in experts])
        down = target.solve("down", torch.stack([e.down for e in experts]), biases, stats, layer.dtype)
    with clock("report"):
        for at, entry in enumerate(entries):
            entry["output_error"] = _output_error(probes[at], down, at)
            if retries := gate_up.retries[at] + down.retries[at]:
                entry["extra_damping"] = retries
            target.store(result.tensors, (chunk[at], layer.config.experts), (gate_up, down), at)
    return entries


def _gate_up_moments(layer: _Layer, e: int) -> Moments:
    """Return the moments of an expert's input."""
    sums = layer.sums(layer.config.hidden)
    for block in layer.routed.blocks(e):
        sums.add(layer.seen(block.x), block.prob**layer.recipe.token_power)
    return sums.finish(layer.routed.x.device)


def _fold_down(layer: _Layer, e: int, original: Expert) -> tuple[Expert, torch.Tensor, dict[str, Any]]:
    """Return (the expert with the up->down fold, its t [F], beta and gain for the report)."""
    weight, bias = original.gate_up[1::2].to(layer.dtype), original.gate_up_bias[1::2].to(layer.dtype)
    seen = int((layer.routed.index == e).sum())
    clamped = torch.full((layer.config.intermediate,), not seen, device=weight.device)
    for block in layer.routed.blocks(e):
        up = functional.linear(block.x, weight, bias)
        # 2 % below the limit, so that rounding of the folded weights does not reach it either
        clamped |= (up.float().abs() >= 0.98 * layer.config.swiglu_limit).any(0)
    settings = layer.config, layer.target.group_size, clamped, layer.recipe.awq_strength, layer.target.grid("down")
    folded, t, beta, gain = awq.search_down(layer.routed.sample(e), original, *settings)
    return folded, t, {"beta": beta, "gain": gain, "clamped": int(clamped.sum())}


# on sampled tokens: the original output, and the activation that the quantized gate_up gives
Probe = tuple[torch.Tensor, torch.Tensor]


def _run_expert(
    layer: _Layer, e: int, original: Expert, solved: tuple[Solution, int], fold: torch.Tensor | None
) -> tuple[Moments, Probe | None]:
    """Run an original expert once over its tokens; its output goes into the sum that the next layer begins with.

    Return the moments of down_proj's input, and a probe of the output error (None without tokens). With full Hessians
    the input is what the quantized gate_up, item `at` of (solution, at), gives, with the drift from the original one.
    """
    gate_up, at = solved
    dtype, clock, power = layer.dtype, layer.clock, layer.recipe.token_power
    sums = layer.sums(layer.config.intermediate)
    full = not sums.diagonal
    cast = original.to(dtype)
    weight, bias = gate_up.weight(at, dtype), gate_up.bias[at].to(dtype)
    for block in layer.routed.blocks(e):
        with clock("forward"):
            act = expert_act(block.x, cast, layer.config)
            layer.routed.add(block, functional.linear(act, cast.down, cast.down_bias))
            seen = layer.act(block.x, weight, bias) if full else None
        with clock("moments"):
            if fold is not None:
                act = (act.float() / fold).to(dtype)
            if seen is not None:
                sums.add(seen, block.prob**power, act)
            else:
                # an importance per column needs no quantized input, which would take one more forward pass
                sums.add(act, block.prob**power)
    with clock("report"):
        x, probe = layer.routed.sample(e).x, None
        if x.shape[0]:
            wanted = functional.linear(expert_act(x, cast, layer.config), cast.down, cast.down_bias)
            probe = (wanted.float(), layer.act(x, weight, bias))
    with clock("moments"):
        return sums.finish(layer.routed.x.device, paired=full), probe


def _output_error(probe: Probe | None, down: Solution, at: int) -> float | None:
    """Return |y - y_quantized|^2 / |y|^2 of an expert's output on sampled tokens; None without tokens."""
    if probe is None:
        return None
    wanted, act = probe
    got = functional.linear(act, down.weight(at, act.dtype), down.bias[at].to(act.dtype)).float()
    return float((got - wanted).square().sum() / wanted.square().sum())
