"""How much each projection of each layer loses at fewer bits: measured on a little text, before the run.

The original model runs over some calibration tokens, layer by layer. In each layer the experts that see most of them
are rounded at every candidate width, one projection at a time, with scales searched under the moments of their input;
what that changes of the block's output is measured, and not estimated from the weights:

    error[layer, part, bits] = mean over tokens of |y_rounded - y|^2 / |h|^2,   h: the stream behind the layer

token by token, since the first token's stream is a thousand times longer than others in the middle of many models.
Layers answer differently to the same error: what is wrong early is carried through all that follows. So the error of
every layer at one width also goes on as a probe, a few tokens with it on their stream, through the layers above, and

    gain[layer] = KL divergence of the probe's predictions / the same mean over the probe's tokens
    loss[layer, part, bits] = gain[layer] * error[layer, part, bits]

is what the projection adds to the divergence of the whole model, to first order. Error feedback makes every loss
smaller, by a factor that hardly depends on layer or bits (docs/lab-notes.md).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from gptoss_quantize.calibration.moments import MomentSums
from gptoss_quantize.config import ModelConfig
from gptoss_quantize.kernels.experts import gated, rows_of
from gptoss_quantize.kernels.grids import Grid
from gptoss_quantize.layouts import PARTS
from gptoss_quantize.model import attend, batches, embed, expert_act, logits, mlp_input, rms_norm, rope_tables, router
from gptoss_quantize.quantize.recipes import Recipe
from gptoss_quantize.quantize.solve import solve
from gptoss_quantize.source import Expert, Source

TOKENS = 2048
EXPERTS = 8  # of a layer, those with most tokens
PROBE = 2, 64  # sequences, their first tokens

# as for AWQ without its folds: scales searched under the importance of columns, then plain rounding
ROUNDING = replace(Recipe(), gptq=False, act_order=False, sweeps=0, asymmetric=0.0, centre=False, lattice=False)

Losses = list[dict[str, list[float]]]  # per layer: part -> loss on every grid


@torch.inference_mode()
def sensitivities(
    source: Source,
    ids_NS: Tensor,
    grids: list[Grid],
    group_size: int,
    dtype: torch.dtype,
    on_layer: Callable[[int], None] = lambda done: None,
) -> Losses:
    """Return the loss of every layer's projections on every grid, from the tokens ids_NS.

    The grid in the middle makes the probes. `dtype` is that of matrix products.
    """
    config = source.config
    N, S = ids_NS.shape
    n, s = min(PROBE[0], N), min(PROBE[1], S)
    h, probes = embed(source, ids_NS), torch.empty(0, s, config.hidden)
    errors: Losses = []
    sizes: list[float] = []
    for index in range(config.layers):
        layer = source.layer(index)
        for states in (h, probes):
            rope = rope_tables(config, states.shape[1])
            for batch in batches(*states.shape[:2]):
                states[batch] = attend(states[batch], layer, config, index, rope, dtype)
        flat = torch.cat((h.flatten(0, 1), probes.flatten(0, 1)))
        x = mlp_input(flat, layer, config)
        found = _layer(source, index, x.to(dtype), router(x, layer, config), N * S, (grids, group_size))
        flat += found.out
        h, probes = flat[: N * S].view(N, S, -1), flat[N * S :].view(-1, s, config.hidden)
        energy_NS = h.square().sum(-1).clamp(min=1e-30)
        errors.append(
            {part: [float((error.view(N, S) / energy_NS).mean()) for error in found.errors[part]] for part in PARTS}
        )
        moved = found.moved.view(N, S, -1)[:n, :s]
        sizes.append(float((moved.square().sum(-1) / energy_NS[:n, :s]).mean()))
        probes = torch.cat((probes, h[:n, :s] + moved))
        on_layer(index + 1)
    diverged = _divergences(source, h[:n, :s], probes.unflatten(0, (-1, n)), dtype)
    gains = [kl / size if size else 0.0 for kl, size in zip(diverged, sizes, strict=True)]
    return [
        {part: [gain * value for value in values] for part, values in layer.items()}
        for gain, layer in zip(gains, errors, strict=True)
    ]


def _divergences(source: Source, h_nsD: Tensor, probes_LnsD: Tensor, dtype: torch.dtype) -> list[float]:
    """Return the mean KL divergence of each probe's predictions from those of the stream without it."""
    norm, eps = source.dense("model.norm.weight"), source.config.rms_eps
    head = source.dense("model.embed_tokens.weight" if source.config.tied else "lm_head.weight").to(dtype)

    def predictions(h: Tensor) -> Tensor:
        return torch.log_softmax(logits(rms_norm(h.flatten(0, 1), norm, eps), head), -1)

    original = predictions(h_nsD)
    share = original.exp()
    return [float((share * (original - predictions(probe))).sum(-1).mean()) for probe in probes_LnsD]


