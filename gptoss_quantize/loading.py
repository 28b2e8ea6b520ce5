"""Load a quantized checkpoint as a transformers model whose experts stay packed in memory.

`load(DIR)` builds GptOssForCausalLM without weights, puts `PackedExpertsModule` where the float experts were, and
places every tensor itself: a missing, unknown or misshapen tensor raises. Stock transformers cannot do this. It
has no int4 experts for gpt-oss, and would fill them with random numbers and a warning; the shard names of our
checkpoints make it stop instead.
"""

import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, GptOssConfig, GptOssForCausalLM

from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.dense_int8 import put_int8_modules
from gptoss_quantize.errors import InputError
from gptoss_quantize.kernels.experts import EXPERT_KERNELS, PackedExperts
from gptoss_quantize.layouts import dense_shapes


class PackedExpertsModule(nn.Module):
    """The experts of one layer in packed int4; the same call as transformers' GptOssExperts."""

    def __init__(self, packed: PackedExperts, limit: float, alpha: float, kernel: str):
        super().__init__()
        for name in PackedExperts.__slots__:
            self.register_buffer(name, getattr(packed, name))
        self.limit, self.alpha, self.kernel = limit, alpha, kernel

    def forward(
        self, hidden_states: torch.Tensor, router_indices: torch.Tensor, routing_weights: torch.Tensor
    ) -> torch.Tensor:
        """Return the block output in the shape and dtype of `hidden_states`."""
        packed = PackedExperts(*(getattr(self, name) for name in PackedExperts.__slots__))
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        run = EXPERT_KERNELS[self.kernel]
        out = run(flat, router_indices, routing_weights, packed, self.limit, self.alpha)
        return out.view_as(hidden_states)


class PackedGptOssForCausalLM(GptOssForCausalLM):
    """The model that `load` returns: experts packed, everything else as in transformers."""

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: stock transformers would find no experts in what it writes, and fill in random ones."""
        raise InputError(
            "a model with packed experts cannot be saved by transformers; copy the directory that it was loaded from"
        )


def read_packed(checkpoint: Checkpoint, layer: int) -> PackedExperts:
    """Return a layer's experts as stored, stacked over experts."""

    def stack(name: str) -> torch.Tensor:
        base = f"model.layers.{layer}.mlp.experts."
        first = checkpoint.info(f"{base}0.{name}")
        out = torch.empty(checkpoint.config.experts, *first.shape, dtype=first.dtype)
        for e in range(checkpoint.config.experts):
            out[e] = checkpoint.read(f"{base}{e}.{name}")
        return out

    return PackedExperts(
        w13_packed=stack("w13_weight_packed"),
        w13_scale=stack("w13_weight_scale"),
        w13_bias=stack("w13_bias"),
        w2_packed=stack("w2_weight_packed"),
        w2_scale=stack("w2_weight_scale"),
        w2_bias=stack("w2_bias"),
    )


def load(
    path: str | Path, *, dtype: torch.dtype = torch.bfloat16, device: str = "cpu", kernel: str = "torch"
) -> GptOssForCausalLM:
    """Return a model ready for `generate`, its experts packed: about 4.25 bits each, 16 for the rest.

    Attention, embedding and head that are stored in 8 bits stay so as well. `dtype` is that of the activations and of
    everything else. `kernel` is a key of `kernels.experts.EXPERT_KERNELS`. InputError for a directory that is not one
    of ours or not complete.
    """
    checkpoint = Checkpoint(Path(path))
    if checkpoint.expert_format != "int4":
        raise InputError(
            f"{path}: its experts are {checkpoint.expert_format}, not int4; load it with transformers, "
            "or quantize it first (gptoss-quantize quantize)"
        )
    if kernel not in EXPERT_KERNELS:
        raise InputError(f"unknown expert kernel {kernel!r}; known: {', '.join(EXPERT_KERNELS)}")
    config = checkpoint.config
    raw = {k: v for k, v in config.raw.items() if k not in ("quantization_config", "gptoss_quantize")}
    with init_empty_weights(include_buffers=False):
        # a copy, since transformers completes the rope settings in place
        model = PackedGptOssForCausalLM(GptOssConfig.from_dict(deepcopy(raw)))
    for i, block in enumerate(model.model.layers):
        packed = read_packed(checkpoint, i)
        block.mlp.experts = PackedExpertsModule(packed, config.swiglu_limit, config.swiglu_alpha, kernel)
    # transformers keeps the norms in float32 whatever the dtype
    kept = put_int8_modules(model, checkpoint, dtype) if checkpoint.dense_format == "int8" else set()
    state = {
        name: checkpoint.dense(name).to(torch.float32 if "norm" in name else dtype)
        for name in dense_shapes(config)
        if name not in kept
    }
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    buffers = {name for name, _ in model.named_buffers()}
    if unexpected or set(missing) - buffers - ({"lm_head.weight"} if config.tied else set()):
        raise InputError(f"{path}: tensors do not fit the model: missing {missing}, unknown {unexpected}")
    if not kept:
        model.tie_weights()
    if (Path(path) / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model.eval().to(device)


class _Auto(GptOssForCausalLM):
    """What AutoModelForCausalLM gets for gpt-oss after `register`: ours for our checkpoints, else the stock one."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a directory with our marker packed; hand everything else to transformers unchanged."""
        config = kwargs.get("config")
        if (getattr(config, "gptoss_quantize", None) or {}).get("format") != "int4":
            return GptOssForCausalLM.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None)) or torch.bfloat16
        if dtype == "auto":
            dtype = torch.bfloat16
        # AutoModel adds adapter_kwargs and some options without a value by itself
        given = {name for name, value in kwargs.items() if value is not None and value is not False}
        if ignored := sorted(given - {"config", "device_map", "adapter_kwargs"}):
            warnings.warn(
                f"gptoss_quantize ignores {ignored} when loading {pretrained_model_name_or_path}", stacklevel=2
            )
        return load(pretrained_model_name_or_path, dtype=dtype, device=_one_device(kwargs.get("device_map")))


def _one_device(device_map: Any) -> str:
    """Return the device that a `device_map` stands for; a packed model lives on one."""
    if isinstance(device_map, dict) and len(devices := set(device_map.values())) == 1:
        (device_map,) = devices
    if device_map in (None, "auto"):
        return "cuda" if device_map and torch.cuda.is_available() else "cpu"
    if isinstance(device_map, int):
        return f"cuda:{device_map}"
    if isinstance(device_map, str | torch.device):
        return str(device_map)
    raise InputError(f"device_map {device_map!r}: a packed model lives on one device; give its name, or 'auto'")


def register() -> None:
    """Make `AutoModelForCausalLM.from_pretrained(DIR)` load our checkpoints packed, in this process."""
    AutoModelForCausalLM.register(GptOssConfig, _Auto, exist_ok=True)


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters and buffers of a model."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors)
