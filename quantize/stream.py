"""A layer's experts, chunk by chunk, with the next chunk being read while this one is worked on.

One thread reads and dequantizes; so two chunks are in memory at a time. For a card it puts the weights into pinned
memory and copies them on a stream of its own, so the copy overlaps the work as well. What the thread refuses is
raised where its chunk is asked for.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from gptoss_quantize.source import Expert, Source


def chunks(experts: range, at_once: int) -> list[range]:
    """Return the experts in consecutive ranges of at most `at_once`."""
    return [range(start, min(start + at_once, experts.stop)) for start in range(experts.start, experts.stop, at_once)]


def stream_experts(
    source: Source, layer: int, parts: list[range], device: torch.device
) -> Iterator[tuple[range, list[Expert]]]:
    """Yield (experts, their float32 weights on `device`) for every range of `parts`, in order."""
    copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def read(part: range) -> tuple[list[Expert], torch.cuda.Event | None]:
        # inference mode and the current stream are properties of the thread
        with torch.inference_mode():
            if copies is None:
                return [source.expert(layer, e) for e in part], None
            with torch.cuda.stream(copies):
                # one expert after the other, so that one at most is in memory that is not pinned
                pinned = [_each(source.expert(layer, e), torch.Tensor.pin_memory) for e in part]
                return [_each(e, lambda t: t.to(device, non_blocking=True)) for e in pinned], copies.record_event()

    with ThreadPoolExecutor(1) as reader:
        ahead = [reader.submit(read, part) for part in parts[:1]]
        for number, part in enumerate(parts):
            experts, copied = ahead.pop().result()
            ahead += [reader.submit(read, following) for following in parts[number + 1 : number + 2]]
            if copied is not None:
                _take_over(experts, copied, torch.cuda.current_stream(device))
            yield part, experts


def _take_over(experts: list[Expert], copied: torch.cuda.Event, here: torch.cuda.Stream) -> None:
    """Make a stream wait for copied experts, and keep their memory from the next copies while it uses them."""
    here.wait_event(copied)
    for expert in experts:
        for tensor in (expert.gate_up, expert.gate_up_bias, expert.down, expert.down_bias):
            tensor.record_stream(here)


def _each(expert: Expert, change: Callable[[torch.Tensor], torch.Tensor]) -> Expert:
    return Expert(change(expert.gate_up), change(expert.gate_up_bias), change(expert.down), change(expert.down_bias))
