"""How long a quantization will take on this machine, from a measurement of a few seconds.

As many experts as there are threads are made up at true size and quantized with the same code as a real run. Work
that grows with tokens and work that grows with experts are timed apart and scaled to the whole model; attention is
taken from its FLOPs and the measured matmul rate. Not counted: reading from a slow disk, and experts with so few
tokens that their products are small.
"""

from dataclasses import replace
from typing import Any

import torch

from gptoss_quantize.calibration.capture import Routed
from gptoss_quantize.config import ModelConfig
from gptoss_quantize.flops import layer_flops, matmul_rate
from gptoss_quantize.kernels import mxfp4
from gptoss_quantize.layouts import dense_shapes, pick_layout
from gptoss_quantize.machine import Clock, reuse_memory
from gptoss_quantize.quantize.layer import Target, calibrated_layer, round_layer
from gptoss_quantize.quantize.recipes import Recipe
from gptoss_quantize.source import Expert, Source

SAMPLE_TOKENS = 1024  # per expert
PER_TOKEN = ("forward", "moments")


class _MadeUp(Source):
    """A model of random numbers: experts from MXFP4 blocks, decoded when asked for."""

    def __init__(self, config: ModelConfig, parts: list[list[tuple[torch.Tensor, torch.Tensor]]]):
        self.config, self.parts = config, parts

    def dense(self, name: str) -> torch.Tensor:
        """Return ones for norms, zeros for biases, small random numbers for the rest."""
        shape = dense_shapes(self.config)[name]
        if len(shape) == 1:
            return torch.ones(shape) if "norm" in name else torch.zeros(shape)
        return torch.randn(shape, generator=torch.Generator().manual_seed(1))

    def expert(self, layer: int, expert: int, dtype: torch.dtype = torch.float32) -> Expert:
        """Return a made-up expert."""
        (wide, wide_scale), (down, down_scale) = self.parts[expert]
        F, D = self.config.intermediate, self.config.hidden
        return Expert(
            mxfp4.decode(wide, wide_scale, dtype),
            torch.zeros(2 * F, dtype=dtype),
            mxfp4.decode(down, down_scale, dtype),
            torch.zeros(D, dtype=dtype),
        )


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
    source, clock = _made_up(config, experts, generator), Clock()
    target = Target(recipe, *pick_layout("int4", group_size))
    if not recipe.calibrated:
        round_layer(source, 0, target, clock)
        phases = {name: s / experts * config.experts * config.layers for name, s in clock.seconds.items()}
        return {"seconds": sum(phases.values()), "phases": phases, "measured": {"experts": experts}}
    count = experts * sample_tokens
    routed = Routed(
        torch.randn(count, config.hidden, generator=generator).to(dtype),
        torch.arange(count).remainder(experts)[:, None],
        torch.full((count, 1), 0.25),
        torch.zeros(count, config.hidden),
    )
    changed = ("post_attention_layernorm.weight", "mlp.router.weight", "mlp.router.bias")
    dense = {name: source.dense(f"model.layers.0.{name}") for name in changed}
    calibrated_layer(source, 0, dense, routed, target, experts, clock)
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
