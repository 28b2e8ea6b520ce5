"""Whether a model's experts are MXFP4 values: of every expert, since a fine-tune may have moved some of them only.

A fine-tune of the release that left the experts alone (a LoRA on attention, the default of the most used notebook) is
exactly as MXFP4 as the release, whatever dtype it was saved in. MXFP4 holds it without any loss, int4 never does.
"""

from typing import Any

from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.layouts import FLOAT, MXFP4, PARTS
from gptoss_quantize.quantize.scales import on_mxfp4_grid
from gptoss_quantize.source import Expert, Source


def known(source: Source, layer: int) -> bool:
    """Return whether the files say that a layer's experts are MXFP4 values: stored so, and no adapter on them."""
    if not isinstance(source, Checkpoint) or source.layout is not MXFP4:
        return False
    targets = () if source.adapter is None else source.adapter.targets
    return not any(FLOAT.base(layer, 0, part) in targets for part in PARTS)


def mxfp4_values(source: Source, layer: int, number: int, expert: Expert) -> bool:
    """Return whether an expert that was read, number `number` of its layer, holds MXFP4 values only."""
    return known(source, layer) or (on_mxfp4_grid(expert.gate_up) and on_mxfp4_grid(expert.down))


def look_at(source: Source | None) -> dict[str, Any]:
    """Return what a glance tells `plan`: one expert of every layer, another one each time (None: the release).

    {"source_is_mxfp4": none of them moved, "stored_as_mxfp4": whether the files say so, "moved_layers": the others,
    "layers": looked at}.
    """
    if source is None:
        return {"source_is_mxfp4": True, "stored_as_mxfp4": True, "moved_layers": [], "layers": 0}
    config, moved = source.config, []
    for layer in range(config.layers):
        number = layer % config.experts
        if not known(source, layer) and not mxfp4_values(source, layer, number, source.expert(layer, number)):
            moved.append(layer)
    stored = isinstance(source, Checkpoint) and source.layout is MXFP4
    return {"source_is_mxfp4": not moved, "stored_as_mxfp4": stored, "moved_layers": moved, "layers": config.layers}


def has_moved(source: Source, layer: int) -> bool:
    """Return whether some expert of a layer is no MXFP4 value; experts are read up to the first such."""
    numbers = range(source.config.experts)
    return not known(source, layer) and any(
        not mxfp4_values(source, layer, e, source.expert(layer, e)) for e in numbers
    )
