"""What the file itself says, before any runtime: lines of `verify` that need our own computation only.

predicts text    the perplexity of the unquantized model (or of the checkpoint, without one) on the text compared:
                 a model of random numbers agrees with itself in every runtime
config           the checkpoint computes with what the baseline computes with: window, rope, limits, ...
experts          every expert's output against the baseline's, on the baseline's own inputs (`eval.experts`): a
                 random expert, halves for interleaved rows or lost biases are all of another size than rounding
adapter          one of the two was made with an adapter
"""

import math
from typing import Any

import torch

from gptoss_quantize.calibration.sanity import suspicion
from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.eval.experts import compare_experts
from gptoss_quantize.eval.identity import adapter_difference, config_differences
from gptoss_quantize.eval.trees import Tree, lay_out
from gptoss_quantize.runtimes.agreement import AGREES, DISAGREES, SUSPECT
from gptoss_quantize.runtimes.verify import Row, VerifyRequest, predictions

OURS = "the file"
# |error|^2 / |output|^2 of a layer and of one expert; right 4-bit experts stay below a fifth of it (docs/verdicts.md)
LAYER_ERROR = 0.35
EXPERT_ERROR = 0.7
# an expert with fewer tokens may be off by the luck of one of them
FEW_TOKENS = 4


def check_file(asked: VerifyRequest) -> list[Row]:
    """Return the lines on the checkpoint itself, and on what it is compared with."""
    rows = [row for row in (predicts_text(asked),) if row is not None]
    if asked.baseline is None or asked.baseline.path.resolve() == asked.checkpoint.path.resolve():
        return rows
    if found := config_differences(asked.baseline, asked.checkpoint):
        rows.append(Row(OURS, "config", DISAGREES, note="; ".join(found)))
    if lost := lost_biases(asked.baseline, asked.checkpoint):
        shown = ", ".join(lost[:3]) + (" ..." if len(lost) > 3 else "")
        rows.append(Row(OURS, "biases", DISAGREES, note=f"all zero, the baseline's are not: {shown}"))
    adapter = adapter_difference(asked.baseline, asked.checkpoint)
    if adapter is not None:
        rows.append(Row(OURS, "adapter", SUSPECT, note=adapter))
    return [*rows, experts_row(asked)]


def perplexity(asked: VerifyRequest, log_probs_PV: torch.Tensor) -> tuple[float, int]:
    """Return (perplexity, number of predictions) of the next tokens at the positions compared."""
    known = [p for p in asked.positions if p + 1 < asked.ids.shape[1]]
    kept = log_probs_PV.view(len(asked.ids), len(asked.positions), -1)[:, : len(known)]
    following = asked.ids[:, [p + 1 for p in known]]
    loss = -kept.gather(-1, following[..., None]).double()
    return (math.exp(min(700.0, float(loss.mean()))) if loss.numel() else math.nan), loss.numel()


def predicts_text(asked: VerifyRequest) -> Row | None:
    """Return a line on a model that cannot predict text, None for one that can."""
    who, model = ("baseline", asked.baseline) if asked.baseline is not None else ("checkpoint", asked.checkpoint)
    found = predictions(model, asked, on_layer=asked.progress(f"{who} on text: layer"))
    value, count = perplexity(asked, found)
    why = suspicion(value, count, model.config.vocab) if count else None
    return None if why is None else Row(OURS, f"{who} predicts text", SUSPECT, note=why)


def lost_biases(baseline: Checkpoint, checkpoint: Checkpoint) -> list[str]:
    """Return the layers whose experts' biases are all zero though the baseline's are not.

    Their outputs' error would not tell: biases are a tenth of the energy in a layer, as rounding is.
    """
    out = []
    for layer in range(baseline.config.layers):
        for part in ("gate_up", "down"):
            ours, theirs = (
                any(bool(c.expert_bias(layer, e, part).any()) for e in range(c.config.experts))
                for c in (baseline, checkpoint)
            )
            if ours and not theirs:
                out.append(f"layer {layer} {part}")
    return out


def worst_expert(layers: list[dict[str, Any]]) -> tuple[float, int, int]:
    """Return (error, layer, expert) of the expert that is furthest off among those with enough tokens."""
    found = [
        (error, i, e)
        for i, layer in enumerate(layers)
        for e, (error, tokens) in enumerate(zip(layer["expert_error"], layer["tokens"], strict=True))
        if error is not None and tokens >= FEW_TOKENS
    ]
    return max(found, default=(0.0, 0, 0))


def experts_row(asked: VerifyRequest) -> Row:
    """Return the line on the checkpoint's experts against the baseline's."""
    assert asked.baseline is not None
    step = asked.progress("experts against the baseline's: layer")
    done = 0

    def on_layer() -> None:
        nonlocal done
        done += 1
        step(done, asked.checkpoint.config.layers)

    layout = lay_out([Tree((row[0],), (tuple(row[1:]),)) for row in asked.ids.tolist()])
    (layers,) = compare_experts(asked.baseline, [asked.checkpoint], layout, on_layer=on_layer)
    expert, at, number = worst_expert(layers)
    block, worst = max((layer["error_clean"], i) for i, layer in enumerate(layers))
    note = (
        f"outputs off by {block:.2g} of their energy in layer {worst}, {expert:.2g} in layer {at} expert {number}, "
        f"the worst; rounding explains at most {LAYER_ERROR:g} and {EXPERT_ERROR:g}"
    )
    wrong = not block <= LAYER_ERROR or not expert <= EXPERT_ERROR
    return Row(OURS, "experts against the baseline's", DISAGREES if wrong else AGREES, note=note)
