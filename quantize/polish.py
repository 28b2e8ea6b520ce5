"""End-to-end polish (docs/method.md, E10): codes frozen, KL(original || quantized) lowered by gradient steps.

Free are the group scales (int4 only: powers of two do not move), the experts' biases and the norm weights. Everything
before this step looked at one layer; here the gradient says which errors of a layer the end result notices, and later
layers make up for earlier ones. Methods of the kind are known as E2E-QP (EfficientQAT) and DWQ (mlx-lm).

A value is used rounded as it will be stored, while a float32 master takes the steps (straight-through), so what is
measured is what is written. Masters start anywhere in what rounds to the stored value: from its middle no step under
half a bfloat16 spacing (0.2 to 0.4 %) would move any of them, now each part of a spacing moves that part of the
values. Each step streams the model twice, layer by layer: forward, keeping the layers' inputs, and backward,
computing each layer again with gradients.

The text is one that calibration has not seen: on its own text a quantized model errs 40 % less, and there is
little to learn. Its last sequences are held out; the values with the lowest KL there are kept, and if that is no less
than before, nothing is changed.

Shapes: N sequences, S positions, D hidden, V vocabulary; R rows, C columns, G groups.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional

from gptoss_quantize.config import ModelConfig
from gptoss_quantize.kernels import int4
from gptoss_quantize.kernels.experts import by_halves, rows_of
from gptoss_quantize.layouts import WRITTEN
from gptoss_quantize.model import attend, batches, mlp_input, rms_norm, rope_tables, router
from gptoss_quantize.quantize.budget import POLISH_CHUNK
from gptoss_quantize.quantize.polish_expert import MATRICES, ExpertOutput, Kept, Matrix

NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
FINAL = "model.norm.weight"
# scales that may move; those of MXFP4 are powers of two and do not
SCALE_SUFFIX = "_weight_scale"
_GATE_UP_BIASES = tuple(f"{layout.stem('gate_up')}_bias" for layout in WRITTEN.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class PolishSettings:
    """How the steps are taken."""

    steps: int
    rate: float = 3e-4  # of Adam, relative to a value's own size
    sequences: int = 4  # per step
    heldout_share: float = 0.125  # of the text's sequences, for early stopping
    heldout_most: int = 12  # sequences
    check_every: int = 10
    patience: int = 3  # checks without improvement before stopping


@dataclass(slots=True)
class Student:
    """The quantized model: stored tensors of a layer on demand, and the outer tensors."""

    config: ModelConfig
    layer: Callable[[int], dict[str, torch.Tensor]]  # all stored tensors of a layer by their name inside it
    final_norm: torch.Tensor  # [D]
    embedding: torch.Tensor  # [V, D]
    head: torch.Tensor  # [V, D]
    dtype: torch.dtype  # of matrix products
    free: list[dict[str, "Free"]] = field(default_factory=list)  # per layer, the last entry for the final norm


@dataclass(slots=True)
class Free:
    """One stored tensor that may move: value = start + step * unit."""

    start: torch.Tensor  # rounds to the stored value
    unit: torch.Tensor
    step: torch.Tensor  # float32, what Adam moves
    rounding: Callable[[torch.Tensor], torch.Tensor]
    dtype: torch.dtype  # as stored: bfloat16, but for the norms of a source that has others

    def value(self) -> torch.Tensor:
        """Return the value as stored, in float32; its gradient goes to `step` unchanged."""
        wanted = self.start + self.step * self.unit
        return wanted + (self.rounding(wanted) - wanted).detach()


def _stored_as(dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda values: values.to(dtype).float()


def _within_rounding(
    stored: torch.Tensor, rounding: Callable[[torch.Tensor], torch.Tensor], generator: torch.Generator
) -> torch.Tensor:
    """Return values spread evenly over what rounds to the stored ones."""
    # bfloat16 has 8 significant bits, and frexp's fraction lies in [0.5, 1); finer dtypes need no such help
    spacing = torch.ldexp(torch.ones_like(stored), torch.frexp(stored).exponent - 8)
    shares = torch.rand(stored.shape, generator=generator, device=generator.device).to(stored.device) - 0.5
    moved = stored + shares * spacing
    return torch.where(rounding(moved) == stored, moved, stored)


def free_values(tensors: dict[str, torch.Tensor], seed: int = 0) -> dict[str, Free]:
    """Return what may move in a layer, by stored name; a step of 1 is as large as the value usually is."""
    found, generator = {}, torch.Generator().manual_seed(seed)
    rounding: Callable[[torch.Tensor], torch.Tensor]
    for name, stored in tensors.items():
        start = stored.float()
        if name.endswith(SCALE_SUFFIX):
            unit, rounding = start, int4.round_scale
        elif name in NORMS or name == FINAL:
            unit, rounding = start, _stored_as(stored.dtype)
        elif "experts" in name and name.endswith("_bias"):
            # pre-activations are of order one, and the experts' outputs a tenth of that
            size = 1.0 if name.endswith(_GATE_UP_BIASES) else 0.1
            unit, rounding = torch.tensor(size), _stored_as(stored.dtype)
        else:
            continue
        step = torch.zeros_like(start, requires_grad=True)
        found[name] = Free(_within_rounding(start, rounding, generator), unit, step, rounding, stored.dtype)
    return found


def _projection(
    tensors: dict[str, torch.Tensor], values: dict[str, torch.Tensor], expert: int, part: str, dtype: torch.dtype
) -> tuple[torch.Tensor | None, torch.Tensor, Matrix]:
    """Return (scales or None, bias, matrix) of an expert's projection, gate_up sorted into gates, then ups."""
    order = by_halves if part == "gate_up" else lambda rows: rows
    layout = next(one for one in WRITTEN.values() if one.inner(expert, part) + one.suffixes[0] in tensors)
    base, at = layout.inner(expert, part), (expert,) if layout.fused else ()
    stored = [order(tensors[base + suffix][at]) for suffix in layout.suffixes]
    free = values.get(base + SCALE_SUFFIX)
    scale = None if free is None else order(free)
    return scale, order(values[base + "_bias"][at]), MATRICES[layout.name](*stored, dtype)


