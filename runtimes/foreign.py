"""int4 gpt-oss checkpoints that other tools made, read as a `Checkpoint`.

Known layouts, one linear layer per expert and projection (`experts.E.{gate_proj,up_proj,down_proj}`), or with gate
and up in one as in the fused weights (GPTQModel of 2025: `experts.{gate_up,down}.E`; nothing is to be found out
there):

    gptq    qweight, qzeros, scales, [g_idx]    GPTQModel, AutoGPTQ, AutoRound; checkpoint_format gptq or gptq_v2
    awq     qweight, qzeros, scales             AutoAWQ's GEMM order, AutoRound
    ct      weight_packed, weight_scale, [weight_zero_point, weight_g_idx]    llm-compressor

gate_proj means one of two (docs/runtimes.md): the even rows of gate_up_proj, the gate (llm-compressor, AutoRound),
or its first half (GPTQModel). Nothing in the shapes tells them apart; `imports.detect_split` does. `split` says how
this object reads them: "interleaved" or "halves".

Attention and the head may be quantized too (GPTQModel's default): they are dequantized, which float32 holds exactly.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptoss_quantize.config import read_json
from gptoss_quantize.errors import InputError
from gptoss_quantize.folder import open_weights, read_config
from gptoss_quantize.kernels import int4, legacy
from gptoss_quantize.layouts import AS_SOURCE, dense_shapes
from gptoss_quantize.names import renamed
from gptoss_quantize.shards import TensorInfo
from gptoss_quantize.source import Expert, StoredSource
from gptoss_quantize.tokenizer_files import side_files

SPLITS = ("interleaved", "halves")
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
JOINED = ("gate_up_proj", "down_proj")
SUFFIXES = {
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "awq": ("qweight", "qzeros", "scales", "g_idx"),
    "ct": ("weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape"),
}
_LISTED = re.compile(r"\.mlp\.experts\.(gate_up|down)(?:_projs)?\.(\d+)\.")
_KNOWN = "expected an int4 gpt-oss of GPTQModel, AutoGPTQ, AutoAWQ, AutoRound or llm-compressor"
_FROM_BF16 = "--to bf16 writes the dequantized weights, which can be quantized again"


@dataclass(slots=True)
class Linear:
    """One quantized matrix: weight = (codes - zeros[group]) * scale[group], codes and zeros 0..15."""

    codes: Tensor  # int16 [R, C]
    zeros: Tensor  # int16 [R, G]
    scale: Tensor  # [R, G] as stored
    group: Tensor  # int64 [C], the group of every input column

    def weight(self) -> Tensor:
        """Return the float32 weights [R, C]."""
        return (self.codes - self.zeros[:, self.group]).float() * self.scale.float()[:, self.group]


Read = Callable[[str], Tensor]


def _groups(columns: int, scale: Tensor) -> Tensor:
    return torch.arange(columns) // (columns // scale.shape[1])


def read_gptq(read: Read, has: Callable[[str], bool], name: str, version: int) -> Linear:
    """Return a matrix of AutoGPTQ's layout."""
    codes, zeros = legacy.read_gptq(read(name + "qweight"), read(name + "qzeros"), version=version)
    scale = read(name + "scales").T.contiguous()
    group = read(name + "g_idx").long() if has(name + "g_idx") else _groups(codes.shape[1], scale)
    return Linear(codes, zeros, scale, group)


def read_awq(read: Read, has: Callable[[str], bool], name: str, version: int) -> Linear:
    """Return a matrix of AutoAWQ's GEMM layout."""
    codes, zeros = legacy.read_awq(read(name + "qweight"), read(name + "qzeros"))
    scale = read(name + "scales").T.contiguous()
    return Linear(codes, zeros, scale, _groups(codes.shape[1], scale))


def read_ct(read: Read, has: Callable[[str], bool], name: str, version: int) -> Linear:
    """Return a matrix of compressed-tensors' pack-quantized layout."""
    codes = int4.unpack(read(name + "weight_packed")).to(torch.int16) + 8
    scale = read(name + "weight_scale")
    zeros = torch.full(scale.shape, 8, dtype=torch.int16)
    if has(name + "weight_zero_point"):
        # packed along the rows
        zeros = (int4.unpack(read(name + "weight_zero_point").T.contiguous()).to(torch.int16) + 8).T
    group = _groups(codes.shape[1], scale)
    if has(name + "weight_g_idx"):
        group = read(name + "weight_g_idx").long()
    return Linear(codes, zeros, scale, group)


LAYOUTS: dict[str, Callable[[Read, Callable[[str], bool], str, int], Linear]] = {
    "gptq": read_gptq,
    "awq": read_awq,
    "ct": read_ct,
}


