"""The many spellings of a gpt-oss config.json, brought into the one that transformers reads; ambiguity is refused.

Where a key has another name (`experts_per_token`), the value is taken and the usual key is written. Two names with
two values are refused with both, since runtimes differ in which they take. What transformers fills in by itself is
written out where its default is not ours. A key of another architecture that would change the model's function is
refused: neither transformers nor this project would compute it.
"""

from typing import Any

from gptoss_quantize.errors import InputError

# transformers' name -> other names in use
ALIASES = {
    "num_experts_per_tok": ("experts_per_token", "num_experts_per_token", "moe_topk", "moe_top_k"),
    "num_local_experts": ("num_experts", "n_routed_experts"),
    "rms_norm_eps": ("layer_norm_epsilon", "layer_norm_eps", "norm_eps", "norm_epsilon"),
    "sliding_window": ("sliding_window_size", "window_size"),
    "intermediate_size": ("moe_intermediate_size",),
}
# transformers takes 64, whatever hidden_size is
HEAD_DIM = 64
_WINDOW = 128
# keys of other architectures, with the values that change nothing
_FOREIGN: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swiglu", "swigluoai"),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "attention_multiplier": (),
    "query_pre_attn_scalar": (),
    "scale_emb": (1,),
    "scale_depth": (),
    "qk_norm": (False,),
    "use_qk_norm": (False,),
    "qk_layernorm": (False,),
    "n_shared_experts": (0,),
    "num_shared_experts": (0,),
    "shared_expert_intermediate_size": (0,),
    "first_k_dense_replace": (0,),
    "moe_layer_freq": (1,),
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([],),
    "routed_scaling_factor": (1,),
    "norm_topk_prob": (True,),
    "scoring_func": ("softmax",),
    "n_group": (0, 1),
    "topk_group": (0, 1),
    "no_rope_layers": ([],),
    "attention_chunk_size": (),
    "attn_temperature_tuning": (False,),
    "rope_interleave": (False,),
    "rope_interleaved": (False,),
    "partial_rotary_factor": (1,),
    "use_sliding_window": (True,),
    "attention_sinks": (True,),
    "add_swiglu_bias": (True,),
    "is_causal": (True,),
    "num_nextn_predict_layers": (0,),
}
_NOT_NULL = (
    "attention_bias",
    "tie_word_embeddings",
    "num_experts_per_tok",
    "max_position_embeddings",
    "rms_norm_eps",
    "swiglu_alpha",
    "hidden_act",
    "use_cache",
    "initializer_range",
    "attention_dropout",
    "router_aux_loss_coef",
    "output_router_logits",
)
_ORIGINAL_KEYS = {"num_experts", "experts_per_token", "initial_context_length"}


def normalized(raw: dict[str, Any], where: str) -> tuple[dict[str, Any], list[str]]:
    """Return (config.json as transformers and we read it alike, notes on what was changed); `raw` stays as it is."""
    raw, notes = dict(raw), []
    inner = raw.get("text_config")
    if raw.get("model_type") != "gpt_oss" and isinstance(inner, dict) and inner.get("model_type") == "gpt_oss":
        raw = dict(inner)
        notes.append(f"{where}: text_config is read, the rest of a larger model's config is not")
    if "model_type" not in raw and raw.keys() >= _ORIGINAL_KEYS:
        raw = _from_original(raw)
        notes.append(f"{where}: read as OpenAI's own config.json, put into the keys of transformers")
    if raw.get("model_type") != "gpt_oss":
        return raw, notes
    for name, others in ALIASES.items():
        _one_of(raw, name, others, where, notes)
    if isinstance(raw.get("num_local_experts"), list):
        raise InputError(
            f"{where}: num_local_experts is a list, a number for each layer; gpt-oss has one number of experts in "
            "all layers, and no runtime of it reads others: prune every layer to the same number"
        )
    _one_rope(raw, where)
    _window(raw, where)
    _head_dim(raw)
    for name in _NOT_NULL:
        if name in raw and raw[name] is None:
            # not given: transformers would stop at null
            del raw[name]
    _refuse_unclear(raw, where)
    return raw, notes


def _head_dim(raw: dict[str, Any]) -> None:
    """Write out the width of a head as transformers fills it in: 64 without the key, the usual ratio for null."""
    hidden, heads = raw.get("hidden_size"), raw.get("num_attention_heads")
    if "head_dim" not in raw:
        raw["head_dim"] = HEAD_DIM
    elif raw["head_dim"] is None and type(hidden) is int and type(heads) is int and heads > 0:
        raw["head_dim"] = hidden // heads


