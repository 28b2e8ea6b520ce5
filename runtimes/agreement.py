"""How far a runtime's predictions are from our reference, and whether that is more than its own noise.

Predictions are compared as log-probabilities over the whole vocabulary, so a constant added to all logits does not
count. A runtime rounds in its own way (int8 activations, bfloat16 products), and the unquantized model shows how much
that is: its distance from *its* reference, in the same runtime, on the same positions. A checkpoint agrees when

    KL  <=  2 * KL of the noise  +  3 standard errors  +  1e-6

Twice, since other weights round otherwise; a wrong layout is orders of magnitude away. Without the noise there is no
verdict. Shapes: P positions, V vocabulary.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

AGREES, DISAGREES, NOT_CHECKED = "agrees", "DISAGREES", "not checked"
SLACK = 1e-6


@dataclass(frozen=True, slots=True)
class Agreement:
    """Distance between two sets of predictions; KL in nats, differences of log-probabilities."""

    positions: int
    max_difference: float
    mean_difference: float
    kl: float
    kl_se: float
    top1: float

    def record(self) -> dict[str, Any]:
        """Return the numbers for a report."""
        return asdict(self)


@torch.inference_mode()
def compare(reference_PV: torch.Tensor, got_PV: torch.Tensor) -> Agreement:
    """Return the distance of log-probabilities (or logits) from the reference; infinite when some are not finite."""
    reference = torch.log_softmax(reference_PV.double(), dim=-1)
    got = torch.log_softmax(got_PV.double(), dim=-1)
    if got.shape != reference.shape:
        raise ValueError(f"predictions of shape {list(got.shape)}, expected {list(reference.shape)}")
    if not bool(torch.isfinite(got).all()):
        return Agreement(len(got), math.inf, math.inf, math.inf, 0.0, 0.0)
    difference = (got - reference).abs()
    kl = (reference.exp() * (reference - got)).sum(-1).clamp_(min=0)
    return Agreement(
        positions=len(got),
        max_difference=float(difference.max()),
        mean_difference=float(difference.mean()),
        kl=float(kl.mean()),
        kl_se=float(kl.std() / math.sqrt(len(kl))) if len(kl) > 1 else 0.0,
        top1=float((got.argmax(-1) == reference.argmax(-1)).double().mean()),
    )


def bound(noise: Agreement, got: Agreement) -> float:
    """Return the largest KL that counts as agreement."""
    return 2 * noise.kl + 3 * math.hypot(got.kl_se, 2 * noise.kl_se) + SLACK


def verdict(got: Agreement, noise: Agreement | None) -> str:
    """Return AGREES, DISAGREES, or NOT_CHECKED without a noise to compare with."""
    if noise is None:
        return NOT_CHECKED
    return AGREES if got.kl <= bound(noise, got) else DISAGREES
