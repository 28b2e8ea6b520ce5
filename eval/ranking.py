"""Which candidate to ship, and why: the verdicts of a comparison in order, or the reason that none may be shipped.

Only a candidate that is as good as the baseline on enough items, and in which no single task fell, may be
recommended; a suspect baseline recommends nobody, since every number is measured against it. Among those that may,
the lowest KL divergence wins (on the text where it is highest). Those whose 95 % interval reaches down to the
winner's cannot be told from it: of them the smallest file is taken, where it is smaller by more than `SAME_SIZE`.
Where one that is undecided stays clearly closer to the baseline than the winner, in no larger a file, nothing is
recommended before that is settled.
"""

from typing import Any

# files this much apart are the same size to whoever ships them
SAME_SIZE = 0.01
ORDER = ("equivalent", "unmeasured", "uncertain", "worse", "broken")
NOT_YET = {
    "unmeasured": "no tasks were run, so only its tokens speak; run compare with tasks",
    "uncertain": "undecided on so few items; run compare with more of them",
    "worse": "worse than the baseline",
    "broken": "broken",
}


def far(entry: dict[str, Any]) -> tuple[float, float, float]:
    """Return (KL mean, low, high) in nats of a candidate on the text where it is highest; all zero without texts."""
    if not entry["texts"]:
        return 0.0, 0.0, 0.0
    text = max(entry["texts"], key=lambda text: float(text["summary"]["kl_mean"]))
    mean = float(text["summary"]["kl_mean"])
    low, high = text["details"]["kl_mean_interval"] or (mean, mean)
    return mean, low, high


def hindrance(entry: dict[str, Any]) -> str | None:
    """Return why a candidate may not be recommended, None where it may."""
    verdict = entry["verdict"]
    if verdict["level"] != "equivalent":
        return NOT_YET[verdict["level"]]
    return "a single task fell by more than chance" if verdict.get("alarms") else None


def choose(fit: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the one to ship of candidates that all may be."""
    closest = min(fit, key=far)
    alike = [entry for entry in fit if far(entry)[1] <= far(closest)[2]]
    small = min(entry["cost"]["bytes"] for entry in alike)
    return min((e for e in alike if e["cost"]["bytes"] <= (1 + SAME_SIZE) * small), key=far)


def closer(candidates: list[dict[str, Any]], chosen: dict[str, Any]) -> dict[str, Any] | None:
    """Return the undecided candidate that stays clearly closer to the baseline than `chosen`, or None."""
    size = (1 + SAME_SIZE) * chosen["cost"]["bytes"]
    found = [
        entry
        for entry in candidates
        if entry["verdict"]["level"] == "uncertain"
        and far(entry)[2] < far(chosen)[1]
        and entry["cost"]["bytes"] <= size
    ]
    return min(found, key=far) if found else None


def _why(chosen: dict[str, Any], fit: list[dict[str, Any]], number: int) -> str:
    measured = bool(chosen["texts"])
    closest = min(fit, key=far)
    words = "It is as good as the baseline on these tasks"
    if number == 1:
        return f"{words}, and it is the only candidate."
    if len(fit) == 1:
        return f"{words}, and no other candidate is known to be."
    if not measured:
        return f"{words}, and no smaller candidate is; no text was run to tell how close it stays."
    if chosen is closest:
        after = min((e for e in fit if e is not chosen), key=far)
        return (
            f"{words}, and of those that are it stays closest to it: KL divergence {far(chosen)[0]:.4f} nats, "
            f"against {far(after)[0]:.4f} of {after['name']}."
        )
    saved = (closest["cost"]["bytes"] - chosen["cost"]["bytes"]) / 2**20
    return (
        f"{words}, and it is {saved:,.0f} MiB smaller than {closest['name']}, whose KL divergence "
        f"({far(closest)[0]:.4f} nats against {far(chosen)[0]:.4f}) is within the uncertainty of these texts."
    )


def rank(candidates: list[dict[str, Any]], suspect: str | None) -> dict[str, Any]:
    """Return {"ship": name or None, "why": a sentence, "order": [{"name", "hindrance" or None}]}, the best first.

    `candidates` are those of report.json, `suspect` says why the baseline is, None where it is not.
    """
    fit = [entry for entry in candidates if hindrance(entry) is None]
    chosen = choose(fit) if fit and suspect is None else None
    rival = None if chosen is None else closer(candidates, chosen)
    if rival is not None:
        chosen = None

    def place(entry: dict[str, Any]) -> tuple[bool, bool, int, float]:
        level = -1 if entry is rival else ORDER.index(entry["verdict"]["level"])
        return entry is not chosen, entry is not rival and entry not in fit, level, far(entry)[0]

    order = sorted(candidates, key=place)
    if chosen is not None:
        why = _why(chosen, fit, len(candidates))
    elif suspect is not None:
        why = "The baseline itself is suspect, and every number here is measured against it: find the right one."
    elif rival is not None:
        first = choose(fit)
        why = (
            f"{first['name']} is as good as the baseline on these tasks, but {rival['name']} stays clearly "
            f"closer to it (KL divergence {far(rival)[0]:.4f} nats, against {far(first)[0]:.4f}) and is "
            f"{hindrance(rival)}."
        )
    else:
        why = f"The best here is {order[0]['name']}: {hindrance(order[0])}."
    return {
        "ship": None if chosen is None else chosen["name"],
        "why": why,
        "order": [{"name": entry["name"], "hindrance": hindrance(entry)} for entry in order],
    }
