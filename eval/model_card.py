"""Results for model cards: a whole card from a comparison, or the lines for the card of one checkpoint."""

from pathlib import Path
from typing import Any

from gptoss_quantize.eval.ranking import rank
from gptoss_quantize.eval.verdict import points
from gptoss_quantize.model_card import front_matter, hub_name

USE = """```python
import gptoss_quantize

model = gptoss_quantize.load("{name}")  # transformers' GptOssForCausalLM, experts packed in memory
```
"""


def best(record: dict[str, Any]) -> dict[str, Any]:
    """Return the candidate that the ranking puts first, as report.html does (`eval.ranking`)."""
    first = rank(record["candidates"], record["suspect"])["order"][0]["name"]
    found: dict[str, Any] = next(entry for entry in record["candidates"] if entry["name"] == first)
    return found


def _made(entry: dict[str, Any]) -> list[str]:
    cost = entry["cost"]
    lines = [
        f"* format: {cost['format']}" + (f", group size {cost['group_size']}" if cost["group_size"] else ""),
        f"* {cost['bits_per_expert_weight']:.3f} bits per expert weight, {cost['bits_per_weight']:.3f} over all, "
        f"{cost['bytes'] / 2**20:,.0f} MiB",
    ]
    if cost["method"] is not None:
        lines.append(f"* method: {cost['method']}, in {cost['quantized_seconds']:.0f} s")
    if cost["quantized_calibration"]:
        calibration = cost["quantized_calibration"]
        lines.append(f"* calibration: {calibration['source']}, {'x'.join(map(str, calibration['shape']))} tokens")
    return lines


def _tokens(record: dict[str, Any]) -> list[str]:
    lines = []
    for number, text in enumerate(record["baseline"]["texts"]):
        about = text["text"]
        lines += ["", f"{about['name']} ({about['kind']}, {about['scored_tokens']:,} tokens):", ""]
        lines += ["| model | perplexity | KL mean | KL p99 | top-1 agreement |", "|---|---|---|---|---|"]
        lines.append(f"| baseline | {text['summary']['baseline_perplexity']:.3f} | 0 | 0 | 100 % |")
        for entry in record["candidates"]:
            found = entry["texts"][number]["summary"]
            lines.append(
                f"| {entry['name']} | {found['perplexity']:.3f} | {found['kl_mean']:.4f} | {found['kl_p99']:.3f} | "
                f"{100 * found['top1_agreement']:.1f} % |"
            )
    return lines


def _tasks(record: dict[str, Any]) -> list[str]:
    if record["candidates"][0]["tasks_overall"] is None:
        return []
    names = [entry["name"] for entry in record["candidates"]]
    lines = ["", f"| task | baseline | {' | '.join(names)} |", "|---" * (2 + len(names)) + "|"]
    entries = [
        (task, [c["tasks"][task]["paired"] for c in record["candidates"]]) for task in record["baseline"]["tasks"]
    ]
    entries.append(("**all items**", [c["tasks_overall"] for c in record["candidates"]]))
    for task, found in entries:
        if found[0] is None:
            continue
        cells = []
        for f in found:
            low, high = map(points, f["interval"])
            cells.append(f"{100 * f['accuracy']:.1f} ({points(f['difference'])} [{low}, {high}])")
        lines.append(f"| {task} | {100 * found[0]['baseline_accuracy']:.1f} | {' | '.join(cells)} |")
    lines += [
        "",
        "Accuracy in percent; in brackets the difference in points with its 95 % paired interval (Newcombe).",
    ]
    return lines


def model_card(record: dict[str, Any]) -> str:
    """Return the card of the best candidate, with all candidates in its tables."""
    chosen = best(record)
    name, base = Path(chosen["path"]).name, Path(record["baseline"]["path"]).name
    tags = ["gpt_oss", "gptoss-quantize", chosen["cost"]["format"]]
    lines = [*front_matter(hub_name(record["baseline"]["path"] + "/"), None, tags), "", f"# {name}", ""]
    lines += [f"{base} with quantized experts, by gptoss-quantize {record['version']}.", ""]
    lines += [f"**{chosen['verdict']['sentence']}**", "", "## How it was made", "", *_made(chosen), ""]
    if chosen["cost"]["format"] == "int4":
        lines += ["## Use", "", USE.format(name=name)]
    lines += ["## Results", "", *[f"* {c['name']}: {c['verdict']['sentence']}" for c in record["candidates"]]]
    lines += [*_tokens(record), *_tasks(record), ""]
    if record["command"]:
        lines += ["## To repeat it", "", "```sh", record["command"], "```", ""]
    return "\n".join(lines)


def compared(record: dict[str, Any], entry: dict[str, Any]) -> list[str]:
    """Return the results of one candidate of a comparison, for its own card."""
    alone = record | {"candidates": [entry]}
    base = _base(record["baseline"]["path"])
    lines = [f"**{entry['verdict']['sentence']}**", *_tokens(alone), *_tasks(alone), ""]
    return [
        *lines,
        f"Measured against {base} by `gptoss-quantize compare` {record['version']}, {record['created'][:10]}.",
    ]


def evaluated(result: dict[str, Any], baseline: str, text: str, version: str) -> list[str]:
    """Return the results of `evaluate` for a checkpoint's own card."""
    return [
        f"| {text}, {result['tokens']:,} tokens | perplexity | KL mean | KL p99 | top-1 agreement |",
        "|---|---|---|---|---|",
        f"| baseline | {result['baseline_perplexity']:.3f} | 0 | 0 | 100 % |",
        f"| this | {result['perplexity']:.3f} | {result['kl_mean']:.4f} | {result['kl_p99']:.3f} | "
        f"{100 * result['top1_agreement']:.1f} % |",
        "",
        f"Measured against {_base(baseline)} by `gptoss-quantize evaluate` {version}.",
    ]


def _base(path: str) -> str:
    return hub_name(path + "/") or Path(path).name
