"""Published shapes: the two gpt-oss models as config.json, and the mixture-of-experts models they are compared with.

`COMPARED` holds what each model's config.json says and nothing else; `parameter_counts` does the sums. Counts follow
OpenAI's model card: of the two vocabulary matrices the output head is active for every token, the embedding is not.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptoss_quantize.config import ModelConfig, parse_config, read_json
from gptoss_quantize.errors import InputError
from gptoss_quantize.published import POSITIONS, SIZES, published

MXFP4_NOT_CONVERTED = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]


def gptoss_config(name: str) -> dict[str, Any]:
    """Return config.json of openai/gpt-oss-20b or -120b (MXFP4 experts)."""
    layers, experts = SIZES[name]
    return {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": 200002,
        "experts_per_token": 4,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2880,
        "initial_context_length": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 2880,
        "layer_types": ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)],
        "max_position_embeddings": POSITIONS,
        "model_type": "gpt_oss",
        "num_attention_heads": 64,
        "num_experts_per_tok": 4,
        "num_hidden_layers": layers,
        "num_key_value_heads": 8,
        "num_local_experts": experts,
        "output_router_logits": False,
        "pad_token_id": 199999,
        "quantization_config": {"modules_to_not_convert": MXFP4_NOT_CONVERTED, "quant_method": "mxfp4"},
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": 150000,
        "router_aux_loss_coef": 0.9,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 201088,
    }


def shape_of(like: str) -> dict[str, Any]:
    """Return the config.json that a name or a path to such a file stands for; InputError for anything else."""
    if name := published(like):
        return gptoss_config(name)
    path = Path(like)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        raise InputError(f"{like}: expected {', '.join(SIZES)}, or a config.json of the gpt-oss architecture")
    raw = read_json(path)
    parse_config(raw, str(path))
    return json.loads(json.dumps(raw))


# ---- how many parameters, and how many of them work on a token


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Parameters of a model: all, and those that take part in the computation of one token."""

    total: int
    active: int

    @property
    def share(self) -> float:
        return self.active / self.total


def gptoss_counts(config: ModelConfig) -> Counts:
    """Return total and active parameters of a gpt-oss model, as OpenAI's model card counts them."""
    D, F, q, kv = (
        config.hidden,
        config.intermediate,
        config.heads * config.head_dim,
        config.kv_heads * config.head_dim,
    )
    attention = D * (q + 2 * kv) + q * D + config.heads
    attention += (q + 2 * kv + D) if config.attention_bias else 0
    expert = 3 * D * F + 2 * F + D
    router, norms, vocabulary = config.experts * (D + 1), 2 * D, config.vocab * D
    shared = config.layers * (attention + router + norms) + D
    embedding = 0 if config.tied else vocabulary
    return Counts(
        total=shared + vocabulary + embedding + config.layers * config.experts * expert,
        active=shared + vocabulary + config.layers * config.top_k * expert,
    )


# config.json of each, in its own words where they say the same thing: huggingface.co, main branch, 2025
COMPARED: dict[str, dict[str, Any]] = {
    "Mixtral 8x7B": {
        "hidden": 4096, "layers": 32, "vocab": 32000, "heads": 32, "kv_heads": 8, "head_dim": 128,
        "expert": 14336, "experts": 8, "top_k": 2, "shared": 0, "moe_layers": 32, "dense": 0,
    },
    "Mixtral 8x22B": {
        "hidden": 6144, "layers": 56, "vocab": 32768, "heads": 48, "kv_heads": 8, "head_dim": 128,
        "expert": 16384, "experts": 8, "top_k": 2, "shared": 0, "moe_layers": 56, "dense": 0,
    },
    "Llama 4 Scout": {
        "hidden": 5120, "layers": 48, "vocab": 202048, "heads": 40, "kv_heads": 8, "head_dim": 128,
        "expert": 8192, "experts": 16, "top_k": 1, "shared": 1, "moe_layers": 48, "dense": 16384,
    },
    "Llama 4 Maverick": {
        "hidden": 5120, "layers": 48, "vocab": 202048, "heads": 40, "kv_heads": 8, "head_dim": 128,
        "expert": 8192, "experts": 128, "top_k": 1, "shared": 1, "moe_layers": 24, "dense": 16384,
    },
    "DeepSeek-V3": {
        "hidden": 7168, "layers": 61, "vocab": 129280, "heads": 128, "q_lora": 1536, "kv_lora": 512,
        "nope": 128, "rope": 64, "value": 128,
        "expert": 2048, "experts": 256, "top_k": 8, "shared": 1, "moe_layers": 58, "dense": 18432,
    },
    "Kimi K2": {
        "hidden": 7168, "layers": 61, "vocab": 163840, "heads": 64, "q_lora": 1536, "kv_lora": 512,
        "nope": 128, "rope": 64, "value": 128,
        "expert": 2048, "experts": 384, "top_k": 8, "shared": 1, "moe_layers": 60, "dense": 18432,
    },
}  # fmt: skip


def _attention(c: dict[str, Any]) -> int:
    """Return the parameters of one attention block: grouped-query, or multi-head latent where `kv_lora` is given."""
    D, H = c["hidden"], c["heads"]
    if "kv_lora" not in c:
        return D * c["head_dim"] * (2 * H + 2 * c["kv_heads"])
    query = D * c["q_lora"] + c["q_lora"] * H * (c["nope"] + c["rope"])
    key_value = D * (c["kv_lora"] + c["rope"]) + c["kv_lora"] * H * (c["nope"] + c["value"])
    return query + key_value + H * c["value"] * D


def parameter_counts(c: dict[str, Any]) -> Counts:
    """Return total and active parameters of an entry of COMPARED: matrices only, language model only, untied head."""
    D = c["hidden"]
    expert, dense = 3 * D * c["expert"], 3 * D * c["dense"] * (c["layers"] - c["moe_layers"])
    fixed = c["layers"] * _attention(c) + dense + D * c["vocab"]
    fixed += c["moe_layers"] * (D * c["experts"] + c["shared"] * expert)
    return Counts(
        total=fixed + D * c["vocab"] + c["moe_layers"] * c["experts"] * expert,
        active=fixed + c["moe_layers"] * c["top_k"] * expert,
    )


def sparsity(name: str, config: ModelConfig) -> list[dict[str, Any]]:
    """Return total and active parameters of the model and of the ones it is compared with, densest first."""
    rows = [(other, parameter_counts(fields)) for other, fields in COMPARED.items()]
    rows.append((name, gptoss_counts(config)))
    return [
        {"model": model, "total": c.total, "active": c.active, "share": c.share, "this": model == name}
        for model, c in sorted(rows, key=lambda row: -row[1].share)
    ]
