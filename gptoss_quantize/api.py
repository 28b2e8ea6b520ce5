"""What the commands do, without the command line: open, run, measure. Also the public Python interface.

Every function takes plain values and a rich progress bar, and raises InputError for what it refuses.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.progress import Progress

from gptoss_quantize.adapter import Adapter
from gptoss_quantize.architectures import SIZES, gptoss_config
from gptoss_quantize.calibration.text import TextSpec, Tokens, load_following, load_tokenizer, load_tokens
from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.config import parse_config
from gptoss_quantize.errors import InputError
from gptoss_quantize.eval import compare as comparison
from gptoss_quantize.eval.divergence import check_pair, evaluate
from gptoss_quantize.eval.identity import pair_warnings
from gptoss_quantize.eval.report import need_matplotlib, write_report
from gptoss_quantize.eval.tasks import export
from gptoss_quantize.eval.whole import whole_model
from gptoss_quantize.hub import resolve
from gptoss_quantize.machine import compute_dtype, pick_device, release_memory
from gptoss_quantize.quantize.awq import FOLDED
from gptoss_quantize.quantize.budget import memory_plan
from gptoss_quantize.quantize.estimate import estimate
from gptoss_quantize.quantize.job import Job
from gptoss_quantize.quantize.polish import FINAL, NORMS, text_needed
from gptoss_quantize.quantize.ranks import joined
from gptoss_quantize.quantize.recipes import RECIPES
from gptoss_quantize.quantize.run import quantize_checkpoint
from gptoss_quantize.runtimes.check_file import check_file
from gptoss_quantize.runtimes.readback import changed_outside_experts, summary
from gptoss_quantize.runtimes.verify import Job as VerifyJob
from gptoss_quantize.runtimes.verify import spread, verify
from gptoss_quantize.sanity import look, suspicion
from gptoss_quantize.shards import DTYPES as SAFETENSORS_DTYPES
from gptoss_quantize.sizes import PlanRequest, disk, fits, serve_command, shard_tensors, sparsity
from gptoss_quantize.terminal import console

DTYPES: dict[str, torch.dtype | None] = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


def open_checkpoint(model: str, adapter: Path | None = None, revision: str | None = None) -> Checkpoint:
    """Return a checked checkpoint for a directory or hub name, with an optional LoRA adapter."""
    checkpoint = Checkpoint(resolve(model, revision), None if adapter is None else Adapter.open(adapter))
    say(checkpoint)
    return checkpoint


def say(checkpoint: Checkpoint) -> None:
    """Show on stderr what was read otherwise than the folder says at first sight."""
    for note in checkpoint.notes:
        console.print(f"[yellow]note[/yellow] {escape(note)}")


def quantize_model(
    model: str,
    text: TextSpec,
    job: Job,
    *,
    adapter: Path | None = None,
    revision: str | None = None,
    bar: Progress,
) -> dict[str, Any]:
    """Quantize a model into `job.dest` and return the report that is also written there.

    What was written is opened once more, and everything outside the experts compared with the source.
    """
    job = replace(job, device=pick_device(job.device))
    source = open_checkpoint(model, adapter, revision)
    tokens = None
    if job.recipe.calibrated:
        tokenizer = load_tokenizer(source.side)
        tokens = load_tokens(text, tokenizer)
        if job.polish:
            job = replace(job, polish_text=load_following(text, tokenizer, text_needed(job.polish, text.seq_len)))
    job = replace(job, look=lambda: _look(source, tokens, job.dtype or compute_dtype("cpu"), bar))
    task = bar.add_task(f"{job.method} {job.format} group {job.group_size}: layer", total=source.config.layers)
    polish = bar.add_task("polish: step", total=job.polish, visible=job.polish > 0)
    with joined(job.device) as ranks:
        report = quantize_checkpoint(
            source,
            job,
            tokens,
            lambda index: bar.update(task, completed=index + 1),
            lambda step, kl: bar.update(polish, completed=step, description=f"polish, KL {kl:.4f}: step"),
            ranks,
        )
    if ranks.rank:
        return report
    release_memory()
    may_change = (FOLDED if job.recipe.awq else ()) + ((*NORMS, FINAL) if job.polish else ())
    changed = summary(changed_outside_experts(source, Checkpoint(job.dest), may_change))
    if changed["different"]:
        raise RuntimeError(
            f"{job.dest}: {changed['different']} tensors outside the experts are not the source's, first "
            f"{', '.join(changed['first'])}; a failing disk, or a bug of ours: please report it"
        )
    return report


def _look(source: Checkpoint, tokens: Tokens | None, dtype: torch.dtype, bar: Progress) -> dict[str, Any] | None:
    """Return what the source makes of its first thousand tokens, and say loudly where that is nothing."""
    try:
        tokenizer = load_tokenizer(source.side)
        ids = load_tokens(TextSpec(tokens=1024, seq_len=256), tokenizer).ids if tokens is None else tokens.ids
    except InputError as error:
        if tokens is not None:
            raise
        # a method that needs no text also needs no tokenizer
        bar.console.print(f"[yellow]the model was not tried on text[/yellow]: {escape(str(error))}")
        return None
    if int(ids.max()) >= source.config.vocab:
        return None
    task = bar.add_task("can it predict text? layer", total=source.config.layers)
    found = look(source, tokenizer, ids, dtype, lambda index: bar.update(task, completed=index + 1))
    if found["suspect"]:
        bar.console.print(f"[bold red]SUSPECT:[/bold red] {escape(f'{source.path}: ' + found['suspect'])}")
    return found


def evaluate_models(
    baseline: str,
    candidates: dict[str, Path],
    *,
    text: TextSpec,
    adapter: Path | None = None,
    revision: str | None = None,
    dtype: str = "float32",
    bar: Progress,
) -> dict[str, Any]:
    """Return {"text", "dtype", "seconds", "results": {name: summary}}, all candidates on the baseline's tokens."""
    base = open_checkpoint(baseline, adapter, revision)
    opened = {name: Checkpoint(path) for name, path in candidates.items()}
    tokenizer = load_tokenizer(base.side)
    tokens = load_tokens(text, tokenizer)
    for name, candidate in opened.items():
        if load_tokenizer(candidate.side).get_vocab() != tokenizer.get_vocab():
            raise InputError(
                f"{name}: its tokenizer differs from the baseline's; the same text is not the same tokens"
            )
    started = time.perf_counter()
    task = bar.add_task("evaluate: layer", total=base.config.layers * (1 + len(opened)))
    resolved = DTYPES[dtype] or compute_dtype("cpu")
    results = evaluate(base, list(opened.values()), tokens.ids, resolved, lambda: bar.advance(task))
    first = results[0]
    suspect = suspicion(first["baseline_perplexity"], first["tokens"], base.config.vocab)
    warnings = [words for name, candidate in opened.items() for words in pair_warnings(base, candidate, name)]
    return {
        "text": tokens.record(),
        "dtype": str(resolved).removeprefix("torch."),
        "seconds": round(time.perf_counter() - started, 1),
        "suspect": suspect,
        "warnings": warnings + ([f"baseline {base.path}: SUSPECT: {suspect}"] if suspect else []),
        "results": dict(zip(opened, results, strict=True)),
    }


