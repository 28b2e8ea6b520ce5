"""What can be written: our packed int4 checkpoint, or MXFP4 in OpenAI's own layout, as data.

int4     one tensor set per expert, compressed-tensors "pack-quantized" (formats.md A2), under shard names of our own.
mxfp4    fused `*_blocks` and `*_scales` for all experts of a layer, under the usual shard names: the file that OpenAI
         releases, so that whatever runs gpt-oss runs it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from gptoss_quantize.errors import InputError
from gptoss_quantize.kernels import grids, int4, mxfp4
from gptoss_quantize.quantize.scales import RULES

STEM = "gptoss-int4"
# names of an expert's projections: in the solve -> in int4 files, in fused files
PROJECTIONS = {"gate_up": ("w13", "gate_up_proj"), "down": ("w2", "down_proj")}
# what OpenAI's config.json names
MXFP4_UNTOUCHED = ("model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head")


@dataclass(frozen=True, slots=True)
class Format:
    """One kind of output checkpoint."""

    name: str
    grid: grids.Grid
    stem: str  # shards are STEM-0000i-of-0000N.safetensors, their index STEM.safetensors.index.json
    # (tensors of the layer so far, experts, expert, projection, codes [N, K], scale [N, G], bias [N])
    store: Callable[..., None]
    config: Callable[[int], dict[str, Any]]  # group size -> quantization_config
    group_size: int  # the default, until `pick_format`

    @property
    def index(self) -> str:
        """Return the file name of the index."""
        return f"{self.stem}.safetensors.index.json"

    def bits_per_weight(self, columns: int) -> float:
        """Return the exact stored bits per expert weight."""
        return 4 + 8 / mxfp4.GROUP_SIZE if self.name == "mxfp4" else int4.bits_per_weight(columns, self.group_size)


def _store_int4(
    tensors: dict[str, torch.Tensor],
    experts: int,
    expert: int,
    projection: str,
    codes_NK: torch.Tensor,
    scale_NG: torch.Tensor,
    bias_N: torch.Tensor,
) -> None:
    """Add the three tensors of one expert's projection."""
    base = f"mlp.experts.{expert}.{PROJECTIONS[projection][0]}_"
    tensors[base + "weight_packed"] = int4.pack(codes_NK).cpu()
    tensors[base + "weight_scale"] = scale_NG.to(torch.bfloat16).cpu()
    tensors[base + "bias"] = bias_N.to(torch.bfloat16).cpu()


def _store_mxfp4(
    tensors: dict[str, torch.Tensor],
    experts: int,
    expert: int,
    projection: str,
    codes_NK: torch.Tensor,
    scale_NG: torch.Tensor,
    bias_N: torch.Tensor,
) -> None:
    """Put one expert's projection at its place in the fused tensors, which the first one makes."""
    base = f"mlp.experts.{PROJECTIONS[projection][1]}"
    parts = {
        "_blocks": mxfp4.pack_codes(grids.halves_to_codes(codes_NK)),
        "_scales": grids.scale_bytes(scale_NG),
        "_bias": bias_N.to(torch.bfloat16),
    }
    for end, part in parts.items():
        if base + end not in tensors:
            tensors[base + end] = torch.empty(experts, *part.shape, dtype=part.dtype)
        tensors[base + end][expert] = part.cpu()


def _int4_config(group_size: int) -> dict[str, Any]:
    """Return the compressed-tensors description that vLLM reads (formats.md A2)."""
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


def _mxfp4_config(_group_size: int) -> dict[str, Any]:
    """Return the description in OpenAI's release."""
    return {"quant_method": "mxfp4", "modules_to_not_convert": list(MXFP4_UNTOUCHED)}


FORMATS: dict[str, Format] = {
    # not model-*.safetensors: stock transformers would load that with random experts and only warn
    "int4": Format("int4", grids.INT4, STEM, _store_int4, _int4_config, 64),
    "mxfp4": Format("mxfp4", grids.MXFP4, "model", _store_mxfp4, _mxfp4_config, 32),
}


def pick_format(name: str, group_size: int, scale: str, awq: bool) -> Format:
    """Return the format with its group size; InputError for a group size, rule or method that it does not have."""
    if name not in FORMATS:
        raise InputError(f"unknown format {name!r}; known: {', '.join(FORMATS)} (--format)")
    found = FORMATS[name]
    if name == "mxfp4" and group_size != mxfp4.GROUP_SIZE:
        raise InputError(f"format {name} has groups of 32, not {group_size}; leave --group-size away")
    if scale not in RULES[name]:
        raise InputError(
            f"format {name} has no scale rule {scale!r}; use --set scale={' or scale='.join(RULES[name])}, "
            "or another --method"
        )
    if awq and name != "int4":
        raise InputError(f"AWQ searches its folds for int4 codes; for --format {name} use --method gptq or rtn")
    return replace(found, group_size=group_size)
