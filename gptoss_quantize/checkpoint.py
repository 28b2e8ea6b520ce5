"""gpt-oss checkpoints, read one tensor and one expert at a time; never the whole model.

How experts and the rest are stored is in `layouts`; whatever the format, an `Expert` has float weights with rows =
outputs. Which files, names and settings a folder means is decided in `folder` and `names`. Opening a checkpoint
compares every name and shape with what the config promises, so that a wrong file is refused before any work starts;
values are checked for NaN and infinity as they are read.
"""

from pathlib import Path

import torch

from gptoss_quantize.adapter import CONFIG_NAME, Adapter
from gptoss_quantize.errors import InputError
from gptoss_quantize.folder import open_weights, read_config, settle
from gptoss_quantize.layouts import (
    FLOAT,
    PARTS,
    Layout,
    Stored,
    dense_of,
    dense_shapes,
    expert_shapes,
    layout_of,
)
from gptoss_quantize.names import canonical, nearest
from gptoss_quantize.shards import ShardFile, TensorInfo
from gptoss_quantize.source import Expert, StoredSource
from gptoss_quantize.tokenizer_files import side_files

HEAD = "lm_head.weight"
_INCOMPLETE = "config.json and weights are not of one whole model, get both from the source again"


class Checkpoint(StoredSource):
    """A checked gpt-oss directory: `config`, `layout` of experts, `dense_layout` of the rest, and tensors.

    `side` are the tokenizer, template and licence that go with it; `notes` say what was read otherwise than it is
    written.
    """

    def __init__(self, path: Path, adapter: Adapter | None = None):
        self.path = path
        if not path.is_dir():
            raise InputError(f"{path}: not a directory; expected a Hugging Face gpt-oss directory")
        if not (path / "config.json").is_file() and (path / CONFIG_NAME).is_file():
            raise InputError(
                f"{path}: is an adapter, not a model; give the base model as MODEL and this folder with --adapter"
            )
        self.config, self.notes = read_config(path)
        shard_of, notes = open_weights(path)
        self.weights, renamed = canonical(shard_of, self.config, str(path))
        self.layout = self._find_layout()
        self.config, self.weights, settled = settle(self.config, self.weights, self.layout, str(path))
        self.notes += notes + renamed + settled
        self.adapter = adapter
        self.side = side_files(path, None if adapter is None else adapter.path)
        self.notes += self.side.notes
        self.dense_layout = dense_of(set(self.weights.names()))
        self.group_size = self._find_group_size()
        self._check_names_and_shapes()
        if adapter is not None:
            if not self.layout.source:
                raise InputError(
                    f"{path}: an adapter cannot be merged into {self.layout.name} experts; "
                    "give the bf16 or MXFP4 base"
                )
            self.adapter, self.config, changed = adapter.onto(self.config)
            self.notes += changed
            self.adapter.check(self.shapes())

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
        if self.adapter is None or name not in self.adapter.targets:
            return self.dense_layout.read(name, self.read)
        if (whole := self.adapter.replacement(name)) is not None:
            # of a vocabulary of another size, perhaps
            return self.adapter.merge(name, whole, out_dtype=self.dense_dtype(name))
        return self.adapter.merge(name, self.dense_layout.read(name, self.read))

    def dense_dtype(self, name: str) -> torch.dtype:
        """Return the dtype that `dense` gives for a tensor, which is not read."""
        if self.dense_layout.dtype is not None and self.dense_layout.packs(name):
            return self.dense_layout.dtype
        # an adapter may bring a head of its own to a tied model
        return self.info(name if name in self.weights else "model.embed_tokens.weight").dtype

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
        found = layout_of(set(self.names()), self.config.layers)
        if found is not None:
            return found
        base = "model.layers.0.mlp.experts."
        there = [name for name in self.names() if name.startswith(base)][:3] or self.names()[:1]
        raise InputError(
            f"{self.path}: no expert tensors of a known layout in layer 0; expected {base}gate_up_proj (bf16/fp16/"
            f"fp32) or {base}gate_up_proj_blocks (MXFP4), found {there or 'none'}"
            + (f"; {nearest(there[0])}" if there else "")
        )

    def _find_group_size(self) -> int:
        try:
            return self.layout.group_size_of(
                self.config, lambda name: self.info(name).shape if name in self.weights else None
            )
        except ValueError as error:
            first = self.layout.base(0, 0, "gate_up") + self.layout.at(0, "gate_up").suffixes[-1]
            where = self.weights.file(first) if first in self.weights else self.path
            raise InputError(f"{where}: {error}; {_INCOMPLETE}") from None

    def _expected(self) -> Stored:
        """Return name -> (shape, allowed dtypes) of everything that the config and the layouts promise."""
        expected: Stored = {}
        for name, shape in dense_shapes(self.config).items():
            expected |= self.dense_layout.parts(name, shape)
        for i in range(self.config.layers):
            inner = self.layout.stored(self.config, self.group_size, i)
            expected |= {f"model.layers.{i}.mlp.experts.{name}": stored for name, stored in inner.items()}
        return expected

    def _check_experts_of_layers(self) -> None:
        """Refuse layers with different numbers of experts, by name; config.json has one number."""
        counts: dict[int, int] = {}
        for layer in range(self.config.layers):
            name = f"model.layers.{layer}.mlp.router.weight"
            if name in self.weights:
                counts[layer] = self.info(name).shape[0]
        if len(set(counts.values())) > 1:
            first, other = next((a, b) for a in counts for b in counts if counts[a] != counts[b])
            raise InputError(
                f"{self.path}: layer {first} has {counts[first]} experts, layer {other} has {counts[other]}; "
                "gpt-oss has one number of experts for all layers (num_local_experts), and neither transformers "
                "nor any runtime reads others: prune every layer to the same number"
            )

    def _check_names_and_shapes(self) -> None:
        self._check_experts_of_layers()
        expected = self._expected()
        for name, (shape, allowed) in expected.items():
            if name not in self.weights:
                tied = "if head and embedding are one, set tie_word_embeddings true; else " if name == HEAD else ""
                raise InputError(f"{self.path}: tensor {name} is missing; {tied}{_INCOMPLETE}")
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
                "would change the model: take it out of the files if it means nothing, or use the original"
                + ("" if self.layout.packed else f"; {nearest(unknown[0])}")
            )
