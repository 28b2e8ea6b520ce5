"""The command line: parse, call the function of `api` with that name, print.

Exit codes: 0 done, 1 refused input (one message, no traceback), 2 usage error, 130 interrupted.
"""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from gptoss_quantize import __version__, cli_hub, cli_measure, cli_models, cli_runtimes, cli_sizes, cli_talk
from gptoss_quantize import cli_early as early
from gptoss_quantize.cli_exits import StoppedError, one_message
from gptoss_quantize.cli_help import Command, with_log_format
from gptoss_quantize.cli_options import (
    AdapterOpt,
    ChatOpt,
    ColumnOpt,
    Dense,
    DeviceOpt,
    Dtype,
    DtypeOpt,
    Format,
    Group,
    Method,
    ModelArg,
    RevisionOpt,
    SeedOpt,
    SeqLenOpt,
)
from gptoss_quantize.cli_words import next_step, print_quantized, starting
from gptoss_quantize.files import check_begin
from gptoss_quantize.quantize.recipes import format_of
from gptoss_quantize.terminal import log_session


class Commands(typer.core.TyperGroup):
    """The group of our commands."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise StoppedError from None


app = typer.Typer(
    name="gptoss-quantize",
    cls=Commands,
    help="Quantize gpt-oss experts to int4 with AWQ and GPTQ, and measure what it cost.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def print_version(asked: bool) -> None:
    """Print the version and stop, when asked."""
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def root(
    # a callback of the option, for this function is only called when a command follows
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=print_version, is_eager=True)
    ] = False,
) -> None:
    """Quantize gpt-oss experts to int4 with AWQ and GPTQ, and measure what it cost."""


def first_rank() -> bool:
    """Return whether this process is the one that speaks, where a launcher started several."""
    return os.environ.get("RANK", "0") == "0"


def quantize(
    model: ModelArg,
    out: Annotated[Path, typer.Argument(help="Directory to write; must not exist.")],
    method: Annotated[
        Method, typer.Option(case_sensitive=False, help="gptq is the good one, awq the fast one, rtn the yardstick.")
    ] = Method.gptq,
    target: Annotated[
        Format,
        typer.Option(
            "--format",
            case_sensitive=False,
            help="int4, int3, int2: ours. mxfp4: OpenAI's own. auto: mxfp4 where that keeps every expert exactly.",
        ),
    ] = Format.int4,
    bits: Annotated[
        int | None, typer.Option(help="4, 3 or 2: short for --format int4, int3, int2. Below 4: our loader only.")
    ] = None,
    group_size: Annotated[
        Group | None,
        typer.Option(
            case_sensitive=False, help="Not for mxfp4. 64 (default): int4 has 4.25 bits. 32: 4.5, tensor parallel 2."
        ),
    ] = None,
    dense: Annotated[
        Dense,
        typer.Option(
            case_sensitive=False, help="int8: attention, embedding and head in 8 bits too; our loader, GGUF, vLLM."
        ),
    ] = Dense.source,
    calibration: Annotated[
        str, typer.Option(help="default, a .txt/.jsonl/.parquet file, or hf:NAME[:CONFIG][@SPLIT].")
    ] = "default",
    tokens: Annotated[int, typer.Option(min=2, help="Calibration tokens.")] = 32768,
    seq_len: SeqLenOpt = 512,
    seed: SeedOpt = 0,
    column: ColumnOpt = None,
    chat_template: ChatOpt = True,
    adapter: AdapterOpt = None,
    revision: RevisionOpt = None,
    device: DeviceOpt = "auto",
    dtype: DtypeOpt = Dtype.auto,
    memory: Annotated[
        str | None,
        typer.Option(
            help="What each process may take (on a card: of its memory), such as 12GiB; by default 60 % of the free."
        ),
    ] = None,
    polish: Annotated[
        int,
        typer.Option(min=0, help="Steps of end-to-end polish of scales, biases, norms, on text after --tokens."),
    ] = 0,
    size: Annotated[
        str | None,
        typer.Option(help="Weight files of at most so much, such as 9.5GiB: bits are chosen layer by layer, 2 to 4."),
    ] = None,
    fit: Annotated[
        str | None, typer.Option(help="Memory of the card (or RAM) that is to run it, such as 12GiB; sets --size.")
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=1, help="With --fit: tokens of context that must fit too; 32768 without it.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT or a stale unfinished run.")] = False,
    recipe: Annotated[
        list[str] | None, typer.Option("--set", help="Change a recipe field, as name=value; see quantize/recipes.py.")
    ] = None,
) -> None:
    """Quantize the experts of MODEL to int4, int3, int2 or MXFP4 and write a packed checkpoint to OUT."""
    written = format_of(bits, target.value)
    early.check_input(model, adapter, revision)
    early.check_quantize(
        method=method.value,
        recipe=recipe or [],
        target=written,
        group_size=None if group_size is None else int(group_size.value),
        dense=dense.value,
        polish=polish,
    )
    early.check_text(calibration, tokens, seq_len)
    early.check_numbers(memory=memory, device=device)
    free = bits is None and target is Format.int4 and dense is Dense.source
    early.check_sizes(size, fit, context, free=free)
    if early.alone():
        inputs = (Path(model), *([] if adapter is None else [adapter]))
        check_begin(out, "quantize", overwrite=overwrite, resume=resume, inputs=inputs)
    starting()
    from gptoss_quantize import api

    made = api.quantize(
        model,
        out,
        method.value,
        written,
        None if group_size is None else int(group_size.value),
        dense=dense.value,
        calibration=calibration,
        tokens=tokens,
        seq_len=seq_len,
        seed=seed,
        column=column,
        chat_template=chat_template,
        adapter=adapter,
        revision=revision,
        device=device,
        dtype=dtype.value,
        memory=memory,
        polish=polish,
        size=size,
        fit=fit,
        context=context,
        resume=resume,
        overwrite=overwrite,
        recipe=recipe or [],
        progress=first_rank(),
    )
    if first_rank():
        print_quantized(out, made.report)
        if written == "mxfp4":
            next_step("evaluate", out, "--baseline", model)
        else:
            next_step("chat", out)


for _name, _command in (
    {"quantize": quantize}
    | cli_measure.COMMANDS
    | cli_models.COMMANDS
    | cli_talk.COMMANDS
    | cli_sizes.COMMANDS
    | cli_runtimes.COMMANDS
    | cli_hub.COMMANDS
).items():
    # these talk, or answer at once
    _long = _name not in ("generate", "chat", "env", "plan")
    app.command(_name, cls=Command)(with_log_format(_command) if _long else _command)


def main() -> None:
    """Run the command line; refused input becomes one message and exit code 1."""
    if not sys.stderr.isatty():
        # bars of libraries fill a log with thousands of lines; read by tqdm when it is imported
        os.environ.setdefault("TQDM_DISABLE", "1")
    with log_session(), one_message():
        app()
