"""The public functions that measure a checkpoint: evaluate, compare."""

import os
from collections.abc import Sequence
from pathlib import Path

from gptoss_quantize import __version__
from gptoss_quantize import progress as steps
from gptoss_quantize.api_inputs import Place, Places, Show, at_least, open_checkpoint, products, tell_notes, words
from gptoss_quantize.calibration.text import TextSpec
from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.errors import InputError
from gptoss_quantize.eval import compare as comparison
from gptoss_quantize.eval import suite
from gptoss_quantize.eval.fidelity import fidelity
from gptoss_quantize.eval.model_card import compared, evaluated
from gptoss_quantize.eval.network import check_reachable
from gptoss_quantize.eval.profiles import Wanted, name_candidates
from gptoss_quantize.eval.report import write_report
from gptoss_quantize.machine import fitting, pick_device
from gptoss_quantize.model_card import hub_name, put_results
from gptoss_quantize.results import Comparison, Evaluation
from gptoss_quantize.terminal import showing


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
    device: str = "auto",
    dtype: str = "float32",
    model_card: bool = False,
    progress: Show = None,
) -> Evaluation:
    """Compare checkpoints with the unquantized model on text: perplexity, KL divergence, top-1 agreement.

    Args:
        candidates: one checkpoint, several (named by their directories), or {name: checkpoint}; hub names too.
        baseline: the unquantized model, a directory or hub name.
        text: heldout, a .txt, .jsonl or .parquet file, or hf:NAME.
        tokens: the token budget; all of the text without it.
        adapter: a PEFT LoRA adapter of the baseline, a directory or hub name.
        device: auto, cpu or cuda: of all layers and the head; files are read and unpacked on the processor.
        model_card: put the numbers into the candidates' README.md.
        seq_len, column, chat_template, revision, dtype, progress: as for `quantize`.
    """
    spec = TextSpec(
        source=str(text), column=column, tokens=tokens, seq_len=seq_len, chat_template=chat_template, shuffle=False
    )
    place = pick_device(device)
    base = open_checkpoint(baseline, adapter, revision)
    opened = _open(candidates, model_card)
    tell_notes(progress, base, *opened.values())
    with showing(progress) as show, fitting(place, "take fewer --tokens"):
        record = fidelity(base, opened, spec, products(dtype, place), show, place)
    if model_card:
        for name, result in record["results"].items():
            put_results(opened[name].path, evaluated(result, str(base.path), spec.source, __version__))
    return Evaluation(record)


def _open(candidates: Places, model_card: bool) -> dict[str, Checkpoint]:
    """Return name -> checkpoint; InputError for one whose card is to be written and cannot be."""
    opened = {name: open_checkpoint(path) for name, path in name_candidates(candidates).items()}
    for checkpoint in opened.values():
        if model_card and (hub_name(checkpoint.path) or not os.access(checkpoint.path, os.W_OK)):
            raise InputError(
                f"{checkpoint.path}: no place for a model card (it is the hub's cache, or may not be written); copy "
                "the directory, or leave --model-card out"
            )
    return opened


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
    device: str = "auto",
    dtype: str = "float32",
    model_card: bool = False,
    command: str = "",
    progress: Show = None,
) -> Comparison:
    """Compare checkpoints with the unquantized model: texts, tasks, experts, examples, cost; write a report.

    Into `out` go report.html, report.json, README.md and the tasks. What was computed stays in `out`/cache: a run
    that was interrupted, or that has one more candidate, computes what is missing. Tasks need the extra `eval`.

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
        adapter: a PEFT LoRA adapter of the baseline, a directory or hub name.
        device: auto, cpu or cuda: of texts, experts and tasks of choices. On the processor remain the reading and
            unpacking of files, example answers, and tasks that generate text. On a card only texts were run.
        model_card: put each candidate's numbers into its own README.md too.
        command: what the report says it was made by.
        seq_len, column, revision, dtype, progress: as for `quantize`.
    """
    at_least(2, text_tokens=text_tokens)
    at_least(1, limit=limit)
    at_least(0, num_fewshot=num_fewshot, margin=margin, expert_tokens=expert_tokens, examples=examples)
    names, place = words(tasks), pick_device(device)
    check_reachable(names)
    wanted = Wanted(
        texts=[str(text)] if isinstance(text, str | Path) else list(map(str, text)),
        tasks=[] if names == ["none"] else names,
        profile=profile,
        dtype=products(dtype, place),
        device=place,
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
    base, dest = open_checkpoint(baseline, adapter, revision), Path(out)
    opened = _open(candidates, model_card)
    tell_notes(progress, base, *opened.values())
    if dest.exists() and not dest.is_dir():
        raise InputError(f"{dest}: is a file; give a directory for the report (--report)")
    dest.mkdir(parents=True, exist_ok=True)
    with showing(progress) as show, fitting(place, "take fewer --text-tokens"):
        record = comparison.compare(base, opened, wanted, dest, steps.counters(show)) | {"command": command}
    write_report(record, dest)
    if model_card:
        for entry in record["candidates"]:
            put_results(opened[entry["name"]].path, compared(record, entry))
    if wanted.tasks is not None:
        suite.export(dest / "tasks")
    return Comparison(dest, record)
