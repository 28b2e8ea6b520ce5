"""What quantizing a model takes and gives, before it is run: bytes on disk, on the card, of memory, and the time."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from gptoss_quantize.architectures import SIZES, gptoss_config, sparsity
from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.config import parse_config
from gptoss_quantize.errors import InputError
from gptoss_quantize.layouts import AS_SOURCE, DENSE, INT4
from gptoss_quantize.machine import compute_dtype
from gptoss_quantize.quantize.budget import memory_needs
from gptoss_quantize.quantize.estimate import estimate
from gptoss_quantize.quantize.mxfp4_values import look_at
from gptoss_quantize.quantize.recipes import RECIPES
from gptoss_quantize.runtimes.memory import fits, serve_command
from gptoss_quantize.sizes import dense_dtype_of, disk, shard_tensors
from gptoss_quantize.units import GIB

CONTEXTS = (4096, 32768, 131072)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """What a plan is asked for; `measure` spends some seconds on the expected time."""

    model: str
    method: str = "gptq"
    group_size: int = 64
    dense: str = "source"
    tokens: int = 32768
    seq_len: int = 512
    gpu_memory: int = 16 * GIB
    contexts: tuple[int, ...] = CONTEXTS
    measure: bool = True

    def __post_init__(self) -> None:
        for option, value, known in (
            ("--method", self.method, list(RECIPES)),
            ("--group-size", self.group_size, sorted(INT4.group_sizes)),
            ("--dense", self.dense, list(DENSE)),
        ):
            if value not in known:
                raise InputError(f"{option} {value}: expected one of {', '.join(map(str, known))}")


def plan_record(wanted: PlanRequest, source: Checkpoint | None) -> dict[str, Any]:
    """Return the numbers of a plan; without a `source`, `wanted.model` is the name of a published shape."""
    config = parse_config(gptoss_config(wanted.model), wanted.model) if source is None else source.config
    if source is not None and source.dense_layout is not AS_SOURCE:
        wanted = replace(wanted, dense=source.dense_layout.name)
    group_size, compute, dense_dtype = wanted.group_size, compute_dtype("cpu"), dense_dtype_of(source)
    record: dict[str, Any] = {
        **asdict(wanted),
        **look_at(source),
        "disk": disk(shard_tensors(config, group_size, wanted.dense, dense_dtype)),
        "card": fits(config, group_size, wanted.dense, wanted.gpu_memory, wanted.contexts, dense_dtype),
        "sparsity": sparsity(wanted.model, config),
        "serve": serve_command("OUT", config, group_size, wanted.gpu_memory, wanted.contexts[-1], dense_dtype),
        "memory": memory_needs(config, wanted.tokens, compute),
    }
    if wanted.measure:
        record["time"] = estimate(config, RECIPES[wanted.method], group_size, wanted.tokens, wanted.seq_len, compute)
    return record


def is_published(model: str) -> bool:
    """Return whether a name is that of a published shape, whose plan needs no file."""
    return model in SIZES
