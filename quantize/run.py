"""The main loop: for every decoder layer, attend, route, quantize the experts, write the shard, remember the state.

Memory holds one layer's attention, a few experts, and the layer's inputs for all calibration tokens; hidden states
live on disk. See `quantize.output` for what survives a crash, and `quantize.layer` for what happens to a layer.
"""

import json
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import torch

from gptoss_quantize import __version__
from gptoss_quantize.calibration.text import Tokens
from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.errors import InputError
from gptoss_quantize.kernels import int8, native
from gptoss_quantize.model import attend, batches, mlp_input, rope_tables, router
from gptoss_quantize.quantize.budget import (
    CARD_SHARE,
    Budget,
    limit_bytes,
    make_room,
    polish_bytes,
    release_memory,
    resolve,
    resolve_card,
    reuse_memory,
    token_arrays,
)
from gptoss_quantize.quantize.formats import Format, pick_format
from gptoss_quantize.quantize.layer import Clock, LayerResult, Routed, calibrated_layer, round_layer
from gptoss_quantize.quantize.output import Output, alone
from gptoss_quantize.quantize.polish import PolishSettings
from gptoss_quantize.quantize.polish_output import polish_output
from gptoss_quantize.quantize.ranks import SINGLE, Ranks, everyone, exchange_rows, from_first, in_turn
from gptoss_quantize.quantize.recipes import Recipe
from gptoss_quantize.quantize.report import peak_of, report_of
from gptoss_quantize.quantize.scales import on_mxfp4_grid
from gptoss_quantize.quantize.writing import columns_beside_groups, write_embedded, write_layer, write_outer
from gptoss_quantize.units import gib


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One quantization: what is read, what is written, and how."""

    dest: Path
    method: str
    recipe: Recipe
    format: str = "int4"  # a key of quantize.formats.FORMATS
    group_size: int = 64
    device: str = "auto"  # auto: cuda where there is one
    dtype: torch.dtype | None = None  # of matrix products; None: what the device multiplies fastest
    dense: str = "source"  # or int8: attention, embedding and head in 8 bits
    memory: int | None = None  # bytes that the process may take; None: 60 % of what is free
    polish: int = 0  # steps of end-to-end polish after the last layer
    polish_text: Tokens | None = None  # what it works on: text that calibration does not see
    resume: bool = False
    overwrite: bool = False
    # what the source makes of a little text (gptoss_quantize.sanity), asked once, before the first layer
    look: Callable[[], dict[str, Any] | None] | None = None

    @property
    def target(self) -> Format:
        """Return the output format; InputError where it does not go with the recipe or the group size."""
        return pick_format(self.format, self.group_size, self.recipe.scale, self.recipe.awq)


def pick_device(device: str) -> str:
    """Return the device to compute on; auto is cuda where there is one. InputError for one that is not there."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"--device {device}: torch {torch.__version__} sees no CUDA device; use --device cpu")
    if device != "cpu" and not device.startswith("cuda"):
        raise InputError(f"--device {device}: expected auto, cpu or cuda")
    number = device.removeprefix("cuda").removeprefix(":")
    if device != "cpu" and number and not (number.isdigit() and int(number) < torch.cuda.device_count()):
        raise InputError(f"--device {device}: torch sees {torch.cuda.device_count()} card(s), cuda:0 is the first")
    return device


def compute_dtype(device: str) -> torch.dtype:
    """Return the dtype that matrix products run fastest in: bfloat16 where the hardware multiplies it natively."""
    if device.startswith("cuda"):
        return torch.bfloat16
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return torch.float32
    return torch.bfloat16 if "avx512_bf16" in flags or "amx_bf16" in flags else torch.float32


def quantize_checkpoint(
    source: Checkpoint,
    job: Job,
    tokens: Tokens | None,
    on_layer: Callable[[int], None] = lambda index: None,
    on_step: Callable[[int, float], None] = lambda step, kl: None,
    ranks: Ranks = SINGLE,
) -> dict[str, Any]:
    """Quantize all experts of `source` into `job.dest`; return the report that is also written there.

    `tokens` are needed by every recipe that looks at activations. `on_layer` is called with the index of each
    finished layer, `on_step` with each step of the polish and its divergence. `ranks` are the processes that share
    the work; each of them calls this. InputError for input that is refused; nothing then stands under the final name.
    """
    _check(source, job, tokens)
    device = pick_device(job.device)
    job = replace(job, device=device, dtype=job.dtype or compute_dtype(device))
    settings = _settings(source, job, tokens)
    if device.startswith("cuda") and ranks.count > 1:
        job = replace(job, device=pick_device(f"cuda:{ranks.local_rank}"))
    output = _begin(source, job, tokens, settings, ranks)
    with alone(output.partial) if ranks.rank == 0 else nullcontext():
        return _run(source, job, tokens, output, on_layer, on_step, ranks)


