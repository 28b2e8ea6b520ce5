"""The public function `plan`, in a module of its own: it needs torch, and no transformers, which load slowly."""

from collections.abc import Callable, Sequence

from gptoss_quantize.api_inputs import Place, at_least, open_checkpoint, size
from gptoss_quantize.errors import InputError
from gptoss_quantize.published import published
from gptoss_quantize.results import Plan
from gptoss_quantize.runtimes.plan import PlanRequest, expected_time, plan_record


def plan(
    model: Place,
    method: str = "gptq",
    *,
    group_size: int = 64,
    dense: str = "source",
    tokens: int = 32768,
    seq_len: int = 512,
    gpu_memory: int | str = "16GiB",
    contexts: Sequence[int] | None = None,
    measure: bool = True,
    before_measuring: Callable[[Plan], None] | None = None,
) -> Plan:
    """Say what quantizing a model would take and give: bytes, memory of the card, time, before it is run.

    Args:
        model: 20b, gpt-oss-20b or openai/gpt-oss-20b and the same of 120b (nothing is downloaded), a directory or
            a hub name.
        gpu_memory: of the card that is to run the result, bytes or a size such as "16GiB".
        contexts: context lengths that it is judged at; without it 4096, 32768 and 131072, as far as the model's go.
        measure: measure this machine for the expected time, some seconds.
        before_measuring: called with what is known before that.
        method, group_size, dense, tokens, seq_len: as for `quantize`.
    """
    if contexts is not None and not contexts:
        raise InputError("contexts: expected at least one context length")
    at_least(1, context=1 if contexts is None else min(contexts), tokens=tokens, seq_len=seq_len)
    wanted = PlanRequest(
        model=str(model),
        method=method,
        group_size=group_size,
        dense=dense,
        tokens=tokens,
        seq_len=seq_len,
        gpu_memory=size(gpu_memory, "--gpu-memory"),
        contexts=None if contexts is None else tuple(contexts),
    )
    source = None if published(wanted.model) else open_checkpoint(model)
    found = Plan(plan_record(wanted, source))
    if before_measuring is not None:
        before_measuring(found)
    if measure:
        found.report["time"] = expected_time(wanted, source)
    return found
