"""A checkpoint as a whole transformers model, made of what our own reader says: adapter, config and experts included.

Generation needs a loaded model; everything else here is streamed from `Checkpoint`. transformers' own loading would
leave out the adapter, and may read a config or a set of files differently; so the model is built without weights and
every tensor placed from the reader that the streamed numbers come from.
"""

from copy import deepcopy
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import GenerationConfig, GptOssConfig, GptOssForCausalLM

from gptoss_quantize.checkpoint import Checkpoint, dense_shapes
from gptoss_quantize.errors import InputError
from gptoss_quantize.loading import load

_LEFT_OUT = ("quantization_config", "gptoss_quantize", "experts_per_token", "rope_scaling", "rope_theta")


def transformers_config(checkpoint: Checkpoint) -> GptOssConfig:
    """Return the config of a checkpoint with every field that we read under its other names as we read it."""
    config = checkpoint.config
    raw = {name: value for name, value in deepcopy(config.raw).items() if name not in _LEFT_OUT}
    raw |= {
        "num_experts_per_tok": config.top_k,
        "sliding_window": config.sliding_window,
        "layer_types": list(config.layer_types),
        "rope_parameters": dict(config.rope),
        "rms_norm_eps": config.rms_eps,
        "head_dim": config.head_dim,
        "attention_bias": config.attention_bias,
        "tie_word_embeddings": config.tied,
        "max_position_embeddings": config.max_positions,
    }
    return GptOssConfig.from_dict(raw)


def whole_model(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """Return the model of a checkpoint, weights in `dtype` (norms in float32, our int4 experts packed)."""
    if checkpoint.layout.packed:
        return load(checkpoint.path, dtype=dtype)
    config = checkpoint.config
    with init_empty_weights(include_buffers=False):
        model = GptOssForCausalLM(transformers_config(checkpoint))
    state = {
        name: checkpoint.dense(name).to(torch.float32 if "norm" in name else dtype) for name in dense_shapes(config)
    }
    E, D, F = config.experts, config.hidden, config.intermediate
    for i in range(config.layers):
        base = f"model.layers.{i}.mlp.experts."
        parts = {
            "gate_up_proj": torch.empty(E, D, 2 * F, dtype=dtype),
            "gate_up_proj_bias": torch.empty(E, 2 * F, dtype=dtype),
            "down_proj": torch.empty(E, F, D, dtype=dtype),
            "down_proj_bias": torch.empty(E, D, dtype=dtype),
        }
        for e, expert in enumerate(checkpoint.experts(i, dtype)):
            parts["gate_up_proj"][e] = expert.gate_up.T
            parts["gate_up_proj_bias"][e] = expert.gate_up_bias
            parts["down_proj"][e] = expert.down.T
            parts["down_proj_bias"][e] = expert.down_bias
        state |= {base + name: tensor for name, tensor in parts.items()}
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    if unexpected or set(missing) - ({"lm_head.weight"} if config.tied else set()):
        raise InputError(
            f"{checkpoint.path}: this transformers has other tensors for gpt-oss (missing {missing[:3]}, unknown "
            f"{unexpected[:3]}); take a version that gptoss-quantize was tested with, or leave generation tasks and "
            "examples out"
        )
    model.tie_weights()
    if (checkpoint.path / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.path)
    return model.eval()
