"""The algebra that turns a Llama layer into a gpt-oss layer with many experts: pure functions of tensors.

gpt-oss computes an expert as `down((up' + 1) * gate' * sigmoid(1.702 gate'))`, a Llama block as
`down(up * gate * sigmoid(gate))`. With

    gate' = gate / 1.702,    up' = c_j up_j - 1 (the -1 is the bias),    down'[:, j] = down[:, j] * 1.702 / c_j

the two are equal as long as no clamp binds. c_j shrinks loud channels so that the clamp of up' at 7 stays off. The
gate has no such freedom and clamps at 11.9. About one neuron in 500 ever gets there, but among them are those that
make the attention sink's huge activation at the first token; these few get a softer sigmoid and a gain, fitted to the
sample (`fit_clamped_gates`). Without that, a conversation's KL divergence from the source is seven times larger.

Attention biases are 0, sinks -40, the sliding window spans the context, and YaRN has factor 1, which is plain rope:
attention is Llama's.

The E experts are copies of the MLP, each with its own order of the neurons and 2 % weight noise. The softmax over
the selected experts sums to 1, so the block still computes the MLP whichever experts a router picks. It picks by
k-means clusters of the layer's own inputs, which makes some experts popular and some nearly dead, as in life. The
residual channels are permuted throughout: otherwise the source's 4-bit groups would line up with ours, and 4 bits
would look free.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gptoss_quantize.demo.smollm2 import LayerSample
from gptoss_quantize.errors import InputError
from gptoss_quantize.kernels import mxfp4

SWIGLU_ALPHA = 1.702
SWIGLU_LIMIT = 7.0
GATE_LIMIT = SWIGLU_ALPHA * SWIGLU_LIMIT  # of the source's gate, 11.9
UP_TARGET = 5.5  # largest sampled |c_j up_j|: leaves headroom below the clamp at 7 - 1
WEIGHT_NOISE = 0.02
SINK = -40.0
# routing is decided clearly, not absolutely: the median token prefers its best expert to the first one
# left out by this many nats
ROUTER_MARGIN = 2.0
KMEANS_ITERATIONS = 20
SHARPNESS_GRID = (1.0, 0.8, 0.6, 0.5, 0.4, 0.3, 0.25)


@dataclass(frozen=True)
class DemoSettings:
    """What the demo model is made with."""

    experts: int = 8
    experts_per_token: int = 2
    seed: int = 0
    mxfp4: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.experts_per_token <= self.experts:
            raise InputError(
                f"demo model: experts_per_token is {self.experts_per_token}, expected 1 to experts = {self.experts}"
            )


@dataclass(frozen=True)
class NeuronScales:
    """Factors on the neurons of a Llama MLP that make it gpt-oss's."""

    gate: Tensor  # [F]
    up: Tensor  # [F]
    down: Tensor  # [F]


def neuron_scales(sample: LayerSample) -> NeuronScales:
    """The factors for a layer, exact but for neurons whose gate leaves the clamp's range on the sample."""
    up_F = (UP_TARGET / sample.up.abs().amax(dim=0)).clamp(max=SWIGLU_ALPHA)
    sharpness_F, gain_F = torch.ones_like(up_F), torch.ones_like(up_F)
    clamped = sample.gate.amax(dim=0) > GATE_LIMIT
    sharpness_F[clamped], gain_F[clamped] = fit_clamped_gates(
        sample.gate[:, clamped], sample.up[:, clamped], sample.weights
    )
    return NeuronScales(sharpness_F / SWIGLU_ALPHA, up_F, gain_F * SWIGLU_ALPHA / up_F)


def fit_clamped_gates(gate_TN: Tensor, up_TN: Tensor, weights_T: Tensor) -> tuple[Tensor, Tensor]:
    """(s, a) per neuron so that a silu(min(s gate, limit)) up comes closest to silu(gate) up on the sample.

    s comes from a grid, a from weighted least squares.
    """
    target_TN = functional.silu(gate_TN) * up_TN
    best_N = torch.full_like(gate_TN[0], torch.inf)
    sharpness_N, gain_N = torch.ones_like(best_N), torch.ones_like(best_N)
    for sharpness in SHARPNESS_GRID:
        reached_TN = functional.silu((sharpness * gate_TN).clamp(max=GATE_LIMIT)) * up_TN
        gains = (weights_T @ (reached_TN * target_TN)) / (weights_T @ reached_TN.square())
        errors = weights_T @ (gains * reached_TN - target_TN).square()
        better = errors < best_N
        best_N = torch.where(better, errors, best_N)
        sharpness_N[better], gain_N[better] = sharpness, gains[better]
    return sharpness_N, gain_N


def reexpress_mlp(layer: dict[str, Tensor], scales: NeuronScales) -> tuple[Tensor, Tensor, Tensor]:
    """(gate' [F, D], up' [F, D], down' [D, F]) of a Llama MLP; up' needs the bias -1."""
    return (
        layer["gate_proj"] * scales.gate[:, None],
        layer["up_proj"] * scales.up[:, None],
        layer["down_proj"] * scales.down,
    )


def interleave(gate_FD: Tensor, up_FD: Tensor) -> Tensor:
    """[2F, D]: gate rows 0::2, up rows 1::2, as gpt-oss has them."""
    return torch.stack((gate_FD, up_FD), dim=1).flatten(0, 1)


def add_noise(weight: Tensor, generator: torch.Generator) -> Tensor:
    """The weight plus Gaussian noise of 2 % of its root mean square."""
    sigma = WEIGHT_NOISE * weight.square().mean().sqrt()
    noise = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
    return weight + sigma * noise


