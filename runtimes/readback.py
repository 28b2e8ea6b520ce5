"""What was written, read back and compared with the checkpoint, bit for bit after dequantizing.

The readers here are not the inverse of our writers: GGUF is read and dequantized by the `gguf` library, Hugging Face
directories by `Checkpoint`, the legacy layouts by the code that imports other tools' files. Every expert is compared,
and every tensor outside them. `export` does this before the result gets its final name, `verify` does it again.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGMLQuantizationType as Ggml

from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.errors import InputError
from gptoss_quantize.files import Progress, no_progress
from gptoss_quantize.layouts import dense_shapes
from gptoss_quantize.runtimes.export_gguf import gguf_name, is_int8
from gptoss_quantize.source import Expert, StoredSource

_ROWS = 4096


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether two tensors hold the same numbers in the same shape, whatever their dtypes."""
    if a.shape != b.shape:
        return False
    if a.dtype == b.dtype:
        return torch.equal(a, b)
    # rows at a time: a whole embedding in float32 would take more memory than the run that wrote it
    return all(torch.equal(x.float(), y.float()) for x, y in zip(_rows(a), _rows(b), strict=True))


def _rows(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tensor.split(_ROWS) if tensor.dim() else (tensor,)


def same_expert(a: Expert, b: Expert) -> bool:
    """Return whether two experts hold the same weights and biases."""
    return all(same(getattr(a, part), getattr(b, part)) for part in Expert.__slots__)


class GgufFile:
    """A GGUF file of gpt-oss as floats, by the gguf library's own reader and dequantizer."""

    def __init__(self, path: Path):
        try:
            self.tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        except (ValueError, OSError, IndexError) as error:
            raise InputError(f"{path}: not a whole GGUF file ({error}); export it again") from None
        self.path = path

    def read(self, name: str, index: int | None = None) -> torch.Tensor:
        """Return a tensor, or one expert's slice of it, as float32."""
        if name not in self.tensors:
            raise InputError(f"{self.path}: tensor {name} is missing; export it again")
        tensor = self.tensors[name]
        data = tensor.data if index is None else tensor.data[index]
        if tensor.tensor_type is Ggml.F32:
            return torch.from_numpy(data.copy())
        return torch.from_numpy(gguf.quants.dequantize(data, tensor.tensor_type).copy())

    def expert(self, layer: int, expert: int) -> Expert:
        """Return one expert, gate and up rows interleaved again."""

        def part(name: str, kind: str) -> torch.Tensor:
            return self.read(f"blk.{layer}.ffn_{name}_exps.{kind}", expert)

        def interleaved(kind: str) -> torch.Tensor:
            return torch.stack((part("gate", kind), part("up", kind)), dim=1).flatten(0, 1)

        return Expert(interleaved("weight"), interleaved("bias"), part("down", "weight"), part("down", "bias"))


def _q8_0_close(exact: torch.Tensor, got: torch.Tensor) -> bool:
    """Return whether Q8_0 weights are within half a step of the exact ones, block by block (one float16 ulp more)."""
    blocks = exact.float().unflatten(-1, (-1, 32))
    step = blocks.abs().amax(-1, keepdim=True) / 127
    bound = 0.5 * step + 127 * step * 2.0**-11 + 127 * 2.0**-24
    return bool(((got.unflatten(-1, (-1, 32)) - blocks).abs() <= bound).all())


def gguf_differences(checkpoint: Checkpoint, path: Path, on_layer: Progress = no_progress) -> Iterator[str]:
    """Yield the name of every tensor of a GGUF file that is not the checkpoint's."""
    file, config = GgufFile(path), checkpoint.config
    for name in dense_shapes(config):
        for written in (gguf_name(name), *(["output.weight"] if config.tied and "embed" in name else [])):
            got, exact = file.read(written), checkpoint.dense(name)
            rounded = file.tensors[written].tensor_type is Ggml.Q8_0 and not is_int8(checkpoint, name)
            if not (_q8_0_close(exact, got) if rounded else same(got, exact)):
                yield written
    eight_bit = file.tensors["blk.0.ffn_up_exps.weight"].tensor_type is Ggml.Q8_0
    for layer in range(config.layers):
        for number, expert in enumerate(checkpoint.experts(layer)):
            there = file.expert(layer, number)
            close = all(_q8_0_close(getattr(expert, p), getattr(there, p)) for p in ("gate_up", "down"))
            if not (close if eight_bit else same_expert(expert, there)):
                yield f"blk.{layer} expert {number}"
        on_layer(layer + 1, config.layers)


def directory_differences(
    checkpoint: Checkpoint, other: StoredSource, dtype: torch.dtype, on_layer: Progress = no_progress
) -> Iterator[str]:
    """Yield what of another directory differs: dense tensors as stored, experts after rounding to `dtype`."""
    for name in dense_shapes(checkpoint.config):
        if not same(checkpoint.dense(name), other.dense(name)):
            yield name
    for layer in range(checkpoint.config.layers):
        for number in range(checkpoint.config.experts):
            exact, got = checkpoint.expert(layer, number), other.expert(layer, number)
            exact.gate_up, exact.down = exact.gate_up.to(dtype), exact.down.to(dtype)
            if not same_expert(exact, got):
                yield f"model.layers.{layer}.mlp.experts expert {number}"
        on_layer(layer + 1, checkpoint.config.layers)


def stored_differences(checkpoint: Checkpoint, other: Checkpoint, on_layer: Progress = no_progress) -> Iterator[str]:
    """Yield what of another directory of the same format is not stored in the same bits."""
    names = list(checkpoint.names())
    for done, name in enumerate(names, 1):
        a, b = checkpoint.read(name), other.read(name)
        if a.dtype != b.dtype or not torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
            yield name
        on_layer(done, len(names))


def changed_outside_experts(source: Checkpoint, written: Checkpoint, may_change: tuple[str, ...]) -> Iterator[str]:
    """Yield the tensors outside the experts that quantization changed though it should not have.

    Names that end with one of `may_change` may differ (AWQ and polish change some); int8 matrices always do.
    """
    for name in dense_shapes(source.config):
        if (
            not name.endswith(may_change)
            and not is_int8(written, name)
            and not same(source.dense(name), written.dense(name))
        ):
            yield name


def summary(differences: Iterator[str]) -> dict[str, Any]:
    """Return {"different": number, "first": up to three names}."""
    found = list(differences)
    return {"different": len(found), "first": found[:3]}
