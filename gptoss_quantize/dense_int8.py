"""Attention projections, embedding and head that stay in 8 bits in memory, as `--dense int8` stores them.

A projection multiplies the codes as they are (kernels.linear_op), in the dtype of the input; a token's embedding is a
row, unpacked when it is looked up.
"""

import torch
from torch import nn

from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.kernels import int8
from gptoss_quantize.kernels.linear_op import int8_product
from gptoss_quantize.layouts import dense_shapes


class Int8Linear(nn.Module):
    """x W^T + b with W in int8; `bias` is a parameter like nn.Linear's."""

    codes: torch.Tensor
    scale: torch.Tensor

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor, bias: bool):
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.bias = nn.Parameter(torch.empty(codes.shape[0], device="meta"), requires_grad=False) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [..., rows] for x [..., columns], in the dtype of x."""
        return int8_product(x, self.codes, self.scale, self.bias)


class Int8Embedding(nn.Module):
    """Rows of a table in int8, looked up in the dtype given."""

    codes: torch.Tensor
    scale: torch.Tensor

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype):
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.dtype = dtype

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return [..., columns] for ids [...]."""
        return int8.dequantize(self.codes[ids], self.scale[ids], self.dtype)


def put_int8_modules(model: nn.Module, checkpoint: Checkpoint, dtype: torch.dtype) -> set[str]:
    """Replace what the checkpoint has in int8 by modules that keep it so; return the names of the matrices."""
    done: set[str] = set()
    for name, shape in dense_shapes(checkpoint.config).items():
        if not checkpoint.dense_layout.packs(name):
            continue
        codes, scale = (checkpoint.read(part) for part in checkpoint.dense_layout.parts(name, shape))
        path = name.removesuffix(".weight")
        parent, _, child = path.rpartition(".")
        owner = model.get_submodule(parent)
        if path.endswith("embed_tokens"):
            setattr(owner, child, Int8Embedding(codes, scale, dtype))
            if checkpoint.config.tied:
                model.lm_head = Int8Linear(codes, scale, bias=False)
        else:
            with_bias = getattr(owner.get_submodule(child), "bias", None) is not None
            setattr(owner, child, Int8Linear(codes, scale, with_bias))
        done.add(name)
    return done
