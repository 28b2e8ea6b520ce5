"""The commands that meet other runtimes: export, import, verify. `cli.py` adds them to the command line."""

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.progress import Progress

from gptoss_quantize.terminal import console, progress


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


OverwriteOpt = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export at DEST.")]


def steps(bar: Progress) -> Callable[[str], Callable[[int, int], None]]:
    """Return a function that starts a task of the progress bar and returns its update function."""

    def start(words: str) -> Callable[[int, int], None]:
        task = bar.add_task(words, total=None)
        return lambda done, total: bar.update(task, completed=done, total=total)

    return start


def export(
    checkpoint: Annotated[str, typer.Argument(help="An int4 or MXFP4 checkpoint, or any gpt-oss directory.")],
    dest: Annotated[Path, typer.Argument(help="Directory to write; must not exist.")],
    to: Annotated[Target, typer.Option(help="gguf: llama.cpp, Ollama, LM Studio. bf16: loads everywhere.")],
    dtype: Annotated[FloatType, typer.Option(help="With bf16: the experts' dtype; float16 is exact.")] = (
        FloatType.bfloat16
    ),
    dense_type: Annotated[
        GgufType, typer.Option(help="With gguf: type of attention, embedding and head.")
    ] = GgufType.stored,
    expert_type: Annotated[
        GgufType, typer.Option(help="With gguf: type of the experts; stored keeps codes and scales.")
    ] = GgufType.stored,
    overwrite: OverwriteOpt = False,
) -> None:
    """Write CHECKPOINT in another runtime's format, read it back and compare, bit for bit."""
    from gptoss_quantize.runtimes.exports import export_checkpoint
    from gptoss_quantize.workflow import open_checkpoint

    with progress() as bar:
        report = export_checkpoint(
            open_checkpoint(checkpoint),
            dest,
            to.value,
            dtype=dtype.value,
            dense_type=dense_type.value,
            expert_type=expert_type.value,
            overwrite=overwrite,
            progress=steps(bar),
        )
    console.print(
        f"[bold]{escape(str(dest))}[/bold]: {report['bytes'] / 2**20:.0f} MiB, every tensor read back equal"
    )
    if report.get("rounded_weights"):
        share = report["rounded_weights"] / report["expert_weights"]
        console.print(
            f"{share:.1%} of the expert weights were rounded to {report['dtype']}, by at most "
            f"{report['largest_relative_rounding']:.1e} of their value; --dtype float16 holds them exactly"
        )


COMMANDS: dict[str, Callable[..., Any]] = {"export": export}
