"""The report's plots: matplotlib figures as inline SVG that follow the page's colours, light or dark.

Ink, grid and series are drawn in placeholder colours, which `svg` replaces by CSS variables; text stays text. Figures
are made without pyplot, so that no global state is touched. Sizes are in inches at 96 dots.
"""

import io
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

INK, GRID, PAPER = "#010101", "#020202", "#030303"
SERIES = [f"#0{i}0b0c" for i in range(8)]
MARKERS = "osD^vPXh"
VARIABLES = {INK: "var(--ink)", GRID: "var(--grid)", PAPER: "var(--paper)"} | {
    color: f"var(--c{i})" for i, color in enumerate(SERIES)
}
RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRID,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}


def series(index: int) -> str:
    """Return the colour of the i-th candidate."""
    return SERIES[index % len(SERIES)]


def svg(figure: Figure, name: str) -> str:
    """Return a figure as an <svg> element in the page's colours; `name` keeps its inner ids apart from others'."""
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for color, variable in VARIABLES.items():
        text = text.replace(color, variable)
    # groups are numbered in every figure alike; nothing refers to them
    text = re.sub(r' id="[A-Za-z]\w*_\d+"', "", text)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    head, rest = text.split(">", 1)
    # the page decides the width, the view box the proportions
    return re.sub(r' (width|height)="[^"]*"', "", head) + ">" + rest


def _figure(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def _log(axis: Axis) -> None:
    """Make an axis logarithmic with plain numbers at 1, 2 and 5."""
    if axis is axis.axes.xaxis:
        axis.axes.set_xscale("log")
    else:
        axis.axes.set_yscale("log")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def kl_against_bits(candidates: Sequence[dict[str, Any]], noise: float | None) -> str:
    """Return KL divergence (log) over bits per expert weight, one point per candidate with its interval."""
    with rc_context(RC):
        figure, axes = _figure(9.4, 4.0)
        for i, entry in enumerate(candidates):
            text = entry["texts"][0]
            x, y = entry["cost"]["bits_per_expert_weight"], text["summary"]["kl_mean"]
            # a log axis has no place for zero
            y = max(y, 1e-7)
            interval = text["details"]["kl_mean_interval"]
            if interval is not None:
                low, high = (max(edge, 1e-7) for edge in interval)
                axes.plot([x, x], [low, high], color=series(i), linewidth=1.4)
            axes.plot([x], [y], MARKERS[i % len(MARKERS)], color=series(i), markersize=8, label=entry["name"])
        if noise is not None and noise > 0:
            axes.axhline(noise, color=INK, linewidth=1, linestyle=(0, (4, 3)))
            axes.annotate("noise floor", (0.995, noise), xycoords=("axes fraction", "data"), ha="right", va="bottom")
        _log(axes.yaxis)
        axes.set_xlabel("bits per expert weight")
        axes.set_ylabel("KL divergence (nats, log)")
        axes.margins(x=0.25)
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
        return svg(figure, "kl-bits")


def task_differences(candidates: Sequence[dict[str, Any]], margin: float) -> str:
    """Return accuracy difference with interval, per task and over all items, one row each."""
    tasks = [t for t, found in candidates[0]["tasks"].items() if found["paired"] is not None]
    rows = ["all items", *tasks]
    with rc_context(RC):
        figure, axes = _figure(9.4, 1.1 + 0.17 * len(rows) * max(2, len(candidates)))
        for i, entry in enumerate(candidates):
            found = [entry["tasks_overall"], *(entry["tasks"][t]["paired"] for t in tasks)]
            at = np.arange(len(rows)) + (i - (len(candidates) - 1) / 2) * 0.7 / len(candidates)
            middle = [100 * f["difference"] for f in found]
            ends = np.array([[100 * f["interval"][0], 100 * f["interval"][1]] for f in found])
            axes.hlines(at, ends[:, 0], ends[:, 1], color=series(i), linewidth=1.4)
            axes.plot(middle, at, MARKERS[i % len(MARKERS)], color=series(i), markersize=4.5, label=entry["name"])
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.axvline(-100 * margin, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.set_yticks(range(len(rows)), [row.removeprefix("gptoss_") for row in rows])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("accuracy against the baseline, points (95 % paired interval; dashed: margin)")
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
        return svg(figure, "tasks")


def buckets(candidates: Sequence[dict[str, Any]]) -> str:
    """Return KL and top-1 agreement by the baseline's confidence in its first choice."""
    with rc_context(RC):
        figure, (left, right) = _figure(9.4, 3.3, 1, 2)
        for i, entry in enumerate(candidates):
            rows = [row for row in entry["texts"][0]["details"]["buckets"] if row["tokens"]]
            names = [f"{row['from']:g}-{row['to']:g}" for row in rows]
            for axes, key, factor in ((left, "kl_mean", 1), (right, "top1_agreement", 100)):
                values = [factor * row[key] for row in rows]
                axes.plot(names, values, MARKERS[i % len(MARKERS)] + "-", color=series(i), label=entry["name"])
        left.set_ylabel("KL divergence (nats)")
        right.set_ylabel("top-1 agreement (%)")
        for axes in (left, right):
            axes.set_xlabel("baseline's confidence")
        figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=4)
        return svg(figure, "buckets")


def layer_lines(candidates: Sequence[dict[str, Any]]) -> str:
    """Return block error (clean and running) and router agreement over layers."""
    with rc_context(RC):
        figure, (left, right) = _figure(9.4, 3.5, 1, 2)
        for i, entry in enumerate(candidates):
            layers = entry["experts"]["layers"]
            x = range(len(layers))
            for key, style in (("error_clean", "-"), ("error_running", ":")):
                label = entry["name"] if style == "-" else None
                left.plot(x, [100 * (layer[key] or 0) for layer in layers], style, color=series(i), label=label)
            right.plot(x, [100 * layer["topk_agreement"] for layer in layers], color=series(i))
        if _positive(candidates):
            _log(left.yaxis)
        left.set_ylabel("error of the expert block (%)")
        right.set_ylabel("experts chosen alike (%)")
        for axes in (left, right):
            axes.set_xlabel("layer")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=4)
        return svg(figure, "layers")


