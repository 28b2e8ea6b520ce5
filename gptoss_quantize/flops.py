"""How many floating-point operations a GPTQ run needs, by phase, and how fast this machine does them.

Counted is what the algorithm needs, not what an implementation happens to do: symmetric products count half, a
Cholesky factor and a triangular inverse K^3/3 each, the column loop N K^2. A multiplication with its addition counts
as two. T tokens, K columns, N rows, D hidden, F intermediate.
"""

import time
from collections.abc import Callable

import torch

from gptoss_quantize.config import ModelConfig


def layer_flops(config: ModelConfig, tokens: int, seq_len: int) -> dict[str, float]:
    """Return FLOPs of one decoder layer by phase, for GPTQ with every step of the default recipe.

    attention: projections and scores of `tokens` tokens. forward: the original expert, and the quantized gate_up that
    down_proj is calibrated on. moments: two covariances and one cross moment. solve: factors, columns, refinement.
    """
    D, F, E = config.hidden, config.intermediate, config.experts
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    routed = tokens * config.top_k
    span = seq_len / 2  # a query sees half of its sequence on average; a window makes it less
    solve = 0.0
    for rows, columns, shifted in ((2 * F, D, False), (D, F, True)):
        factor = 2 * columns**3 / 3
        # columns of GPTQ, one product with H and one sweep; the asymmetric target is one product and two triangular
        passes = 1 + 2 + 1 + (4 if shifted else 0)
        solve += factor + passes * rows * columns**2
    return {
        "attention": tokens * (2.0 * D * (2 * q + 2 * kv) + 4.0 * span * q),
        "forward": routed * (2.0 * 3 * D * F + 2.0 * 2 * D * F),
        "moments": routed * (1.0 * D**2 + 1.0 * F**2 + 2.0 * F**2),
        "solve": E * solve,
    }


def rate(multiply: Callable[[], object], flops: float, seconds: float = 0.5) -> float:
    """Return the best FLOP/s of a function over about `seconds`, after one call that warms up."""
    multiply()
    best, end = 0.0, time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        multiply()
        now = time.perf_counter()
        best = max(best, flops / (now - start))
        if now > end:
            return best


def matmul_rate(dtype: torch.dtype, size: int = 2048, seconds: float = 0.5, device: str = "cpu") -> float:
    """Return the FLOP/s of a square matrix product in a dtype."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(size, size, generator=generator).to(device, dtype)
    b = torch.randn(size, size, generator=generator).to(device, dtype)
    out = torch.empty_like(a)

    def multiply() -> None:
        torch.mm(a, b, out=out)
        if device != "cpu":
            torch.cuda.synchronize()

    return rate(multiply, 2.0 * size**3, seconds)