def run_layer(
    student: Student,
    index: int,
    tensors: dict[str, torch.Tensor],
    hidden_NSD: torch.Tensor,
    rope: tuple[torch.Tensor, torch.Tensor],
    kept: dict[int, list[Kept]] | None = None,
) -> torch.Tensor:
    """Return the residual stream after layer `index`: `model.hidden_states` for one layer, with gradients.

    `kept`, by expert, passes inner results from a forward pass to the backward pass over the same tokens.
    """
    config, dtype = student.config, student.dtype
    values = {name: free.value() for name, free in student.free[index].items()}
    dense = tensors | {name: values[name] for name in NORMS}
    h = attend(hidden_NSD, dense, config, index, rope, dtype)
    flat = h.flatten(0, 1)
    x = mlp_input(flat, dense, config)
    index_TK, prob_TK = router(x, dense, config)
    x = x.to(dtype)
    out = torch.zeros_like(flat)
    for e in range(config.experts):
        token, slot = rows_of(index_TK, e)
        if not token.numel():
            continue
        scale13, bias13, w13 = _projection(tensors, values, e, "gate_up", dtype)
        scale2, bias2, w2 = _projection(tensors, values, e, "down", dtype)
        here = [] if kept is None else kept.setdefault(e, [])
        inputs = x.index_select(0, token), prob_TK[token, slot], scale13, bias13, scale2, bias2
        y = ExpertOutput.apply(*inputs, w13, w2, config, here)
        out = out.index_add(0, token, y)
    return h + out.view_as(h)


def _head_loss(
    student: Student, hidden_TD: torch.Tensor, teacher_TD: torch.Tensor, grad: bool
) -> tuple[float, torch.Tensor]:
    """Return (sum over tokens of KL(teacher || student), its gradient by the student's normed hidden states)."""
    total, gradient = 0.0, torch.zeros_like(hidden_TD)
    for part in torch.arange(hidden_TD.shape[0]).split(POLISH_CHUNK):
        rows = slice(int(part[0]), int(part[-1]) + 1)
        wanted, got = (
            functional.linear(h[rows].to(student.dtype), student.head).float().log_softmax(-1)
            for h in (teacher_TD, hidden_TD)
        )
        p = wanted.exp()
        total += float((wanted.sub_(got) * p).sum())
        if grad:
            gradient[rows] = (got.exp_().sub_(p).to(student.dtype) @ student.head).float()
    return total, gradient


@torch.no_grad()
def measure(student: Student, ids_NS: torch.Tensor, teacher_NSD: torch.Tensor) -> float:
    """Return the mean KL(teacher || student) in nats; `teacher` are its normed final hidden states."""
    rope = rope_tables(student.config, ids_NS.shape[1], str(student.embedding.device))
    total = 0.0
    for batch in batches(*ids_NS.shape):
        h = functional.embedding(ids_NS[batch], student.embedding).float()
        for i in range(student.config.layers):
            h = run_layer(student, i, student.layer(i), h, rope)
        final = rms_norm(h, student.free[-1][FINAL].value(), student.config.rms_eps).flatten(0, 1)
        total += _head_loss(student, final, teacher_NSD[batch].flatten(0, 1), False)[0]
    return total / ids_NS.numel()


