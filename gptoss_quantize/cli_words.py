"""What is said of a quantization when it is done."""

import shlex
import sys
from pathlib import Path
from typing import Any

from rich.markup import escape

from gptoss_quantize import advice
from gptoss_quantize.terminal import console


def starting(what: str = "torch and transformers") -> None:
    """Say that something is going on, before what takes seconds to load; nothing where it is loaded already."""
    if "torch" not in sys.modules:
        console.print(f"loading {what}", style="dim", highlight=False)


def next_step(command: str, *words: object) -> None:
    """Say on stderr what to try next, as a line that can be copied."""
    say_try("gptoss-quantize", command, *words)


def say_try(*words: object) -> None:
    """Say on stderr which command to try next."""
    console.print(f"try: {escape(shlex.join(map(str, words)))}", highlight=False, soft_wrap=True)


def number(value: float) -> str:
    """Return a measure in four decimals, or with an exponent where these say nothing."""
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.4f}"


def print_quantized(out: Path, report: dict[str, Any]) -> None:
    """Print what a quantization run did, and every retreat it had to make."""
    console.print(
        f"[bold]{escape(str(out))}[/bold]: {report['bytes'] / 2**20:.0f} MiB, experts at "
        f"{report['expert_bits_per_weight']:.2f} bits per weight, {report['seconds']:.0f} s, "
        f"peak {report['peak_rss_mib']} MiB"
    )
    if said := advice.after_quantizing(report):
        console.print(said)
    if report["suspect"]:
        console.print(f"[bold red]SUSPECT:[/bold red] the source's {escape(report['suspect'])}", soft_wrap=True)
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