def compare_models(
    baseline: str,
    candidates: dict[str, Path],
    settings: comparison.Settings,
    dest: Path,
    *,
    adapter: Path | None = None,
    revision: str | None = None,
    command: str = "",
    bar: Progress,
) -> dict[str, Any]:
    """Compare candidates with their baseline; write report.html, report.json, README.md and the tasks into `dest`.

    Return the record of report.json. What was computed stays in `dest`/cache, for the next run.
    """
    need_matplotlib()
    base = open_checkpoint(baseline, adapter, revision)
    opened = {name: Checkpoint(path) for name, path in candidates.items()}
    if dest.exists() and not dest.is_dir():
        raise InputError(f"{dest}: is a file; give a directory for the report (--report)")
    dest.mkdir(parents=True, exist_ok=True)

    def start(what: str, steps: int) -> Callable[[], None]:
        task = bar.add_task(what, total=steps)
        return lambda: bar.advance(task)

    record = comparison.compare(base, opened, settings, dest, start) | {"command": command}
    write_report(record, dest)
    if settings.tasks is not None:
        export(dest / "tasks")
    return record


def verify_checkpoint(
    checkpoint: Path,
    baseline: str | None,
    runtimes: tuple[str, ...],
    *,
    shape: tuple[int, int, int],
    text: str = "heldout",
    progress: Callable[[str], Callable[[int, int], None]],
    **options: Any,
) -> list[dict[str, Any]]:
    """Return the lines of `verify` for a checkpoint; `shape` is (sequences, tokens each, positions compared in each).

    `options` are fields of `runtimes.verify.Job`: work, llama_server, exact.
    """
    sequences, seq_len, count = shape
    opened = Checkpoint(checkpoint)
    tokenizer = load_tokenizer(opened.side)
    spec = TextSpec(source=text, tokens=sequences * seq_len, seq_len=seq_len, shuffle=False)
    ids = load_tokens(spec, tokenizer).ids
    job = VerifyJob(
        checkpoint=opened,
        baseline=None if baseline is None else open_checkpoint(baseline),
        ids=ids,
        positions=spread(seq_len, count),
        texts=[str(tokenizer.decode(row)) for row in ids],
        progress=progress,
        **options,
    )
    if job.baseline is not None:
        check_pair(job.baseline, opened, ids)
    return [row.record() for row in [*check_file(job), *verify(job, runtimes)]]


