"""gpt-oss in plain PyTorch, streamed: one decoder layer for all tokens, then the next.

This file defines what "correct" means here; it equals transformers' GptOssForCausalLM to 1e-4 on float32 logits.
The residual stream is float32 always; matrix products run in the `dtype` given. Only one layer's attention and
one expert's weights are in memory at a time, so a model of any size can be evaluated or calibrated.

Shapes: N sequences, S positions, T = N*S tokens, D hidden, V vocabulary, H heads, d head_dim.
"""

from collections.abc import Callable, Iterable

import torch
from torch.nn import functional

from gptoss_quantize.config import ModelConfig, rope_frequencies
from gptoss_quantize.kernels.experts import gated, route, rows_of
from gptoss_quantize.source import Expert, Source

# scores of one attention call stay below this many elements (256 MB of float32 mask and scores at most)
MAX_MASK_ELEMENTS = 1 << 24
BATCH_TOKENS = 4096
EXPERT_BLOCK = 1024


def rms_norm(x: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """Return x / rms(x) * weight in float32 over the last dimension."""
    x = x.float()
    return weight_D.float() * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def rope_tables(config: ModelConfig, positions: int, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Return (cos, sin), each [S, d/2] in float32, for positions 0..S-1."""
    inverse, factor = rope_frequencies(config)
    angles = torch.arange(positions, dtype=torch.float32)[:, None] * inverse
    return (angles.cos() * factor).to(device), (angles.sin() * factor).to(device)


def apply_rope(x_NHSd: torch.Tensor, cos_Sd: torch.Tensor, sin_Sd: torch.Tensor) -> torch.Tensor:
    """Return x rotated, first half against second half of the head dimension."""
    first, second = x_NHSd.float().chunk(2, dim=-1)
    rotated = torch.cat((first * cos_Sd - second * sin_Sd, second * cos_Sd + first * sin_Sd), dim=-1)
    return rotated.to(x_NHSd.dtype)


def attention(
    x_NSD: torch.Tensor,
    layer: dict[str, torch.Tensor],
    config: ModelConfig,
    window: int | None,
    rope: tuple[torch.Tensor, torch.Tensor],
    visible: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the attention output [N, S, D] for normalised input, in the dtype of x.

    `visible`, bool [N, 1, S, S], says which keys a query sees where that is not the causal window (eval/trees.py).

    The sink is one more key that no value belongs to. It enters through an extra head dimension: queries carry
    their head's sink logit there, real keys 0 and the sink key 1, so one mask [S, S+1] serves all heads.
    """
    N, S, _ = x_NSD.shape
    d, dtype = config.head_dim, x_NSD.dtype

    def project(name: str) -> torch.Tensor:
        bias = layer.get(f"self_attn.{name}_proj.bias")
        weight = layer[f"self_attn.{name}_proj.weight"].to(dtype)
        return functional.linear(x_NSD, weight, None if bias is None else bias.to(dtype))

    q = apply_rope(project("q").view(N, S, -1, d).transpose(1, 2), *rope)
    k = apply_rope(project("k").view(N, S, -1, d).transpose(1, 2), *rope)
    v = project("v").view(N, S, -1, d).transpose(1, 2)
    sinks = layer["self_attn.sinks"].to(dtype).view(1, -1, 1, 1).expand(N, -1, S, 1)
    # fused kernels on a card take head dimensions in steps of 8; zeros change nothing
    more = -(d + 1) % 8 if x_NSD.device.type == "cuda" else 0
    q = functional.pad(torch.cat((q * d**-0.5, sinks), dim=-1), (0, more))
    k = functional.pad(k, (0, 1 + more, 0, 1))
    k[:, :, S, d] = 1
    v = functional.pad(v, (0, 1 + more, 0, 1))
    groups = config.heads // config.kv_heads
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)

    out = torch.empty_like(q)
    step = max(1, MAX_MASK_ELEMENTS // (S + 1))
    columns = torch.arange(S + 1, device=x_NSD.device)
    for start in range(0, S, step):
        rows = torch.arange(start, min(start + step, S), device=x_NSD.device)[:, None]
        if visible is not None:
            mask = functional.pad(visible[:, :, start : start + step], (0, 1), value=True)
        else:
            mask = (columns <= rows) | (columns == S)
            if window is not None:
                mask &= (columns > rows - window) | (columns == S)
        out[:, :, start : start + step] = functional.scaled_dot_product_attention(
            q[:, :, start : start + step], k, v, attn_mask=mask, scale=1.0
        )
    merged = out[..., :d].transpose(1, 2).reshape(N, S, -1)
    bias = layer.get("self_attn.o_proj.bias")
    weight = layer["self_attn.o_proj.weight"].to(dtype)
    return functional.linear(merged, weight, None if bias is None else bias.to(dtype))


def attend(
    h_NSD: torch.Tensor,
    layer: dict[str, torch.Tensor],
    config: ModelConfig,
    index: int,
    rope: tuple[torch.Tensor, torch.Tensor],
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return the residual stream [N, S, D] (float32) after the attention half of layer `index`."""
    x = rms_norm(h_NSD, layer["input_layernorm.weight"], config.rms_eps).to(dtype)
    return h_NSD + attention(x, layer, config, config.window(index), rope).float()


def mlp_input(h_TD: torch.Tensor, layer: dict[str, torch.Tensor], config: ModelConfig) -> torch.Tensor:
    """Return what router and experts see, [T, D] in float32."""
    return rms_norm(h_TD, layer["post_attention_layernorm.weight"], config.rms_eps)


def router(
    x_TD: torch.Tensor, layer: dict[str, torch.Tensor], config: ModelConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (expert indices, probabilities), each [T, K], computed in float32."""
    weight, bias = layer["mlp.router.weight"].float(), layer["mlp.router.bias"].float()
    return route(x_TD.float(), weight, bias, config.top_k)


def expert_act(x_TD: torch.Tensor, expert: Expert, config: ModelConfig) -> torch.Tensor:
    """Return the input of down_proj [T, F] for one expert, in the dtype of x."""
    return gated(x_TD, expert.gate_up, expert.gate_up_bias, config.swiglu_limit, config.swiglu_alpha)


def moe(
    x_TD: torch.Tensor,
    index_TK: torch.Tensor,
    prob_TK: torch.Tensor,
    experts: Iterable[Expert],
    config: ModelConfig,
) -> torch.Tensor:
    """Return the MoE block output [T, D] in float32; products in the dtype of x, experts taken one by one."""
    out = torch.zeros(x_TD.shape, dtype=torch.float32, device=x_TD.device)
    for e, expert in enumerate(experts):
        token, slot = rows_of(index_TK, e)
        # in blocks, so that intermediates stay in cache and malloc can reuse them
        for rows, places in zip(token.split(EXPERT_BLOCK), slot.split(EXPERT_BLOCK), strict=True):
            y = functional.linear(expert_act(x_TD[rows], expert, config), expert.down, expert.down_bias)
            out.index_add_(0, rows, y.float().mul_(prob_TK[rows, places, None]))
    return out


def batches(sequences: int, seq_len: int) -> list[slice]:
    """Return slices over sequences, each of at most BATCH_TOKENS tokens (one sequence at least)."""
    step = max(1, BATCH_TOKENS // seq_len)
    return [slice(start, min(start + step, sequences)) for start in range(0, sequences, step)]


def embed(source: Source, ids_NS: torch.Tensor) -> torch.Tensor:
    """Return the float32 residual stream [N, S, D] at the bottom of the model, on the device of its tensors."""
    table = source.dense("model.embed_tokens.weight")
    return functional.embedding(ids_NS.to(table.device), table).float()


@torch.inference_mode()
def hidden_states(
    source: Source,
    ids_NS: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    on_layer: Callable[[int], None] = lambda index: None,
) -> torch.Tensor:
    """Return the final hidden states [N, S, D] (normed, float32), streaming the model layer by layer.

    They are computed, and stay, on the device that the source's tensors are on.
    """
    config = source.config
    N, S = ids_NS.shape
    h = embed(source, ids_NS)
    rope = rope_tables(config, S, str(h.device))
    for i in range(config.layers):
        layer = source.layer(i)
        for batch in batches(N, S):
            h[batch] = attend(h[batch], layer, config, i, rope, dtype)
        flat = h.view(N * S, -1)
        x = mlp_input(flat, layer, config)
        index, prob = router(x, layer, config)
        flat += moe(x.to(dtype), index, prob, source.experts(i, dtype), config)
        on_layer(i)
    return rms_norm(h, source.dense("model.norm.weight"), config.rms_eps)


@torch.inference_mode()
def logits(hidden: torch.Tensor, head_VD: torch.Tensor) -> torch.Tensor:
    """Return float32 logits [..., V]; the product runs in the dtype of the head."""
    return functional.linear(hidden.to(head_VD.dtype), head_VD).float()