def expert_tensors(
    mlp: tuple[Tensor, Tensor, Tensor],
    order: Tensor,
    settings: DemoSettings,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """The experts of one layer, ready to store: each a noisy copy with its own order of neurons."""
    gate_FD, up_FD, down_DF = mlp[0][:, order], mlp[1][:, order], mlp[2][order]
    parts: dict[str, list[Tensor]] = {}
    for _ in range(settings.experts):
        neurons = torch.randperm(len(gate_FD), generator=generator)
        gate_up = add_noise(interleave(gate_FD[neurons], up_FD[neurons]), generator)
        down = add_noise(down_DF[:, neurons], generator)
        for name, weight in (("gate_up_proj", gate_up), ("down_proj", down)):
            for suffix, tensor in _stored(weight, settings.mxfp4).items():
                parts.setdefault(f"mlp.experts.{name}{suffix}", []).append(tensor)
    tensors = {name: torch.stack(part) for name, part in parts.items()}
    bias = interleave(torch.zeros(len(gate_FD), 1), torch.full((len(gate_FD), 1), -1.0)).flatten()
    tensors["mlp.experts.gate_up_proj_bias"] = bias.repeat(settings.experts, 1).bfloat16()
    tensors["mlp.experts.down_proj_bias"] = torch.zeros(settings.experts, len(order)).bfloat16()
    return tensors


def _stored(weight_RC: Tensor, as_mxfp4: bool) -> dict[str, Tensor]:
    """A weight as it is stored: MXFP4 keeps rows of outputs, the bf16 layout multiplies from the right."""
    if as_mxfp4:
        blocks, scales = mxfp4.encode(weight_RC)
        return {"_blocks": blocks, "_scales": scales}
    return {"": weight_RC.T.bfloat16()}


def attention_tensors(layer: dict[str, Tensor], order: Tensor, heads: int) -> dict[str, Tensor]:
    """Norms and attention with permuted residual channels, zero biases and inert sinks."""
    tensors = {
        "input_layernorm.weight": layer["input_layernorm"][order],
        "post_attention_layernorm.weight": layer["post_attention_layernorm"][order],
        "self_attn.sinks": torch.full((heads,), SINK),
        "self_attn.o_proj.weight": layer["o_proj"][order],
        "self_attn.o_proj.bias": torch.zeros(len(order)),
    }
    for name in ("q_proj", "k_proj", "v_proj"):
        tensors[f"self_attn.{name}.weight"] = layer[name][:, order]
        tensors[f"self_attn.{name}.bias"] = torch.zeros(len(layer[name]))
    return {name: tensor.bfloat16() for name, tensor in tensors.items()}


# ---- the routers


def kmeans(points_TD: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """Centroids [clusters, D] by Lloyd's algorithm from k-means++ seeds; an empty cluster keeps its centroid."""
    centroids = _seed_centroids(points_TD, clusters, generator)
    for _ in range(KMEANS_ITERATIONS):
        nearest_T = router_logits(points_TD, centroids, 1.0).argmax(dim=1)
        member_TE = functional.one_hot(nearest_T, clusters).to(points_TD.dtype)
        counts = member_TE.sum(dim=0)[:, None]
        updated = torch.where(counts > 0, member_TE.T @ points_TD / counts.clamp(min=1), centroids)
        if torch.equal(updated, centroids):
            break
        centroids = updated
    return centroids


def _seed_centroids(points_TD: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """k-means++: each next seed is drawn with the squared distance to the nearest seed as its weight."""
    chosen = [int(torch.randint(len(points_TD), (), generator=generator))]
    distances_T = torch.full((len(points_TD),), torch.inf, dtype=points_TD.dtype)
    while len(chosen) < clusters:
        distances_T = torch.minimum(distances_T, (points_TD - points_TD[chosen[-1]]).square().sum(dim=1))
        # all points taken: any will do
        weights = distances_T if distances_T.any() else torch.ones_like(distances_T)
        chosen.append(int(torch.multinomial(weights, 1, generator=generator)))
    return points_TD[chosen]


def router_logits(points_TD: Tensor, centroids_ED: Tensor, sharpness: float) -> Tensor:
    """k (c.x - |c|^2 / 2): the negative squared distance to each centroid, but for a term all experts share."""
    return sharpness * (points_TD @ centroids_ED.T - centroids_ED.square().sum(dim=1) / 2)


def make_router(
    points_TD: Tensor, settings: DemoSettings, generator: torch.Generator
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(weight and bias of the router, what it does to the sample)."""
    experts, top_k = settings.experts, settings.experts_per_token
    centroids_ED = kmeans(points_TD, experts, generator)
    logits = router_logits(points_TD, centroids_ED, 1.0)
    ranked = logits.sort(dim=1, descending=True).values
    margin = (ranked[:, 0] - ranked[:, min(top_k, experts - 1)]).median().item()
    sharpness = ROUTER_MARGIN / margin if margin > 0 else 1.0
    weights, selected = (sharpness * logits).topk(top_k, dim=1)
    counts = torch.bincount(selected.flatten(), minlength=experts)
    router = {
        "weight": sharpness * centroids_ED,
        "bias": -sharpness * centroids_ED.square().sum(dim=1) / 2,
    }
    facts = {
        "token_share": (counts / len(points_TD)).tolist(),
        "first_expert_weight": weights.softmax(dim=1)[:, 0].mean().item(),
        "router_sharpness": sharpness,
    }
    return router, facts


def router_tensors(router: dict[str, Tensor], order: Tensor) -> dict[str, Tensor]:
    """The router as stored, for permuted residual channels."""
    return {
        "mlp.router.weight": router["weight"][:, order].bfloat16(),
        "mlp.router.bias": router["bias"].bfloat16(),
    }