def _positive(candidates: Sequence[dict[str, Any]]) -> bool:
    return all(
        layer[k] for e in candidates for layer in e["experts"]["layers"] for k in ("error_clean", "error_running")
    )


def _heatmap(axes: Axes, values_EL: np.ndarray, norm: Normalize, label: str) -> Any:
    image = axes.imshow(values_EL, aspect="auto", interpolation="none", cmap="viridis", norm=norm, origin="lower")
    axes.set_xlabel("layer")
    axes.set_ylabel("expert")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(label, fontsize=10, loc="left")
    axes.grid(visible=False)
    return image


def _expert_errors(layers: Sequence[dict[str, Any]]) -> np.ndarray:
    """Return the error of every expert in percent [E, L], NaN where it saw no token."""
    rows = [[np.nan if value is None else 100 * value for value in layer["expert_error"]] for layer in layers]
    return np.array(rows, dtype=float).T


def expert_heatmaps(candidates: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return (name, heatmap) of tokens per expert and layer, then of every candidate's expert errors."""
    first = candidates[0]["experts"]["layers"]
    tokens = np.array([layer["tokens"] for layer in first], dtype=float).T
    errors = [_expert_errors(entry["experts"]["layers"]) for entry in candidates]
    known = np.concatenate([e[np.isfinite(e) & (e > 0)] for e in errors])
    low, high = (float(np.quantile(known, 0.05)), float(known.max())) if known.size else (1e-3, 1.0)
    # one scale for all candidates
    norm = LogNorm(low, max(high, low * 1.01))
    maps = [("tokens", tokens, Normalize(0, max(1.0, tokens.max())), "tokens per expert (baseline's routing)")]
    maps += [
        (e["name"], v, norm, f"{e['name']}: error per expert (%)") for e, v in zip(candidates, errors, strict=True)
    ]
    out = []
    for number, (name, values, scale, label) in enumerate(maps):
        with rc_context(RC):
            figure, axes = _figure(9.4, 1.2 + min(4.0, 0.15 * values.shape[0]))
            image = _heatmap(axes, values, scale, label)
            bar = figure.colorbar(image, ax=axes, pad=0.01, fraction=0.05)
            bar.outline.set_visible(False)
            if isinstance(scale, LogNorm):
                _log(bar.ax.yaxis)
            out.append((name, svg(figure, f"heat-{number}")))
    return out


def error_against_tokens(candidates: Sequence[dict[str, Any]]) -> str:
    """Return the error of every expert over the tokens that it saw here."""
    with rc_context(RC):
        figure, axes = _figure(9.4, 3.8)
        for i, entry in enumerate(candidates):
            pairs = [
                (n, 100 * e)
                for layer in entry["experts"]["layers"]
                for n, e in zip(layer["tokens"], layer["expert_error"], strict=True)
                if e
            ]
            if pairs:
                style = {"color": series(i), "markersize": 3, "alpha": 0.5, "label": entry["name"]}
                axes.plot(*zip(*pairs, strict=True), MARKERS[i % len(MARKERS)], **style)
                _log(axes.xaxis)
                _log(axes.yaxis)
        axes.set_xlabel("tokens routed to the expert (log)")
        axes.set_ylabel("error of the expert (%, log)")
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
        return svg(figure, "error-tokens")
