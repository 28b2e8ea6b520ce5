"""How often the paired interval holds the true accuracy difference, over simulated comparisons.

    python benchmarks/coverage.py [--simulations 2000]

Every simulation draws, per task, how many items both models, one of them, or neither answer right, from known
probabilities (tasks of unlike difficulty and unlike loss), and asks `eval.paired.compare_answers` for its interval.
Printed: the share of intervals that hold the truth, its standard error, and the mean width, in points.
"""

import argparse
import json
import math

import numpy as np

from gptoss_quantize.eval.paired import compare_answers

# per task: items, and the probabilities of both right, only the baseline, only the candidate, neither
SETTINGS = {
    "1,508 items, 4-bit like flips": [(180, (0.60, 0.05, 0.04, 0.31)), (520, (0.45, 0.06, 0.04, 0.45)),
                                      (808, (0.75, 0.03, 0.03, 0.19))],
    "300 items, 4-bit like flips": [(100, (0.60, 0.05, 0.04, 0.31)), (100, (0.45, 0.06, 0.04, 0.45)),
                                    (100, (0.75, 0.03, 0.03, 0.19))],
    "1,508 items, clear loss": [(754, (0.45, 0.20, 0.06, 0.29)), (754, (0.60, 0.12, 0.04, 0.24))],
    "1,508 items, few flips": [(1508, (0.70, 0.010, 0.008, 0.282))],
    "27 items in 9 tasks": [(3, (0.60, 0.08, 0.05, 0.27))] * 9,
    "9 items": [(9, (0.50, 0.06, 0.04, 0.40))],
    "30 items": [(30, (0.50, 0.06, 0.04, 0.40))],
    "100 items, few flips": [(100, (0.70, 0.02, 0.01, 0.27))],
}  # fmt: skip


def simulate(tasks: list[tuple[int, tuple[float, ...]]], simulations: int, seed: int) -> tuple[float, float]:
    """Return (share of intervals that hold the true difference, mean width)."""
    rng = np.random.default_rng(seed)
    items = sum(n for n, _ in tasks)
    truth = sum(n * (p[2] - p[1]) for n, p in tasks) / items
    hits, width = 0, 0.0
    for trial in range(simulations):
        base, cand = {}, {}
        for number, (n, p) in enumerate(tasks):
            counts = rng.multinomial(n, p)
            base[str(number)] = np.repeat([True, True, False, False], counts)
            cand[str(number)] = np.repeat([True, False, True, False], counts)
        low, high = compare_answers(base, cand, resamples=2, seed=trial)["interval"]
        hits += low <= truth <= high
        width += high - low
    return hits / simulations, width / simulations


def main() -> None:
    """Print one JSON object per setting."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--simulations", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name, tasks in SETTINGS.items():
        share, width = simulate(tasks, options.simulations, options.seed)
        error = math.sqrt(share * (1 - share) / options.simulations)
        row = {"setting": name, "simulations": options.simulations, "coverage": round(share, 4),
               "standard_error": round(error, 4), "mean_width_points": round(100 * width, 2)}  # fmt: skip
        print(json.dumps(row))


if __name__ == "__main__":
    main()
