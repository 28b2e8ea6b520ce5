"""The commands that meet other runtimes: export, import, verify. `cli.py` adds them to the command line."""

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding

from gptoss_quantize import cli_early as early
from gptoss_quantize.cli_options import TextOpt
from gptoss_quantize.cli_words import next_step, say_try, starting
from gptoss_quantize.files import check_begin
from gptoss_quantize.terminal import console


class Target(StrEnum):
    """What `export` can write."""

    gguf = "gguf"
    bf16 = "bf16"
    mxfp4 = "mxfp4"
    autogptq = "autogptq"
    autogptq_v2 = "autogptq-v2"
    autoawq = "autoawq"


class FloatType(StrEnum):
    """Dtype of dequantized experts."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


class GgufType(StrEnum):
    """ggml types that `export --to gguf` can be asked for."""

    stored = "stored"
    bf16 = "bf16"
    f32 = "f32"
    q8_0 = "q8_0"


STYLES = {"agrees": "green", "not checked": "yellow"}
OverwriteOpt = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export at DEST.")]


def export(
    checkpoint: Annotated[str, typer.Argument(help="An int4 or MXFP4 checkpoint, or any gpt-oss directory.")],
    dest: Annotated[Path, typer.Argument(help="Directory to write; must not exist.")],
    to: Annotated[
        Target, typer.Option(case_sensitive=False, help="gguf: llama.cpp, Ollama, LM Studio. bf16: loads everywhere.")
    ],
    dtype: Annotated[
        FloatType, typer.Option(case_sensitive=False, help="With bf16: the experts' dtype; float16 is exact.")
    ] = (FloatType.bfloat16),
    dense_type: Annotated[
        GgufType, typer.Option(case_sensitive=False, help="With gguf: type of attention, embedding and head.")
    ] = GgufType.stored,
    expert_type: Annotated[
        GgufType,
        typer.Option(case_sensitive=False, help="With gguf: type of the experts; stored keeps codes and scales."),
    ] = GgufType.stored,
    overwrite: OverwriteOpt = False,
) -> None:
    """Write CHECKPOINT in another runtime's format, read it back and compare, bit for bit."""
    early.check_export(to.value, dtype.value, dense_type.value, expert_type.value)
    early.check_input(checkpoint)
    check_begin(dest, f"export --to {to.value}", overwrite=overwrite, inputs=(Path(checkpoint),))
    starting()
    from gptoss_quantize import api

    report = api.export(
        checkpoint,
        dest,
        to.value,
        dtype=dtype.value,
        dense_type=dense_type.value,
        expert_type=expert_type.value,
        overwrite=overwrite,
        progress=True,
    ).report
    console.print(
        f"[bold]{escape(str(dest))}[/bold]: {report['bytes'] / 2**20:.0f} MiB, every tensor read back equal"
    )
    if report.get("rounded_weights"):
        share = report["rounded_weights"] / report["expert_weights"]
        console.print(
            f"{share:.1%} of the expert weights were rounded to {report['dtype']}, by at most "
            f"{report['largest_relative_rounding']:.1e} of their value; --dtype float16 holds them exactly"
        )
    if to is Target.gguf:
        say_try("llama-server", "-m", dest / "model.gguf", "-c", "8192")
    elif to is Target.bf16:
        next_step("verify", dest, "--baseline", checkpoint)


class Split(StrEnum):
    """What another tool calls gate_proj."""

    detect = "detect"
    interleaved = "interleaved"
    halves = "halves"


class ImportTarget(StrEnum):
    """What `import` can write."""

    int4 = "int4"
    bf16 = "bf16"


def import_(
    source: Annotated[Path, typer.Argument(help="int4 gpt-oss of GPTQModel, llm-compressor, AutoRound, ...")],
    out: Annotated[Path, typer.Argument(help="Directory to write; must not exist.")],
    to: Annotated[
        ImportTarget,
        typer.Option(case_sensitive=False, help="int4: ours, no rounding. bf16: also holds asymmetric codes."),
    ] = (ImportTarget.int4),
    split: Annotated[
        Split,
        typer.Option(
            case_sensitive=False, help="gate_proj is the even rows (interleaved) or the first half (halves)."
        ),
    ] = Split.detect,
    text: TextOpt = "heldout",
    tokens: Annotated[int, typer.Option(min=512, help="Tokens of text that settle the split.")] = 1024,
    overwrite: OverwriteOpt = False,
) -> None:
    """Rescue another tool's int4 checkpoint: find out which rows are the gate, and write it in our layout."""
    early.check_input(source)
    if split is Split.detect:
        early.check_text(text, tokens, 128)
    check_begin(out, "import", overwrite=overwrite, inputs=(source,))
    starting()
    from gptoss_quantize import api

    report = api.import_checkpoint(
        source, out, to.value, split=split.value, text=text, tokens=tokens, overwrite=overwrite, progress=True
    ).report
    print_import(out, report)
    if to is ImportTarget.int4:
        next_step("verify", out)
    else:
        next_step("quantize", out, f"{out}-int4")


