"""One quantization as data: its options, whether they go together, and all that the result depends on."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from gptoss_quantize import __version__
from gptoss_quantize.calibration.text import Tokens
from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.config import ModelConfig
from gptoss_quantize.errors import InputError
from gptoss_quantize.kernels import int8, native
from gptoss_quantize.layouts import DENSE, Bits, Layout, dense_shapes, layout_of_bits, misfit, pick_layout
from gptoss_quantize.machine import compute_dtype, pick_device
from gptoss_quantize.prompts import check_ids
from gptoss_quantize.quantize.budget import (
    CARD_SHARE,
    Budget,
    limit_bytes,
    polish_bytes,
    resolve,
    resolve_card,
)
from gptoss_quantize.quantize.layer import Target
from gptoss_quantize.quantize.polish import PolishSettings
from gptoss_quantize.quantize.ranks import Ranks
from gptoss_quantize.quantize.recipes import Recipe, check_recipe
from gptoss_quantize.units import gib


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is read, what is written, and how."""

    dest: Path
    method: str
    recipe: Recipe
    format: str = "int4"  # a key of layouts.WRITTEN
    group_size: int = 64
    device: str = "auto"  # auto: cuda where there is one
    dtype: torch.dtype | None = None  # of matrix products; None: what the device multiplies fastest
    dense: str = "source"  # or int8: attention, embedding and head in 8 bits
    size: int | None = None  # bytes that the weight files may have; `format` and `dense` are then chosen
    bits: Bits = ()  # chosen for that size: per layer those of gate_up and of down
    chosen: dict[str, Any] | None = None  # what the report says of it
    memory: int | None = None  # bytes that the process may take; None: 60 % of what is free
    polish: int = 0  # steps of end-to-end polish after the last layer
    polish_text: Tokens | None = None  # what it works on: text that calibration does not see
    resume: bool = False
    overwrite: bool = False
    # what the source makes of a little text (gptoss_quantize.calibration.sanity), asked once, before the first layer
    look: Callable[[], dict[str, Any] | None] | None = None

    @property
    def layout(self) -> Layout:
        """Return the output's layout; InputError where it does not go with the group size."""
        return layout_of_bits(self.bits) if self.bits else pick_layout(self.format, self.group_size)[0]

    @property
    def target(self) -> Target:
        """Return what every layer is turned into."""
        return Target(self.recipe, self.layout, self.group_size)

    @property
    def products(self) -> torch.dtype:
        """Return the dtype of matrix products."""
        return self.dtype or compute_dtype(pick_device(self.device))


def check(source: Checkpoint, job: Job, tokens: Tokens | None) -> None:
    """Raise InputError for a job that cannot be done, before anything is written."""
    config, layout = source.config, job.layout
    if not source.layout.source:
        raise InputError(
            f"{source.path}: its experts are {source.layout.name} already; start from the bf16 or MXFP4 original"
        )
    if source.layout is layout and source.adapter is None:
        raise InputError(
            f"{source.path}: its experts are {layout.name.upper()} already; use that file, nothing would change"
        )
    for name, size in (("hidden_size", config.hidden), ("intermediate_size", config.intermediate)):
        if size % job.group_size:
            sizes = sorted(layout.group_sizes)
            fits = [g for g in sizes if config.hidden % g == 0 and config.intermediate % g == 0]
            remedy = (
                f"use --group-size {' or '.join(map(str, fits))}" if fits else f"no {layout.name} fits this model"
            )
            raise InputError(
                f"{source.path}: {name} {size} is not a multiple of group size {job.group_size}; {remedy}"
            )
    # what goes with a mixture goes with each of its widths
    check_recipe(job.method, job.recipe, layout.layers[0][0].name if layout.layers else layout.name)
    _check_options(source, job, tokens)
    if job.recipe.calibrated and tokens is None:
        raise InputError(f"method {job.method} needs calibration text; pass --calibration")
    for text in (tokens, job.polish_text):
        if text is not None:
            check_ids(text.ids, config.vocab, "calibration text")