def _begin(source: Checkpoint, job: Job, tokens: Tokens | None, settings: dict[str, Any], ranks: Ranks) -> Output:
    """Return the output, begun or taken over by rank 0; the others join it, if they see the same input."""
    shards, stem = source.config.layers + 1, job.target.stem
    found: list[Output] = []

    def begin() -> dict[str, Any]:
        output = Output(job.dest, shards, settings, stem=stem, resume=job.resume, overwrite=job.overwrite)
        try:
            _budget(source, job, tokens, output, ranks)
        except InputError:
            # only where nothing is in it yet
            with suppress(OSError):
                output.partial.rmdir()
            raise
        found.append(output)
        return output.state

    state = from_first(ranks, begin)
    if not found:
        found.append(Output(job.dest, shards, settings, stem=stem, resume=False, overwrite=False, state=state))
    same = json.loads(json.dumps(settings))
    theirs = json.loads(json.dumps(state["settings"]))
    differing = sorted(name for name in same if same[name] != theirs.get(name))
    for rank, names in enumerate(everyone(ranks, differing)):
        if names:
            raise InputError(
                f"rank {rank} sees another {', '.join(names)} than rank 0; all ranks need the same options and files"
            )
    if ranks.count > 1:
        _check_shared(found[0].partial, ranks)
    return found[0]


def _check_shared(folder: Path, ranks: Ranks) -> None:
    """Raise InputError on all ranks unless they all see rank 0's folder: hidden states and shards pass through it."""
    mark = everyone(ranks, uuid4().hex)[0]
    path = folder / ".shared"
    if ranks.rank == 0:
        path.write_text(mark, encoding="utf-8")
    everyone(ranks, None)
    seen = everyone(ranks, path.is_file() and path.read_text(encoding="utf-8") == mark)
    if ranks.rank == 0:
        path.unlink()
    if not all(seen):
        raise InputError(
            f"rank {seen.index(False)} does not see rank 0's {folder}; "
            "ranks on several machines need OUT on a file system that they share"
        )


def _run(
    source: Checkpoint,
    job: Job,
    tokens: Tokens | None,
    output: Output,
    on_layer: Callable[[int], None],
    on_step: Callable[[int, float], None],
    ranks: Ranks,
) -> dict[str, Any]:
    """Do what is left of a run; see `quantize_checkpoint`."""
    reuse_memory()
    config, clock = source.config, Clock()
    # what an interrupted run took, up to its last whole layer, counts
    started = time.time() - output.state.get("elapsed", 0.0)
    clock.seconds = output.state["seconds"]
    shape = (*tokens.ids.shape, config.hidden) if tokens is not None else None
    budget = Budget(**output.state["budget"])
    done = len(output.state["layers"])
    if not output.state["weight_map"]:
        first = source.expert(0, 0)
        output.state["source_is_mxfp4"] = on_mxfp4_grid(first.gate_up) and on_mxfp4_grid(first.down)
        if ranks.rank == 0:
            output.note(write_outer(source, job.dense, output))
            if tokens is not None and shape is not None:
                write_embedded(source, tokens, output.hidden(0, shape))
            output.save_state()
        everyone(ranks, None)
    if ranks.rank == 0 and "sanity" not in output.state:
        # after the first state, so that a run that this refuses is resumed like any other
        output.state["sanity"] = None if job.look is None else job.look()
        output.save_state()
    everyone(ranks, None)
    for i in range(done):
        on_layer(i)
    with torch.inference_mode():
        for i in range(done, config.layers):
            if tokens is None or shape is None:
                weigh = bool(output.state["source_is_mxfp4"])
                result = round_layer(source, i, job.recipe, job.target, clock, ranks.share(config.experts), weigh)
                if weigh:
                    shares = everyone(ranks, result.report["weight_error"])
                    result.report["weight_error"] = [sum(share) for share in zip(*shares, strict=True)]
            else:
                result = _calibrate(source, i, job, output, shape, budget, clock, ranks)
            output.state |= {"elapsed": time.time() - started, "peak_rss_mib": peak_of(output)}
            with clock("write"):
                write_layer(source, i, job.dense, result, output, ranks)
            del result
            on_layer(i)
    if job.polish and job.polish_text is not None:
        with clock("polish"):
            _polish(source, job, job.polish_text, output, on_step, ranks)
    bits = job.target.bits_per_weight(config.hidden)
    peaks = everyone(ranks, peak_of(output))
    report = report_of(tokens, output, bits, time.time() - started) | {"peak_rss_mib_of_ranks": peaks}
    if ranks.rank == 0:
        _finish(source, job, output, report)
    everyone(ranks, None)
    return report


