"""Draw docs/img/kl-bits.svg, the README's picture: KL divergence against bits, ours and the others.

Usage: kl_picture.py [--check]                                                                 (`make picture`)

Every number comes from benchmarks/fidelity.json. `SHOWN` names the rows and their labels; a row that stands neither
there nor in `LEFT_OUT` is an error, so that a new measurement is not forgotten. --check draws nothing and exits with
1 where the picture was made from other numbers (they stand in its description).
"""

import argparse
import json
import math
import re
import sys
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "docs/img/kl-bits.svg"
OURS, OTHERS = "#0b5fa5", "#b3541e"
SHOWN = {
    "GPTQ g64, 131072 calibration tokens": ("GPTQ, four times the text", OURS),
    "AWQ+GPTQ g64": ("AWQ+GPTQ", OURS),
    "GPTQ g64": ("GPTQ, the default", OURS),
    "GPTQ mxfp4": ("GPTQ to MXFP4", OURS),
    "AutoRound 50 iterations g64": ("AutoRound", OTHERS),
    "GPTQModel GPTQ g64": ("GPTQModel, GPTQ", OTHERS),
    "llm-compressor GPTQ g64": ("llm-compressor, GPTQ", OTHERS),
    "RTN g64": ("round to nearest", OTHERS),
    "RTN mxfp4": ("round to MXFP4", OTHERS),
    "AWQ+GPTQ g32": ("AWQ+GPTQ", OURS),
    "GPTQ g32": ("GPTQ", OURS),
    "llama.cpp IQ4_NL imatrix": ("llama.cpp IQ4_NL, imatrix", OTHERS),
    "llama.cpp Q4_0 imatrix": ("llama.cpp Q4_0, imatrix", OTHERS),
    "RTN g32": ("round to nearest", OTHERS),
}
# in docs/fidelity.md, and too many for a picture; llm-compressor's AWQ is broken for gpt-oss, at 0.744
LEFT_OUT = {
    "GPTQ + polish g32", "GPTQ + polish g64", "AWQ+GPTQ + polish g64", "AWQ+GPTQ g64, two sweeps, weights p^1.5",
    "GPTQ int3 g64", "GPTQ int3 g32", "RTN int3 g64",
    "AWQ g64", "AWQ g32", "RTN signed g64", "GPTQ g64, 256 calibration tokens", "llm-compressor AWQ g64",
}  # fmt: skip


def points() -> list[tuple[float, float, str, str]]:
    """Return bits, KL, label and colour of every shown row; exits where a row was forgotten."""
    rows = json.loads((ROOT / "benchmarks/fidelity.json").read_text(encoding="utf-8"))["rows"]
    if forgotten := rows.keys() - SHOWN.keys() - LEFT_OUT:
        sys.exit(f"benchmarks/fidelity.json has rows that SHOWN and LEFT_OUT do not name: {sorted(forgotten)}")
    return [(rows[name]["bits"], rows[name]["result"]["kl_mean"], *SHOWN[name]) for name in SHOWN]


def words(found: list[tuple[float, float, str, str]]) -> str:
    """Return the numbers as a sentence, for screen readers and for --check."""
    return "; ".join(f"{bits} bits, {label}: {kl:.4f}" for bits, kl, label, _ in found)


def spread(values: list[float], gap: float) -> list[float]:
    """Return ascending heights at least `gap` apart, each as near to its value as that allows."""
    groups: list[list[float]] = []
    for value in values:
        groups.append([value])
        while len(groups) > 1:
            low, high = groups[-2], groups[-1]
            top = sum(low) / len(low) + gap * (len(low) - 1) / 2
            if top + gap <= sum(high) / len(high) - gap * (len(high) - 1) / 2:
                break
            groups[-2:] = [low + high]
    return [sum(g) / len(g) + gap * (i - (len(g) - 1) / 2) for g in groups for i in range(len(g))]


def draw(found: list[tuple[float, float, str, str]]) -> None:
    """Write the picture: one column of points per size, labels beside them, heights on a logarithmic scale."""
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "kl", "font.family": "sans-serif", "font.size": 11})
    figure, axes = plt.subplots(figsize=(8.2, 4.8))
    sizes = sorted({bits for bits, *_ in found})
    for place, size in enumerate(sizes):
        column = sorted(point for point in found if point[0] == size)
        heights = spread([math.log10(kl) for _, kl, _, _ in column], 0.062)
        for (_, kl, label, colour), height in zip(column, heights, strict=True):
            mine = colour == OURS
            axes.plot(place, kl, "o" if mine else "D", color=colour, markersize=9 if mine else 7)
            axes.annotate(
                f"{label}  {kl:.3f}", (place, kl), (place + 0.1, 10**height), va="center", color=colour,
                weight="bold" if mine else "normal",
                arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.5, "shrinkB": 5},
            )  # fmt: skip
    axes.set_yscale("log")
    axes.set_xlim(-0.2, len(sizes) - 0.05)
    axes.set_ylim(0.021, 0.32)
    axes.set_xticks(range(len(sizes)), [f"{size:g} bits per expert weight" for size in sizes])
    axes.set_yticks([0.025, 0.05, 0.1, 0.2], ["0.025", "0.05", "0.1", "0.2"])
    axes.minorticks_off()
    axes.grid(axis="y", color="#e4e4e4")
    axes.set_axisbelow(True)
    axes.set_ylabel("KL divergence from the original, nats\n(lower is better)")
    axes.set_title("What 4 bits lose: gptoss-quantize (blue) and others (orange)", loc="left", weight="bold")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    OUT.parent.mkdir(exist_ok=True)
    figure.savefig(OUT, metadata={"Date": None, "Description": words(found)}, facecolor="white")
    text = re.sub(r"[ \t]+$", "", OUT.read_text(encoding="utf-8"), flags=re.MULTILINE)
    OUT.write_text(text, encoding="utf-8")


def main() -> None:
    """Draw the picture, or see whether it is that of the numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    found = points()
    if parser.parse_args().check:
        if words(found) not in OUT.read_text(encoding="utf-8"):
            sys.exit(f"{OUT} was drawn from other numbers; run `make picture`")
        return
    draw(found)


if __name__ == "__main__":
    main()
