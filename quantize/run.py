"""The main loop: for every decoder layer, attend, route, quantize the experts, write the shard, remember the state.

Memory holds one layer's attention, a few experts, and the layer's inputs for all calibration tokens; hidden states
live on disk. See `quantize.output` for what survives a crash, and `quantize.layer` for what happens to a layer.
"""

import json
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch

from gptoss_quantize import __version__
from gptoss_quantize.atomic import alone, going_on
from gptoss_quantize.calibration.capture import Routed, add_experts, attend_and_route
from gptoss_quantize.calibration.text import Tokens
from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.errors import InputError
from gptoss_quantize.files import check_dest
from gptoss_quantize.kernels import native
from gptoss_quantize.layouts import DENSE, INT4, quantization_config
from gptoss_quantize.machine import Clock, pick_device, release_memory, reuse_memory
from gptoss_quantize.model import batches
from gptoss_quantize.quantize.auto import settle_format
from gptoss_quantize.quantize.budget import Budget, make_room, token_arrays
from gptoss_quantize.quantize.job import Job, budget_of, check, fingerprint
from gptoss_quantize.quantize.layer import LayerResult, Target, calibrated_layer, round_layer
from gptoss_quantize.quantize.mixing import choose, forms_for, measured, room, with_choice
from gptoss_quantize.quantize.output import Output, chosen_before
from gptoss_quantize.quantize.polish import PolishSettings
from gptoss_quantize.quantize.polish_output import polish_output
from gptoss_quantize.quantize.ranks import (
    SINGLE,
    Ranks,
    check_shared,
    everyone,
    exchange_rows,
    from_first,
    in_turn,
    same_everywhere,
)
from gptoss_quantize.quantize.report import peak_of, report_of
from gptoss_quantize.quantize.writing import write_embedded, write_layer, write_outer


@dataclass(slots=True)
class Run:
    """One quantization at work: what it reads and writes, with whom, and since when."""

    source: Checkpoint
    job: Job
    tokens: Tokens | None
    output: Output
    ranks: Ranks
    on_layer: Callable[[int], None]
    on_step: Callable[[int, float], None]
    clock: Clock = field(default_factory=Clock)
    target: Target = field(init=False)

    def __post_init__(self) -> None:
        self.target = self.job.target

    @property
    def first(self) -> bool:
        """Return whether this process is the one that writes the state."""
        return self.ranks.rank == 0


def quantize_checkpoint(
    source: Checkpoint,
    job: Job,
    tokens: Tokens | None,
    on_layer: Callable[[int], None] = lambda index: None,
    on_step: Callable[[int, float], None] = lambda step, kl: None,
    ranks: Ranks = SINGLE,
    on_sensed: Callable[[int], None] = lambda done: None,
    on_chosen: Callable[[dict[str, Any]], None] = lambda record: None,
) -> dict[str, Any]:
    """Quantize all experts of `source` into `job.dest`; return the report that is also written there.

    `tokens` are needed by every recipe that looks at activations. `on_layer` is called with the index of each
    finished layer, `on_step` with each step of the polish and its divergence; `on_sensed` with the number of layers
    whose sensitivity is measured, for a job with a size, and `on_chosen` with what was chosen for it. `ranks` are
    the processes that share the work; each of them calls this. InputError for input that is refused; nothing then
    stands under the final name.
    """
    job = settle_format(source, job)
    tokens = tokens if job.recipe.calibrated else None
    if job.size is not None:
        job = _choose(source, job, tokens, ranks, on_sensed)
        on_chosen(job.chosen or {})
    check(source, job, tokens)
    job = replace(job, device=pick_device(job.device))
    job = replace(job, dtype=job.products)
    with native.switched(job.recipe.native):
        settings = fingerprint(source, job, tokens)
        if job.device.startswith("cuda") and ranks.count > 1:
            job = replace(job, device=pick_device(f"cuda:{ranks.local_rank}"))
        output = _begin(source, job, tokens, settings, ranks)
        run = Run(source, job, tokens, output, ranks, on_layer, on_step)
        with going_on("run the same command with --resume"), alone(output.partial) if run.first else nullcontext():
            return _work(run)


