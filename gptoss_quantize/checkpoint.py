"""gpt-oss checkpoints, read one tensor and one expert at a time; never the whole model.

How experts and the rest are stored is in `layouts`; whatever the format, an `Expert` has float weights with rows =
outputs. Opening a checkpoint compares every name and shape with what the config promises, so that a wrong file is
refused before any work starts; values are checked for NaN and infinity as they are read.
"""

from pathlib import Path

import torch

from gptoss_quantize.adapter import Adapter
from gptoss_quantize.config import parse_config, read_json
from gptoss_quantize.errors import InputError
from gptoss_quantize.layouts import (
    FLOAT,
    LAYOUTS,
    PARTS,
    Layout,
    Stored,
    dense_of,
    dense_shapes,
    expert_shapes,
    layout_of,
)
from gptoss_quantize.shards import ShardFile, TensorInfo, Weights
from gptoss_quantize.source import Expert, StoredSource

# names of our own first
INDEX_NAMES = tuple(sorted({layout.index_name for layout in LAYOUTS.values()}))
SINGLE_NAME = "model.safetensors"
_INCOMPLETE = "config.json and weights are not of one whole model, get both from the source again"
_INDEX_REMEDY = "get the index and all files it names from the source again"


class Checkpoint(StoredSource):
    """A checked gpt-oss directory: `config`, `layout` of experts, `dense_layout` of the rest, and tensors."""

    def __init__(self, path: Path, adapter: Adapter | None = None):
        self.path = path
        if not path.is_dir():
            raise InputError(f"{path}: not a directory; expected a Hugging Face gpt-oss directory")
        self.config = parse_config(read_json(path / "config.json"), str(path / "config.json"))
        self.adapter = adapter
        self.weights = Weights(_open_shards(path))
        self.layout = self._find_layout()
        self.dense_layout = dense_of(set(self.weights.names()))
        self.group_size = self._find_group_size()
        self._check_names_and_shapes()
        if adapter is not None:
            if not self.layout.source:
                raise InputError(
                    f"{path}: an adapter cannot be merged into {self.layout.name} experts; "
                    "give the bf16 or MXFP4 base"
                )
            adapter.check(self.shapes())

    @property
    def expert_format(self) -> str:
        """Return the name of the experts' layout."""
        return self.layout.name

    @property
    def dense_format(self) -> str:
        """Return the name of the layout of everything else."""
        return self.dense_layout.name

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return name -> shape of the unquantized model, fused expert names for every format."""
        return dense_shapes(self.config) | expert_shapes(self.config, FLOAT)

    def info(self, name: str) -> TensorInfo:
        """Return dtype, shape and place of a stored tensor."""
        return self.weights.info(name)

    def shard(self, name: str) -> ShardFile:
        """Return the file that holds a stored tensor."""
        return self.weights.shard(name)

    def names(self) -> list[str]:
        """Return the names of all stored tensors, sorted."""
        return self.weights.names()

    def files(self) -> list[Path]:
        """Return the weight files, sorted."""
        return self.weights.files()

    def read(self, name: str, index: int | None = None) -> torch.Tensor:
        """Return a stored tensor (or one slice of it) as stored, without any adapter; NaN and Inf are refused."""
        return self.weights.read(name, index)

    def dense(self, name: str) -> torch.Tensor:
        """Return a tensor outside the experts, adapter merged (in the stored dtype; float32 where it is in int8)."""
        tensor = self.dense_layout.read(name, self.read)
        if self.adapter is not None and name in self.adapter.targets:
            tensor = self.adapter.merge(name, tensor)
        return tensor

    def dense_dtype(self, name: str) -> torch.dtype:
        """Return the dtype that `dense` gives for a tensor, which is not read."""
        if self.dense_layout.dtype is not None and self.dense_layout.packs(name):
            return self.dense_layout.dtype
        return self.info(name).dtype

    def expert(self, layer: int, expert: int, dtype: torch.dtype = torch.float32) -> Expert:
        """Return one expert's weights in `dtype`, whatever the stored format, adapter merged in float32."""
        gate_up, down = (self._weight(layer, expert, part, dtype) for part in PARTS)
        gate_up_bias, down_bias = (self.expert_bias(layer, expert, part).to(dtype) for part in PARTS)
        return Expert(gate_up, gate_up_bias, down, down_bias)

    def expert_bias(self, layer: int, expert: int, part: str) -> torch.Tensor:
        """Return one expert's bias as stored; `part` is "gate_up" (interleaved, [2F]) or "down" ([D])."""
        return self.layout.bias(self.read, layer, expert, part)

    def _weight(self, layer: int, expert: int, part: str, dtype: torch.dtype) -> torch.Tensor:
        """Return [rows, columns] of one expert's projection."""
        # what training and adapters call it
        name = FLOAT.base(layer, expert, part)
        adapter = self.adapter if self.adapter is not None and name in self.adapter.targets else None
        try:
            weight = self.layout.weight(self.read, layer, expert, part, dtype if adapter is None else torch.float32)
        except InputError:
            raise
        except ValueError as error:
            raise InputError(f"{self.path}: {error}") from None
        if adapter is None:
            return weight
        merged = adapter.merge(name, weight.T.contiguous(), expert, out_dtype=torch.float32)
        return merged.T.to(dtype).contiguous()

    def _find_layout(self) -> Layout:
        found = layout_of(set(self.names()))
        if found is not None:
            return found
        base = "model.layers.0.mlp.experts."
        there = [name for name in self.names() if name.startswith(base)][:3]
        raise InputError(
            f"{self.path}: no expert tensors of a known layout in layer 0; expected {base}gate_up_proj (bf16/fp16/"
            f"fp32) or {base}gate_up_proj_blocks (MXFP4), found {there or 'none'}. A checkpoint that another tool "
            "already quantized cannot be a source: start from the bf16 or MXFP4 original"
        )

    def _find_group_size(self) -> int:
        try:
            return self.layout.group_size_of(
                self.config, lambda name: self.info(name).shape if name in self.weights else None
            )
        except ValueError as error:
            first = self.layout.base(0, 0, "gate_up") + self.layout.suffixes[-1]
            where = self.weights.file(first) if first in self.weights else self.path
            raise InputError(f"{where}: {error}; {_INCOMPLETE}") from None

    def _expected(self) -> Stored:
        """Return name -> (shape, allowed dtypes) of everything that the config and the layouts promise."""
        expected: Stored = {}
        for name, shape in dense_shapes(self.config).items():
            expected |= self.dense_layout.parts(name, shape)
        inner = self.layout.stored(self.config, self.group_size)
        for i in range(self.config.layers):
            expected |= {f"model.layers.{i}.mlp.experts.{name}": stored for name, stored in inner.items()}
        return expected

    def _check_names_and_shapes(self) -> None:
        expected = self._expected()
        for name, (shape, allowed) in expected.items():
            if name not in self.weights:
                raise InputError(f"{self.path}: tensor {name} is missing; {_INCOMPLETE}")
            info, file = self.info(name), self.weights.file(name)
            if info.shape != shape:
                raise InputError(
                    f"{file}: {name} has shape {list(info.shape)}, config.json asks for {list(shape)}; {_INCOMPLETE}"
                )
            if info.dtype not in allowed:
                listed = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
                raise InputError(f"{file}: {name} has dtype {info.dtype}, expected one of {listed}; {_INCOMPLETE}")
        if unknown := sorted(set(self.names()) - expected.keys()):
            raise InputError(
                f"{self.weights.file(unknown[0])}: {len(unknown)} unknown tensor(s), first {unknown[0]}; "
                f"a gpt-oss checkpoint with {self.layout.name} experts has none of that name, and dropping it "
                "would change the model: take it out of the files, or use the original"
            )


