"""Two models on the same items: accuracy difference with its interval, McNemar's test, flips, recovery.

Items are answered right or wrong by both models, so each falls in one of four cells: both right, only the baseline,
only the candidate, neither. What matters is the two cells in which they differ (the flips): the models share the
luck of the draw of items, and pairing removes it, which is why a paired interval is several times narrower than the
difference of two separate ones.

    difference = (only candidate - only baseline) / n          in fractions, negative when the candidate is worse
    interval   = Newcombe's score interval for a paired difference (Statistics in Medicine 17, 1998, p. 2635, method
                 10), per task, and combined over tasks as the interval of a weighted sum of independent parts
                 (MOVER, Zou & Donner 2008). It is right for few items, where resampling is not: 9 items without a
                 flip resample to a width of zero, and know next to nothing.
    p          = exact McNemar (1947): the chance, if both directions of flip were equally likely, of flips at
                 least as one-sided as these; two-sided, binomial.
    recovery   = accuracy of the candidate / accuracy of the baseline; its error from resampled items, each task by
                 itself. Drawing n items with replacement and counting cells is drawing cell counts from a
                 multinomial, so 10,000 resamples cost milliseconds (Efron & Tibshirani 1993, ch. 13).
    fallen     = tasks in which the candidate lost more than chance explains, however well it does in the others:
                 McNemar's one-sided mid-p test of each task (recommended over the exact one, which is too cautious
                 for few flips: Fagerland, Lydersen & Laake 2013), corrected for their number by Holm (1979)

benchmarks/coverage.py measures how often the interval holds the true difference.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import comb, sqrt
from statistics import NormalDist
from typing import Any

import numpy as np

RESAMPLES = 10_000
SEED = 0
ALARM_LEVEL = 0.05  # chance of a false alarm over all tasks of one candidate


@dataclass(frozen=True, slots=True)
class Cells:
    """How many items both models, one of them, or neither answered right."""

    both: int
    only_baseline: int
    only_candidate: int
    neither: int

    @property
    def items(self) -> int:
        return self.both + self.only_baseline + self.only_candidate + self.neither


def cells(baseline: np.ndarray, candidate: np.ndarray) -> Cells:
    """Return the cell counts of two bool arrays [n], one entry per item in the same order."""
    if baseline.shape != candidate.shape or baseline.ndim != 1 or not baseline.size:
        raise ValueError(f"{baseline.shape=} and {candidate.shape=}: expected two equal lists of at least one item")
    base, cand = baseline.astype(bool), candidate.astype(bool)
    counts = (base & cand, base & ~cand, ~base & cand, ~base & ~cand)
    return Cells(*(int(cell.sum()) for cell in counts))


def mcnemar(worse: int, better: int) -> float:
    """Return the exact two-sided p value of flips in one direction and in the other; 1 without any flip."""
    flips = worse + better
    tail = sum(comb(flips, k) for k in range(min(worse, better) + 1))
    # whole numbers until the last division, which Python rounds correctly at any size
    return min(1.0, 2 * tail / (1 << flips))


def mcnemar_mid_p(worse: int, better: int) -> float:
    """Return the one-sided mid-p value of at least so many flips for the worse; 1/2 without any flip."""
    flips = worse + better
    beyond = sum(comb(flips, k) for k in range(worse + 1, flips + 1))
    # half the chance of exactly this many
    return (2 * beyond + comb(flips, worse)) / (1 << (flips + 1))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return adjusted p values: those below a level are significant at that level over all tests together."""
    adjusted, least = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = least
    return {name: adjusted[name] for name in p_values}


