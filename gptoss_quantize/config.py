"""The gpt-oss architecture as data: what config.json says, checked once, frozen afterwards."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gptoss_quantize.errors import InputError

_REQUIRED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_local_experts",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Sizes and constants of one gpt-oss model; `raw` is config.json as read."""

    hidden: int
    intermediate: int
    layers: int
    experts: int
    top_k: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int
    rms_eps: float
    sliding_window: int
    layer_types: tuple[str, ...]
    rope: dict[str, Any]
    swiglu_limit: float
    swiglu_alpha: float
    attention_bias: bool
    tied: bool
    raw: dict[str, Any]

    def window(self, layer: int) -> int | None:
        """Return the sliding window of a layer in tokens, or None for full attention."""
        return self.sliding_window if self.layer_types[layer] == "sliding_attention" else None


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object from a file; InputError names the file when it is missing or is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; expected a Hugging Face gpt-oss directory") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); copy the file again from its source") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def parse_config(raw: dict[str, Any], where: str) -> ModelConfig:
    """Return the checked architecture; InputError says which field of `where` is wrong and what was expected."""
    if raw.get("model_type") != "gpt_oss":
        raise InputError(
            f"{where}: model_type is {raw.get('model_type')!r}, expected 'gpt_oss'; "
            "gptoss-quantize knows the gpt-oss architecture only"
        )
    if missing := [name for name in _REQUIRED if not isinstance(raw.get(name), int)]:
        raise InputError(f"{where}: {', '.join(missing)} missing or not an integer; expected gpt-oss sizes")
    layers, heads = raw["num_hidden_layers"], raw["num_attention_heads"]
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    rope.setdefault("rope_theta", raw.get("rope_theta", 150000.0))
    rope.setdefault("rope_type", "default")
    if rope["rope_type"] not in ("default", "yarn"):
        raise InputError(f"{where}: rope_type {rope['rope_type']!r} is unknown; expected 'default' or 'yarn'")
    if unknown := {"mscale", "mscale_all_dim", "partial_rotary_factor"} & rope.keys():
        raise InputError(f"{where}: rope option(s) {sorted(unknown)} are not used by gpt-oss and not implemented")
    default_types = ["sliding_attention" if i % 2 == 0 else "full_attention" for i in range(layers)]
    layer_types = tuple(raw.get("layer_types") or default_types)
    if len(layer_types) != layers or set(layer_types) - {"sliding_attention", "full_attention"}:
        raise InputError(f"{where}: layer_types must name sliding_attention or full_attention for {layers} layers")
    top_k = raw.get("num_experts_per_tok", raw.get("experts_per_token", 4))
    if not 1 <= top_k <= raw["num_local_experts"]:
        raise InputError(f"{where}: num_experts_per_tok {top_k} is outside 1..{raw['num_local_experts']}")
    if heads % raw["num_key_value_heads"]:
        raise InputError(f"{where}: {heads} heads are not a multiple of {raw['num_key_value_heads']} kv heads")
    return ModelConfig(
        hidden=raw["hidden_size"],
        intermediate=raw["intermediate_size"],
        layers=layers,
        experts=raw["num_local_experts"],
        top_k=top_k,
        heads=heads,
        kv_heads=raw["num_key_value_heads"],
        head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
        vocab=raw["vocab_size"],
        max_positions=raw.get("max_position_embeddings", 131072),
        rms_eps=raw.get("rms_norm_eps", 1e-5),
        sliding_window=raw.get("sliding_window") or 128,
        layer_types=layer_types,
        rope=rope,
        swiglu_limit=float(raw.get("swiglu_limit", 7.0)),
        swiglu_alpha=float(raw.get("swiglu_alpha", 1.702)),
        attention_bias=bool(raw.get("attention_bias", True)),
        tied=bool(raw.get("tie_word_embeddings", False)),
        raw=raw,
    )


def rope_frequencies(config: ModelConfig) -> tuple[torch.Tensor, float]:
    """Return (inverse frequencies [head_dim/2] in float32, factor on cos and sin), default or YaRN.

    YaRN (arXiv 2309.00071): wavelengths that turn more than beta_fast times in the original context are kept,
    those below beta_slow are divided by `factor`, with a linear ramp between; attention is scaled by
    0.1 ln(factor) + 1.
    """
    dim, base = config.head_dim, float(config.rope["rope_theta"])
    inverse = 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if config.rope["rope_type"] == "default":
        return inverse, 1.0
    factor = float(config.rope["factor"])
    original = config.rope.get("original_max_position_embeddings") or config.max_positions

    def ramp_edge(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = ramp_edge(config.rope.get("beta_fast") or 32), ramp_edge(config.rope.get("beta_slow") or 1)
    if config.rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    attention_factor = config.rope.get("attention_factor") or (0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0)
    return inverse / factor * ramp + inverse * (1 - ramp), float(attention_factor)
