"""Attention projections, embedding and head in 8 bits inside vLLM, as `--dense int8` stores them.

Codes and scales stay as they are in memory. On a CPU the product reads the codes (kernels.linear_op); on a card they
are unpacked some rows at a time for every product, which saves memory and costs time.
"""

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from gptoss_quantize.kernels import int8
from gptoss_quantize.kernels.linear_op import int8_linear
from gptoss_quantize.runtimes import vllm_rules as rules

CODES, SCALE = "weight_q8", "weight_q8_scale"


class Int8Method(QuantizeMethodBase):
    """int8 codes [R, C] with float16 scales [R, C/32], for linear layers, the embedding and the head."""

    def __init__(self, prefix: str):
        self.prefix = prefix

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **others: Any,
    ) -> None:
        """Add codes and scales, empty, with the layer's own loader: it narrows by `input_dim` and `output_dim`."""
        ranks = input_size // input_size_per_partition
        rules.check_columns(input_size, ranks, int8.GROUP_SIZE, self.prefix)
        rows = sum(output_partition_sizes)
        for name, columns, dtype in (
            (CODES, input_size_per_partition, torch.int8),
            (SCALE, input_size_per_partition // int8.GROUP_SIZE, torch.float16),
        ):
            parameter = torch.nn.Parameter(torch.zeros(rows, columns, dtype=dtype), requires_grad=False)
            for attribute, value in {"input_dim": 1, "output_dim": 0, **others}.items():
                setattr(parameter, attribute, value)
            layer.register_parameter(name, parameter)
        self.dtype = params_dtype

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return x W^T + b."""
        return int8_linear(x, getattr(layer, CODES), getattr(layer, SCALE), bias)

    def embedding(self, layer: Any, ids: Tensor) -> Tensor:
        """Return the rows of the tokens, in the dtype of the activations."""
        codes, scale = getattr(layer, CODES), getattr(layer, SCALE)
        return int8.dequantize(codes[ids], scale[ids], self.dtype)