@dataclass(slots=True)
class _Found:
    """What one layer's experts give, and what rounding them changes."""

    out: Tensor  # [T + probes, D] float32
    errors: dict[str, Tensor]  # part -> squared error of the output [grids, T]
    moved: Tensor  # [T, D], the output's change on the middle grid, both parts


def _layer(
    source: Source,
    index: int,
    x_TD: Tensor,
    routing: tuple[Tensor, Tensor],
    count: int,
    rounding: tuple[list[Grid], int],
) -> _Found:
    """Run a layer's experts over all tokens, and measure what rounding changes on the first `count` of them."""
    config, (chosen, prob), (grids, _) = source.config, routing, rounding
    seen = torch.bincount(chosen[:count].flatten(), minlength=config.experts)
    busiest = set(seen.argsort(descending=True, stable=True)[:EXPERTS].tolist())
    found = _Found(
        torch.zeros(x_TD.shape, dtype=torch.float32),
        {part: torch.zeros(len(grids), count) for part in PARTS},
        torch.zeros(count, config.hidden),
    )
    measured = total = 0.0
    for e in range(config.experts):
        token, slot = rows_of(chosen, e)
        if not token.numel():
            continue
        original, weight, x = source.expert(index, e), prob[token, slot], x_TD[token]
        cast = original.to(x.dtype)
        act = expert_act(x, cast, config)
        y = functional.linear(act, cast.down, cast.down_bias).float()
        found.out.index_add_(0, token, y * weight[:, None])
        own = token < count
        token, x, act, y, weight = (t[own] for t in (token, x, act, y, weight))
        energy = float((y.square().sum(-1) * weight.square()).sum(dtype=torch.float64))
        total += energy
        if e in busiest and token.numel():
            measured += energy
            _add_expert(found, original, (token, x, act, y, weight), rounding, config)
    # the others lose in proportion to what they give
    share = total / measured if measured else 1.0
    found.errors = {part: errors * share for part, errors in found.errors.items()}
    return found


def _add_expert(
    found: _Found,
    expert: Expert,
    tokens: tuple[Tensor, ...],
    rounding: tuple[list[Grid], int],
    config: ModelConfig,
) -> None:
    """Add what an expert's weighted output changes by when one of its projections is rounded, for every grid."""
    (rows, x, act, y, prob), (grids, group_size) = tokens, rounding
    dtype, limit, alpha = x.dtype, config.swiglu_limit, config.swiglu_alpha
    down, down_bias = expert.down.to(dtype), expert.down_bias.to(dtype)
    for part, matrix, bias, seen in (
        ("gate_up", expert.gate_up, expert.gate_up_bias, x),
        ("down", expert.down, expert.down_bias, act),
    ):
        moments = MomentSums(seen.shape[1], centre=False, diagonal=True)
        moments.add(seen, prob.square())
        stats = [moments.finish()]
        for at, grid in enumerate(grids):
            solved = solve(matrix[None], bias[None], stats, ROUNDING, group_size, grid, dtype)
            rounded = solved.weight(0, dtype)
            got = act if part == "down" else gated(x, rounded, bias.to(dtype), limit, alpha)
            last = rounded if part == "down" else down
            error = (functional.linear(got, last, down_bias).float() - y) * prob[:, None]
            found.errors[part][at].index_add_(0, rows, error.square().sum(-1))
            if at == len(grids) // 2:
                found.moved.index_add_(0, rows, error)
