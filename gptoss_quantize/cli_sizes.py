"""The command `plan`: what a quantization takes and gives, before it is run."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gptoss_quantize import advice, early
from gptoss_quantize.units import gib, parse_size


def plan(
    model: Annotated[str, typer.Argument(help="gpt-oss-20b, gpt-oss-120b, a directory or a hub name.")],
    method: Annotated[str, typer.Option(help="As for quantize: gptq, awq, awq+gptq, rtn, rtn-signed.")] = "gptq",
    group_size: Annotated[int, typer.Option(help="64 or 32.")] = 64,
    dense: Annotated[str, typer.Option(help="source or int8: attention, embedding and head.")] = "source",
    tokens: Annotated[int, typer.Option(min=2, help="Calibration tokens.")] = 32768,
    seq_len: Annotated[int, typer.Option("--seq-len", min=2, help="Tokens per sequence.")] = 512,
    gpu_memory: Annotated[str, typer.Option(help="Memory of the card that is to run it.")] = "16GiB",
    context: Annotated[
        int | None, typer.Option(min=1, help="Context length; 4096, 32768 and 131072 without it.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Measure this machine for the expected time.")
    ] = True,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the numbers to this file.")] = None,
) -> None:
    """Say what quantizing MODEL would take and give: bytes, memory of the card, time, before it is run."""
    early.check_file(json_out, "--json")
    if model not in early.PUBLISHED_SHAPES:
        early.check_input(model)
    parse_size(gpu_memory, "--gpu-memory")
    from gptoss_quantize import api

    options: dict[str, Any] = {} if context is None else {"contexts": (context,)}
    found = api.plan(
        model,
        method,
        group_size=group_size,
        dense=dense,
        tokens=tokens,
        seq_len=seq_len,
        gpu_memory=gpu_memory,
        measure=measure,
        **options,
    )
    early.write_file(json_out, found.report)
    print_plan(found.report, Console(emoji=False))


def print_plan(record: dict[str, Any], console: Console) -> None:
    """Print a plan as tables."""
    console.print(_sparsity_table(record))
    console.print(_disk_table(record))
    console.print(_card_table(record))
    if said := advice.before_quantizing(record):
        console.print(said)
    if refusing := sorted({row["runtime"] for row in record["card"] if not row["loads"]}):
        console.print(
            f"{', '.join(refusing)} does not load --dense int8; its rows are for bf16 there", style="yellow"
        )
    for row in record["card"]:
        for change in row["changes"]:
            outcome = "fits" if change["fits"] else f"{gib(change['total'])}, still too much"
            console.print(f"{row['runtime']}, {row['context']:,} tokens: {change['change']}: {outcome}")
    serve = record["serve"]
    console.print(f"\n[bold]{escape(serve['command'])}[/bold]\n{escape(serve['why'])}", highlight=False)
    console.print(f"two cards: {escape(serve['two_cards'])}", highlight=False)
    memory = record["memory"]
    console.print(f"\nquantizing needs at least {gib(memory['least'])} of memory (--memory); ", end="")
    console.print(
        f"with what is free here, {memory['experts_at_once']} expert(s) at a time in about {gib(memory['peak'])}"
        if memory["peak"]
        else "[red]that is more than 60 % of what is free here[/red]"
    )
    if time := record.get("time"):
        minutes = time["seconds"] / 60
        phases = ", ".join(f"{name} {seconds / 60:.1f}" for name, seconds in time["phases"].items())
        console.print(f"expected time on this machine: {minutes:.0f} minutes ({phases})", highlight=False)
        if more := time.get("more_tokens"):
            console.print(
                f"with --tokens {more['tokens']}: {more['seconds'] / 60:.0f} minutes; "
                "at the same bits nothing lowers the loss of gptq as much as more text",
                highlight=False,
            )


def _table(title: str, *columns: str) -> Table:
    """Return a table whose first column is text and whose others are numbers."""
    table = Table(title=title)
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i else "left")
    return table


def _sparsity_table(record: dict[str, Any]) -> Table:
    title = escape(f"{record['model']}: how much of a model works on a token")
    table = _table(title, "model", "parameters", "active", "share")
    table.add_column("")
    for row in record["sparsity"]:
        numbers = f"{row['total'] / 1e9:.1f} B", f"{row['active'] / 1e9:.2f} B", f"{100 * row['share']:.1f} %"
        bar = "#" * max(1, round(50 * row["share"]))
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
    columns = ("runtime", "context", "weights", "padding", "KV full", "KV window", "rest, est.", "sum", "fits")
    table = _table(f"GiB on a card of {gib(record['gpu_memory'])}, one sequence", *columns)
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
        verdict = "[green]yes[/green]" if row["fits"] else "[red]no[/red]"
        numbers = (f"{size / 2**30:.2f}" for size in sizes)
        table.add_row(row["runtime"], f"{row['context']:,}", *numbers, verdict)
    return table


COMMANDS: dict[str, Callable[..., Any]] = {"plan": plan}