def _grad(tensor: torch.Tensor) -> torch.Tensor:
    """Return the gradient that a backward pass has left."""
    if tensor.grad is None:
        raise RuntimeError("the loss does not depend on the hidden states")
    return tensor.grad


def gradients(student: Student, ids_NS: torch.Tensor, teacher_NSD: torch.Tensor) -> float:
    """Return the mean KL and leave its gradient in the `grad` of every free value's `step`."""
    config, tokens = student.config, ids_NS.numel()
    rope = rope_tables(config, ids_NS.shape[1], str(student.embedding.device))
    inputs: list[tuple[torch.Tensor, dict[int, list[Kept]]]] = []
    with torch.no_grad():
        h = functional.embedding(ids_NS, student.embedding).float()
        for i in range(config.layers):
            inputs.append((h, {}))
            h = run_layer(student, i, student.layer(i), h, rope, inputs[-1][1])
    with torch.enable_grad():
        h.requires_grad_()
        final = rms_norm(h, student.free[-1][FINAL].value(), config.rms_eps)
        loss, slope = _head_loss(student, final.detach().flatten(0, 1), teacher_NSD.flatten(0, 1), True)
        final.backward(slope.view_as(final) / tokens)
        slope = _grad(h)
        for i in reversed(range(config.layers)):
            h, kept = inputs.pop()
            h.requires_grad_()
            run_layer(student, i, student.layer(i), h, rope, kept).backward(slope)
            slope = _grad(h)
    return loss / tokens


def text_needed(steps: int, seq_len: int) -> int:
    """Return the tokens for which no step sees a sequence twice; with fewer, `polish` goes round."""
    settings = PolishSettings(steps=steps)
    count = steps * settings.sequences
    while count - _held_out(count, settings) < steps * settings.sequences:
        count += 1
    return seq_len * count


def _held_out(sequences: int, settings: PolishSettings) -> int:
    return min(settings.heldout_most, max(1, round(settings.heldout_share * sequences)))


def polish(
    student: Student,
    ids_NS: torch.Tensor,
    teacher_NSD: torch.Tensor,
    settings: PolishSettings,
    on_step: Callable[[int, float], None] = lambda step, kl: None,
) -> dict[str, Any]:
    """Move the student's free values for at most `steps` steps; leave the best on held-out text; return a report.

    `free` is set up here when it is empty. `kept` is False in the report when nothing helped, and
    all steps are zero then.
    """
    if not student.free:
        student.free = [free_values(student.layer(i), seed=i) for i in range(student.config.layers)]
        student.free.append(free_values({FINAL: student.final_norm}))
    steps = [free.step for layer in student.free for free in layer.values()]
    per_step = min(settings.sequences, len(ids_NS) - _held_out(len(ids_NS), settings))
    held = _held_out(len(ids_NS), settings)
    train, heldout = slice(0, len(ids_NS) - held), slice(len(ids_NS) - held, None)
    order = torch.randperm(len(ids_NS) - held, generator=torch.Generator().manual_seed(0))
    before = best = measure(student, ids_NS[heldout], teacher_NSD[heldout])
    kept, losses, checks, worse = [torch.zeros_like(s) for s in steps], [], [[0, before]], 0
    adam = torch.optim.Adam(steps, lr=settings.rate, betas=(0.9, 0.99))
    for step in range(settings.steps):
        for group in adam.param_groups:
            warm = min(1.0, (step + 1) / 5)
            group["lr"] = settings.rate * warm * (1 - step / settings.steps)
        at = torch.arange(step * per_step, (step + 1) * per_step) % len(order)
        chosen = order[at]
        losses.append(gradients(student, ids_NS[train][chosen], teacher_NSD[train][chosen]))
        adam.step()
        adam.zero_grad(set_to_none=True)
        on_step(step + 1, losses[-1])
        if (step + 1) % settings.check_every == 0 or step + 1 == settings.steps:
            now = measure(student, ids_NS[heldout], teacher_NSD[heldout])
            checks.append([step + 1, now])
            if now < best:
                best, worse, kept = now, 0, [s.detach().clone() for s in steps]
            elif (worse := worse + 1) >= settings.patience:
                break
    with torch.no_grad():
        for parameter, value in zip(steps, kept, strict=True):
            parameter.copy_(value)
    return {
        "steps": len(losses),
        # above 1: the text ran short, and was gone round this often
        "rounds": len(losses) * per_step / len(order),
        "heldout_tokens": ids_NS[heldout].numel(),
        "kl_before": before,
        "kl_after": best,
        "kept": best < before,
        "checks": checks,
        "losses": [round(loss, 5) for loss in losses],
    }
