"""What quantizing a model takes and gives, before it is run: bytes on disk, on the card, of memory, and the time."""

import shlex
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gptoss_quantize.architectures import gptoss_config, sparsity
from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.config import ModelConfig, parse_config
from gptoss_quantize.errors import InputError
from gptoss_quantize.layouts import AS_SOURCE, DENSE, INT4
from gptoss_quantize.machine import compute_dtype
from gptoss_quantize.published import HUB, published
from gptoss_quantize.quantize.budget import memory_needs
from gptoss_quantize.quantize.estimate import estimate
from gptoss_quantize.quantize.mxfp4_values import look_at
from gptoss_quantize.quantize.recipes import RECIPES
from gptoss_quantize.runtimes.memory import fewer_bits, fits, llamacpp_command, serve_command
from gptoss_quantize.sizes import dense_dtype_of, disk, shard_tensors
from gptoss_quantize.units import GIB

CONTEXTS = (4096, 32768, 131072)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """What a plan is asked for; without contexts, `CONTEXTS` as far as the model's go."""

    model: str
    method: str = "gptq"
    group_size: int = 64
    dense: str = "source"
    tokens: int = 32768
    seq_len: int = 512
    gpu_memory: int = 16 * GIB
    contexts: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for option, value, known in (
            ("--method", self.method, list(RECIPES)),
            ("--group-size", self.group_size, sorted(INT4.group_sizes)),
            ("--dense", self.dense, list(DENSE)),
        ):
            if value not in known:
                raise InputError(f"{option} {value}: expected one of {', '.join(map(str, known))}")


def _shape(wanted: PlanRequest, source: Checkpoint | None) -> tuple[str, ModelConfig]:
    """Return the model's name and config: of its files, or of the published model that was named."""
    name = published(wanted.model) or wanted.model
    return name, parse_config(gptoss_config(name), name) if source is None else source.config


def plan_record(wanted: PlanRequest, source: Checkpoint | None) -> dict[str, Any]:
    """Return the numbers of a plan; without a `source`, `wanted.model` is the name of a published model."""
    name, config = _shape(wanted, source)
    if source is not None and source.dense_layout is not AS_SOURCE:
        wanted = replace(wanted, dense=source.dense_layout.name)
    contexts = _contexts(wanted, config.max_positions)
    wanted = replace(wanted, contexts=contexts)
    group_size, dense_dtype = wanted.group_size, dense_dtype_of(source)
    out = _out(name)
    card = config, group_size, wanted.dense, wanted.gpu_memory, contexts, dense_dtype
    fewer = fewer_bits(config, group_size, wanted.gpu_memory, dense_dtype)
    record: dict[str, Any] = {
        **asdict(wanted),
        "model": name,
        **look_at(source),
        "disk": disk(shard_tensors(config, group_size, wanted.dense, dense_dtype)),
        "card": fits(*card),
        "fewer_bits": fewer,
        "sparsity": sparsity(name, config),
        "commands": _commands(wanted, name, out) | {"fit": _fit_command(wanted, name, fewer, contexts)},
        "serve": serve_command(out, config, group_size, wanted.dense, wanted.gpu_memory, contexts[-1], dense_dtype),
        "llama.cpp": llamacpp_command(f"{out}-gguf", *card),
        "memory": memory_needs(config, wanted.tokens, compute_dtype("cpu")),
    }
    return record


def expected_time(wanted: PlanRequest, source: Checkpoint | None) -> dict[str, Any]:
    """Return how long a quantization takes on this machine, after measuring it for some seconds."""
    _, config = _shape(wanted, source)
    dtype = compute_dtype("cpu")
    return estimate(config, RECIPES[wanted.method], wanted.group_size, wanted.tokens, wanted.seq_len, dtype)


def _contexts(wanted: PlanRequest, positions: int) -> tuple[int, ...]:
    """Return the context lengths to judge, ascending; InputError for one that the model was not made for."""
    if wanted.contexts is None:
        return tuple(c for c in CONTEXTS if c <= positions) or (positions,)
    if max(wanted.contexts) > positions:
        raise InputError(
            f"--context {max(wanted.contexts)}: {wanted.model} was made for {positions} tokens "
            "(max_position_embeddings); ask for that many or fewer"
        )
    return tuple(sorted(wanted.contexts))


def _out(model: str) -> str:
    """Return a name for the directory to write."""
    return f"{Path(model).name or 'model'}-int4"


def _fit_command(
    wanted: PlanRequest, name: str, fewer: list[dict[str, Any]], contexts: tuple[int, ...]
) -> str | None:
    """Return the command that chooses bits for the card and the middle context or what fits; None if nothing does."""
    longest = max(row["context"] for row in fewer)
    if not longest:
        return None
    source, out = shlex.quote(HUB.get(name, wanted.model)), shlex.quote(f"{Path(name).name or 'model'}-fit")
    context = min(longest, contexts[len(contexts) // 2])
    group = "" if wanted.group_size == INT4.group_sizes[0] else f" --group-size {wanted.group_size}"
    memory = f"{wanted.gpu_memory / GIB:g}GiB"
    return f"gptoss-quantize quantize {source} {out} --fit {memory} --context {context}{group}"


def _commands(wanted: PlanRequest, name: str, out: str) -> dict[str, str]:
    """Return the command lines that make the checkpoint and its GGUF file."""
    defaults = PlanRequest(model=name)
    options = [
        f"--{option.replace('_', '-')} {value}"
        for option in ("method", "group_size", "dense", "tokens", "seq_len")
        if (value := getattr(wanted, option)) != getattr(defaults, option)
    ]
    source, made = shlex.quote(HUB.get(name, wanted.model)), shlex.quote(out)
    return {
        "quantize": " ".join(["gptoss-quantize quantize", source, made, *options]),
        "export": f"gptoss-quantize export {made} {shlex.quote(out + '-gguf')} --to gguf",
    }
