"""The record of `eval.compare` as files: report.html (one file, no network), report.json, and a model card.

The page is HTML with inline SVG by matplotlib and no script: it opens from disk, follows the reader's light or dark
setting, and prints. Each file appears under its name when it is whole.
"""

import json
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, metadata
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from gptoss_quantize.eval.model_card import model_card
from gptoss_quantize.eval.ranking import rank
from gptoss_quantize.eval.verdict import CEILING_KL, LEAST_TOP1, WORDS, points
from gptoss_quantize.files import write_json

TEMPLATE = "report.html.j2"
Figure = tuple[str, str]  # inline SVG and caption
LAYER_ROWS = (
    ("experts chosen alike (%)", "topk_agreement", 100),
    ("router KL (nats)", "router_kl", 1),
    ("block error, clean input (%)", "error_clean", 100),
    ("block error, running input (%)", "error_running", 100),
)


def percent(fraction: float | None) -> str:
    """Return a fraction as percent with one digit."""
    return "" if fraction is None else f"{100 * fraction:.1f}"


def nats(value: float) -> str:
    """Return a divergence with three significant digits, rounding noise below zero as zero."""
    if abs(value) < 1e-6:
        return "0"
    return f"{value:.4f}" if abs(value) >= 1e-3 else f"{value:.1e}"


def p_value(value: float) -> str:
    """Return a p value with as many digits as mean something."""
    return "< 0.0001" if value < 1e-4 else f"{value:.4f}"


FILTERS = {
    "percent": percent,
    "nats": nats,
    "p_value": p_value,
    "signed": points,
    "capitalize_first": lambda text: text[:1].upper() + text[1:],
    "unbroken": lambda text: text.replace(" %", "\u00a0%"),
    "points": lambda value: f"{value:g}",
    "mib": lambda count: f"{(count or 0) / 2**20:,.0f}",
}


def figures(record: dict[str, Any]) -> dict[str, list[Figure]]:
    """Return the plots of every section that has data."""
    from gptoss_quantize.eval import plots  # noqa: PLC0415

    candidates = record["candidates"]
    out: dict[str, list[Figure]] = {"first": [], "tasks": [], "tokens": [], "experts": []}
    if record["baseline"]["texts"]:
        noise = record["noise_floor"][0]["summary"]["kl_mean"] if record["noise_floor"] else None
        out["first"].append(
            (
                plots.kl_against_bits(candidates, noise),
                "KL divergence on the first text"
                + (": left is better." if plots.same_bits(candidates) else " against size: lower left is better.")
                + " Lines are 95 % intervals.",
            )
        )
        out["tokens"].append(
            (plots.buckets(candidates), "By the probability that the baseline gives its own first choice.")
        )
    if candidates[0]["tasks_overall"] is not None:
        out["tasks"].append(
            (
                plots.task_differences(candidates, record["settings"]["margin"]),
                "Accuracy differences with 95 % paired intervals; the dashed line is the margin.",
            )
        )
    if candidates[0]["experts"] is not None:
        out["experts"].append(
            (
                plots.layer_lines(candidates),
                "Error of the expert block per layer (solid: clean input, dotted: running), routing.",
            )
        )
        out["experts"] += [(svg, words) for words, svg in plots.expert_heatmaps(candidates)]
        out["experts"].append(
            (
                plots.error_against_tokens(candidates),
                "Every expert of every layer: error (clean input) against tokens seen.",
            )
        )
    return out


