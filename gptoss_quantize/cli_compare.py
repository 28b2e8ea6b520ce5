"""The command `compare`: its options, what the two profiles stand for, and what is printed at the end."""

import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from gptoss_quantize.errors import InputError
from gptoss_quantize.terminal import Dtype, console, progress

STYLES = {"equivalent": "green", "uncertain": "yellow", "unmeasured": "yellow", "worse": "red", "broken": "bold red"}


class Profile(StrEnum):
    """How much is measured where no option says it."""

    quick = "quick"
    full = "full"


# items in all, tokens per text, tokens for the experts, example prompts, new tokens
PROFILES: dict[Profile, tuple[int | None, int, int, int, int]] = {
    Profile.quick: (300, 2048, 1024, 1, 24),
    Profile.full: (None, 8192, 2048, 3, 40),
}


def _profile(profile: Profile, tasks: int, limit: int | None) -> tuple[int | None, int, int, int, int]:
    """Return (items per task, tokens per text, expert tokens, prompts, new tokens)."""
    items, text, experts, prompts, new = PROFILES[profile]
    if limit is None and items is not None and tasks:
        limit = max(1, -(-items // tasks))
    return limit, text, experts, prompts, new


def _candidates(paths: list[Path]) -> dict[str, Path]:
    """Return a short name for every candidate: the directory's, or the whole path where two are alike."""
    names = [path.resolve().name for path in paths]
    if len({path.resolve() for path in paths}) != len(paths):
        raise InputError("a candidate is named twice; give every checkpoint once")
    return {
        str(path) if names.count(name) > 1 or name == "baseline" else name: path
        for name, path in zip(names, paths, strict=True)
    }


def compare(
    candidates: Annotated[list[Path], typer.Argument(help="Checkpoints to judge: int4, bf16 or MXFP4.")],
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
        Profile, typer.Option(help="quick: 300 items, 2,048 tokens. full: all, 8,192.")
    ] = Profile.full,
    margin: Annotated[float, typer.Option(min=0, help="Loss of accuracy that does not matter, in points.")] = 2.0,
    expert_tokens: Annotated[int | None, typer.Option(min=0, help="Tokens for the expert section; 0: none.")] = None,
    examples: Annotated[int | None, typer.Option(min=0, max=3, help="Example prompts.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="PEFT LoRA adapter of the baseline.")] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a hub model.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of matrix products.")] = Dtype.float32,
) -> None:
    """Compare checkpoints with the unquantized model and write a report that opens in a browser.

    Run again to continue an interrupted comparison or to add a checkpoint: what was computed is kept.
    """
    from gptoss_quantize.api import DTYPES, compare_models
    from gptoss_quantize.calibration.text import TextSpec
    from gptoss_quantize.eval.compare import Settings
    from gptoss_quantize.eval.examples import PROMPTS
    from gptoss_quantize.eval.tasks import TaskSettings, expand
    from gptoss_quantize.machine import compute_dtype

    names = [] if tasks == "none" else expand([name.strip() for name in tasks.split(",") if name.strip()])
    limit, budget, routed, prompts, new_tokens = _profile(profile, len(names), limit)
    settings = Settings(
        texts=tuple(
            TextSpec(
                source=source,
                column=column,
                tokens=text_tokens or max(budget, seq_len),
                seq_len=seq_len,
                shuffle=False,
            )
            for source in text or ["heldout"]
        ),
        tasks=TaskSettings(
            names=tuple(names), limit=limit, num_fewshot=num_fewshot, apply_chat_template=apply_chat_template
        )
        if names
        else None,
        dtype=DTYPES[dtype.value] or compute_dtype("cpu"),
        expert_tokens=routed if expert_tokens is None else expert_tokens,
        prompts=PROMPTS[: prompts if examples is None else examples],
        new_tokens=new_tokens,
        margin=margin / 100,
    )
    with progress() as bar:
        record = compare_models(
            baseline,
            _candidates(candidates),
            settings,
            report,
            adapter=adapter,
            revision=revision,
            command=shlex.join(["gptoss-quantize", *sys.argv[1:]]),
            bar=bar,
        )
    print_verdicts(record, report)


def print_verdicts(record: dict[str, Any], report: Path) -> None:
    """Print one line per candidate, and where the report is."""
    for words in record.get("warnings", []):
        console.print(f"[bold red]warning:[/bold red] {escape(words)}", soft_wrap=True, highlight=False)
    for entry in record["candidates"]:
        style = STYLES[entry["verdict"]["level"]]
        console.print(
            f"[{style}]{escape(entry['name'])}[/{style}]: {escape(entry['verdict']['sentence'])}", highlight=False
        )
    console.print(f"{report / 'report.html'} written, {record['seconds']:.0f} s")
