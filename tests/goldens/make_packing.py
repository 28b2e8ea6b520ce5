"""Write packing.json: one small matrix as AutoGPTQ 0.7.1 and AutoAWQ 0.2.9 pack and decode it.

The numbers come from their code, not from ours: nothing of gptoss_quantize is imported. To make them again:

    python3 -m venv oracles && oracles/bin/pip install -c constraints.txt -r requirements-oracles.txt
    oracles/bin/python tests/goldens/make_packing.py

The scales are powers of two times small integers, some of them negative, so both packers recover the codes
exactly and both decoders are exact in float16. Tensors are stored as dtype, shape and little-endian bytes in hex.
"""

import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from auto_gptq.nn_modules.qlinear.qlinear_cuda_old import QuantLinear
from awq.modules.linear.gemm import WQLinear_GEMM
from awq.utils.packing_utils import dequantize_gemm

ROWS, COLUMNS, GROUP = 32, 64, 32


def stored(tensor: torch.Tensor) -> dict:
    """Return a tensor as dtype, shape and bytes."""
    array = tensor.detach().contiguous().numpy()
    return {"dtype": str(array.dtype), "shape": list(array.shape), "hex": array.astype(array.dtype).tobytes().hex()}


def example() -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes int8 [R, C] with every value at every nibble, and scales float32 [R, G] of both signs."""
    random = np.random.default_rng(0)
    codes = random.integers(-8, 8, (ROWS, COLUMNS))
    codes[:16, :8] = (np.arange(16)[:, None] + np.arange(8)) % 16 - 8
    scales = random.integers(129, 255, (ROWS, COLUMNS // GROUP)) * 2.0 ** random.integers(-14, -8, (ROWS, 1))
    scales *= random.choice((-1, 1), scales.shape)
    return torch.from_numpy(codes).to(torch.int8), torch.from_numpy(scales).float()


def linear(codes: torch.Tensor, scales: torch.Tensor) -> torch.nn.Linear:
    """Return a float32 linear layer whose weights are codes * scales."""
    layer = torch.nn.Linear(COLUMNS, ROWS, bias=False)
    layer.weight.data = codes.float() * scales.repeat_interleave(GROUP, dim=1)
    return layer


def main() -> None:
    """Pack and decode the example with both and write the file beside this one."""
    codes, scales = example()
    zeros = torch.full_like(scales, 8)
    gptq = QuantLinear(4, GROUP, COLUMNS, ROWS, bias=False, use_cuda_fp16=False, weight_dtype=torch.float32)
    gptq.pack(linear(codes, scales), scales.clone(), zeros.clone(), None)
    awq = WQLinear_GEMM.from_linear(
        linear(codes, scales), 4, GROUP, scales=scales.T.contiguous(), zeros=zeros.T.contiguous()
    )
    with torch.inference_mode():
        decoded_gptq = gptq(torch.eye(COLUMNS)).half()
    decoded_awq = dequantize_gemm(awq.qweight, awq.qzeros, awq.scales, 4, GROUP)
    record = {
        "command": "python tests/goldens/make_packing.py, in the environment of requirements-oracles.txt",
        "versions": {name: version(name) for name in ("auto_gptq", "autoawq", "torch")},
        "group_size": GROUP,
        "codes": stored(codes),
        "scales": stored(scales),
        "gptq": {"qweight": stored(gptq.qweight), "qzeros": stored(gptq.qzeros), "decoded": stored(decoded_gptq)},
        "awq": {"qweight": stored(awq.qweight), "qzeros": stored(awq.qzeros), "decoded": stored(decoded_awq)},
    }
    path = Path(__file__).with_name("packing.json")
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