def wilson(right: int, items: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval (1927) of a share."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    centre = (right + z * z / 2) / (items + z * z)
    half = z * sqrt(right * (items - right) / items + z * z / 4) / (items + z * z)
    return max(0.0, centre - half), min(1.0, centre + half)


def newcombe(counts: Cells, confidence: float = 0.95) -> tuple[float, float]:
    """Return the interval of candidate minus baseline, from Wilson's of each and their correlation phi."""
    a, b, c, d, n = counts.both, counts.only_candidate, counts.only_baseline, counts.neither, counts.items
    ours, theirs = (a + b) / n, (a + c) / n
    (low1, high1), (low2, high2) = wilson(a + b, n, confidence), wilson(a + c, n, confidence)
    margins = (a + b) * (c + d) * (a + c) * (b + d)
    product: float = a * d - b * c
    # for few items, a positive correlation is taken for less than it seems
    product = max(product - n / 2, 0) if product > 0 else product
    phi = product / sqrt(margins) if margins else 0.0

    def width(first: float, second: float) -> float:
        return sqrt(max(0.0, first * first - 2 * phi * first * second + second * second))

    difference = ours - theirs
    low = difference - width(ours - low1, high2 - theirs)
    return max(-1.0, low), min(1.0, difference + width(high1 - ours, theirs - low2))


def combined(strata: list[Cells], confidence: float = 0.95) -> tuple[float, float]:
    """Return the interval of the difference over all items of several tasks, each with an interval of its own."""
    items = sum(s.items for s in strata)
    total = below = above = 0.0
    for stratum in strata:
        weight, difference = stratum.items / items, (stratum.only_candidate - stratum.only_baseline) / stratum.items
        low, high = newcombe(stratum, confidence)
        total += weight * difference
        below += (weight * (difference - low)) ** 2
        above += (weight * (high - difference)) ** 2
    return max(-1.0, total - sqrt(below)), min(1.0, total + sqrt(above))


def resample(strata: list[Cells], resamples: int = RESAMPLES, seed: int = SEED) -> np.ndarray:
    """Return bootstrap cell counts [resamples, 4], every stratum (task) resampled by itself and added up."""
    rng = np.random.default_rng(seed)
    total = np.zeros((resamples, 4), dtype=np.int64)
    for stratum in strata:
        counts = np.array([stratum.both, stratum.only_baseline, stratum.only_candidate, stratum.neither])
        total += rng.multinomial(stratum.items, counts / stratum.items, size=resamples)
    return total


def compare_answers(
    baseline: Mapping[str, np.ndarray],
    candidate: Mapping[str, np.ndarray],
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> dict[str, Any]:
    """Return the paired comparison of right answers, {task: bool [n]} of both models over the same items.

    Keys: items, baseline_accuracy, accuracy, difference, interval [low, high], p_mcnemar, flips_worse,
    flips_better, recovery, recovery_se (None where the baseline answers nothing right). All fractions, not percent.
    """
    if baseline.keys() != candidate.keys():
        raise ValueError(f"tasks differ: {sorted(baseline)} and {sorted(candidate)}")
    strata = [cells(baseline[task], candidate[task]) for task in baseline]
    items = sum(s.items for s in strata)
    both, worse, better = (sum(getattr(s, n) for s in strata) for n in ("both", "only_baseline", "only_candidate"))
    draws = resample(strata, resamples, seed)
    low, high = combined(strata, confidence)
    base_right = draws[:, 0] + draws[:, 1]
    ratios = (draws[:, 0] + draws[:, 2]) / np.maximum(base_right, 1)
    base = both + worse
    return {
        "items": items,
        "baseline_accuracy": base / items,
        "accuracy": (both + better) / items,
        "difference": (better - worse) / items,
        "interval": [low, high],
        "p_mcnemar": mcnemar(worse, better),
        "flips_worse": worse,
        "flips_better": better,
        "recovery": (both + better) / base if base else None,
        "recovery_se": float(ratios.std(ddof=1)) if base else None,
    }


def fallen(paired: Mapping[str, dict[str, Any]], level: float = ALARM_LEVEL) -> list[dict[str, Any]]:
    """Return the tasks whose loss is no chance, {"task", "difference", "interval", "p"}; `paired` is per task."""
    adjusted = holm({task: mcnemar_mid_p(e["flips_worse"], e["flips_better"]) for task, e in paired.items()})
    return [
        {"task": task, "difference": e["difference"], "interval": e["interval"], "p": adjusted[task]}
        for task, e in paired.items()
        if adjusted[task] < level
    ]
