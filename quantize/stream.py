"""A layer's experts, chunk by chunk, with the next chunk being read while this one is worked on.

One thread reads, dequantizes and, for a card, puts the weights into pinned memory, from which they are copied without
waiting; so two chunks are in memory at a time. What the thread refuses is raised where its chunk is asked for. The
card's side has not been run yet.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from gptoss_quantize.checkpoint import Checkpoint, Expert


def chunks(experts: range, at_once: int) -> list[range]:
    """Return the experts in consecutive ranges of at most `at_once`."""
    return [range(start, min(start + at_once, experts.stop)) for start in range(experts.start, experts.stop, at_once)]


def stream_experts(
    source: Checkpoint, layer: int, parts: list[range], device: torch.device
) -> Iterator[tuple[range, list[Expert]]]:
    """Yield (experts, their float32 weights on `device`) for every range of `parts`, in order."""
    pinned = device.type == "cuda"

    def read(part: range) -> list[Expert]:
        # inference mode is a property of the thread
        with torch.inference_mode():
            experts = [source.expert(layer, e) for e in part]
            return [_each(expert, torch.Tensor.pin_memory) for expert in experts] if pinned else experts

    with ThreadPoolExecutor(1) as reader:
        ahead = [reader.submit(read, part) for part in parts[:1]]
        for number, part in enumerate(parts):
            experts = ahead.pop().result()
            ahead += [reader.submit(read, following) for following in parts[number + 1 : number + 2]]
            yield part, [_each(expert, lambda t: t.to(device, non_blocking=pinned)) for expert in experts]


def _each(expert: Expert, change: Callable[[torch.Tensor], torch.Tensor]) -> Expert:
    return Expert(change(expert.gate_up), change(expert.gate_up_bias), change(expert.down), change(expert.down_bias))
