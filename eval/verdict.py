"""From numbers to plain words: is the candidate as good as the baseline, worse, or broken?

    broken      it has lost the baseline's behaviour: another first choice for most tokens, KL above 1 nat, or more
                than half of what the baseline scores above chance is gone
    worse       the whole interval of the accuracy difference lies below minus the margin
    uncertain   the interval reaches below minus the margin: too few items to say
    equivalent  the whole interval lies above minus the margin (non-inferior at that margin)
    unmeasured  no tasks were run; only token-level numbers speak

"Equivalent" is said of the accuracy on these items only. 4-bit experts change 10 to 25 % of the first choices (demo
model) while task averages stay, so the KL divergence ranks checkpoints and the tasks guard the floor.
"""

from typing import Any

BROKEN_TOP1 = 0.5
BROKEN_KL = 1.0
BROKEN_RECOVERY_ABOVE_CHANCE = 0.5
MINUS = "\N{MINUS SIGN}"
WORDS = {
    "broken": "BROKEN",
    "worse": "worse than the baseline",
    "uncertain": "undecided: more items are needed",
    "equivalent": "as good as the baseline",
    "unmeasured": "tasks not measured",
}


def points(fraction: float) -> str:
    """Return a difference in percentage points with its sign."""
    return f"{100 * fraction:+.1f}".replace("-", MINUS)


def judge(
    text: dict[str, Any] | None, tasks: dict[str, Any] | None, margin: float, chance: float | None
) -> tuple[str, list[str]]:
    """Return (level, reasons) for a token-level summary, a paired comparison, and the margin as a fraction.

    `chance` is the accuracy of guessing on the same items, None where it is not known.
    """
    reasons = []
    if text is not None:
        if text["top1_agreement"] < BROKEN_TOP1:
            share = 100 * (1 - text["top1_agreement"])
            reasons.append(f"prefers another next token than the baseline {share:.0f} % of the time")
        if text["kl_mean"] > BROKEN_KL:
            reasons.append(f"KL divergence {text['kl_mean']:.2f} nats, above {BROKEN_KL:g}")
    if tasks is not None and chance is not None:
        above = tasks["baseline_accuracy"] - chance
        kept = tasks["accuracy"] - chance
        # 5 points: below, the baseline itself guesses
        if above > 0.05 and kept < BROKEN_RECOVERY_ABOVE_CHANCE * above and tasks["interval"][1] < 0:
            share = 100 * max(kept, 0) / above
            reasons.append(f"keeps {share:.0f} % of what the baseline scores above guessing")
    if reasons:
        return "broken", reasons
    if tasks is None:
        return "unmeasured", []
    low, high = tasks["interval"]
    if high < -margin:
        return "worse", []
    return ("uncertain" if low < -margin else "equivalent"), []


def measured(entry: dict[str, Any], margin: float) -> str:
    """Return what was measured of one candidate in one line; `entry` is its part of report.json."""
    parts = [f"{entry['cost']['bits_per_expert_weight']:.2f} bits per expert weight"]
    tasks = entry["tasks_overall"]
    if tasks is not None:
        low, high = tasks["interval"]
        where = {
            "equivalent": "inside the margin",
            "worse": "outside the margin",
            "uncertain": "the interval crosses the margin",
            "broken": "margin",
        }[entry["verdict"]["level"]]
        parts.append(
            f"accuracy {points(tasks['difference'])} points [{points(low)}, {points(high)}] "
            f"on {tasks['items']:,} items, {where} of {100 * margin:g}"
        )
    if entry["texts"]:
        text = entry["texts"][0]["summary"]
        parts.append(f"top-1 agreement {100 * text['top1_agreement']:.1f} %, KL {text['kl_mean']:.4f} nats")
    return "; ".join(parts)


def sentence(entry: dict[str, Any], margin: float) -> str:
    """Return the verdict of one candidate and what it rests on."""
    reasons = "".join(f"; {reason}" for reason in entry["verdict"]["reasons"])
    return f"{WORDS[entry['verdict']['level']]}{reasons}. {measured(entry, margin)}."
