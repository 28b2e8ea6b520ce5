"""Load a quantized checkpoint as a transformers model whose experts stay packed in memory.

`load(DIR)` builds GptOssForCausalLM without weights, puts `PackedExpertsModule` where the float experts were, and
places every tensor itself: a missing, unknown or misshapen tensor raises. Stock transformers cannot do this. It
has no packed experts for gpt-oss, and would fill them with random numbers and a warning; the shard names of our
checkpoints make it stop instead.
"""

import functools
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, GptOssConfig, GptOssForCausalLM
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from gptoss_quantize.attention import use_float32_attention
from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.decoding import is_step, share_projections, step
from gptoss_quantize.dense_int8 import put_int8_modules
from gptoss_quantize.errors import InputError
from gptoss_quantize.hub import resolve
from gptoss_quantize.kernels import native
from gptoss_quantize.kernels.experts_op import KERNELS, kernel_report
from gptoss_quantize.kernels.linear_op import fast_bfloat16, use_bf16_linear
from gptoss_quantize.layouts import AS_SOURCE, LAYOUTS, dense_shapes
from gptoss_quantize.packed_experts import PackedExpertsModule, map_experts
from gptoss_quantize.saving import save_packed


class PackedGptOssForCausalLM(GptOssForCausalLM):
    """The model that `load` returns: experts packed, everything else as in transformers."""

    loaded_from: Checkpoint

    @functools.wraps(GptOssForCausalLM.forward)
    def forward(  # type: ignore[override]
        self, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any
    ) -> Any:
        """Return what transformers returns; one more token of one sequence takes the short way of `decoding`."""
        # transformers 5.24 gave the cache another name
        name = "cache" if "cache" in kwargs else "past_key_values"
        cache = kwargs.get(name)
        rest = {key: value for key, value in kwargs.items() if key != name}
        if cache is not None and is_step(self, input_ids, attention_mask, cache, rest):
            logits = step(self, input_ids, cache, kwargs.get("position_ids"))
            return MoeCausalLMOutputWithPast(**{"logits": logits, name: cache})
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | Path, *args: Any, **kwargs: Any
    ) -> None:
        """Write the model as a directory that `load` reads to the same logits (gptoss_quantize.saving).

        InputError for a directory that is taken, for options that would change what is written, and for a model that
        was changed in ways that the layout has no place for.
        """
        harmless = {"is_main_process": (True, False), "safe_serialization": (True,), "push_to_hub": (False,)}
        given = {name: value for name, value in kwargs.items() if value is not None}
        given = {name: value for name, value in given.items() if value not in harmless.get(name, ())}
        if args or given:
            raise InputError(
                f"save_pretrained of a packed model does not know {sorted(given) or list(args)}: it writes one shard "
                "for a layer; send it to the hub with gptoss_quantize.push"
            )
        if kwargs.get("is_main_process", True):
            save_packed(self, self.loaded_from, Path(save_directory))


def load(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    kernel: str = "auto",
    revision: str | None = None,
) -> GptOssForCausalLM:
    """Return a model ready for `generate`, its experts packed: about 4.25 bits each in int4, 16 for the rest.

    `path` is a directory or a hub name; `revision`: a branch, tag or commit of the latter. Attention, embedding and
    head that are stored in 8 bits stay so as well. `dtype` is that of the activations and of everything else. On a
    CPU the experts stay in the mapped files, which must not change while the model lives; for other devices they are
    copied. `kernel`: "auto" for the fastest (kernels.experts_op), "torch" for the definition.
    InputError for a directory that is not one of ours or not complete.
    """
    path = resolve(str(path), revision)
    checkpoint = Checkpoint(path)
    if not checkpoint.layout.packed:
        raise InputError(
            f"{path}: its experts are {checkpoint.layout.name}, not int4, int3, int2 or a mixture; load it with "
            "transformers, or quantize it first (gptoss-quantize quantize)"
        )
    if kernel not in KERNELS:
        raise InputError(f"unknown expert kernel {kernel!r}; known: {', '.join(KERNELS)}")
    if kernel == "auto" and torch.device(device).type == "cpu" and not native.available():
        warnings.warn(f"{path}: its experts run in {kernel_report(device, dtype)}", stacklevel=2)
    config = checkpoint.config
    raw = {k: v for k, v in config.raw.items() if k not in ("quantization_config", "gptoss_quantize")}
    with init_empty_weights(include_buffers=False):
        # a copy, since transformers completes the rope settings in place
        model = PackedGptOssForCausalLM(GptOssConfig.from_dict(deepcopy(raw)))
    maps: dict[Path, torch.Tensor] = {}
    for i, block in enumerate(model.model.layers):
        experts = map_experts(checkpoint, i, maps)
        block.mlp.experts = PackedExpertsModule(experts, config.swiglu_limit, config.swiglu_alpha, kernel)
    # transformers keeps the norms in float32 whatever the dtype
    kept = put_int8_modules(model, checkpoint, dtype) if checkpoint.dense_layout is not AS_SOURCE else set()
    state = {
        name: checkpoint.dense(name).to(torch.float32 if "norm" in name else dtype)
        for name in dense_shapes(config)
        if name not in kept
    }
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    # a tied head shares its buffers with the embedding, and is to be counted
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    if unexpected or set(missing) - buffers - ({"lm_head.weight"} if config.tied else set()):
        raise InputError(f"{path}: tensors do not fit the model: missing {missing}, unknown {unexpected}")
    if not kept:
        model.tie_weights()
    if torch.device(device).type == "cpu":
        _make_fast(model, dtype)
    model.loaded_from = checkpoint
    if (path / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model.eval().to(device)


def _make_fast(model: PackedGptOssForCausalLM, dtype: torch.dtype) -> None:
    """Let a model use what is faster than torch's own on this processor."""
    if dtype == torch.bfloat16 and native.available():
        use_bf16_linear(model)
        share_projections(model)
    if dtype in (torch.bfloat16, torch.float16) and not fast_bfloat16():
        use_float32_attention(model)


class _Auto(GptOssForCausalLM):
    """What AutoModelForCausalLM gets for gpt-oss after `register`: ours for our checkpoints, else the stock one."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a directory with our marker packed; hand everything else to transformers unchanged."""
        config = kwargs.get("config")
        marker = getattr(config, "gptoss_quantize", None) or {}
        if not (marker.get("format") in LAYOUTS and LAYOUTS[marker["format"]].packed):
            return GptOssForCausalLM.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None)) or torch.bfloat16
        if dtype == "auto":
            dtype = torch.bfloat16
        revision = kwargs.pop("revision", None)
        # AutoModel adds adapter_kwargs and some options without a value by itself
        given = {name for name, value in kwargs.items() if value is not None and value is not False}
        if ignored := sorted(given - {"config", "device_map", "adapter_kwargs"}):
            warnings.warn(
                f"gptoss_quantize ignores {ignored} when loading {pretrained_model_name_or_path}", stacklevel=2
            )
        device = _one_device(kwargs.get("device_map"))
        return load(pretrained_model_name_or_path, dtype=dtype, device=device, revision=revision)


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
    """Return the bytes of all parameters and buffers of a model; of mapped experts, those of their own tensors."""
    experts = [module for module in model.modules() if isinstance(module, PackedExpertsModule)]
    inside = {id(buffer) for module in experts for buffer in module.buffers()}
    others = [t for t in (*model.parameters(), *model.buffers()) if id(t) not in inside]
    return sum(t.nbytes for t in others) + sum(module.nbytes() for module in experts)