def _polish(
    source: Checkpoint,
    job: Job,
    text: Tokens,
    output: Output,
    on_step: Callable[[int, float], None],
    ranks: Ranks,
) -> None:
    """Polish in the first rank; the others hear of every step, so that none takes it for lost."""
    if ranks.rank:
        while everyone(ranks, None)[0]:
            pass
        return

    def step(number: int, kl: float) -> None:
        everyone(ranks, True)
        on_step(number, kl)

    polish_output(source, output, text, job.dtype or torch.float32, PolishSettings(steps=job.polish), step)
    everyone(ranks, False)


def _finish(source: Checkpoint, job: Job, output: Output, report: dict[str, Any]) -> None:
    """Write what belongs to the whole checkpoint, and give it its name."""
    config, fmt = source.config, job.target
    raw = {k: v for k, v in config.raw.items() if k != "quantization_config"}
    marker = {"version": __version__, "format": job.format, "method": job.method, "group_size": job.group_size}
    described = fmt.config(job.group_size)
    if job.dense == "int8":
        # a name that runtimes do not know: vLLM would leave tensors that it does not find uninitialised
        marker, described = marker | {"dense": "int8"}, described | {"quant_method": "gptoss-quantize"}
    raw |= {"quantization_config": described, "gptoss_quantize": marker}
    output.finish(source.path, raw, report)


def _check(source: Checkpoint, job: Job, tokens: Tokens | None) -> None:
    config = source.config
    if source.expert_format == "int4":
        raise InputError(f"{source.path}: its experts are int4 already; start from the bf16 or MXFP4 original")
    if source.expert_format == "mxfp4" == job.format and source.adapter is None:
        raise InputError(f"{source.path}: its experts are MXFP4 already; use that file, nothing would change")
    for name, size in (("hidden_size", config.hidden), ("intermediate_size", config.intermediate)):
        if size % job.group_size:
            fits = [g for g in (32, 64) if config.hidden % g == 0 and config.intermediate % g == 0]
            raise InputError(
                f"{source.path}: {name} {size} is not a multiple of group size {job.group_size}; "
                f"use --group-size {' or '.join(map(str, fits)) or '(none fits this model)'}"
            )
    _check_options(source, job, tokens)
    if job.recipe.calibrated and tokens is None:
        raise InputError(f"method {job.method} needs calibration text; pass --calibration")
    highest = max((int(text.ids.max()) for text in (tokens, job.polish_text) if text is not None), default=0)
    if highest >= config.vocab:
        raise InputError(
            f"calibration text has token id {highest}, the model's vocabulary ends at "
            f"{config.vocab - 1}; tokenizer and model do not belong together"
        )


def _check_options(source: Checkpoint, job: Job, tokens: Tokens | None) -> None:
    """Raise InputError for options that do not go together, or not with this model."""
    if job.dense not in ("source", "int8"):
        raise InputError(f"--dense {job.dense}: expected source or int8")
    if job.dense == "int8" and (odd := columns_beside_groups(source)):
        raise InputError(
            f"{source.path}: {odd[0]} has {odd[1]} columns, not a multiple of {int8.GROUP_SIZE}; --dense int8 "
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
    if job.dense == "int8" and (job.polish or job.format != "int4"):
        what = "--polish" if job.polish else f"--format {job.format}"
        raise InputError(f"--dense int8 and {what} do not go together; leave one of them out")


def _settings(source: Checkpoint, job: Job, tokens: Tokens | None) -> dict[str, Any]:
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
        # equal but for rounding, which a continued run must not mix
        "native_kernels": native.problem() or "yes",
        "format": job.format,
        "group_size": job.group_size,
        "dense": job.dense,
        "polish": job.polish,
        "polish_text": None if job.polish_text is None else job.polish_text.sha256,
        "calibration": None if tokens is None else tokens.sha256,
        "dtype": str(job.dtype).removeprefix("torch."),
        "device": job.device,
    }


