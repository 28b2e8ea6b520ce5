"""The gpt-oss architecture as data: what config.json says, checked once, frozen afterwards."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gptoss_quantize.errors import InputError

# beyond all that exists; a slip in config.json would keep us busy with names of tensors for hours
MOST_LAYERS = 10_000
_REQUIRED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_local_experts",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
# what transformers takes for a gpt-oss config.json that says nothing about rope
DEFAULT_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


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
        raise InputError(f"{path}: no such file; expected a Hugging Face gpt-oss directory with it") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(
            f"{path}: not valid JSON ({error}); correct it, or copy the file again from where the model comes from"
        ) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error}); check that it is a readable file") from None
    if not isinstance(value, dict):
        what = type(value).__name__
        raise InputError(f"{path}: expected a JSON object, got {what}; copy the file again from where it comes from")
    return value


def _positive(raw: dict[str, Any], name: str, where: str, default: Any = None, *, whole: bool = False) -> Any:
    """Return a field that must be a positive number (an integer with `whole`), or the default where it is null."""
    value = raw.get(name)
    value = default if value is None else value
    right = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not right or not 0 < value < math.inf:
        kind = "integer" if whole else "number"
        raise InputError(
            f"{where}: {name} is {value!r}, expected a positive {kind}; correct it there, to what the model has"
        )
    return value


def _parse_rope(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the rotary settings as transformers resolves them: old and new field names, and its defaults."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters")
    rope = DEFAULT_ROPE if rope is None else rope
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise InputError(f"{where}: rope_parameters is {rope!r}; expected one object with numbers, for all layers")
    rope = dict(rope)
    rope.setdefault("rope_theta", raw.get("rope_theta", 150000.0))
    rope.setdefault("rope_type", rope.get("type", "default"))
    if rope["rope_type"] not in ("default", "yarn"):
        raise InputError(
            f"{where}: rope_type {rope['rope_type']!r} is unknown; expected 'default' or 'yarn', as gpt-oss has"
        )
    if unknown := {"mscale", "mscale_all_dim", "partial_rotary_factor"} & (rope.keys() | raw.keys()):
        raise InputError(
            f"{where}: rope option(s) {sorted(unknown)} are not used by gpt-oss and not implemented; "
            "a model that was trained with them cannot be quantized here"
        )
    _positive(rope, "rope_theta", where)
    if rope["rope_type"] == "yarn":
        for name in ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor"):
            # all but the factor have defaults
            _positive(rope, name, where, None if name == "factor" else 1)
    return rope


def parse_config(raw: dict[str, Any], where: str) -> ModelConfig:
    """Return the checked architecture; InputError says which field of `where` is wrong and what was expected."""
    if raw.get("model_type") != "gpt_oss":
        raise InputError(
            f"{where}: model_type is {raw.get('model_type')!r}, expected 'gpt_oss'; "
            "gptoss-quantize knows the gpt-oss architecture only"
        )
    sizes = {name: _positive(raw, name, where, whole=True) for name in _REQUIRED}
    layers, heads, experts = sizes["num_hidden_layers"], sizes["num_attention_heads"], sizes["num_local_experts"]
    if layers > MOST_LAYERS:
        raise InputError(
            f"{where}: num_hidden_layers is {layers}, expected at most {MOST_LAYERS:,}; correct it there"
        )
    default_types = ["sliding_attention" if i % 2 == 0 else "full_attention" for i in range(layers)]
    layer_types = raw.get("layer_types") or default_types
    known = ("sliding_attention", "full_attention")
    if not isinstance(layer_types, list) or len(layer_types) != layers or any(t not in known for t in layer_types):
        raise InputError(
            f"{where}: layer_types must name sliding_attention or full_attention for {layers} layers; correct that "
            "list or num_hidden_layers, whichever is not the model's"
        )
    # experts_per_token is the name in OpenAI's own config
    top_k = _positive(raw, "num_experts_per_tok", where, raw.get("experts_per_token", 4), whole=True)
    if top_k > experts:
        raise InputError(f"{where}: num_experts_per_tok {top_k} is outside 1..{experts}, the number of experts")
    if heads % sizes["num_key_value_heads"]:
        raise InputError(
            f"{where}: num_attention_heads {heads} is not a multiple of num_key_value_heads "
            f"{sizes['num_key_value_heads']}; the weights and the config are not of one model"
        )
    return ModelConfig(
        hidden=sizes["hidden_size"],
        intermediate=sizes["intermediate_size"],
        layers=layers,
        experts=experts,
        top_k=top_k,
        heads=heads,
        kv_heads=sizes["num_key_value_heads"],
        head_dim=_positive(raw, "head_dim", where, sizes["hidden_size"] // heads, whole=True),
        vocab=sizes["vocab_size"],
        max_positions=_positive(raw, "max_position_embeddings", where, 131072, whole=True),
        rms_eps=_positive(raw, "rms_norm_eps", where, 1e-5),
        sliding_window=_positive(raw, "sliding_window", where, 128, whole=True),
        layer_types=tuple(layer_types),
        rope=_parse_rope(raw, where),
        swiglu_limit=float(_positive(raw, "swiglu_limit", where, 7.0)),
        swiglu_alpha=float(_positive(raw, "swiglu_alpha", where, 1.702)),
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
    default_factor = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    attention_factor = float(config.rope.get("attention_factor") or default_factor)
    return inverse / factor * ramp + inverse * (1 - ramp), attention_factor
