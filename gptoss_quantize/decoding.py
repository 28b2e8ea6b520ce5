"""One token of one sequence through a loaded model, without what transformers does around each operation.

At one token a layer of a small model takes longer in Python than in its products: masks that hide nothing, keys
repeated for every head, wrappers that look for what nobody asked. `step` calls the same modules in the same order
and computes attention in float32; `is_step` says when a call of the model is nothing but that.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from gptoss_quantize.kernels.linear_op import Bf16Linear

# arguments that ask for nothing more where they are None, False or what is here
_USUAL = {"return_dict": True, "use_cache": True}


def is_step(model: Any, ids: Any, mask: Any, cache: Any, rest: dict[str, Any]) -> bool:
    """Return whether a call is one more token of one sequence whose cache hides nothing, on the CPU, to be decoded.

    `rest` are the call's other arguments; logits_to_keep and position_ids may be among them.
    """
    if not isinstance(ids, Tensor) or ids.shape != (1, 1) or ids.device.type != "cpu" or torch.is_grad_enabled():
        return False
    if type(cache) is not DynamicCache or getattr(cache, "offloading", False) or model.training:
        return False
    layers, held = model.model.layers, cache.layers
    known = all(
        type(c) in (DynamicLayer, DynamicSlidingWindowLayer) and getattr(c, "is_initialized", False) for c in held
    )
    if not known or len(held) != len(layers) or torch.compiler.is_compiling():
        return False
    if any(layer._forward_hooks or layer._forward_pre_hooks or _watched(layer.self_attn) for layer in layers):
        return False
    if mask is not None and not (
        isinstance(mask, Tensor) and mask.shape == (1, cache.get_seq_length() + 1) and bool(mask.all())
    ):
        return False
    free = ("logits_to_keep", "position_ids")
    return all(v is None or v is False or v == _USUAL.get(k) for k, v in rest.items() if k not in free)


def _watched(module: Any) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def step(model: Any, ids: Tensor, cache: DynamicCache, position_ids: Tensor | None = None) -> Tensor:
    """Return the logits [1, 1, V] of one more token [1, 1], whose keys and values go into the cache."""
    inner, config = model.model, model.config
    hidden = inner.embed_tokens(ids)
    if position_ids is None:
        position_ids = torch.tensor([[cache.get_seq_length()]])
    rope = inner.rotary_emb(hidden, position_ids)
    cos, sin = (part[0].float() for part in rope)
    for number, layer in enumerate(inner.layers):
        window = config.sliding_window if config.layer_types[number] == "sliding_attention" else 0
        mixed = _attention(layer.self_attn, _normed(layer.input_layernorm, hidden), cache, number, (cos, sin), window)
        hidden = hidden + mixed
        hidden = hidden + layer.mlp(_normed(layer.post_attention_layernorm, hidden))[0]
    logits: Tensor = model.lm_head(_normed(inner.norm, hidden))
    return logits


def _attention(
    module: Any, x: Tensor, cache: DynamicCache, number: int, rope: tuple[Tensor, Tensor], window: int
) -> Tensor:
    """Return the attention output [1, 1, D] of x [1, 1, D]; `rope` is (cos, sin) [1, d/2] of its position."""
    d = module.head_dim
    heads = torch.cat([project(x).view(-1, d) for project in _projections(module)])
    groups = module.sinks.shape[0] // module.num_key_value_groups
    turned = _turned(heads[:-groups].float(), *rope).to(x.dtype)
    query, new, v = turned[:-groups].float().view(groups, -1, d), turned[-groups:], heads[-groups:]
    keys, values = cache.update(new.view(1, groups, 1, d), v.view(1, groups, 1, d), number)
    keys, values = keys[0, :, -window:].float(), values[0, :, -window:].float()
    scores = torch.matmul(query, keys.transpose(1, 2)) * module.scaling
    sinks = module.sinks.float().view(groups, -1, 1)
    share = functional.softmax(torch.cat((scores, sinks), dim=-1), dim=-1)[..., :-1]
    out: Tensor = module.o_proj(torch.matmul(share, values).view(1, 1, -1).to(x.dtype))
    return out


def _normed(norm: Any, x: Tensor) -> Tensor:
    """Return what a GptOssRMSNorm does of one token [1, 1, D]; one number is quicker in Python than in a tensor."""
    wide = x.float()
    flat = wide.view(-1)
    mean = float(torch.dot(flat, flat)) / flat.numel()
    return (wide * (mean + norm.variance_epsilon) ** -0.5 * norm.weight).to(x.dtype)


def share_projections(model: Any) -> None:
    """Put the weights of a layer's q, k and v into one tensor, of which they become parts: `step` reads it at once.

    Attention whose projections are no Bf16Linear, 8-bit ones say, stays as it is.
    """
    for layer in model.model.layers:
        module = layer.self_attn
        parts = (module.q_proj, module.k_proj, module.v_proj)
        if any(type(part) is not Bf16Linear for part in parts):
            continue
        whole = Bf16Linear(1, 1, bias=False, device="meta")
        for name in ("weight", "bias"):
            if getattr(parts[0], name) is None:
                continue
            tensors = [getattr(part, name).data for part in parts]
            together = torch.cat(tensors)
            setattr(whole, name, nn.Parameter(together, requires_grad=False))
            for part, own in zip(parts, together.split([len(t) for t in tensors]), strict=True):
                getattr(part, name).data = own
        # not a module of the model: its parameters are there already
        object.__setattr__(module, "together", whole)


def _projections(module: Any) -> tuple[Any, ...]:
    """Return the modules that give queries, keys and values: one, where it still has the weights of the three."""
    parts, whole = (module.q_proj, module.k_proj, module.v_proj), getattr(module, "together", None)
    if whole is None:
        return parts
    at = whole.weight.data_ptr()
    for part in parts:
        if type(part) is not Bf16Linear or _watched(part) or part.weight.data_ptr() != at:
            return parts
        at += part.weight.nbytes
    return (whole,)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
