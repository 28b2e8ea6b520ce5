"""The demo: make a real model, quantize it by every method, measure, let it answer. Also models to measure with."""

import gzip
import json
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from gptoss_quantize.api import evaluate_models, generate_text, quantize_model
from gptoss_quantize.calibration.sources import default_calibration_path
from gptoss_quantize.calibration.text import TextSpec
from gptoss_quantize.demo.model import build_demo_model
from gptoss_quantize.demo.synthetic import build_synthetic_model
from gptoss_quantize.errors import InputError
from gptoss_quantize.kernels import int4
from gptoss_quantize.quantize.job import Job
from gptoss_quantize.quantize.recipes import RECIPES

DEMO_PROMPT = "What is the capital of France, and what is it known for?"


def make_demo_model(
    dest: Path,
    *,
    experts: int,
    experts_per_token: int,
    seed: int,
    wheel: Path | None,
    mxfp4: bool = False,
    bar: Progress,
) -> dict[str, Any]:
    """Write the demo model and return facts about it."""
    task = bar.add_task("demo model: layer", total=None)
    return build_demo_model(
        dest,
        sample_text=sample_text(),
        experts=experts,
        experts_per_token=experts_per_token,
        seed=seed,
        wheel=wheel,
        mxfp4=mxfp4,
        progress=lambda done, total: bar.update(task, completed=done, total=total),
    )


def make_synthetic_model(dest: Path, *, like: str, layers: int | None, seed: int, bar: Progress) -> dict[str, Any]:
    """Write a model of true shape with random weights and return facts about it."""
    task = bar.add_task(f"synthetic {like}: layer", total=layers)
    return build_synthetic_model(
        dest,
        like=like,
        sample_text=sample_text(),
        layers=layers,
        seed=seed,
        progress=lambda done, total: bar.update(task, completed=done, total=total),
    )


def sample_text() -> str:
    """Return the packaged calibration text as one string."""
    with gzip.open(default_calibration_path(), "rt", encoding="utf-8") as file:
        return "\n\n".join(json.loads(line)["text"] for line in file)


def run_demo(
    out: Path,
    *,
    methods: list[str],
    tokens: int,
    eval_tokens: int,
    experts: int,
    wheel: Path | None,
    progress: Callable[[], AbstractContextManager[Progress]],
    console: Console,
) -> dict[str, Any]:
    """Make the demo model, quantize it by every method, evaluate all against it; print and store one table."""
    started = time.perf_counter()
    model, results_path = out / "model", out / "demo.json"
    if out.exists():
        if not (model.is_dir() or not any(out.iterdir())):
            raise InputError(f"{out}: holds something else than a demo; choose another directory")
        shutil.rmtree(out)
    out.mkdir(parents=True)
    reports: dict[str, dict[str, Any]] = {}
    with progress() as bar:
        facts = make_demo_model(model, experts=experts, experts_per_token=2, seed=0, wheel=wheel, bar=bar)
        for method in methods:
            job = Job(dest=out / f"int4-{method}", method=method, recipe=RECIPES[method])
            reports[method] = quantize_model(str(model), TextSpec(tokens=tokens, seq_len=512), job, bar=bar)
        record = evaluate_models(
            str(model),
            {method: out / f"int4-{method}" for method in methods},
            text=TextSpec(source="heldout", tokens=eval_tokens, seq_len=512, shuffle=False),
            bar=bar,
        )
    best = min(methods, key=lambda name: record["results"][name]["kl_mean"])
    answers = {
        name: generate_text(path, DEMO_PROMPT, max_new_tokens=48, raw=False, dtype="auto")
        for name, path in (("unquantized", model), (best, out / f"int4-{best}"))
    }
    seconds = time.perf_counter() - started
    console.print(demo_table(model, reports, record["results"]))
    for name, answer in answers.items():
        console.print(f"[bold]{name}:[/bold] {answer}", highlight=False)
    console.print(f"{seconds:.0f} s in all; numbers in {results_path}")
    record |= {"demo_model": facts, "reports": reports, "answers": answers, "total_seconds": round(seconds, 1)}
    results_path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def demo_table(model: Path, reports: dict[str, dict[str, Any]], results: dict[str, dict[str, Any]]) -> Table:
    """Return the comparison table of a demo."""
    table = Table(title="int4 experts, group 64, against the unquantized model", box=SIMPLE)
    for name in ("method", "bits", "ppl", "KL mean", "KL p99", "top-1", "MiB", "seconds", "peak MiB"):
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    first = next(iter(results.values()))
    size = sum(p.stat().st_size for p in model.glob("*.safetensors")) / 2**20
    table.add_row(
        "unquantized", "16", f"{first['baseline_perplexity']:.2f}", "0", "0", "100 %", f"{size:.0f}", "", ""
    )
    for name, result in results.items():
        report = reports[name]
        table.add_row(
            name,
            f"{int4.bits_per_weight(64, 64):.2f}",
            f"{result['perplexity']:.2f}",
            f"{result['kl_mean']:.4f}",
            f"{result['kl_p99']:.3f}",
            f"{100 * result['top1_agreement']:.1f} %",
            f"{report['bytes'] / 2**20:.0f}",
            f"{report['seconds']:.0f}",
            f"{report['peak_rss_mib']}",
        )
    return table
