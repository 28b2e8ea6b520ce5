"""How far a runtime's predictions are from our reference, and whether that is more than its own noise.

Predictions are compared as log-probabilities over the whole vocabulary, so a constant added to all logits does not
count. Two kinds of alarm stand beside each other, and docs/verdicts.md derives their numbers:

relative    A runtime rounds in its own way (int8 activations, bfloat16 products), and the unquantized model shows how
            much that is: its distance from *its* reference, in the same runtime, on the same positions. A checkpoint
            agrees when

                KL  <=  2 * KL of the noise  +  3 standard errors  +  1e-6

            Twice, since other weights round otherwise; a wrong layout is orders of magnitude away.

absolute    What the runtime's precision can explain at all (`LIMITS`), for the checkpoint and for the unquantized
            model alike. A runtime that misreads both in the same way has a "noise" as large as its error, and only
            this alarm sees it. Three numbers, since faults are broad (all positions a little: the median), strong
            (the mean), or rare (one expert of 128: the share of positions that are far off).

Within the absolute limits but without a baseline there is no verdict. Shapes: P positions, V vocabulary.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

AGREES, DISAGREES, NOT_CHECKED = "agrees", "DISAGREES", "not checked"
FAILED, SUSPECT = "FAILED", "SUSPECT"
SLACK = 1e-6


@dataclass(frozen=True, slots=True)
class Limits:
    """What right models never exceed at one precision; KL in nats per position."""

    mean: float
    median: float
    position: float  # a position beyond this is far off
    far_off: float  # the largest share of positions that may be


# by the precision that the runtime computes in; measured and multiplied in docs/verdicts.md
LIMITS = {
    "float32": Limits(mean=1e-3, median=1e-6, position=1e-2, far_off=0.02),
    "16 bit": Limits(mean=0.05, median=0.01, position=1.0, far_off=0.02),
    "int8": Limits(mean=0.03, median=0.01, position=1.0, far_off=0.02),
}


@dataclass(frozen=True, slots=True)
class Agreement:
    """Distance between two sets of predictions; KL in nats, differences of log-probabilities."""

    positions: int
    max_difference: float
    mean_difference: float
    kl: float
    kl_se: float
    top1: float
    kl_median: float = 0.0
    kl_max: float = 0.0
    kls: tuple[float, ...] = ()  # of every position

    def record(self) -> dict[str, Any]:
        """Return the numbers for a report."""
        return {name: value for name, value in asdict(self).items() if name != "kls"}

    def share_beyond(self, limit: float) -> tuple[int, float]:
        """Return (number, share) of the positions with a KL above the limit."""
        count = sum(not kl <= limit for kl in self.kls)
        return count, count / max(1, len(self.kls))


@torch.inference_mode()
def compare(reference_PV: torch.Tensor, got_PV: torch.Tensor) -> Agreement:
    """Return the distance of log-probabilities (or logits) from the reference; infinite when some are not finite."""
    reference = torch.log_softmax(reference_PV.double(), dim=-1)
    got = torch.log_softmax(got_PV.double(), dim=-1)
    if got.shape != reference.shape:
        raise ValueError(f"predictions of shape {list(got.shape)}, expected {list(reference.shape)}")
    if not bool(torch.isfinite(got).all()):
        worst = math.inf
        return Agreement(len(got), worst, worst, worst, 0.0, 0.0, worst, worst, (worst,) * len(got))
    difference = (got - reference).abs()
    kl = (reference.exp() * (reference - got)).sum(-1).clamp_(min=0)
    return Agreement(
        positions=len(got),
        max_difference=float(difference.max()),
        mean_difference=float(difference.mean()),
        kl=float(kl.mean()),
        kl_se=float(kl.std() / math.sqrt(len(kl))) if len(kl) > 1 else 0.0,
        top1=float((got.argmax(-1) == reference.argmax(-1)).double().mean()),
        kl_median=float(kl.quantile(0.5)),
        kl_max=float(kl.max()),
        kls=tuple(kl.tolist()),
    )


def bound(noise: Agreement, got: Agreement) -> float:
    """Return the largest KL that counts as agreement with this noise."""
    return 2 * noise.kl + 3 * math.hypot(got.kl_se, 2 * noise.kl_se) + SLACK


def alarm(got: Agreement, precision: str) -> str | None:
    """Return what is beyond anything that the precision explains (a key of `LIMITS`), None where nothing is."""
    limits = LIMITS[precision]
    words = f"nats, and {precision} explains at most"
    if not got.kl <= limits.mean:
        return f"KL {got.kl:.2g} {words} {limits.mean:g}"
    if not got.kl_median <= limits.median:
        return f"median KL {got.kl_median:.2g} {words} {limits.median:g}"
    count, share = got.share_beyond(limits.position)
    # a single position may fall on a router's tie
    if count > 1 and share > limits.far_off:
        where = f"{count} of {got.positions} positions beyond {limits.position:g} nats"
        return f"{where}, and {precision} explains at most {limits.far_off:.0%}"
    return None


def verdict(got: Agreement, noise: Agreement | None, precision: str = "16 bit") -> str:
    """Return DISAGREES, AGREES, or NOT_CHECKED where no alarm is up and there is no noise to compare with."""
    return judge(got, noise, precision)[0]


def judge(got: Agreement, noise: Agreement | None, precision: str) -> tuple[str, str]:
    """Return (verdict, why: empty where it agrees) of a distance, the baseline's own, and what is computed in."""
    if noise is not None and (why := alarm(noise, precision)) is not None:
        return DISAGREES, f"the unquantized model itself is far from ours here: {why}"
    if (why := alarm(got, precision)) is not None:
        return DISAGREES, why
    if noise is None:
        return NOT_CHECKED, "no baseline to show the runtime's noise; no absolute alarm"
    most = bound(noise, got)
    if got.kl <= most:
        return AGREES, ""
    return DISAGREES, f"KL {got.kl:.2g} nats, the noise allows {most:.2g}"
