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

from gptoss_quantize.api_hub import push
from gptoss_quantize.api_inputs import DTYPES, Place, Show, at_least, known, open_checkpoint, tell_notes
from gptoss_quantize.api_inputs import size as bytes_of
from gptoss_quantize.api_measure import compare, evaluate
from gptoss_quantize.api_plan import plan
from gptoss_quantize.api_quantize import SizeAsked, Watching
from gptoss_quantize.api_runtimes import export, import_checkpoint, verify
from gptoss_quantize.api_talk import generate
from gptoss_quantize.calibration.text import TextSpec, load_following, load_tokenizer, load_tokens
from gptoss_quantize.layouts import pick_layout
from gptoss_quantize.loading import load, register
from gptoss_quantize.machine import pick_device, release_memory
from gptoss_quantize.progress import phases
from gptoss_quantize.quantize.auto import settle_format
from gptoss_quantize.quantize.job import Job
from gptoss_quantize.quantize.polish import text_needed
from gptoss_quantize.quantize.ranks import joined
from gptoss_quantize.quantize.recipes import RECIPES, override
from gptoss_quantize.quantize.run import quantize_checkpoint
from gptoss_quantize.results import Quantized
from gptoss_quantize.runtimes.written import check_written
from gptoss_quantize.terminal import showing, tell

__all__ = [
    "compare",
    "evaluate",
    "export",
    "generate",
    "import_checkpoint",
    "load",
    "plan",
    "push",
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
    size: int | str | None = None,
    fit: int | str | None = None,
    context: int | None = None,
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
        format: int4, int3 or int2 (ours), mxfp4 (OpenAI's own), or auto (mxfp4 where that is exact).
        group_size: weights per scale of int4, int3 and int2, 64 (also None) or 32.
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
        size: bytes that the weight files may have, or "9.5GiB": bits per layer and projection, and the form of the
            rest, are then chosen for the least expected loss; without `format` and `dense`.
        fit: instead of a size, the memory of the card that `load` is to put it on, with one conversation's cache.
        context: the tokens of that conversation; 32,768, or what the model was made for, without it.
        resume: continue an interrupted run.
        overwrite: replace `out`, or a stale unfinished run, if it is ours.
        recipe: fields of quantize/recipes.py that differ from the method's, {"damping": 0.01} or ["damping=0.01"].
        progress: see above.
    """
    at_least(0, polish=polish)
    changes = [f"{name}={value}" for name, value in recipe.items()] if isinstance(recipe, Mapping) else list(recipe)
    asked = SizeAsked(size, fit, context)
    asked.check(format, dense)
    _, group = pick_layout(format, group_size)
    job = Job(
        dest=Path(out),
        method=method,
        recipe=override(RECIPES[known("--method", method, RECIPES)], changes),
        format=format,
        group_size=group,
        dense=dense,
        device=pick_device(device),
        dtype=DTYPES[known("--dtype", dtype, DTYPES)],
        memory=None if memory is None else bytes_of(memory, "--memory"),
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
    job = replace(job, size=asked.bytes(source.config))
    tell_notes(progress, source)
    with showing(progress) as show:
        on_grid = phases(show)("MXFP4 values: layer")
        job = settle_format(source, job, lambda done: on_grid(done, source.config.layers))
    if job.recipe.calibrated:
        tokenizer = load_tokenizer(source.side)
        calibrating = load_tokens(text, tokenizer)
        if job.polish:
            job = replace(job, polish_text=load_following(text, tokenizer, text_needed(polish, seq_len)))
    with showing(progress) as show, joined(job.device) as ranks:
        watch = Watching(progress, show, source, job, calibrating, not ranks.rank)
        if calibrating is not None and not ranks.rank:
            tell(progress, f"calibration text: {calibrating.line()}")
        job = replace(job, look=watch.look)
        watch.layer(-1)
        report = quantize_checkpoint(
            source, job, calibrating, watch.layer, watch.step, ranks, watch.sensed, watch.chosen
        )
    if not ranks.rank:
        release_memory()
        check_written(source, job.dest, awq=job.recipe.awq, polished=job.polish > 0)
    return Quantized(job.dest, report)