def _open_shards(path: Path) -> dict[str, ShardFile]:
    """Return tensor name -> open file, from the index if there is one; refuse an index that does not fit."""
    index_path = next((path / name for name in INDEX_NAMES if (path / name).exists()), None)
    if index_path is None:
        if not (path / SINGLE_NAME).exists():
            raise InputError(
                f"{path}: no weights; expected {SINGLE_NAME} or one of {', '.join(INDEX_NAMES)}; download them"
            )
        single = ShardFile(path / SINGLE_NAME)
        return dict.fromkeys(single.tensors, single)
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index_path}: no weight_map of tensor names to file names; {_INDEX_REMEDY}")
    shards: dict[str, ShardFile] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".."):
            raise InputError(f"{index_path}: {name} points to {file!r}, which is no file name; {_INDEX_REMEDY}")
        if file not in shards:
            shards[file] = ShardFile(path / file)
        if name not in shards[file].tensors:
            raise InputError(
                f"{path / file}: {name} is missing, though {index_path.name} places it there; {_INDEX_REMEDY}"
            )
    for file, shard in shards.items():
        if extra := sorted(shard.tensors.keys() - weight_map.keys()):
            raise InputError(f"{path / file}: {extra[0]} is not in {index_path.name}; {_INDEX_REMEDY}")
    return {name: shards[file] for name, file in weight_map.items()}
