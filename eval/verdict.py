"""From numbers to plain words: is the candidate as good as the baseline, worse, or broken?

    broken      it has lost the baseline's behaviour: another first choice for most tokens, KL above 1 nat, or more
                than half of what the baseline scores above chance is gone
    worse       its predictions moved further than careful 4-bit quantization moves them (`CEILING_KL`,
                `LEAST_TOP1`), or the whole interval of the accuracy difference lies below minus the margin
    uncertain   the interval reaches below minus the margin, or there are fewer items than could ever say
                (`least_items`)
    equivalent  the whole interval lies above minus the margin (non-inferior at that margin)
    unmeasured  no tasks were run; only token-level numbers speak

"Equivalent" is said of the accuracy on these items only. 4-bit experts change 10 to 25 % of the first choices (demo
model) while task averages stay, so the KL divergence ranks checkpoints, and no accuracy outvotes its ceiling. A
single task that fell by more than chance is named beside any verdict. docs/verdicts.md derives the numbers.
"""

import math
from typing import Any

BROKEN_TOP1 = 0.5
BROKEN_KL = 1.0
BROKEN_RECOVERY_ABOVE_CHANCE = 0.5
# between the worst careful 4-bit checkpoint of the demo model and the best that is plainly rounded (docs/verdicts.md)
CEILING_KL = 0.11
LEAST_TOP1 = 0.82
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


def least_items(margin: float, confidence: float = 0.95) -> int:
    """Return the fewest items that can exclude a loss of `margin`: as many right answers in a row would be chance.

    With n items none of which got worse, a loss of p has shown itself with probability 1 - (1 - p)^n; a two-sided
    interval excludes it when the rest is below (1 - confidence) / 2. 183 items for 2 points.
    """
    if not 0 < margin < 1:
        return 1
    return math.ceil(math.log((1 - confidence) / 2) / math.log1p(-margin))


def furthest(texts: list[dict[str, Any]]) -> dict[str, float] | None:
    """Return the largest KL and the least agreement over the texts of a model, None where there are none."""
    if not texts:
        return None
    summaries = [text["summary"] for text in texts]
    return {
        "kl_mean": max(s["kl_mean"] for s in summaries),
        "top1_agreement": min(s["top1_agreement"] for s in summaries),
    }


def _moved(text: dict[str, Any]) -> list[str]:
    """Return why predictions are further from the baseline's than an accuracy can make good."""
    reasons = []
    if text["kl_mean"] > CEILING_KL:
        reasons.append(f"KL divergence {text['kl_mean']:.3f} nats, above {CEILING_KL:g}, which no accuracy outvotes")
    if text["top1_agreement"] < LEAST_TOP1:
        share = 100 * (1 - text["top1_agreement"])
        reasons.append(
            f"prefers another next token than the baseline {share:.0f} % of the time, above "
            f"{100 * (1 - LEAST_TOP1):.0f} %"
        )
    return reasons


def _lost(text: dict[str, Any] | None, tasks: dict[str, Any] | None, chance: float | None) -> list[str]:
    """Return why the baseline's behaviour is gone; nothing where it is not."""
    reasons = []
    if text is not None and text["top1_agreement"] < BROKEN_TOP1:
        share = 100 * (1 - text["top1_agreement"])
        reasons.append(f"prefers another next token than the baseline {share:.0f} % of the time")
    if text is not None and text["kl_mean"] > BROKEN_KL:
        reasons.append(f"KL divergence {text['kl_mean']:.2f} nats, above {BROKEN_KL:g}")
    if tasks is not None and chance is not None:
        above = tasks["baseline_accuracy"] - chance
        kept = tasks["accuracy"] - chance
        # 5 points: below, the baseline itself guesses
        if above > 0.05 and kept < BROKEN_RECOVERY_ABOVE_CHANCE * above and tasks["interval"][1] < 0:
            share = 100 * max(kept, 0) / above
            reasons.append(f"keeps {share:.0f} % of what the baseline scores above guessing")
    return reasons


def judge(
    text: dict[str, Any] | None, tasks: dict[str, Any] | None, margin: float, chance: float | None
) -> tuple[str, list[str]]:
    """Return (level, reasons) for a token-level summary, a paired comparison, and the margin as a fraction.

    `chance` is the accuracy of guessing on the same items, None where it is not known.
    """
    if reasons := _lost(text, tasks, chance):
        return "broken", reasons
    if text is not None and (reasons := _moved(text)):
        return "worse", reasons
    if tasks is None:
        return "unmeasured", []
    low, high = tasks["interval"]
    if high < -margin:
        return "worse", []
    if tasks["items"] < (needed := least_items(margin)):
        few = f"{tasks['items']} items cannot exclude a loss of {100 * margin:g} points, whatever they say"
        return "uncertain", [f"{few}: at least {needed} are needed"]
    return ("uncertain" if low < -margin else "equivalent"), []


def measured(entry: dict[str, Any], margin: float) -> str:
    """Return what was measured of one candidate in one line; `entry` is its part of report.json."""
    parts = [f"{entry['cost']['bits_per_expert_weight']:.2f} bits per expert weight"]
    tasks = entry["tasks_overall"]
    if tasks is not None:
        low, high = tasks["interval"]
        inside, outside = low >= -margin, high < -margin
        where = (
            "inside the margin" if inside else "outside the margin" if outside else "the interval crosses the margin"
        )
        parts.append(
            f"accuracy {points(tasks['difference'])} points [{points(low)}, {points(high)}] "
            f"on {tasks['items']:,} items, {where} of {100 * margin:g}"
        )
    if entry["texts"]:
        text = entry["texts"][0]["summary"]
        parts.append(f"top-1 agreement {100 * text['top1_agreement']:.1f} %, KL {text['kl_mean']:.4f} nats")
    return "; ".join(parts)


def fell(tasks: list[dict[str, Any]]) -> str:
    """Return what is said of tasks that fell by more than chance (`paired.fallen`), "" where none did."""
    parts = []
    for task in tasks:
        low, high = task["interval"]
        name = task["task"].removeprefix("gptoss_")
        parts.append(f"{name} fell by {points(task['difference'])} points [{points(low)}, {points(high)}]")
    return "" if not parts else f"ALARM: {', '.join(parts)}, which is no chance over all tasks"


def sentence(entry: dict[str, Any], margin: float) -> str:
    """Return the verdict of one candidate, its alarms, and what it rests on."""
    verdict = entry["verdict"]
    reasons = "".join(f"; {reason}" for reason in verdict["reasons"])
    alarms = "".join(f" {alarm}." for alarm in verdict.get("alarms", []))
    return f"{WORDS[verdict['level']]}{reasons}.{alarms} {measured(entry, margin)}."
