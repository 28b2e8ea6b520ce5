"""What a model is to everything that streams one: its configuration, and tensors one layer and one expert at a time.

`Checkpoint` is one, other tools' files are (`runtimes.foreign`), and so are the made-up weights that `plan` times.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from gptoss_quantize.config import ModelConfig
from gptoss_quantize.layouts import dense_shapes
from gptoss_quantize.tokenizer_files import SideFiles


@dataclass(slots=True)
class Expert:
    """One expert's float weights, rows = outputs; gate and up rows interleaved."""

    gate_up: torch.Tensor  # [2F, D]
    gate_up_bias: torch.Tensor  # [2F]
    down: torch.Tensor  # [D, F]
    down_bias: torch.Tensor  # [D]

    def to(self, where: torch.device | torch.dtype) -> "Expert":
        """Return the expert on a device or in a dtype."""
        return Expert(
            self.gate_up.to(where), self.gate_up_bias.to(where), self.down.to(where), self.down_bias.to(where)
        )


class Source(Protocol):
    """A gpt-oss model whose tensors are asked for one at a time."""

    config: ModelConfig

    def dense(self, name: str) -> torch.Tensor:
        """Return a tensor outside the experts by its name in transformers."""
        ...

    def expert(self, layer: int, expert: int, dtype: torch.dtype = torch.float32) -> Expert:
        """Return one expert's weights in a dtype."""
        ...

    def head(self) -> torch.Tensor:
        """Return the output head [vocab, D]: `lm_head.weight`, or the embedding of a tied model."""
        return self.dense("model.embed_tokens.weight" if self.config.tied else "lm_head.weight")

    def layer(self, index: int) -> dict[str, torch.Tensor]:
        """Return the tensors of a decoder layer outside its experts, by their name inside the layer."""
        prefix = f"model.layers.{index}."
        names = [name for name in dense_shapes(self.config) if name.startswith(prefix)]
        return {name.removeprefix(prefix): self.dense(name) for name in names}

    def experts(self, layer: int, dtype: torch.dtype = torch.float32) -> Iterator[Expert]:
        """Yield a layer's experts one after another."""
        return (self.expert(layer, e, dtype) for e in range(self.config.experts))


class Placed(Source):
    """A source whose tensors stand on a device as soon as they are read and unpacked, which the processor does."""

    def __init__(self, source: Source, device: torch.device | str):
        self.config, self._source, self._device = source.config, source, torch.device(device)

    def dense(self, name: str) -> torch.Tensor:
        """Return a tensor outside the experts, on the device."""
        return self._source.dense(name).to(self._device)

    def expert(self, layer: int, expert: int, dtype: torch.dtype = torch.float32) -> Expert:
        """Return one expert's weights in a dtype, on the device."""
        return self._source.expert(layer, expert, dtype).to(self._device)


def placed(source: Source, device: torch.device | str) -> Source:
    """Return a source whose tensors are on a device: itself for the processor."""
    return source if torch.device(device).type == "cpu" else Placed(source, device)


class StoredSource(Source, Protocol):
    """A source that lies in files: what can be exported."""

    path: Path
    side: SideFiles
    notes: list[str]  # what was read otherwise than it is written

    def dense_dtype(self, name: str) -> torch.dtype:
        """Return the dtype that `dense` gives for a tensor, which is not read."""
        ...

    def expert_bias(self, layer: int, expert: int, part: str) -> torch.Tensor:
        """Return one expert's bias as stored; `part` is "gate_up" (interleaved, [2F]) or "down" ([D])."""
        ...
