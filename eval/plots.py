"""The report's plots: matplotlib figures as inline SVG that follow the page's colours, light or dark.

Ink, grid and series are drawn in placeholder colours, which `svg` replaces by CSS variables; text stays text. Figures
are made without pyplot, so that no global state is touched. All are `WIDE` inches wide, with letters of 11 points: a
phone of 390 pixels shows them at 10 pixels, a page with two beside each other at 13.
"""

import io
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

INK, GRID, PAPER = "#010101", "#020202", "#030303"
SERIES = [f"#0{i}0b0c" for i in range(8)]
MARKERS = "osD^vPXh"
WIDE = 5.6  # inches
LONGEST_NAME = 30
# sizes that differ by less say nothing on an axis
SAME_BITS = 0.01
EMPTY = "#8d939c"  # of cells without a number; seen on white and on black
VARIABLES = {INK: "var(--ink)", GRID: "var(--grid)", PAPER: "var(--paper)"} | {
    color: f"var(--c{i})" for i, color in enumerate(SERIES)
}
RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 11,
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


def _figure(height: float, rows: int = 1) -> tuple[Figure, Any]:
    figure = Figure(figsize=(WIDE, height), layout="constrained")
    return figure, figure.subplots(rows, 1)


def short(name: str) -> str:
    """Return a name that fits into a plot: a long one without its middle."""
    half = (LONGEST_NAME - 1) // 2
    return name if len(name) <= LONGEST_NAME else f"{name[:half]}…{name[-half:]}"


