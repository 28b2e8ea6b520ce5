"""How long a quantization will take on this machine, from a measurement of a few seconds.

As many experts as there are threads are made up at true size and quantized with the same code as a real run. Work
that grows with tokens and work that grows with experts are timed apart and scaled to the whole model; attention is
taken from its FLOPs and the measured matmul rate. Not counted: reading from a slow disk, and experts with so few
tokens that their products are small.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from gptoss_quantize.checkpoint import Checkpoint, Expert
from gptoss_quantize.config import ModelConfig
from gptoss_quantize.flops import layer_flops, matmul_rate
from gptoss_quantize.kernels import mxfp4
from gptoss_quantize.machine import reuse_memory
from gptoss_quantize.quantize.formats import pick_format
from gptoss_quantize.quantize.layer import Clock, Routed, calibrated_layer, round_layer
from gptoss_quantize.quantize.recipes import Recipe

SAMPLE_TOKENS = 1024  # per expert
PER_TOKEN = ("forward", "moments")


@dataclass(slots=True)
class _MadeUp:
    """Stands in for a checkpoint: experts from MXFP4 blocks, decoded when asked for."""

    config: ModelConfig
    parts: list[list[tuple[torch.Tensor, torch.Tensor]]]

    def expert(self, layer: int, expert: int, dtype: torch.dtype = torch.float32) -> Expert:
        (wide, wide_scale), (down, down_scale) = self.parts[expert]
        F, D = self.config.intermediate, self.config.hidden
        return Expert(
            mxfp4.decode(wide, wide_scale, dtype),
            torch.zeros(2 * F, dtype=dtype),
            mxfp4.decode(down, down_scale, dtype),
            torch.zeros(D, dtype=dtype),
        )

    def experts(self, layer: int, dtype: torch.dtype = torch.float32) -> Iterator[Expert]:
        return (self.expert(layer, e, dtype) for e in range(self.config.experts))


def _made_up(config: ModelConfig, experts: int, generator: torch.Generator) -> _MadeUp:
    def blocks(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (rows, columns // mxfp4.GROUP_SIZE, mxfp4.BYTES_PER_GROUP)
        codes = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        # one power of two for all: outputs near 1 for inputs near 1
        return codes, torch.full(shape[:2], mxfp4.SCALE_BIAS - 8, dtype=torch.uint8)

    wide, down = (2 * config.intermediate, config.hidden), (config.hidden, config.intermediate)
    parts = [[blocks(*wide), blocks(*down)] for _ in range(experts)]
    return _MadeUp(replace(config, experts=experts, top_k=1, layers=1), parts)


@torch.inference_mode()
def estimate(
    config: ModelConfig,
    recipe: Recipe,
    group_size: int,
    tokens: int,
    seq_len: int,
    dtype: torch.dtype,
    sample_tokens: int = SAMPLE_TOKENS,
) -> dict[str, Any]:
    """Return expected seconds by phase for the whole model, with the measurements they were made of."""
    reuse_memory()
    generator = torch.Generator().manual_seed(0)
    experts = min(config.experts, torch.get_num_threads())
    source = cast("Checkpoint", _made_up(config, experts, generator))
    fmt, clock = pick_format("int4", group_size, recipe.scale, recipe.awq), Clock()
    if not recipe.calibrated:
        round_layer(source, 0, recipe, fmt, clock)
        phases = {name: s / experts * config.experts * config.layers for name, s in clock.seconds.items()}
        return {"seconds": sum(phases.values()), "phases": phases, "measured": {"experts": experts}}
    count = experts * sample_tokens
    routed = Routed(
        torch.randn(count, config.hidden, generator=generator).to(dtype),
        torch.arange(count).remainder(experts)[:, None],
        torch.full((count, 1), 0.25),
        torch.zeros(count, config.hidden),
    )
    dense = {
        "post_attention_layernorm.weight": torch.ones(config.hidden),
        "mlp.router.weight": torch.randn(experts, config.hidden, generator=generator),
        "mlp.router.bias": torch.zeros(experts),
    }
    calibrated_layer(source, 0, dense, routed, recipe, fmt, experts, clock)
    measured = dict(clock.seconds)
    pairs = tokens * config.top_k
    phases = {}
    for name, seconds in measured.items():
        scale = pairs / count if name in PER_TOKEN else config.experts / experts
        phases[name] = seconds * scale * config.layers
    speed = matmul_rate(dtype)
    phases["attention"] = config.layers * layer_flops(config, tokens, seq_len)["attention"] / speed
    more = {name: s * (4 if name in (*PER_TOKEN, "attention") else 1) for name, s in phases.items()}
    return {
        "seconds": sum(phases.values()),
        "phases": phases,
        "more_tokens": {"tokens": 4 * tokens, "seconds": sum(more.values())},
        "measured": {"experts": experts, "tokens": count, "seconds": measured, "matmul_flops": speed},
    }
