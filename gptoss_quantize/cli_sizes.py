"""The command `plan`: what a quantization takes and gives, before it is run."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gptoss_quantize import advice
from gptoss_quantize import cli_early as early
from gptoss_quantize.cli_words import starting
from gptoss_quantize.units import GIB, gib, parse_size


def plan(
    model: Annotated[str, typer.Argument(help="20b or 120b (nothing is downloaded), a directory or a hub name.")],
    method: Annotated[str, typer.Option(help="As for quantize: gptq, awq, awq+gptq, rtn, rtn-signed.")] = "gptq",
    group_size: Annotated[int, typer.Option(help="64 or 32.")] = 64,
    dense: Annotated[str, typer.Option(help="source or int8: attention, embedding and head.")] = "source",
    tokens: Annotated[int, typer.Option(min=2, help="Calibration tokens.")] = 32768,
    seq_len: Annotated[int, typer.Option("--seq-len", min=2, help="Tokens per sequence.")] = 512,
    gpu_memory: Annotated[
        str, typer.Option("--gpu-memory", "--fit", help="Memory of the card that is to run it.")
    ] = "16GiB",
    context: Annotated[
        int | None, typer.Option(min=1, help="Context length; 4096, 32768 and 131072 without it.")
    ] = None,
    details: Annotated[
        bool, typer.Option("--details", help="Show where the bytes go, on disk and on the card.")
    ] = False,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Measure this machine for the expected time.")
    ] = True,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the numbers to this file.")] = None,
) -> None:
    """Say whether MODEL in int4 fits your card, with the commands; then what quantizing it takes."""
    early.check_file(json_out, "--json")
    early.check_plan(model, context)
    parse_size(gpu_memory, "--gpu-memory")
    starting("torch")
    from gptoss_quantize import api_plan

    console = Console(emoji=False)
    found = api_plan.plan(
        model,
        method,
        group_size=group_size,
        dense=dense,
        tokens=tokens,
        seq_len=seq_len,
        gpu_memory=gpu_memory,
        contexts=None if context is None else (context,),
        measure=measure,
        before_measuring=lambda plan: print_plan(plan.report, console, details),
    )
    early.write_file(json_out, found.report)
    if measure:
        print_time(found.report["time"], console)


def print_plan(record: dict[str, Any], console: Console, details: bool = False) -> None:
    """Print whether it fits, the commands, and what quantizing takes; with `details`, where the bytes go."""
    _answer(record, console)
    console.print(_fits_table(record))
    _commands(record, console)
    if not all(row["fits"] for row in record["card"]):
        _fewer_bits(record, console)
    if said := advice.before_quantizing(record):
        console.print(said + "\n")
    if refusing := sorted({row["runtime"] for row in record["card"] if not row["loads"]}):
        console.print(
            f"{', '.join(refusing)} does not load --dense int8; its column is for bf16 there", style="yellow"
        )
    for row in record["card"]:
        for change in row["changes"]:
            outcome = "fits" if change["fits"] else f"{gib(change['total'])}, still too much"
            console.print(f"{row['runtime']}, {row['context']:,} tokens: {change['change']}: {outcome}")
    if details:
        for table in (_card_table(record), _disk_table(record), _sparsity_table(record)):
            console.print(table)
    else:
        console.print("Where the bytes go: --details", style="dim")
    memory = record["memory"]
    console.print(f"\nQuantizing needs at least {gib(memory['least'])} of memory (--memory).")
    console.print(
        f"With what is free here: {memory['experts_at_once']} expert(s) at a time in about {gib(memory['peak'])}."
        if memory["peak"]
        else "[red]That is more than 60 % of what is free here.[/red]"
    )


def print_time(time: dict[str, Any], console: Console) -> None:
    """Print how long quantizing would take here."""
    phases = ", ".join(f"{name} {_long(seconds)}" for name, seconds in time["phases"].items())
    console.print(f"Expected time on this machine: {_long(time['seconds'])} ({phases})", highlight=False)
    if more := time.get("more_tokens"):
        console.print(
            f"with --tokens {more['tokens']}: {_long(more['seconds'])}; "
            "at the same bits nothing lowers the loss of gptq as much as more text",
            highlight=False,
        )


def _long(seconds: float) -> str:
    """Return a time as people say it."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _answer(record: dict[str, Any], console: Console) -> None:
    """Print yes, partly or no, in a sentence."""
    what = f"{record['model']}, int4 in groups of {record['group_size']}, one user"
    console.print(
        f"[bold]Does it fit?[/bold] {escape(what)}, a card of {gib(record['gpu_memory'])}\n",
        highlight=False,
    )
    longest = {name: _longest(record, name) for name in RUNTIMES}
    able = [f"{tokens:,} in {name}" for name, tokens in longest.items() if tokens]
    offload = record["llama.cpp"]["offload"]
    if able:
        words = "[bold green]YES[/bold green]; tokens of context at most: " + ", ".join(able) + "."
    elif offload:
        words = (
            "[bold yellow]PARTLY[/bold yellow]: in llama.cpp, with the experts of "
            f"{offload['layers']} of {len(record['disk']['files']) - 1} layers in {gib(offload['bytes'])} of RAM."
        )
    else:
        words = "[bold red]NO[/bold red]: not even with every expert in RAM."
    console.print(words + "\n", highlight=False)