def _check_options(source: Checkpoint, job: Job, tokens: Tokens | None) -> None:
    """Raise InputError for options that do not go together, or not with this model."""
    if job.dense not in DENSE:
        raise InputError(f"--dense {job.dense}: expected {' or '.join(DENSE)}")
    packs = DENSE[job.dense].packs
    if (odd := misfit(source.config, job.dense)) is not None:
        raise InputError(
            f"{source.path}: {odd[0]} has {odd[1]} columns, not a multiple of {int8.GROUP_SIZE}; --dense {job.dense} "
            "works in groups of that many, leave it out"
        )
    if job.polish and not job.recipe.calibrated:
        raise InputError(f"--polish needs a method that looks at calibration text; {job.method} does not, use gptq")
    if job.polish and tokens is not None and (job.polish_text is None or len(job.polish_text.ids) < 2):
        raise InputError(
            f"--polish needs at least two sequences of text that calibration does not see, and {tokens.source} has "
            f"{'none' if job.polish_text is None else 'one'} after the first {tokens.tokens} tokens; "
            "give more text, or fewer --tokens"
        )
    # other runtimes read MXFP4 by its names, and polish moves what int8 would round again
    if any(map(packs, dense_shapes(source.config))) and (job.polish or not job.layout.packed):
        what = "--polish" if job.polish else f"--format {job.format}"
        raise InputError(f"--dense {job.dense} and {what} do not go together; leave one of them out")


def fingerprint(source: Checkpoint, job: Job, tokens: Tokens | None) -> dict[str, Any]:
    """Return everything the result depends on; a resumed run must have the same."""
    adapter = None if source.adapter is None else source.adapter.path
    return {
        "version": __version__,
        "source": str(source.path.resolve()),
        "source_files": _identity([source.path / "config.json", *source.files()]),
        "adapter": None if adapter is None else str(adapter.resolve()),
        "adapter_files": {} if adapter is None else _identity(sorted(adapter.glob("adapter_*"))),
        "method": job.method,
        "recipe": asdict(job.recipe),
        # equal but for rounding, which a continued run must not mix; why there are none stands in the report
        "native_kernels": "yes" if job.recipe.native and native.available() else "no",
        "format": job.format,
        "group_size": job.group_size,
        "dense": job.dense,
        "size": job.size,
        "bits": [list(pair) for pair in job.bits],
        "polish": job.polish,
        "polish_text": None if job.polish_text is None else job.polish_text.sha256,
        "calibration": None if tokens is None else tokens.sha256,
        "dtype": str(job.products).removeprefix("torch."),
        "device": job.device,
    }


def _identity(files: list[Path]) -> dict[str, list[int]]:
    """Return name -> [bytes, modification time in ns]: what must not change between a run and its continuation."""
    return {p.name: [p.stat().st_size, p.stat().st_mtime_ns] for p in files}


def budget_of(config: ModelConfig, job: Job, tokens: Tokens | None, ranks: Ranks) -> Budget:
    """Return what the job's memory is resolved to here; InputError where it is not enough."""
    count = 0 if tokens is None else tokens.tokens
    if job.polish and (text := job.polish_text) is not None:
        # on the processor, wherever the layers are quantized
        step = PolishSettings(steps=job.polish).sequences * text.ids.shape[1]
        groups, base = job.group_size if job.layout.packed else None, psutil.Process().memory_info().rss
        need = polish_bytes(config, text.tokens, step, groups, job.products, base)
        limit = limit_bytes(None if job.device.startswith("cuda") else job.memory, base)
        if need > limit:
            raise InputError(
                f"--polish of this model needs about {gib(need)} of memory, {gib(limit)} are allowed; "
                "leave --polish out, take fewer steps (less text), or give more (--memory)"
            )
    if job.device.startswith("cuda"):
        free, _ = torch.cuda.mem_get_info(job.device)
        limit = job.memory or int(CARD_SHARE * free)
        return resolve_card(config, count, job.products, limit, ranks.count, ranks.local_count)
    return resolve(
        config,
        count,
        job.products,
        job.memory,
        threads=torch.get_num_threads(),
        ranks=ranks.count,
        processes=ranks.local_count,
    )
