"""The commands that make a model: demo-model, demo, synthetic-model."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gptoss_quantize.cli_options import Method, WheelOpt
from gptoss_quantize.cli_words import next_step, starting
from gptoss_quantize.files import check_begin
from gptoss_quantize.terminal import console, showing


def demo_model(
    dest: Annotated[Path, typer.Argument(help="Directory to write; must not exist.")],
    experts: Annotated[int, typer.Option(min=2)] = 8,
    experts_per_token: Annotated[int, typer.Option(min=1)] = 2,
    seed: Annotated[int, typer.Option(min=0, help="Seed of routers, channel order and experts.")] = 0,
    wheel: WheelOpt = None,
    mxfp4: Annotated[
        bool, typer.Option("--mxfp4", help="Write experts as MXFP4 blocks, like OpenAI's release.")
    ] = False,
) -> None:
    """Make a small real gpt-oss model from SmolLM2-135M, without any model hub."""
    check_begin(dest, "demo-model", overwrite=None)
    starting()
    from gptoss_quantize.demo.tour import make_demo_model

    with showing(True) as show:
        make_demo_model(
            dest,
            experts=experts,
            experts_per_token=experts_per_token,
            seed=seed,
            wheel=wheel,
            mxfp4=mxfp4,
            progress=show,
        )
    console.print(f"[bold]{escape(str(dest))}[/bold] written")
    next_step("quantize", dest, f"{dest}-int4")


def demo(
    out: Annotated[Path, typer.Argument(help="Directory for models, checkpoints and results.")] = Path("demo-out"),
    methods: Annotated[
        str,
        typer.Option(help="Methods with commas between, the quickest first; gptq-int3 and gptq-int2 for fewer bits."),
    ] = "rtn,awq,gptq,gptq-int3",
    tokens: Annotated[int, typer.Option(min=512, help="Calibration tokens.")] = 32768,
    eval_tokens: Annotated[int, typer.Option(min=1024, help="Held-out tokens.")] = 8192,
    experts: Annotated[int, typer.Option(min=2)] = 8,
    wheel: WheelOpt = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier demo at OUT.")] = False,
) -> None:
    """Make a small real model, quantize it, hear it speak; then every method, compared, and a report.

    The first method's numbers and answer come after a minute or two, the rest after a quarter of an hour.
    """
    names = [name.strip() for name in methods.split(",")]
    known = {f"{m.value}{bits}" for m in Method for bits in ("", "-int3", "-int2")}
    if unknown := sorted(set(names) - known):
        raise typer.BadParameter(
            f"unknown {unknown}; known: {', '.join(m.value for m in Method)}, with -int3 or -int2 after it",
            param_hint="--methods",
        )
    if len(set(names)) < len(names):
        raise typer.BadParameter(f"{methods} names a method twice", param_hint="--methods")
    starting()
    from gptoss_quantize.demo.tour import REPORT, RESULTS, folder, run_demo

    printed = Console()
    with showing(True) as show:
        record = run_demo(
            out,
            methods=names,
            tokens=tokens,
            eval_tokens=eval_tokens,
            experts=experts,
            wheel=wheel,
            overwrite=overwrite,
            progress=show,
            first=lambda act: _print_first(printed, act, more=len(names) > 1),
        )
    printed.print(demo_table(out / "model", record))
    best = min(names, key=lambda name: record["results"][name]["kl_mean"])
    for prompt in record["answers"]["unquantized"]:
        _print_answers(printed, prompt, {n: record["answers"][n][prompt] for n in ("unquantized", names[0], best)})
    printed.print(
        f"{record['total_seconds']:.0f} s in all. For curves and all answers open {escape(str(out / REPORT[0]))} in "
        f"a browser; numbers in {escape(str(out / RESULTS))}",
        highlight=False,
        soft_wrap=True,
    )
    next_step("chat", out / folder(best))


def _print_answers(printed: Console, prompt: str, answers: dict[str, str]) -> None:
    printed.print(f"\n[bold]{escape(prompt)}[/bold]", highlight=False)
    for name, said in answers.items():
        printed.print(f"[bold]{escape(name)}:[/bold] {escape(said)}", highlight=False)


def _print_first(printed: Console, act: dict[str, Any], *, more: bool) -> None:
    """Print what the first method gave, while the others are still to come."""
    name, result = act["method"], act["result"]
    printed.print(
        f"\nAfter {act['seconds']:.0f} s, [bold]{escape(name)}[/bold] on {result['tokens']} tokens: KL divergence "
        f"{result['kl_mean']:.4f}, the same next token {100 * result['top1_agreement']:.1f} % of the time, "
        f"perplexity {result['baseline_perplexity']:.2f} before and {result['perplexity']:.2f} after.",
        highlight=False,
    )
    _print_answers(printed, act["prompt"], act["answers"])
    if more:
        printed.print("\nNow the other methods, calibrated on text, and the whole comparison.", highlight=False)


def demo_table(model: Path, record: dict[str, Any]) -> Table:
    """Return the comparison table of a demo, at most 80 columns wide: a row per method."""
    speeds = {name: "" if speed is None else f"{speed:.1f}" for name, speed in record["tokens_per_second"].items()}
    table = Table(
        title="quantized experts, group 64, against the unquantized model",
        caption="tok/s: of the answers, on the processor. s: quantizing. peak: MiB of memory, so far",
        box=SIMPLE,
        padding=(0, 0, 0, 1),
    )
    for name in ("method", "bits", "ppl", "KL mean", "KL p99", "top-1", "MiB", "tok/s", "s", "peak"):
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    first = next(iter(record["results"].values()))
    size = sum(p.stat().st_size for p in model.glob("*.safetensors")) / 2**20
    table.add_row(
        "unquantized",
        "16",
        f"{first['baseline_perplexity']:.2f}",
        "0",
        "0",
        "100 %",
        f"{size:.0f}",
        speeds["unquantized"],
        "",
        "",
    )
    for name, result in record["results"].items():
        report = record["reports"][name]
        table.add_row(
            name,
            f"{report['expert_bits_per_weight']:.2f}",
            f"{result['perplexity']:.2f}",
            f"{result['kl_mean']:.4f}",
            f"{result['kl_p99']:.3f}",
            f"{100 * result['top1_agreement']:.1f} %",
            f"{report['bytes'] / 2**20:.0f}",
            speeds.get(name, ""),
            f"{report['seconds']:.0f}",
            f"{report['peak_rss_mib']}",
        )
    return table


def synthetic_model(
    dest: Annotated[Path, typer.Argument(help="Directory to write; must not exist.")],
    like: Annotated[
        str, typer.Option(help="gpt-oss-20b, gpt-oss-120b, or a config.json of the gpt-oss architecture.")
    ] = "gpt-oss-20b",
    layers: Annotated[int | None, typer.Option(min=1, help="Decoder layers to write; all without it.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the weights.")] = 0,
) -> None:
    """Make a model of true shape with random weights, to measure time and memory."""
    check_begin(dest, "synthetic-model", overwrite=None)
    starting()
    from gptoss_quantize.demo.tour import make_synthetic_model

    with showing(True) as show:
        facts = make_synthetic_model(dest, like=like, layers=layers, seed=seed, progress=show)
    console.print(
        f"[bold]{escape(str(dest))}[/bold] written: {facts['layers']} of {facts['of_layers']} layers of "
        f"{escape(like)}, {facts['bytes'] / 1e9:.1f} GB in {facts['seconds']:.0f} s; random weights, it knows nothing"
    )
    next_step("plan", dest)


COMMANDS: dict[str, Callable[..., Any]] = {
    "demo-model": demo_model,
    "demo": demo,
    "synthetic-model": synthetic_model,
}