def _legend(figure: Figure, axes: Axes) -> None:
    """Put the candidates' names under a figure, as many beside each other as fit."""
    handles, names = axes.get_legend_handles_labels()
    if names:
        columns = max(1, min(len(names), 44 // (max(map(len, names)) + 5)))
        figure.legend(handles, names, loc="outside lower center", ncols=columns, handlelength=1.2, columnspacing=1.2)


def _log(axis: Axis) -> None:
    """Make an axis logarithmic with plain numbers at 1, 2 and 5, or at 1 over many decades; after plotting."""
    if axis is axis.axes.xaxis:
        axis.axes.set_xscale("log")
    else:
        axis.axes.set_yscale("log")
    # over many decades the numbers between would touch
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def same_bits(candidates: Sequence[dict[str, Any]]) -> bool:
    """Return whether all candidates have the same bits per expert weight, so that no axis of sizes says anything."""
    bits = [entry["cost"]["bits_per_expert_weight"] for entry in candidates]
    return max(bits) - min(bits) <= SAME_BITS * max(bits)


def _kl(entry: dict[str, Any]) -> tuple[float, float, float]:
    """Return (mean, low, high) of the first text; a log axis has no place for zero."""
    text = entry["texts"][0]
    mean = text["summary"]["kl_mean"]
    low, high = text["details"]["kl_mean_interval"] or (mean, mean)
    return max(mean, 1e-7), max(low, 1e-7), max(high, 1e-7)


def kl_against_bits(candidates: Sequence[dict[str, Any]], noise: float | None) -> str:
    """Return KL divergence (log) with its interval over bits per expert weight, or over names."""
    with rc_context(RC):
        if same_bits(candidates):
            return _kl_of_names(candidates, noise)
        figure, axes = _figure(4.0)
        for i, entry in enumerate(candidates):
            x, (y, low, high) = entry["cost"]["bits_per_expert_weight"], _kl(entry)
            axes.plot([x, x], [low, high], color=series(i), linewidth=1.4)
            axes.plot([x], [y], MARKERS[i % len(MARKERS)], color=series(i), markersize=8, label=short(entry["name"]))
        if noise is not None and noise > 0:
            axes.axhline(noise, color=INK, linewidth=1, linestyle=(0, (4, 3)))
            axes.annotate("noise floor", (0.995, noise), xycoords=("axes fraction", "data"), ha="right", va="bottom")
        _log(axes.yaxis)
        axes.set_xlabel("bits per expert weight")
        axes.set_ylabel("KL divergence (nats, log)")
        axes.margins(x=0.25)
        _legend(figure, axes)
        return svg(figure, "kl-bits")


def _kl_of_names(candidates: Sequence[dict[str, Any]], noise: float | None) -> str:
    """Return KL divergence (log) with its interval, a row per candidate, the best above."""
    order = sorted(range(len(candidates)), key=lambda i: _kl(candidates[i])[0])
    figure, axes = _figure(1.3 + 0.36 * len(order))
    for row, i in enumerate(order):
        mean, low, high = _kl(candidates[i])
        axes.hlines([row], [low], [high], color=series(i), linewidth=1.6)
        axes.plot([mean], [row], MARKERS[i % len(MARKERS)], color=series(i), markersize=8)
        axes.annotate(f"{mean:.2g}", (mean, row), xytext=(0, 7), textcoords="offset points", ha="center")
    _log(axes.xaxis)
    if noise is not None and noise > 0:
        axes.axvline(noise, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        # beside its line, over the rows
        axes.annotate(" noise floor", (noise, 1), xycoords=("data", "axes fraction"), ha="left", va="bottom")
    axes.set_yticks(range(len(order)), [short(candidates[i]["name"]) for i in order])
    axes.set_ylim(len(order) - 0.4, -0.8)
    axes.margins(x=0.12)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("KL divergence (nats, log)")
    bits = candidates[0]["cost"]["bits_per_expert_weight"]
    axes.set_title(f"all at {bits:.2f} bits per expert weight", fontsize=11, loc="left", pad=18)
    return svg(figure, "kl-names")


def task_differences(candidates: Sequence[dict[str, Any]], margin: float) -> str:
    """Return accuracy difference with interval, per task and over all items, one row each."""
    tasks = [t for t, found in candidates[0]["tasks"].items() if found["paired"] is not None]
    rows = ["all items", *tasks]
    with rc_context(RC):
        figure, axes = _figure(1.5 + 0.17 * len(rows) * max(2, len(candidates)))
        for i, entry in enumerate(candidates):
            found = [entry["tasks_overall"], *(entry["tasks"][t]["paired"] for t in tasks)]
            at = np.arange(len(rows)) + (i - (len(candidates) - 1) / 2) * 0.7 / len(candidates)
            middle = [100 * f["difference"] for f in found]
            ends = np.array([[100 * f["interval"][0], 100 * f["interval"][1]] for f in found])
            axes.hlines(at, ends[:, 0], ends[:, 1], color=series(i), linewidth=1.4)
            style = {"color": series(i), "markersize": 4.5, "label": short(entry["name"])}
            axes.plot(middle, at, MARKERS[i % len(MARKERS)], **style)
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.axvline(-100 * margin, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.set_yticks(range(len(rows)), [row.removeprefix("gptoss_") for row in rows])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("accuracy against the baseline (points)")
        _legend(figure, axes)
        return svg(figure, "tasks")


def buckets(candidates: Sequence[dict[str, Any]]) -> str:
    """Return KL and top-1 agreement by the baseline's confidence in its first choice."""
    with rc_context(RC):
        figure, (upper, lower) = _figure(5.2, 2)
        for i, entry in enumerate(candidates):
            rows = [row for row in entry["texts"][0]["details"]["buckets"] if row["tokens"]]
            names = [f"{row['from']:g}-{row['to']:g}" for row in rows]
            for axes, key, factor in ((upper, "kl_mean", 1), (lower, "top1_agreement", 100)):
                values = [factor * row[key] for row in rows]
                axes.plot(names, values, MARKERS[i % len(MARKERS)] + "-", color=series(i), label=short(entry["name"]))
        upper.set_ylabel("KL divergence (nats)")
        lower.set_ylabel("top-1 agreement (%)")
        for axes in (upper, lower):
            axes.set_xlabel("baseline's confidence")
        _legend(figure, upper)
        return svg(figure, "buckets")


def layer_lines(candidates: Sequence[dict[str, Any]]) -> str:
    """Return block error (clean and running) and router agreement over layers."""
    with rc_context(RC):
        figure, (upper, lower) = _figure(5.4, 2)
        for i, entry in enumerate(candidates):
            layers = entry["experts"]["layers"]
            x = range(len(layers))
            for key, style in (("error_clean", "-"), ("error_running", ":")):
                label = short(entry["name"]) if style == "-" else None
                upper.plot(x, [100 * (layer[key] or 0) for layer in layers], style, color=series(i), label=label)
            lower.plot(x, [100 * layer["topk_agreement"] for layer in layers], color=series(i))
        if _positive(candidates):
            _log(upper.yaxis)
        upper.set_ylabel("block error (%)")
        lower.set_ylabel("experts alike (%)")
        for axes in (upper, lower):
            axes.set_xlabel("layer")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _legend(figure, upper)
        return svg(figure, "layers")


def _positive(candidates: Sequence[dict[str, Any]]) -> bool:
    return all(
        layer[k] for e in candidates for layer in e["experts"]["layers"] for k in ("error_clean", "error_running")
    )


def _heatmap(axes: Axes, values_EL: np.ndarray, norm: Normalize, label: str) -> Any:
    colors = colormaps["viridis"].with_extremes(bad=EMPTY)
    image = axes.imshow(values_EL, aspect="auto", interpolation="none", cmap=colors, norm=norm, origin="lower")
    axes.set_xlabel("layer")
    axes.set_ylabel("expert")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(label, fontsize=11, loc="left")
    axes.grid(visible=False)
    return image


def _expert_errors(layers: Sequence[dict[str, Any]]) -> np.ndarray:
    """Return the error of every expert in percent [E, L], NaN where it saw no token."""
    rows = [[np.nan if value is None else 100 * value for value in layer["expert_error"]] for layer in layers]
    return np.array(rows, dtype=float).T


def expert_heatmaps(candidates: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return (caption, heatmap) of tokens per expert and layer, then of every candidate's expert errors."""
    first = candidates[0]["experts"]["layers"]
    tokens = np.array([layer["tokens"] for layer in first], dtype=float).T
    tokens[tokens == 0] = np.nan
    errors = [_expert_errors(entry["experts"]["layers"]) for entry in candidates]
    known = np.concatenate([e[np.isfinite(e) & (e > 0)] for e in errors])
    low, high = (float(np.quantile(known, 0.05)), float(known.max())) if known.size else (1e-3, 1.0)
    # one scale for all candidates
    norm = LogNorm(low, max(high, low * 1.01))
    maps = [("tokens", tokens, Normalize(0, max(1.0, np.nanmax(tokens))), "tokens per expert")]
    maps += [(e["name"], v, norm, f"{short(e['name'])}: error (%)") for e, v in zip(candidates, errors, strict=True)]
    out = []
    for number, (name, values, scale, label) in enumerate(maps):
        with rc_context(RC):
            figure, axes = _figure(1.3 + min(4.0, 0.15 * values.shape[0]))
            image = _heatmap(axes, values, scale, label)
            bar = figure.colorbar(image, ax=axes, pad=0.01, fraction=0.05)
            bar.outline.set_visible(False)
            if isinstance(scale, LogNorm):
                _log(bar.ax.yaxis)
            out.append((_heat_words(name, values, scale), svg(figure, f"heat-{number}")))
    return out


def _heat_words(name: str, values_EL: np.ndarray, scale: Normalize) -> str:
    """Return the caption of a heat map: what its colours mean, the grey cells and the darkest ones too."""
    if not isinstance(scale, LogNorm):
        words = "Tokens that the baseline sends to each expert of each layer; bright is many."
        return words + (" Grey: an expert that got none." if np.isnan(values_EL).any() else "")
    words = f"{name}: how far the output of each expert moved, clean input; bright is far. All have one scale."
    if (values_EL < scale.vmin).any():
        words += f" The darkest colour is {scale.vmin:.2g} % and below."
    unseen, exact = bool(np.isnan(values_EL).any()), bool((values_EL == 0).any())
    meaning = {(1, 0): "got no token", (0, 1): "did not move at all", (1, 1): "got no token, or did not move at all"}
    return words + (f" Grey: an expert that {meaning[unseen, exact]}." if unseen or exact else "")


def error_against_tokens(candidates: Sequence[dict[str, Any]]) -> str:
    """Return the error of every expert over the tokens that it saw here."""
    with rc_context(RC):
        figure, axes = _figure(4.0)
        for i, entry in enumerate(candidates):
            pairs = [
                (n, 100 * e)
                for layer in entry["experts"]["layers"]
                for n, e in zip(layer["tokens"], layer["expert_error"], strict=True)
                if e
            ]
            if pairs:
                style = {"color": series(i), "markersize": 3, "alpha": 0.5, "label": short(entry["name"])}
                axes.plot(*zip(*pairs, strict=True), MARKERS[i % len(MARKERS)], **style)
                _log(axes.xaxis)
                _log(axes.yaxis)
        axes.set_xlabel("tokens routed to the expert (log)")
        axes.set_ylabel("error of the expert (%, log)")
        _legend(figure, axes)
        return svg(figure, "error-tokens")
