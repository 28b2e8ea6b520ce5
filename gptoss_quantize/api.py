"""The public Python interface: plain values in, reports out. `import gptoss_quantize as gq` has all of it.

    import gptoss_quantize as gq

    made = gq.quantize("openai/gpt-oss-20b", "gpt-oss-20b-int4", tokens=65536, progress=True)
    found = gq.evaluate("gpt-oss-20b-int4", "openai/gpt-oss-20b")
    print(made.bits_per_weight, found["gpt-oss-20b-int4"].kl_mean)

A model is a directory or a hub name. What is refused raises `InputError`, a `ValueError` whose message says what,
where, and the remedy; it names options as the command line spells them. `progress` is a function of (phase, done,
total), True for a bar in a terminal or a notebook, or None. `dtype`, that of matrix products, is auto (what the
machine multiplies fastest), float32 or bfloat16.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gptoss_quantize import progress as steps
from gptoss_quantize.api_inputs import (
    DTYPES,
    Place,
    Places,
    Show,
    at_least,
    known,
    open_checkpoint,
    products,
    size,
    words,
)
from gptoss_quantize.api_runtimes import export, import_checkpoint, plan, verify
from gptoss_quantize.calibration.text import TextSpec, load_following, load_tokenizer, load_tokens
from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.errors import InputError
from gptoss_quantize.eval import compare as comparison
from gptoss_quantize.eval import tasks as suite
from gptoss_quantize.eval.examples import ask, continuation, load_model
from gptoss_quantize.eval.fidelity import fidelity
from gptoss_quantize.eval.profiles import Wanted, name_candidates
from gptoss_quantize.eval.report import need_matplotlib, write_report
from gptoss_quantize.loading import load, register
from gptoss_quantize.machine import pick_device, release_memory
from gptoss_quantize.quantize.formats import FORMATS
from gptoss_quantize.quantize.polish import text_needed
from gptoss_quantize.quantize.ranks import joined
from gptoss_quantize.quantize.recipes import RECIPES, override
from gptoss_quantize.quantize.run import Job, quantize_checkpoint
from gptoss_quantize.results import Comparison, Evaluation, Quantized
from gptoss_quantize.runtimes.written import check_written
from gptoss_quantize.terminal import showing

__all__ = [
    "compare",
    "evaluate",
    "export",
    "generate",
    "import_checkpoint",
    "load",
    "plan",
    "quantize",
    "register",
    "verify",
]


def quantize(
    model: Place,
    out: Place,
    method: str = "gptq",
    format: str = "int4",
    group_size: int | None = None,
    *,
    dense: str = "source",
    calibration: Place = "default",
    tokens: int = 32768,
    seq_len: int = 512,
    seed: int = 0,
    column: str | None = None,
    chat_template: bool = True,
    adapter: Place | None = None,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    memory: int | str | None = None,
    polish: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    recipe: Mapping[str, Any] | Sequence[str] = (),
    progress: Show = None,
) -> Quantized:
    """Quantize the experts of a model and write a packed checkpoint to the directory `out`.

    Args:
        model: a gpt-oss directory (bf16, fp16, fp32 or MXFP4 experts), or a hub name.
        out: the directory to write; it must not exist, or be empty.
        method: gptq, awq, awq+gptq, rtn or rtn-signed.
        format: int4 (ours), or mxfp4 (OpenAI's own layout).
        group_size: weights per scale of int4, 64 (also None) or 32.
        dense: source, or int8 for attention, embedding and head in 8 bits.
        calibration: default, a .txt, .jsonl or .parquet file, or hf:NAME[:CONFIG][@SPLIT].
        tokens: calibration tokens.
        seq_len: tokens per sequence.
        seed: of the order of documents.
        column: the column with the text or the messages.
        chat_template: whether messages are rendered as chat.
        adapter: a PEFT LoRA adapter, merged while reading.
        revision: of a hub model.
        device: auto, cpu or cuda.
        dtype: of matrix products.
        memory: bytes that the process may take, or a size such as "12GiB"; 60 % of what is free without it.
        polish: steps of end-to-end polish, on text that follows the calibration's.
        resume: continue an interrupted run.
        overwrite: replace `out`, or a stale unfinished run, if it is ours.
        recipe: fields of quantize/recipes.py that differ from the method's, {"damping": 0.01} or ["damping=0.01"].
        progress: see above.
    """
    at_least(0, polish=polish)
    changes = [f"{name}={value}" for name, value in recipe.items()] if isinstance(recipe, Mapping) else list(recipe)
    group = FORMATS[known("--format", format, FORMATS)].group_size if group_size is None else group_size
    job = Job(
        dest=Path(out),
        method=method,
        recipe=override(RECIPES[known("--method", method, RECIPES)], changes),
        format=format,
        group_size=known("--group-size", group, (32, 64)),
        dense=dense,
        device=pick_device(device),
        dtype=DTYPES[known("--dtype", dtype, DTYPES)],
        memory=None if memory is None else size(memory, "--memory"),
        polish=polish,
        resume=resume,
        overwrite=overwrite,
    )
    text = TextSpec(
        source=str(calibration),
        column=column,
        tokens=tokens,
        seq_len=seq_len,
        seed=seed,
        chat_template=chat_template,
    )
    source, calibrating = open_checkpoint(model, adapter, revision), None
    if job.recipe.calibrated:
        tokenizer = load_tokenizer(source.path)
        calibrating = load_tokens(text, tokenizer)
        if polish:
            job = replace(job, polish_text=load_following(text, tokenizer, text_needed(polish, seq_len)))
    with showing(progress) as show, joined(job.device) as ranks:
        layers, phase = source.config.layers, f"{method} {format} group {group}: layer"
        show(phase, 0, layers)
        report = quantize_checkpoint(
            source,
            job,
            calibrating,
            lambda index: show(phase, index + 1, layers),
            lambda step, kl: show(f"polish: step (KL {kl:.4f})", step, polish),
            ranks,
        )
    if not ranks.rank:
        release_memory()
        check_written(source, job.dest, awq=job.recipe.awq, polished=polish > 0)
    return Quantized(job.dest, report)


def evaluate(
    candidates: Places,
    baseline: Place,
    *,
    text: Place = "heldout",
    tokens: int | None = None,
    seq_len: int = 512,
    column: str | None = None,
    chat_template: bool = True,
    adapter: Place | None = None,
    revision: str | None = None,
    dtype: str = "float32",
    progress: Show = None,
) -> Evaluation:
    """Compare checkpoints with the unquantized model on text: perplexity, KL divergence, top-1 agreement.

    Args:
        candidates: one checkpoint, several (named by their directories), or {name: checkpoint}.
        baseline: the unquantized model, a directory or hub name.
        text: heldout, a .txt, .jsonl or .parquet file, or hf:NAME.
        tokens: the token budget; all of the text without it.
        adapter: a PEFT LoRA adapter of the baseline.
        seq_len, column, chat_template, revision, dtype, progress: as for `quantize`.
    """
    spec = TextSpec(
        source=str(text), column=column, tokens=tokens, seq_len=seq_len, chat_template=chat_template, shuffle=False
    )
    base = open_checkpoint(baseline, adapter, revision)
    opened = {name: Checkpoint(path) for name, path in name_candidates(candidates).items()}
    with showing(progress) as show:
        return Evaluation(fidelity(base, opened, spec, products(dtype), show))


def compare(
    candidates: Places,
    baseline: Place,
    out: Place,
    *,
    text: Place | Sequence[Place] = "heldout",
    tasks: str | Sequence[str] = "offline",
    profile: str = "full",
    text_tokens: int | None = None,
    seq_len: int = 512,
    column: str | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    apply_chat_template: bool = False,
    margin: float = 2.0,
    expert_tokens: int | None = None,
    examples: int | None = None,
    adapter: Place | None = None,
    revision: str | None = None,
    dtype: str = "float32",
    command: str = "",
    progress: Show = None,
) -> Comparison:
    """Compare checkpoints with the unquantized model: texts, tasks, experts, examples, cost; write a report.

    Into `out` go report.html, report.json, README.md and the tasks. What was computed stays in `out`/cache: a run
    that was interrupted, or that has one more candidate, computes what is missing. Needs the extra `eval`.

    Args:
        candidates: as for `evaluate`.
        baseline: the unquantized model, a directory or hub name.
        out: the directory of the report.
        text: heldout, a file or hf:NAME, or several of them; conversations score answers.
        tasks: offline (packaged), names of lm-eval, several of them (also with commas between), or none.
        profile: how much is measured where nothing else says it; quick (300 items, 2,048 tokens) or full.
        text_tokens: the token budget of each text.
        limit: items per task.
        num_fewshot: examples before each question.
        apply_chat_template: ask as a user's turn.
        margin: loss of accuracy that does not matter, in points.
        expert_tokens: tokens for the expert section; 0 leaves it out.
        examples: example prompts, 0 to 3.
        adapter: a PEFT LoRA adapter of the baseline.
        command: what the report says it was made by.
        seq_len, column, revision, dtype, progress: as for `quantize`.
    """
    at_least(2, text_tokens=text_tokens)
    at_least(1, limit=limit)
    at_least(0, num_fewshot=num_fewshot, margin=margin, expert_tokens=expert_tokens, examples=examples)
    names = words(tasks)
    wanted = Wanted(
        texts=[str(text)] if isinstance(text, str | Path) else list(map(str, text)),
        tasks=[] if names == ["none"] else names,
        profile=profile,
        dtype=products(dtype),
        text_tokens=text_tokens,
        seq_len=seq_len,
        column=column,
        limit=limit,
        num_fewshot=num_fewshot,
        apply_chat_template=apply_chat_template,
        margin=margin,
        expert_tokens=expert_tokens,
        examples=examples,
    ).settings()
    need_matplotlib()
    base, dest = open_checkpoint(baseline, adapter, revision), Path(out)
    opened = {name: Checkpoint(path) for name, path in name_candidates(candidates).items()}
    if dest.exists() and not dest.is_dir():
        raise InputError(f"{dest}: is a file; give a directory for the report (--report)")
    dest.mkdir(parents=True, exist_ok=True)
    with showing(progress) as show:
        record = comparison.compare(base, opened, wanted, dest, steps.counters(show)) | {"command": command}
    write_report(record, dest)
    if wanted.tasks is not None:
        suite.export(dest / "tasks")
    return Comparison(dest, record)


def generate(
    model: Place, prompt: str, *, max_new_tokens: int = 60, raw: bool = False, dtype: str = "bfloat16"
) -> str:
    """Return the greedy answer of a checkpoint; int4 experts of ours stay packed in memory.

    Args:
        model: an int4 checkpoint of ours, or any gpt-oss directory.
        prompt: the user's message, in the chat template (whose date is fixed), or plain text when `raw`.
        max_new_tokens: how long the answer may be.
        raw: continue the prompt as text.
        dtype: of activations and of what is not packed.
    """
    path = Path(model)
    at_least(1, max_new_tokens=max_new_tokens)
    tokenizer = load_tokenizer(path)
    if raw and not prompt:
        raise InputError("the prompt is empty, and --raw adds nothing to it; give at least one word (--prompt)")
    if not raw and tokenizer.chat_template is None:
        raise InputError(f"{path}: its tokenizer has no chat template; continue the prompt as plain text with --raw")
    inputs = ask(prompt, tokenizer, "--prompt", raw=raw)
    ids = continuation(load_model(Checkpoint(path), products(dtype)), inputs, max_new_tokens)
    return str(tokenizer.decode(ids, skip_special_tokens=True))
