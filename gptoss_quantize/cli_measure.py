"""The commands that measure a checkpoint against its baseline: evaluate and compare."""

import shlex
import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gptoss_quantize import cli_early as early
from gptoss_quantize.cli_options import (
    AdapterOpt,
    ChatOpt,
    ColumnOpt,
    Dtype,
    DtypeOpt,
    ModelCardOpt,
    RevisionOpt,
    SeqLenOpt,
    TextOpt,
)
from gptoss_quantize.cli_words import next_step, number, starting
from gptoss_quantize.terminal import console

STYLES = {"equivalent": "green", "uncertain": "yellow", "unmeasured": "yellow", "worse": "red", "broken": "bold red"}


class Profile(StrEnum):
    """How much is measured where no option says it."""

    quick = "quick"
    full = "full"


def evaluate(
    candidate: Annotated[
        Path, typer.Argument(help="Checkpoint to judge: int4, bf16 or MXFP4; a directory or hub name.")
    ],
    baseline: Annotated[str, typer.Option(help="The unquantized model, a directory or hub name.")],
    text: TextOpt = "heldout",
    tokens: Annotated[int | None, typer.Option(min=2, help="Token budget; all of the text without it.")] = None,
    seq_len: SeqLenOpt = 512,
    column: ColumnOpt = None,
    chat_template: ChatOpt = True,
    adapter: AdapterOpt = None,
    revision: RevisionOpt = None,
    device: Annotated[
        str, typer.Option(help="auto, cpu or cuda; files are read and unpacked on the processor.")
    ] = "auto",
    dtype: DtypeOpt = Dtype.float32,
    model_card: ModelCardOpt = False,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the numbers to this file.")] = None,
) -> None:
    """Compare CANDIDATE with the unquantized model: perplexity, KL divergence, top-1 agreement."""
    early.check_file(json_out, "--json")
    early.check_input(baseline, adapter, revision, "--baseline")
    early.check_input(candidate)
    early.check_text(text, tokens, seq_len)
    early.check_numbers(device=device)
    starting()
    from gptoss_quantize import api

    found = api.evaluate(
        {str(candidate): candidate},
        baseline,
        text=text,
        tokens=tokens,
        seq_len=seq_len,
        column=column,
        chat_template=chat_template,
        adapter=adapter,
        revision=revision,
        device=device,
        dtype=dtype.value,
        model_card=model_card,
        progress=True,
    )
    early.write_file(json_out, found.report)
    (result,) = found.report["results"].values()
    table = Table(title=escape(f"{candidate} against {baseline}, {result['tokens']} tokens"))
    table.add_column("measure")
    table.add_column("value", justify="right")
    table.add_column("standard error", justify="right")
    for name in ("baseline_perplexity", "perplexity", "kl_mean", "kl_median", "kl_p99", "top1_agreement"):
        error = result.get(name + "_se")
        table.add_row(name, number(result[name]), "" if error is None else number(error))
    print_warnings(found.report)
    Console(emoji=False).print(table)
    next_step("compare", candidate, "--baseline", baseline, "--report", "report", "--profile", "quick")


def print_warnings(record: dict[str, Any]) -> None:
    """Print what makes the numbers of a record doubtful."""
    for words in record["warnings"]:
        console.print(f"[bold red]warning:[/bold red] {escape(words)}", highlight=False)