def layout_of(quantization: dict[str, Any], has: Callable[[str], bool], where: Path) -> tuple[str, int]:
    """Return (key of LAYOUTS, AutoGPTQ version) from config.json and the tensor names; InputError for others."""
    base = "model.layers.0.mlp.experts.0."
    stems = [base + name + "." for name in ("gate_proj", "gate_up_proj")]
    if any(has(stem + "weight_packed") for stem in stems):
        return "ct", 0
    if not any(has(stem + "qweight") for stem in stems):
        raise InputError(f"{where}: no tensor {stems[0]}qweight or {stems[0]}weight_packed; {_KNOWN}")
    method, packing = quantization.get("quant_method"), str(quantization.get("packing_format", ""))
    if method == "awq" or packing.endswith("awq"):
        return "awq", 0
    if method == "gptq" or packing.endswith("gptq"):
        v2 = quantization.get("checkpoint_format") == "gptq_v2" or packing.endswith("v2")
        return "gptq", 2 if v2 else 1
    raise InputError(
        f"{where}: quantization_config has quant_method {method!r}, packing_format {packing!r}; {_KNOWN}"
    )


class Foreign(StoredSource):
    """Another tool's directory: `config`, dense tensors and dequantized experts, like any checkpoint."""

    def __init__(self, path: Path, split: str):
        if split not in SPLITS:
            raise InputError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
        if not path.is_dir():
            raise InputError(f"{path}: not a directory; {_KNOWN}")
        self.path, self.split = path, split
        self.config, self.notes = read_config(path)
        shard_of, notes = open_weights(path)
        self.side = side_files(path)
        self.notes += [*notes, *self.side.notes]
        self.weights = renamed(shard_of, str(path), lambda name: _LISTED.sub(r".mlp.experts.\2.\1_proj.", name))
        self.quantization = self.config.raw.get("quantization_config")
        if self.quantization is None and (path / "quantize_config.json").is_file():
            # AutoGPTQ's place for it
            self.quantization = {"quant_method": "gptq"} | read_json(path / "quantize_config.json")
        if not isinstance(self.quantization, dict):
            raise InputError(f"{path / 'config.json'}: no quantization_config; {_KNOWN}")
        bits = self.quantization.get("bits", 4)
        if bits != 4:
            raise InputError(f"{path / 'config.json'}: {bits} bits; only int4 is known here")
        self.layout, self.version = layout_of(self.quantization, self.weights.__contains__, path)
        self.projections = JOINED if self._joined() else PROJECTIONS
        self.dense_layout = AS_SOURCE
        # what is quantized outside the experts: attention, with GPTQModel's defaults
        self.packed_dense = {
            name: shape
            for name, shape in dense_shapes(self.config).items()
            if name not in self.weights and self._stem(name) + SUFFIXES[self.layout][0] in self.weights
        }
        for name, shape in dense_shapes(self.config).items():
            if name in self.packed_dense:
                continue
            if name not in self.weights:
                raise InputError(f"{path}: tensor {name} is missing; the file is not of a whole gpt-oss model")
            if self.info(name).shape != shape:
                raise InputError(f"{path}: {name} has shape {list(self.info(name).shape)}, expected {list(shape)}")
        self._check_names()

    def _check_names(self) -> None:
        """Refuse experts without biases, and tensors that nothing here would read."""
        known = set(dense_shapes(self.config))
        suffixes = (*SUFFIXES[self.layout], "bias")
        known |= {self._stem(name) + suffix for name in self.packed_dense for suffix in SUFFIXES[self.layout]}
        known -= self.packed_dense.keys()
        for layer in range(self.config.layers):
            for expert in range(self.config.experts):
                for projection in self.projections:
                    base = self._name(layer, expert, projection)
                    known |= {base + suffix for suffix in suffixes}
                    if base + "bias" not in self.weights:
                        raise InputError(
                            f"{self.path}: {base}bias is missing; the tool dropped the experts' biases, without "
                            "which the model is another one. Quantize again from the original"
                        )
        if unknown := sorted(set(self.weights.names()) - known):
            raise InputError(
                f"{self.path}: {len(unknown)} tensor(s) of unknown meaning, first {unknown[0]}; {_KNOWN}"
            )

    def info(self, name: str) -> TensorInfo:
        """Return dtype, shape and place of a stored tensor."""
        return self.weights.info(name)

    def read(self, name: str, index: int | None = None) -> Tensor:
        """Return a stored tensor as stored; NaN and infinity are refused."""
        return self.weights.read(name, index)

    def dense(self, name: str) -> Tensor:
        """Return a tensor outside the experts: as stored; in float32, which is exact, where it is in int4."""
        if name in self.packed_dense:
            return self._linear(self._stem(name), self.packed_dense[name]).weight()
        return self.read(name)

    def dense_dtype(self, name: str) -> torch.dtype:
        """Return the dtype that `dense` gives."""
        return torch.float32 if name in self.packed_dense else self.info(name).dtype

    def _joined(self) -> bool:
        """Return whether gate and up are one matrix, so that there is nothing to find out about their rows."""
        return any(f"model.layers.0.mlp.experts.0.gate_up_proj.{s}" in self.weights for s in SUFFIXES[self.layout])

    @staticmethod
    def _stem(name: str) -> str:
        return name.removesuffix("weight")

    @staticmethod
    def _name(layer: int, expert: int, projection: str) -> str:
        return f"model.layers.{layer}.mlp.experts.{expert}.{projection}."

    def linear(self, layer: int, expert: int, projection: str) -> Linear:
        """Return one quantized matrix; InputError when it does not have the shape of the model's."""
        F, D = self.config.intermediate, self.config.hidden
        shape = {"down_proj": (D, F), "gate_up_proj": (2 * F, D)}.get(projection, (F, D))
        return self._linear(self._name(layer, expert, projection), shape)

    def _linear(self, name: str, shape: tuple[int, ...]) -> Linear:
        try:
            linear = LAYOUTS[self.layout](self.read, self.weights.__contains__, name, self.version)
        except (KeyError, RuntimeError) as error:
            raise InputError(f"{self.path}: {name}* is missing or misshapen ({error}); {_KNOWN}") from None
        if linear.codes.shape != shape or linear.zeros.shape != linear.scale.shape:
            raise InputError(f"{self.path}: {name}* is {list(linear.codes.shape)}, expected {list(shape)}")
        return linear

    def joined(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        """Return the interleaved rows of gate and up tensors, as `split` reads them; of one tensor, its own."""
        if up is None:
            return gate
        if self.split == "halves":
            return torch.cat((gate, up))
        return torch.stack((gate, up), dim=1).flatten(0, 1)

    def expert_bias(self, layer: int, expert: int, part: str) -> Tensor:
        """Return one expert's bias as stored, gate and up joined."""
        biases = [self.read(self._name(layer, expert, projection) + "bias") for projection in self.projections]
        return self.joined(*biases[:-1]) if part == "gate_up" else biases[-1]

    def expert(self, layer: int, expert: int, dtype: torch.dtype = torch.float32) -> Expert:
        """Return one expert's dequantized weights."""
        *gate_up, down = (self.linear(layer, expert, projection).weight() for projection in self.projections)
        return Expert(
            gate_up=self.joined(*gate_up).to(dtype),
            gate_up_bias=self.expert_bias(layer, expert, "gate_up").to(dtype),
            down=down.to(dtype),
            down_bias=self.expert_bias(layer, expert, "down").to(dtype),
        )

    def packed(self, layer: int, expert: int) -> dict[str, Tensor]:
        """Return the expert in our layout, name inside `experts.E.` -> tensor; InputError for what it cannot hold."""
        *gate_up, down = (self._symmetric(layer, expert, projection) for projection in self.projections)
        return {
            "w13_weight_packed": int4.pack(self.joined(*(codes for codes, _ in gate_up))),
            "w13_weight_scale": self.joined(*(scale for _, scale in gate_up)),
            "w13_bias": self.expert_bias(layer, expert, "gate_up"),
            "w2_weight_packed": int4.pack(down[0]),
            "w2_weight_scale": down[1],
            "w2_bias": self.expert_bias(layer, expert, "down"),
        }

    def _symmetric(self, layer: int, expert: int, projection: str) -> tuple[Tensor, Tensor]:
        """Return (int8 codes -8..7, scales) of a matrix that has zero point 8 and groups of neighbours."""
        linear, name = self.linear(layer, expert, projection), self._name(layer, expert, projection)
        if other := int((linear.zeros != 8).sum()):
            raise InputError(
                f"{self.path}: {name}* has {other} zero points other than 8 (asymmetric codes); our layout, like "
                f"vLLM's, has no zero points. {_FROM_BF16}"
            )
        if not torch.equal(linear.group, _groups(linear.codes.shape[1], linear.scale)):
            raise InputError(
                f"{self.path}: {name}g_idx puts inputs into groups out of order (desc_act); our layout, like vLLM's, "
                f"has groups of neighbours only. {_FROM_BF16}"
            )
        return (linear.codes - 8).to(torch.int8), linear.scale