def _refuse_unclear(raw: dict[str, Any], where: str) -> None:
    """Refuse values that readers take in two ways, and settings of other architectures."""
    if "swiglu_limit" in raw and raw["swiglu_limit"] is None:
        raise InputError(
            f"{where}: swiglu_limit is null, which is no limit to some readers and 7.0 to others; write the number "
            "that the model was trained with (the release: 7.0)"
        )
    for name, neutral in _FOREIGN.items():
        if name in raw and raw[name] is not None and not any(_same(raw[name], value) for value in neutral):
            raise InputError(
                f"{where}: {name} is {raw[name]!r}; gpt-oss has no such setting, transformers ignores it and so "
                "would we, but a model that was trained with it would compute something else: take it out if it "
                "means nothing"
            )


def _same(value: Any, other: Any) -> bool:
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _one_of(raw: dict[str, Any], name: str, others: tuple[str, ...], where: str, notes: list[str]) -> None:
    """Leave one key of several that mean the same."""
    for other in others:
        value = raw.get(other)
        if value is None:
            continue
        if raw.get(name) is None:
            raw[name] = value
            notes.append(f"{where}: {other} {value!r} is read as {name}, which transformers would fill in itself")
        elif raw[name] != value:
            raise InputError(
                f"{where}: {name} is {raw[name]!r} and {other} is {value!r}; both mean the same, and readers differ "
                f"in which they take: keep the right one as {name}, and take {other} out"
            )


def _one_rope(raw: dict[str, Any], where: str) -> None:
    """Refuse rotary settings that say two things; they are read by `config.parse_config`."""
    scaling, parameters = raw.get("rope_scaling"), raw.get("rope_parameters")
    both = [_named(value) for value in (scaling, parameters) if isinstance(value, dict) and value]
    if len(both) == 2:
        for key in sorted(both[0].keys() & both[1].keys()):
            if both[0][key] != both[1][key]:
                raise InputError(
                    f"{where}: rope_scaling has {key} {both[0][key]!r}, rope_parameters has {both[1][key]!r}; "
                    "readers differ in which they take: keep the right one"
                )
    theta = raw.get("rope_theta")
    for name, value in (("rope_parameters", parameters), ("rope_scaling", scaling)):
        own = value.get("rope_theta") if isinstance(value, dict) else None
        if theta is not None and own is not None and own != theta:
            raise InputError(
                f"{where}: rope_theta is {theta!r}, and {own!r} in {name}; readers differ in which they take: keep "
                "the right one"
            )


def _named(rope: dict[str, Any]) -> dict[str, Any]:
    """Return rotary settings with `type` called rope_type."""
    rope = dict(rope)
    kind = rope.pop("type", None)
    return {"rope_type": kind, **rope} if kind is not None else rope


def _window(raw: dict[str, Any], where: str) -> None:
    """Refuse a window that is null while layers slide; fill in what nothing reads."""
    if "sliding_window" not in raw or raw["sliding_window"] is not None:
        return
    types = raw.get("layer_types")
    if isinstance(types, list) and types and set(types) == {"full_attention"}:
        # no layer uses it, but transformers cannot build its mask without a number
        raw["sliding_window"] = _WINDOW
        return
    raise InputError(
        f"{where}: sliding_window is null, but layer_types has sliding_attention layers (every second one by "
        f"default); write the window that the model was trained with (the release: {_WINDOW}), or layer_types with "
        "full_attention only"
    )


def _from_original(raw: dict[str, Any]) -> dict[str, Any]:
    """Return OpenAI's own config (original/config.json of the release) in the keys of transformers."""
    context, factor = raw["initial_context_length"], raw.get("rope_scaling_factor", 32.0)
    taken = ("num_experts", "experts_per_token", "initial_context_length", "rope_theta", "rope_scaling_factor")
    rest = {key: value for key, value in raw.items() if key not in (*taken, "rope_ntk_alpha", "rope_ntk_beta")}
    return {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        **rest,
        "num_local_experts": raw["num_experts"],
        "num_experts_per_tok": raw["experts_per_token"],
        "max_position_embeddings": int(context * factor),
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": float(raw.get("rope_theta", 150000.0)),
            "factor": float(factor),
            "beta_fast": float(raw.get("rope_ntk_beta", 32.0)),
            "beta_slow": float(raw.get("rope_ntk_alpha", 1.0)),
            "truncate": False,
            "original_max_position_embeddings": context,
        },
    }