def _choose(
    source: Checkpoint, job: Job, tokens: Tokens | None, ranks: Ranks, on_layer: Callable[[int], None]
) -> Job:
    """Return a job with bits for its size: those of the run that it continues, or chosen by the first rank."""
    check(source, replace(job, format=INT4.name), tokens)
    size, group, forms = job.size or 0, job.group_size, forms_for(job, source.config)

    def choose_here() -> dict[str, Any]:
        before = chosen_before(job.dest) if job.resume else None
        if before is not None and before.get("size") == size:
            return before
        dense, units = room(source, size, group, forms)
        if tokens is None:
            raise InputError(f"--size needs a method that looks at calibration text; {job.method} does not, use gptq")
        if not job.resume:
            check_dest(job.dest, overwrite=job.overwrite, inputs=(source.path,))
        started = time.perf_counter()
        losses = measured(source, tokens, group, job.products, on_layer)
        seconds = round(time.perf_counter() - started, 2)
        return choose(source, losses, group, dense, units).record(size) | {"seconds": seconds}

    return with_choice(job, from_first(ranks, choose_here))


def _begin(source: Checkpoint, job: Job, tokens: Tokens | None, settings: dict[str, Any], ranks: Ranks) -> Output:
    """Return the output, begun or taken over by rank 0; the others join it, if they see the same input."""
    shards, stem = source.config.layers + 1, job.layout.shard_stem
    found: list[Output] = []

    def begin() -> dict[str, Any]:
        output = Output(job.dest, shards, settings, stem=stem, resume=job.resume, overwrite=job.overwrite)
        try:
            # a run goes on with the memory that it began with, unless it is given another
            output.state.setdefault("mixture", job.chosen)
            if "budget" not in output.state or job.memory not in (None, output.state["budget"]["bytes"]):
                output.state["budget"] = asdict(budget_of(source.config, job, tokens, ranks))
        except InputError:
            # only where nothing is in it yet
            with suppress(OSError, InputError):
                output.abandon()
            raise
        found.append(output)
        return output.state

    state = from_first(ranks, begin)
    if not found:
        found.append(Output(job.dest, shards, settings, stem=stem, resume=False, overwrite=False, state=state))
    same_everywhere(ranks, json.loads(json.dumps(settings)), json.loads(json.dumps(state["settings"])))
    check_shared(found[0].partial, ranks)
    return found[0]


def _work(run: Run) -> dict[str, Any]:
    """Do what is left of a run; see `quantize_checkpoint`."""
    reuse_memory()
    source, output, ranks = run.source, run.output, run.ranks
    # what an interrupted run took, up to its last whole layer, counts
    started = time.time() - output.state.get("elapsed", 0.0)
    run.clock.seconds = output.state["seconds"]
    done = len(output.state["layers"])
    if not output.state["weight_map"]:
        _first_shard(run)
    if run.first and "sanity" not in output.state:
        # after the first state, so that a run that this refuses is resumed like any other
        output.state["sanity"] = None if run.job.look is None else run.job.look()
        output.save_state()
    everyone(ranks, None)
    for i in range(done):
        run.on_layer(i)
    with torch.inference_mode():
        for i in range(done, source.config.layers):
            result = _round(run, i) if run.tokens is None else _calibrate(run, i, run.tokens)
            output.state |= {"elapsed": time.time() - started, "peak_rss_mib": peak_of(output)}
            with run.clock("write"):
                write_layer(source, i, DENSE[run.job.dense], result, output, ranks)
            del result
            run.on_layer(i)
    if run.job.polish and run.job.polish_text is not None:
        with run.clock("polish"):
            _polish(run, run.job.polish_text)
    bits = run.job.layout.bits_per_weight(source.config.hidden, run.job.group_size)
    peaks = everyone(ranks, peak_of(output))
    report = report_of(run.tokens, output, bits, time.time() - started) | {
        "source_experts": source.layout.name,
        "peak_rss_mib_of_ranks": peaks,
    }
    report["notes"] = list(source.notes)
    if run.first:
        output.finish(run.source.side, _config(run), report)
    everyone(ranks, None)
    return report


def _first_shard(run: Run) -> None:
    """Write what is outside the layers, and the hidden states below the first."""
    if run.first:
        run.output.note(write_outer(run.source, DENSE[run.job.dense], run.output))
        if run.tokens is not None:
            write_embedded(run.source, run.tokens, run.output.hidden(0, _shape(run, run.tokens)))
        run.output.save_state()
    everyone(run.ranks, None)