def plan_model(wanted: PlanRequest) -> dict[str, Any]:
    """Return what quantizing a model takes and gives, before it is run; the model may be a published shape's name."""
    for option, value, known in (
        ("--method", wanted.method, list(RECIPES)),
        ("--group-size", wanted.group_size, [32, 64]),
        ("--dense", wanted.dense, ["source", "int8"]),
    ):
        if value not in known:
            raise InputError(f"{option} {value}: expected one of {', '.join(map(str, known))}")
    source = None if wanted.model in SIZES else open_checkpoint(wanted.model)
    config = parse_config(gptoss_config(wanted.model), wanted.model) if source is None else source.config
    names = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
    stored = set() if source is None else set(source.names())
    if source is not None and source.dense_format == "int8":
        wanted = replace(wanted, dense="int8")

    def dense_dtype(name: str) -> str:
        return names[source.info(name).dtype] if source is not None and name in stored else "BF16"

    group_size, compute = wanted.group_size, compute_dtype("cpu")
    record: dict[str, Any] = {
        **asdict(wanted),
        "source_is_mxfp4": source is None or source.expert_format == "mxfp4",
        "disk": disk(shard_tensors(config, group_size, wanted.dense, dense_dtype)),
        "card": fits(config, group_size, wanted.dense, wanted.gpu_memory, wanted.contexts, dense_dtype),
        "sparsity": sparsity(wanted.model, config),
        "serve": serve_command("OUT", config, group_size, wanted.gpu_memory, wanted.contexts[-1], dense_dtype),
        "memory": memory_plan(config, wanted.tokens, compute),
    }
    if wanted.measure:
        record["time"] = estimate(config, RECIPES[wanted.method], group_size, wanted.tokens, wanted.seq_len, compute)
    return record


def generate_text(model: Path, prompt: str, *, max_new_tokens: int, raw: bool, dtype: str) -> str:
    """Return the greedy continuation of a prompt; int4 checkpoints of ours are loaded packed."""
    tokenizer = load_tokenizer(model)
    if raw and not prompt:
        raise InputError("the prompt is empty, and --raw adds nothing to it; give at least one word (--prompt)")
    if not raw and tokenizer.chat_template is None:
        raise InputError(f"{model}: its tokenizer has no chat template; continue the prompt as plain text with --raw")
    checkpoint = Checkpoint(model)
    say(checkpoint)
    resolved = DTYPES[dtype] or compute_dtype("cpu")
    network: Any = whole_model(checkpoint, resolved)
    if raw:
        inputs = tokenizer(prompt, return_tensors="pt")
    else:
        messages = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    with torch.inference_mode():
        out = network.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
    return str(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