def task_rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of the task table, all items last; nothing where no tasks were run."""
    base, candidates = record["baseline"], record["candidates"]
    rows = []
    for task, found in base["tasks"].items():
        entries = [c["tasks"][task] for c in candidates]
        first = entries[0]["paired"]
        shown = [
            {
                "paired": e["paired"],
                "metrics": ", ".join(f"{k.split(',')[0]} {v:.4g}" for k, v in e["metrics"].items()),
            }
            for e in entries
        ]
        rows.append(
            {
                "name": task.removeprefix("gptoss_"),
                "count": found["items"],
                "chance": found["chance"],
                "baseline": first and first["baseline_accuracy"],
                "candidates": shown,
            }
        )
    overall = candidates[0]["tasks_overall"]
    if overall is not None:
        rows.append(
            {
                "name": "all items",
                "count": overall["items"],
                "chance": record["chance"],
                "baseline": overall["baseline_accuracy"],
                "candidates": [{"paired": c["tasks_overall"], "metrics": ""} for c in candidates],
            }
        )
    return rows


def documentation() -> str | None:
    """Return the address of the documentation that this package was published with, None where it has none."""
    try:
        urls = metadata("gptoss-quantize").get_all("Project-URL") or []
    except PackageNotFoundError:
        return None
    named = dict(url.split(", ", 1) for url in urls)
    return next((url for name, url in named.items() if name.lower() == "documentation"), None)


def whole_sentences(text: str) -> str:
    """Return an answer that was cut in its midst to the end of its last whole sentence, or word, with an ellipsis."""
    text = text.strip()
    # the number of a list's item ends no sentence
    ends = [m.end() for m in re.finditer(r"(?<![\s\d])[.!?][\"')\]*]*(?=\s|$)", text)]
    if ends:
        return text[: ends[-1]] + ("" if ends[-1] == len(text) else " …")
    return text + " …"


def spoken(said: dict[str, Any], new_tokens: int) -> str:
    """Return an example answer as it is shown: one that was cut at `new_tokens` to its last whole sentence."""
    return whole_sentences(said["answer"]) if said["tokens"] >= new_tokens else str(said["answer"]).strip()


def spoken_speed(entry: dict[str, Any]) -> float | None:
    """Return tokens/s of a model's example answers, from first token to last; None where not measured."""
    seconds = sum(e.get("answer_seconds") or 0 for e in entry["examples"])
    steps = sum(e["tokens"] - 1 for e in entry["examples"] if e.get("answer_seconds"))
    return steps / seconds if seconds else None


def render(record: dict[str, Any]) -> str:
    """Return the whole page."""
    models = [record["baseline"], *record["candidates"]]
    new_tokens = record["settings"]["new_tokens"]

    def plot(figure: Figure) -> Markup:
        svg, caption = figure
        label = caption or "heat map"
        text = f'<figure role="img" aria-label="{escape(label)}">{svg}'
        return Markup(text + (f"<figcaption>{escape(caption)}</figcaption></figure>" if caption else "</figure>"))

    def token_rows(number: int) -> Iterator[tuple[str, dict[str, Any]]]:
        yield from ((c["name"], c["texts"][number]) for c in record["candidates"])
        if record["noise_floor"]:
            yield "noise floor", record["noise_floor"][number]

    def layer_mean(entry: dict[str, Any], key: str, factor: float) -> str:
        values = [layer[key] for layer in entry["experts"]["layers"] if layer[key] is not None]
        return f"{factor * sum(values) / len(values):.3g}" if values else ""

    def speed(entry: dict[str, Any]) -> str:
        found = spoken_speed(entry)
        return "not measured" if found is None else f"{found:.1f}"

    def shown(entry: dict[str, Any], number: int) -> str:
        if not entry["examples"]:
            return f"No answer: {entry['examples_left_out']}."
        return spoken(entry["examples"][number], new_tokens)

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= FILTERS
    source = (files("gptoss_quantize.eval") / "data" / TEMPLATE).read_text(encoding="utf-8")
    hidden = ("candidates", "baseline", "noise_floor", "command", "warnings")
    provenance = {k: v for k, v in record.items() if k not in hidden}
    provenance["models"] = {m["name"]: {k: m[k] for k in ("path", "sha256", "seconds")} for m in models}
    provenance["texts"] = [t["text"] for t in record["baseline"]["texts"]]
    provenance["tasks"] = {task: found["prompts_sha256"] for task, found in record["baseline"]["tasks"].items()}
    count = len(record["candidates"])
    kinds = {t["text"]["kind"] for t in record["baseline"]["texts"]}
    return environment.from_string(source).render(
        title=f"{Path(record['baseline']['path']).name}: {count} checkpoint{'' if count == 1 else 's'} compared",
        record=record,
        words=WORDS,
        ceiling_kl=CEILING_KL,
        least_top1=LEAST_TOP1,
        models=models,
        tasks=task_rows(record),
        figures=figures(record),
        parts=list(record["baseline"]["cost"]["bytes_by_part"]),
        examples=any(m["examples"] for m in models),
        layer_rows=LAYER_ROWS,
        chat_note=""
        if "chat" in kinds
        else "gpt-oss is a chat model: its perplexity on raw text is near 200 and says little.",
        provenance=json.dumps(provenance, indent=1, ensure_ascii=False),
        plot=plot,
        token_rows=token_rows,
        layer_mean=layer_mean,
        speed=speed,
        shown=shown,
        ranking=rank(record["candidates"], record["suspect"]),
        docs=documentation(),
    )


def write_report(record: dict[str, Any], dest: Path) -> list[Path]:
    """Write report.json, report.html and README.md into `dest`; return their paths."""
    paths = [dest / name for name in ("report.json", "report.html", "README.md")]
    write_json(paths[0], record)
    for path, text in ((paths[1], render(record)), (paths[2], model_card(record))):
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    return paths