def compare(
    candidates: Annotated[
        list[Path], typer.Argument(help="Checkpoints to judge: int4, bf16 or MXFP4; directories or hub names.")
    ],
    baseline: Annotated[str, typer.Option(help="The unquantized model, a directory or hub name.")],
    report: Annotated[Path, typer.Option(help="Directory for report.html, report.json, README.md and the cache.")],
    text: Annotated[
        list[str] | None,
        typer.Option(help="heldout, a file or hf:NAME; several times; conversations score answers."),
    ] = None,
    text_tokens: Annotated[int | None, typer.Option(min=2, help="Token budget of each text.")] = None,
    seq_len: Annotated[int, typer.Option("--seq-len", min=2, help="Tokens per sequence of raw text.")] = 512,
    column: Annotated[str | None, typer.Option(help="Column with the text or the messages.")] = None,
    tasks: Annotated[
        str, typer.Option(help="offline (packaged), lm-eval names with commas between, or none.")
    ] = "offline",
    limit: Annotated[int | None, typer.Option(min=1, help="Items per task.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Examples before each question.")] = None,
    apply_chat_template: Annotated[bool, typer.Option("--apply-chat-template", help="Ask as a user's turn.")] = False,
    profile: Annotated[
        Profile, typer.Option(case_sensitive=False, help="quick: 300 items, 2,048 tokens. full: all, 8,192.")
    ] = Profile.full,
    margin: Annotated[float, typer.Option(min=0, help="Loss of accuracy that does not matter, in points.")] = 2.0,
    expert_tokens: Annotated[int | None, typer.Option(min=0, help="Tokens for the expert section; 0: none.")] = None,
    examples: Annotated[int | None, typer.Option(min=0, max=3, help="Example prompts.")] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="PEFT LoRA adapter of the baseline, a directory or hub name.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a hub model.")] = None,
    device: Annotated[
        str,
        typer.Option(
            help="auto, cpu or cuda, for texts, experts and tasks of choices. Example answers, tasks that generate "
            "text, and reading stay on the processor."
        ),
    ] = "auto",
    dtype: Annotated[Dtype, typer.Option(case_sensitive=False, help="Dtype of matrix products.")] = Dtype.float32,
    model_card: ModelCardOpt = False,
) -> None:
    """Compare checkpoints with the unquantized model and write a report that opens in a browser.

    Run again to continue an interrupted comparison or to add a checkpoint: what was computed is kept.
    """
    early.check_report(report, "--report")
    early.check_once(candidates)
    for path in candidates:
        early.check_input(path)
    early.check_input(baseline, adapter, revision, "--baseline")
    for source in text or []:
        early.check_text(source)
    early.check_numbers(device=device)
    from gptoss_quantize.eval.network import check_reachable

    check_reachable(name.strip() for name in tasks.split(","))
    starting()
    from gptoss_quantize import api

    done = api.compare(
        candidates,
        baseline,
        report,
        text=text or "heldout",
        tasks=tasks,
        profile=profile.value,
        text_tokens=text_tokens,
        seq_len=seq_len,
        column=column,
        limit=limit,
        num_fewshot=num_fewshot,
        apply_chat_template=apply_chat_template,
        margin=margin,
        expert_tokens=expert_tokens,
        examples=examples,
        adapter=adapter,
        revision=revision,
        device=device,
        dtype=dtype.value,
        model_card=model_card,
        command=shlex.join(["gptoss-quantize", *sys.argv[1:]]),
        progress=True,
    )
    print_verdicts(done.report, report)
    next_step(*after_comparing(done.report, baseline, report, adapter))


def after_comparing(record: dict[str, Any], baseline: str, report: Path, adapter: Path | None) -> list[str]:
    """Return the command that what was found asks for: use the one to ship, or settle why there is none."""
    from gptoss_quantize.eval.ranking import rank

    found = rank(record["candidates"], record["suspect"])
    path = {entry["name"]: entry["path"] for entry in record["candidates"]}
    first = next(e for e in record["candidates"] if e["name"] == found["order"][0]["name"])
    merged = [] if adapter is None else ["--adapter", str(adapter)]
    if found["ship"] is not None:
        return ["chat", path[found["ship"]]]
    if record["suspect"] is not None:
        return ["generate", baseline, "--prompt", "Why is the sky blue?"]
    if first["verdict"]["level"] in ("unmeasured", "uncertain"):
        tasks = record["settings"]["tasks"]
        # every packaged question; where they were all asked, others' too. What is computed already is kept
        more = ["--tasks", "offline,arc_easy"] if tasks is not None and tasks["limit"] is None else []
        return ["compare", *path.values(), "--baseline", baseline, *merged, "--report", str(report), *more]
    if first["verdict"]["level"] == "broken":
        return ["verify", first["path"], "--baseline", baseline]
    return ["quantize", baseline, f"{Path(first['path']).name}-more-text", *merged, "--tokens", "131072"]


def print_verdicts(record: dict[str, Any], report: Path) -> None:
    """Print one line per candidate, and where the report is."""
    print_warnings(record)
    for entry in record["candidates"]:
        style = STYLES[entry["verdict"]["level"]]
        line = f"[{style}]{escape(entry['name'])}[/{style}]: {escape(entry['verdict']['sentence'])}"
        console.print(line, highlight=False)
    console.print(f"{report / 'report.html'} written, {record['seconds']:.0f} s", soft_wrap=True)


COMMANDS: dict[str, Callable[..., Any]] = {"evaluate": evaluate, "compare": compare}
