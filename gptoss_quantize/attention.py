"""Attention with sinks in float32 for processors that multiply bfloat16 slowly, as an attention of transformers.

transformers' gpt-oss multiplies queries, keys and values in their own dtype. Without AVX-512 BF16 or AMX torch does
that at a fifth of float32's rate: measured on an AMD EPYC with AVX2, 12 GFLOP/s where float32 has 64.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

NAME = "gptoss_float32"
# scores that are in memory at a time: 16 MiB, which stay in cache
_SCORES = 1 << 22


def float32_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Return (output [N, S, H, d] in the dtype of query, None): as transformers' eager attention of gpt-oss.

    query [N, H, S, d], key and value [N, G, T, d], mask [N, 1, S, T] added to the scores; `module.sinks` [H]. The
    heads that share a key are one product, so that keys are not repeated; scores are made for a block of queries at
    a time, and not returned.
    """
    (N, H, S, d), (G, T) = query.shape, key.shape[1:3]
    out = query.new_empty(N, S, H, d)
    shared = H // G
    sinks = cast(Tensor, module.sinks).float().view(G, shared, 1, 1)
    step = max(1, _SCORES // (shared * T))
    for n in range(N):
        for g in range(G):
            keys, values = key[n, g].float(), value[n, g].float()
            for start in range(0, S, step):
                rows = slice(start, start + step)
                asked = query[n, g * shared : (g + 1) * shared, rows].float()
                scores = torch.matmul(asked, keys.T) * scaling
                if attention_mask is not None:
                    scores = scores + attention_mask[n, :, rows, :T].float()
                sink = sinks[g].expand(-1, scores.shape[1], -1)
                share = functional.softmax(torch.cat((scores, sink), dim=-1), dim=-1)[..., :-1]
                share = functional.dropout(share, p=dropout, training=module.training)
                mixed = torch.matmul(share, values)
                out[n, rows, g * shared : (g + 1) * shared] = mixed.transpose(0, 1).to(out.dtype)
    return out, None


def use_float32_attention(model: Any) -> None:
    """Make a gpt-oss model of transformers use `float32_attention`."""
    AttentionInterface.register(NAME, float32_attention)
    AttentionMaskInterface.register(NAME, eager_mask)
    model.set_attn_implementation(NAME)