def _shape(run: Run, tokens: Tokens) -> tuple[int, int, int]:
    """Return the shape of the hidden states."""
    sequences, positions = tokens.ids.shape
    return sequences, positions, run.source.config.hidden


def _round(run: Run, index: int) -> LayerResult:
    """Quantize one layer by plain rounding; where experts are MXFP4 values, say how far their weights moved."""
    mine = run.ranks.share(run.source.config.experts)
    result = round_layer(run.source, index, run.target, run.clock, mine)
    shares = everyone(run.ranks, result.report["weight_error"])
    result.report["weight_error"] = [sum(share) for share in zip(*shares, strict=True)]
    _gather_grid(run, result)
    return result


def _gather_grid(run: Run, result: LayerResult) -> None:
    """Bring together what each rank found of its experts' values."""
    shares = everyone(run.ranks, result.report["off_mxfp4_grid"])
    result.report["off_mxfp4_grid"] = [expert for share in shares for expert in share]


def _calibrate(run: Run, index: int, tokens: Tokens) -> LayerResult:
    """Run one layer on the hidden states of the previous one, quantize it, leave hidden states for the next."""
    source, ranks, clock, output = run.source, run.ranks, run.clock, run.output
    config, device, budget = source.config, run.job.device, Budget(**output.state["budget"])
    sequences, positions, width = shape = _shape(run, tokens)
    before, after = output.hidden(index, shape), output.hidden(index + 1, shape)
    with clock("read"):
        dense = {name: t.to(device) for name, t in source.layer(index).items()}
    count, per = sequences * positions, config.top_k
    (x_all, out), drop = token_arrays(
        [((count, width), run.job.products), ((count, width), torch.float32)], budget.states, output.partial, device
    )
    routed = Routed(
        x_all,
        torch.empty(count, per, dtype=torch.int64, device=device),
        torch.empty(count, per, dtype=torch.float32, device=device),
        out,
        drop,
        partial(make_room, drop, 0 if device != "cpu" else budget.bytes - budget.solving(config)),
        ranks.share(config.experts),
        [] if ranks.count > 1 else None,
        partial(everyone, ranks),
    )
    mine = ranks.share(sequences)
    own = [slice(mine.start + b.start, mine.start + b.stop) for b in batches(len(mine), positions)]
    with clock("attention"):
        attend_and_route(routed, dense, config, index, (before, after), own, positions)
    with clock("exchange"):
        exchange_rows(ranks, [routed.x, routed.index, routed.prob], sequences, positions, drop)
    release_memory()
    result = calibrated_layer(source, index, dense, routed, run.target, budget.experts_at_once, clock)
    with clock("exchange"):
        in_turn(ranks, out, routed.add_kept, drop)
        if ranks.count > 1:
            result.report["experts"] = [entry for part in everyone(ranks, result.report["experts"]) for entry in part]
    _gather_grid(run, result)
    with clock("write"):
        add_experts(routed, after, own, positions)
        after.flush()
    result.report["tokens"] = torch.bincount(routed.index.flatten(), minlength=config.experts).tolist()
    return result


def _polish(run: Run, text: Tokens) -> None:
    """Polish in the first rank; the others hear of every step, so that none takes it for lost."""
    if not run.first:
        while everyone(run.ranks, None)[0]:
            pass
        return

    def step(number: int, kl: float) -> None:
        everyone(run.ranks, True)
        run.on_step(number, kl)

    polish_output(run.source, run.output, text, run.job.products, PolishSettings(steps=run.job.polish), step)
    everyone(run.ranks, False)


def _config(run: Run) -> dict[str, Any]:
    """Return the config.json of the checkpoint: the source's, how it is quantized, and our marker."""
    job = run.job
    raw = {k: v for k, v in run.source.config.raw.items() if k != "quantization_config"}
    marker = {"version": __version__, "format": job.format, "method": job.method, "group_size": job.group_size}
    described = quantization_config(job.layout, job.group_size)
    if DENSE[job.dense].dtype is not None:
        # a name that runtimes do not know: vLLM would leave tensors that it does not find uninitialised
        marker, described = marker | {"dense": job.dense}, described | {"quant_method": "gptoss-quantize"}
    return raw | {"quantization_config": described, "gptoss_quantize": marker}