def print_import(out: Path, report: dict[str, Any]) -> None:
    """Print how a file was read and what our layout made of it."""
    reading = report["reading"]
    console.print(f"gate_proj read as [bold]{reading['split']}[/bold] ({reading['because']})")
    if reading["nll"]:
        numbers = ", ".join(f"{split} {value:.3f}" for split, value in reading["nll"].items())
        console.print(f"nats per token of real text: {numbers}; metadata: {reading['metadata_source']}")
        if reading["metadata"] not in (None, reading["split"]):
            console.print(f"[yellow]the metadata suggests {reading['metadata']}[/yellow]; the text decided")
    console.print(f"[bold]{escape(str(out))}[/bold]: {report['bytes'] / 2**20:.0f} MiB")
    if inexact := report.get("scales_inexact_in_bfloat16"):
        console.print(
            f"{inexact} of {report['scales']} scales need float16 and are kept so; vLLM casts scales to the model's "
            "dtype, so run it with --dtype float16"
        )


def verify(
    checkpoint: Annotated[Path, typer.Argument(help="The checkpoint to judge: int4, MXFP4 or float.")],
    baseline: Annotated[
        str | None, typer.Option(help="The unquantized model, which shows each runtime's own noise.")
    ] = None,
    runtime: Annotated[str, typer.Option(help="Comma-separated: transformers, llama.cpp, vllm.")] = (
        "transformers,llama.cpp,vllm"
    ),
    text: TextOpt = "heldout",
    sequences: Annotated[int, typer.Option(min=1, help="Sequences of text.")] = 4,
    seq_len: Annotated[int, typer.Option("--seq-len", min=2, help="Tokens per sequence.")] = 256,
    positions: Annotated[int, typer.Option(min=1, help="Positions compared in each sequence.")] = 16,
    llama_server: Annotated[Path | None, typer.Option(help="A llama-server binary, instead of xllamacpp.")] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Compare llama.cpp on F32 files too: nothing rounded, 4 bytes a weight.")
    ] = False,
    work: Annotated[Path | None, typer.Option(help="Directory for temporary exports, deleted at the end.")] = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the table to this file.")] = None,
) -> None:
    """Load CHECKPOINT in each runtime installed here and compare predictions; exit code 1 when one disagrees."""
    early.check_file(json_out, "--json")
    early.check_input(checkpoint)
    if baseline is not None:
        early.check_input(baseline, what="--baseline")
    early.check_text(text)
    starting()
    from gptoss_quantize import api
    from gptoss_quantize.runtimes.verify import RUNTIMES

    names = tuple(name.strip() for name in runtime.split(","))
    if unknown := sorted(set(names) - set(RUNTIMES)):
        raise typer.BadParameter(f"unknown {unknown}; known: {', '.join(RUNTIMES)}", param_hint="--runtime")
    found = api.verify(
        checkpoint,
        baseline,
        runtimes=names,
        text=text,
        sequences=sequences,
        seq_len=seq_len,
        positions=min(positions, seq_len),
        llama_server=llama_server,
        exact=exact,
        work=work,
        progress=True,
    )
    early.write_file(json_out, found.report)
    print_verified(checkpoint, baseline, found.report, Console(emoji=False))
    if found.disagreeing:
        raise typer.Exit(1)
    next_step("generate", checkpoint, "--prompt", "Why is the sky blue?")


def print_verified(checkpoint: Path, baseline: str | None, rows: list[dict[str, Any]], printed: Console) -> None:
    """Print what `verify` found, a few lines for each runtime, which 80 columns hold whole."""
    printed.print(
        f"[bold]{escape(str(checkpoint))}[/bold] against our float32 reference; noise from "
        f"{escape(baseline or 'no baseline')}",
        highlight=False,
    )
    for row in rows:
        style = STYLES.get(row["verdict"], "bold red")
        printed.print(
            f"\n[bold]{row['runtime']}[/bold] {escape(row['what'])}: [{style}]{row['verdict']}[/{style}]",
            highlight=False,
        )
        if got := row["got"]:
            noise = "" if row["noise"] is None else f" (noise {row['noise']['kl']:.1e})"
            numbers = (
                f"KL {got['kl']:.1e}{noise}, top-1 {100 * got['top1']:.1f} %, difference of log-probabilities "
                f"{got['mean_difference']:.1e}, at most {got['max_difference']:.1e}"
            )
            printed.print(Padding(numbers, (0, 0, 0, 2)), highlight=False)
        if row["note"]:
            printed.print(Padding(escape(row["note"]), (0, 0, 0, 2)), highlight=False)


COMMANDS: dict[str, Callable[..., Any]] = {"export": export, "import": import_, "verify": verify}
