"""The module in the place of transformers' GptOssExperts: packed experts in mapped files, or stacked on a device."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.errors import InputError
from gptoss_quantize.kernels import experts_op
from gptoss_quantize.kernels.experts import MappedExperts, PackedExperts, experts_torch
from gptoss_quantize.layouts import PARTS, Layout


def stored_parts(layout: Layout, layer: int = 0) -> tuple[str, ...]:
    """Return the names of an expert's stored tensors in a layer, in the order of PackedExperts."""
    return tuple(
        layout.stem(part) + suffix for part in PARTS for suffix in (*layout.at(layer, part).suffixes, "_bias")
    )


class PackedExpertsModule(nn.Module):
    """The packed experts of one layer; the same call as transformers' GptOssExperts.

    Mapped experts become stacked ones when the module is moved to another device. Their dtypes never change.
    """

    def __init__(self, experts: MappedExperts | PackedExperts, limit: float, alpha: float, kernel: str):
        super().__init__()
        self.limit, self.alpha, self.kernel = limit, alpha, kernel
        self._put(experts)

    def _put(self, experts: MappedExperts | PackedExperts) -> None:
        for name in list(self._buffers):
            delattr(self, name)
        if isinstance(experts, MappedExperts):
            self.sizes, self.storages = (
                (experts.intermediate, experts.group, experts.bias_dtype),
                len(experts.storages),
            )
            tensors = {f"storage_{i}": storage for i, storage in enumerate(experts.storages)} | {
                "place": experts.place
            }
        else:
            tensors = {name: getattr(experts, name) for name in PackedExperts.__slots__}
        self.mapped = isinstance(experts, MappedExperts)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)
        self._experts = experts

    def experts(self) -> MappedExperts | PackedExperts:
        """Return the experts as they lie in memory."""
        return self._experts

    def nbytes(self) -> int:
        """Return the bytes of the experts' tensors."""
        experts = self._experts
        if isinstance(experts, MappedExperts):
            return experts.nbytes()
        return sum(getattr(experts, name).nbytes for name in PackedExperts.__slots__)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "PackedExpertsModule":
        device = fn(torch.empty(0)).device
        if self.mapped and device.type not in ("cpu", "meta"):
            self._put(self._experts.stack())  # type: ignore[union-attr]
        if not self.mapped:
            moved = (getattr(self._experts, name).to(device) for name in PackedExperts.__slots__)
            self._put(PackedExperts(*moved))
        return self

    def forward(
        self, hidden_states: torch.Tensor, router_indices: torch.Tensor, routing_weights: torch.Tensor
    ) -> torch.Tensor:
        """Return the block output in the shape and dtype of `hidden_states`."""
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        routing = (x, router_indices, routing_weights)
        if self.kernel == "torch":
            return experts_torch(*routing, self._experts, self.limit, self.alpha).view_as(hidden_states)
        training = torch.is_grad_enabled() and (x.requires_grad or routing_weights.requires_grad)
        if not training and not torch.compiler.is_compiling():
            # past torch's dispatcher, whose way to an operator takes as long as a small layer
            return experts_op.run(*routing, self._experts, self.limit, self.alpha).view_as(hidden_states)
        return self._operator(*routing).view_as(hidden_states)

    def _operator(self, *routing: torch.Tensor) -> torch.Tensor:
        bits = self._experts.bits
        if self.mapped:
            storages = [getattr(self, f"storage_{i}") for i in range(self.storages)]
            intermediate, group, bias_dtype = self.sizes
            return experts_op.experts_mapped(
                *routing, storages, self.place, intermediate, group, bias_dtype, self.limit, self.alpha, *bits
            )
        parts = (getattr(self, name) for name in PackedExperts.__slots__)
        return experts_op.experts(*routing, *parts, self.limit, self.alpha, *bits)


def map_experts(checkpoint: Checkpoint, layer: int, maps: dict[Path, torch.Tensor]) -> MappedExperts:
    """Return a layer's experts where they lie in the files; `maps` keeps what is mapped, by path.

    Scales and biases with NaN or infinite values are refused. What the kernels cannot read in place is copied: scales
    in another dtype than bfloat16, biases of mixed dtypes, tensors at odd addresses.
    """
    config, parts = checkpoint.config, stored_parts(checkpoint.layout, layer)
    base = f"model.layers.{layer}.mlp.experts."
    biases = {
        checkpoint.info(f"{base}{e}.{part}").dtype for e in range(config.experts) for part in (parts[2], parts[5])
    }
    bias_dtype = biases.pop() if len(biases) == 1 else torch.float32
    storages: list[torch.Tensor] = []
    number: dict[Path | str, int] = {}
    place: list[tuple[int, int]] = []
    for part, dtype in zip(parts, (torch.int32, torch.bfloat16, bias_dtype) * 2, strict=True):
        for e in range(config.experts):
            name = f"{base}{e}.{part}"
            shard, info = checkpoint.shard(name), checkpoint.info(name)
            if shard.path not in maps:
                maps[shard.path] = shard.map()
            inside = info.dtype == dtype and info.start % dtype.itemsize == 0
            data = maps[shard.path][info.start : info.start + info.nbytes]
            if not inside or (dtype.is_floating_point and not _finite(data.view(dtype))):
                # read checks for NaN, and says what it found
                data = _exactly(checkpoint.read(name), dtype, f"{shard.path}: {name}")
            key = shard.path if inside else name
            if key not in number:
                number[key] = len(storages)
                storages.append(maps[shard.path] if inside else data)
            place.append((number[key], info.start if inside else 0))
    where = torch.tensor(place, dtype=torch.int64).view(len(parts), config.experts, 2)
    wide, narrow = (checkpoint.layout.at(layer, part).bits for part in PARTS)
    return MappedExperts(
        storages, where, config.hidden, config.intermediate, checkpoint.group_size, bias_dtype, (wide, narrow)
    )


def _finite(values: torch.Tensor) -> bool:
    return all(map(torch.isfinite, torch.aminmax(values)))


def _exactly(values: torch.Tensor, dtype: torch.dtype, what: str) -> torch.Tensor:
    """Return the bytes of values in a dtype that must hold them."""
    narrow = values.to(dtype)
    if not torch.equal(narrow.to(values.dtype), values):
        raise InputError(f"{what} is {values.dtype} and {dtype} cannot hold it; quantize the source again")
    return narrow.reshape(-1).view(torch.uint8)
