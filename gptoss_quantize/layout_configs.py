"""What config.json says of quantized experts, as `quantization_config`, per layout; `layouts` says which is whose."""

from typing import Any

# what OpenAI's config.json names
MXFP4_UNTOUCHED = ("model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head")


def planes_config(bits: Any, group_size: int) -> dict[str, Any]:
    """Return a description that other tools refuse: none of them knows planes.

    `bits` are those of all codes, or per layer those of gate_up and of down.
    """
    return {"quant_method": "gptoss-quantize", "format": "planes", "num_bits": bits, "group_size": group_size}


def int4_config(group_size: int) -> dict[str, Any]:
    """Return the compressed-tensors description that vLLM reads."""
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": group_size,
        "dynamic": False,
    }
    group = {
        "targets": ["re:.*mlp\\.experts\\..*"],
        "format": "pack-quantized",
        "input_activations": None,
        "output_activations": None,
        "weights": weights,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def mxfp4_config(_group_size: int) -> dict[str, Any]:
    """Return the description in OpenAI's release."""
    return {"quant_method": "mxfp4", "modules_to_not_convert": list(MXFP4_UNTOUCHED)}