def _longest(record: dict[str, Any], runtime: str) -> int:
    """Return the longest context that was found to fit, 0 for none."""
    rows = [row for row in record["card"] if row["runtime"] == runtime]
    whole = [row["context"] for row in rows if row["fits"]]
    shorter = [change["tokens"] for row in rows for change in row["changes"] if "tokens" in change]
    return max([*whole, *shorter], default=0)


def _fits_table(record: dict[str, Any]) -> Table:
    """Return a row per context: what each runtime takes, and whether that fits."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("context", justify="right")
    for name in RUNTIMES:
        table.add_column(name)
    for context in record["contexts"]:
        cells = [_cell(row) for row in record["card"] if row["context"] == context]
        table.add_row(f"{context:,}", *cells)
    return table


def _cell(row: dict[str, Any]) -> str:
    need, room = f"{row['parts']['total'] / GIB:.1f}", f"{row['room'] / GIB:.1f} GiB"
    if row["fits"]:
        return f"[green]fits[/green], {need} of {room}"
    if row["offload"]:
        return f"{need} of {room}: [yellow]--n-cpu-moe {row['offload']['layers']}[/yellow]"
    return f"[red]no[/red], {need} of {room}"


def _commands(record: dict[str, Any], console: Console) -> None:
    """Print what to type, one command a line, never wrapped."""
    llama, commands = record["llama.cpp"], record["commands"]
    lines = [
        ("make it", commands["quantize"]),
        ("vLLM", record["serve"]["command"]),
        ("llama.cpp", commands["export"]),
        ("", llama["command"]),
    ]
    console.print()
    for name, command in lines:
        console.print(f"{name:9} [bold]{escape(command)}[/bold]", highlight=False, soft_wrap=True)
    console.print(
        f"{'no card':9} the same without -ngl and --n-cpu-moe, in about {gib(llama['without_card'])} of RAM\n",
        highlight=False,
    )
    console.print(escape(f"vLLM: {record['serve']['why']}"), highlight=False)
    console.print(escape(f"vLLM on two cards: {record['serve']['two_cards']}\n"), highlight=False)


def _fewer_bits(record: dict[str, Any], console: Console) -> None:
    """Print what fewer bits than four make room for, and the command."""
    table = Table(
        title="with fewer bits, run by gptoss-quantize alone (chat, load), attention in 8 bits",
        caption="halves: bits chosen layer by layer; what is lost: docs/fewer-bits.md",
        box=None,
        padding=(0, 3, 0, 0),
    )
    for name in ("bits of a code", "with scales", "weights", "longest context"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in record["fewer_bits"]:
        tokens = f"{row['context']:,}" if row["context"] else "[red]does not fit[/red]"
        table.add_row(f"{row['bits']:g}", f"{row['bits_per_weight']:.2f}", gib(row["bytes"]), tokens)
    console.print(table)
    if command := record["commands"]["fit"]:
        console.print(f"and so    [bold]{escape(command)}[/bold]\n", highlight=False, soft_wrap=True)


def _table(title: str, *columns: str) -> Table:
    """Return a table whose first column is text and whose others are numbers."""
    table = Table(title=title)
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i else "left", overflow="fold")
    return table


def _sparsity_table(record: dict[str, Any]) -> Table:
    title = escape(f"{record['model']}: how much of a model works on a token")
    table = _table(title, "model", "parameters", "active", "share")
    table.add_column("")
    for row in record["sparsity"]:
        numbers = f"{row['total'] / 1e9:.1f} B", f"{row['active'] / 1e9:.2f} B", f"{100 * row['share']:.1f} %"
        bar = "#" * max(1, round(24 * row["share"]))
        table.add_row(escape(row["model"]), *numbers, bar, style="bold" if row["this"] else None)
    return table


def _disk_table(record: dict[str, Any]) -> Table:
    total = record["disk"]["total"]
    table = _table(f"weight files: {total / 1e9:.2f} GB", "part", "bytes", "GiB")
    for name, size in record["disk"]["parts"].items():
        table.add_row(name, f"{size:,}", f"{size / 2**30:.3f}")
    table.add_row("all", f"{total:,}", f"{total / 2**30:.3f}", style="bold")
    return table


def _card_table(record: dict[str, Any]) -> Table:
    columns = ("", "context", "weights", "padding", "KV full", "KV window", "rest", "sum")
    table = Table(title="GiB on the card (rest: an estimate)", box=None, padding=(0, 1))
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    for row in record["card"]:
        parts = row["parts"]
        sizes = (
            parts["experts"] + parts["other weights"],
            parts["padding"],
            parts["KV cache, full layers"],
            parts["KV cache, windowed layers"],
            parts["runtime (estimate)"],
            parts["total"],
        )
        table.add_row(row["runtime"], f"{row['context']:,}", *(f"{size / GIB:.2f}" for size in sizes))
    return table


RUNTIMES = ("vLLM", "llama.cpp")
COMMANDS: dict[str, Callable[..., Any]] = {"plan": plan}