def _identity(files: list[Path]) -> dict[str, list[int]]:
    """Return name -> [bytes, modification time in ns]: what must not change between a run and its continuation."""
    return {p.name: [p.stat().st_size, p.stat().st_mtime_ns] for p in files}


def _budget(source: Checkpoint, job: Job, tokens: Tokens | None, output: Output, ranks: Ranks) -> None:
    """Resolve the memory budget and remember it, unless the run began with one and is given no other."""
    if "budget" in output.state and job.memory in (None, output.state["budget"]["bytes"]):
        return
    count = 0 if tokens is None else tokens.tokens
    dtype = job.dtype or compute_dtype(job.device)
    if job.polish and (text := job.polish_text) is not None:
        # on the processor, wherever the layers are quantized
        step = PolishSettings(steps=job.polish).sequences * text.ids.shape[1]
        groups, base = job.group_size if job.format == "int4" else None, psutil.Process().memory_info().rss
        need = polish_bytes(source.config, text.tokens, step, groups, dtype, base)
        limit = limit_bytes(None if job.device.startswith("cuda") else job.memory, base)
        if need > limit:
            raise InputError(
                f"--polish of this model needs about {gib(need)} of memory, {gib(limit)} are allowed; "
                "leave --polish out, take fewer steps (less text), or give more (--memory)"
            )
    if job.device.startswith("cuda"):
        free, _ = torch.cuda.mem_get_info(job.device)
        limit = job.memory or int(CARD_SHARE * free)
        card = resolve_card(source.config, count, dtype, limit, ranks.count, ranks.local_count)
        output.state["budget"] = asdict(card)
        return
    budget = resolve(
        source.config,
        count,
        dtype,
        job.memory,
        threads=torch.get_num_threads(),
        ranks=ranks.count,
        processes=ranks.local_count,
    )
    output.state["budget"] = asdict(budget)


def _calibrate(
    source: Checkpoint,
    index: int,
    job: Job,
    output: Output,
    shape: tuple[int, int, int],
    budget: Budget,
    clock: Clock,
    ranks: Ranks,
) -> LayerResult:
    """Run one layer on the hidden states of the previous one, quantize it, leave hidden states for the next."""
    config, dtype = source.config, job.dtype or compute_dtype(job.device)
    sequences, positions, width = shape
    before, after = output.hidden(index, shape), output.hidden(index + 1, shape)
    with clock("read"):
        dense = {name: t.to(job.device) for name, t in source.layer(index).items()}
    rope = rope_tables(config, positions, job.device)
    count, per = sequences * positions, config.top_k
    (x_all, out), drop = token_arrays(
        [((count, width), dtype), ((count, width), torch.float32)], budget.states, output.partial, job.device
    )
    routed = Routed(
        x_all,
        torch.empty(count, per, dtype=torch.int64, device=job.device),
        torch.empty(count, per, dtype=torch.float32, device=job.device),
        out,
        drop,
        partial(make_room, drop, 0 if job.device != "cpu" else budget.bytes - budget.solving(config)),
        ranks.share(config.experts),
        [] if ranks.count > 1 else None,
        partial(everyone, ranks),
    )
    mine = ranks.share(sequences)
    own = [slice(mine.start + b.start, mine.start + b.stop) for b in batches(len(mine), positions)]
    with clock("attention"):
        for batch in own:
            h = attend(before.read(batch).to(job.device), dense, config, index, rope, dtype)
            x = mlp_input(h.flatten(0, 1), dense, config)
            part = slice(batch.start * positions, batch.stop * positions)
            routed.x[part] = x.to(dtype)
            routed.index[part], routed.prob[part] = router(x, dense, config)
            after.write(batch, h.cpu())
            drop()
    with clock("exchange"):
        exchange_rows(ranks, [routed.x, routed.index, routed.prob], sequences, positions, drop)
    release_memory()
    result = calibrated_layer(source, index, dense, routed, job.recipe, job.target, budget.experts_at_once, clock)
    with clock("exchange"):
        in_turn(ranks, out, routed.add_kept, drop)
        if ranks.count > 1:
            result.report["experts"] = [entry for part in everyone(ranks, result.report["experts"]) for entry in part]
    with clock("write"):
        for batch in own:
            part = slice(batch.start * positions, batch.stop * positions)
            after.write(batch, after.read(batch) + out[part].cpu().unflatten(0, (-1, positions)))
            drop()
        after.flush()
    result.report["tokens"] = torch.bincount(routed.index.flatten(), minlength=config.experts).tolist()
    return result
