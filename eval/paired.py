"""Two models on the same items: accuracy difference with its interval, McNemar's test, flips, recovery.

Items are answered right or wrong by both models, so each falls in one of four cells: both right, only the baseline,
only the candidate, neither. What matters is the two cells in which they differ (the flips): the models share the
luck of the draw of items, and pairing removes it, which is why a paired interval is several times narrower than the
difference of two separate ones.

    difference = (only candidate - only baseline) / n          in fractions, negative when the candidate is worse
    interval   = percentiles of the difference over resampled items (Efron & Tibshirani 1993, ch. 13), each task
                 resampled by itself. Drawing n items with replacement and counting cells is drawing cell counts
                 from a multinomial, so 10,000 resamples cost milliseconds.
    p          = exact McNemar (1947): the chance, if both directions of flip were equally likely, of flips at
                 least as one-sided as these; two-sided, binomial.
    recovery   = accuracy of the candidate / accuracy of the baseline, its error from the same resamples

benchmarks/coverage.py measures how often the interval holds the true difference.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import comb
from typing import Any

import numpy as np

RESAMPLES = 10_000
SEED = 0


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
    differences = (draws[:, 2] - draws[:, 1]) / items
    edge = (1 - confidence) / 2
    low, high = np.quantile(differences, [edge, 1 - edge])
    base_right = draws[:, 0] + draws[:, 1]
    ratios = (draws[:, 0] + draws[:, 2]) / np.maximum(base_right, 1)
    base = both + worse
    return {
        "items": items,
        "baseline_accuracy": base / items,
        "accuracy": (both + better) / items,
        "difference": (better - worse) / items,
        "interval": [float(low), float(high)],
        "p_mcnemar": mcnemar(worse, better),
        "flips_worse": worse,
        "flips_better": better,
        "recovery": (both + better) / base if base else None,
        "recovery_se": float(ratios.std(ddof=1)) if base else None,
    }
