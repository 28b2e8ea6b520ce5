"""Bits per layer and projection for a given size: the least expected loss that fits, by an exact knapsack.

All matrices of a kind are equally large, and every further bit of a code costs the same, so that sizes are small
whole numbers: gate_up counts two units a bit and down one. Dynamic programming over them is exact.

What 16-bit attention, embedding and head would take of the size is worth more as bits of experts, unless int4 fits
beside them; so they go to 8 bits where the model's shape allows it (docs/lab-notes.md).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch

from gptoss_quantize.calibration.text import Tokens
from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.config import ModelConfig
from gptoss_quantize.errors import InputError
from gptoss_quantize.layouts import MIXED, PARTS, WIDTHS, Bits, Layout, layout_of_bits, misfit
from gptoss_quantize.quantize.job import Job
from gptoss_quantize.quantize.sensitivity import TOKENS, Losses, sensitivities
from gptoss_quantize.sizes import dense_dtype_of, disk, shard_tensors
from gptoss_quantize.units import gib

UNITS = {"gate_up": 2, "down": 1}  # of a projection's size, per bit of its codes


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen for a size."""

    bits: Bits
    dense: str
    total: int  # bytes of the weight files
    expected: float  # loss, as `sensitivity` defines it, summed over the model
    uniform: dict[int, float]  # the same at 2, 3 and 4 bits everywhere

    def record(self, size: int) -> dict[str, Any]:
        """Return it for the report."""
        return {
            "size": size,
            "bits": [list(pair) for pair in self.bits],
            "dense": self.dense,
            "expected_bytes": self.total,
            "expected_loss": self.expected,
            "expected_loss_uniform": {str(bits): loss for bits, loss in self.uniform.items()},
        }


def allot(losses: Losses, units: int) -> Bits:
    """Return the bits with the least sum of losses whose sizes add up to at most `units`; ValueError if none do.

    `losses` have, per layer and part, one loss for each of WIDTHS.
    """
    widths, items = tuple(WIDTHS), [(layer, part) for layer in losses for part in PARTS]
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for layer, part in items:
        grown: dict[int, tuple[float, tuple[int, ...]]] = {}
        for used, (loss, chosen) in best.items():
            for width, more in zip(widths, layer[part], strict=True):
                size = used + UNITS[part] * width
                if size <= units and (size not in grown or loss + more < grown[size][0]):
                    grown[size] = loss + more, (*chosen, width)
        best = grown
    if not best:
        raise ValueError(f"{units} units hold no bits for {len(losses)} layers")
    _, chosen = min(best.values())
    return tuple(zip(chosen[::2], chosen[1::2], strict=True))


def loss_of(losses: Losses, bits: Bits) -> float:
    """Return the sum of the losses of these bits."""
    at = list(WIDTHS).index
    return sum(layer[part][at(w)] for layer, pair in zip(losses, bits, strict=True)
               for part, w in zip(PARTS, pair, strict=True))  # fmt: skip


def total_bytes(source: Checkpoint, layout: Layout, group_size: int, dense: str) -> int:
    """Return the bytes of the weight files that a run writes, headers included."""
    total = disk(shard_tensors(source.config, group_size, dense, dense_dtype_of(source), layout))["total"]
    return int(total)


def choose(source: Checkpoint, losses: Losses, group_size: int, dense: str, units: int) -> Choice:
    """Return what to write with the form of the rest and the units of bits that `room` found."""
    bits = allot(losses, units)
    uniform = {width: loss_of(losses, ((width, width),) * source.config.layers) for width in WIDTHS}
    total = total_bytes(source, layout_of_bits(bits), group_size, dense)
    return Choice(bits, dense, total, loss_of(losses, bits), uniform)


def room(source: Checkpoint, size: int, group_size: int, forms: Sequence[str]) -> tuple[str, int]:
    """Return (the form of attention, embedding and head, units of bits that fit beside them) for `size` bytes.

    The first of `forms` that int4 fits beside, else the last; InputError where nothing fits.
    """
    config = source.config
    for dense in forms:
        totals = {width: total_bytes(source, layout, group_size, dense) for width, layout in WIDTHS.items()}
        if dense == forms[-1] or totals[4] <= size:
            break
    if totals[2] > size:
        raise InputError(
            f"--size {gib(size)}: 2 bits everywhere take {gib(totals[2])} of {source.path.name or source.path}, and "
            "there is nothing smaller; give more, or use a smaller model"
        )
    if totals[4] <= size:
        return dense, 4 * sum(UNITS.values()) * config.layers
    # headers name other tensors where bits are mixed: a few bytes for each
    spare = 16 * config.layers * config.experts
    return dense, 2 * sum(UNITS.values()) * config.layers + max(0, size - totals[2] - spare) // unit_bytes(config)


def unit_bytes(config: ModelConfig) -> int:
    """Return the bytes of one bit for every weight of `down` of one layer."""
    return config.experts * config.hidden * config.intermediate // 8


def forms_for(job: Job, config: ModelConfig) -> tuple[str, ...]:
    """Return the forms that attention, embedding and head may have; a polish moves what int8 would round again."""
    return ("source",) if misfit(config, "int8") or job.polish else ("source", "int8")


def measured(
    source: Checkpoint, tokens: Tokens, group_size: int, dtype: torch.dtype, on_layer: Callable[[int], None]
) -> Losses:
    """Return the losses of a model on the first TOKENS tokens of its calibration text."""
    sequences = max(1, TOKENS // tokens.ids.shape[1])
    grids = [layout.grid for layout in WIDTHS.values() if layout.grid is not None]
    return sensitivities(source, tokens.ids[:sequences], grids, group_size, dtype, on_layer)


def with_choice(job: Job, record: dict[str, Any]) -> Job:
    """Return a job with the bits and the form of the rest that a record of a choice names."""
    bits = _bits_of(record)
    layout = layout_of_bits(bits)
    name = MIXED.name if layout.layers else layout.name
    return replace(job, format=name, bits=bits, dense=record["dense"], chosen=record)


def _bits_of(record: dict[str, Any]) -> Bits:
    """Return the bits of a record, which may have been JSON."""
    return tuple((int(wide), int(narrow)) for wide, narrow in record["bits"])


def chosen_words(record: dict[str, Any]) -> str:
    """Return what was chosen for a size, in a few lines: bits, layers in runs of the same, and the expected loss."""
    bits = _bits_of(record)
    names = "attention, embedding and head in " + ("8 bits" if record["dense"] == "int8" else "the source's form")
    units = sum(UNITS[part] * width for pair in bits for part, width in zip(PARTS, pair, strict=True))
    mean = units / (sum(UNITS.values()) * len(bits))
    listed, layer = [], 0
    for (wide, narrow), run in groupby(bits):
        last = layer + len(list(run)) - 1
        listed.append((f"{layer}-{last}" if layer < last else f"{layer}") + f" {wide}/{narrow}")
        layer = last + 1
    uniform, expected = record["expected_loss_uniform"].items(), record["expected_loss"]
    against = ", ".join(f"{loss / expected:.2f} with {name} bits" for name, loss in uniform) if expected else ""
    return (
        f"chosen for {gib(record['size'])}: {gib(record['expected_bytes'])}, codes of {mean:.2f} bits on average, "
        f"{names}\n  layers, bits of gate_up/down: {'; '.join(listed)}\n"
        + (f"  expected loss 1; everywhere the same: {against}" if against else "  nothing is expected to be lost")
    )
