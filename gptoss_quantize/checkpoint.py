"""gpt-oss checkpoints, read one tensor and one expert at a time; never the whole model.

Three expert formats are known, and turned into the same `Expert` of float weights with rows = outputs:
    float   fused `experts.gate_up_proj` [E, D, 2F] and `down_proj` [E, F, D] in bf16, fp16 or fp32
    mxfp4   OpenAI's release: `gate_up_proj_blocks` / `_scales`, `down_proj_blocks` / `_scales`
    int4    ours: per-expert `w13_*` / `w2_*` (formats.md A2)
Opening a checkpoint compares every name and shape with what the config promises, so that a wrong file is
refused before any work starts; values are checked for NaN and infinity as they are read.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from gptoss_quantize.adapter import Adapter
from gptoss_quantize.config import ModelConfig, parse_config, read_json
from gptoss_quantize.errors import InputError
from gptoss_quantize.kernels import int4, int8, mxfp4
from gptoss_quantize.shards import ShardFile, TensorInfo

INDEX_NAMES = ("gptoss-int4.safetensors.index.json", "model.safetensors.index.json")
SINGLE_NAME = "model.safetensors"
# what `--dense int8` stores in 8 bits; routers, norms, biases and sinks stay as they are
Q8_MATRICES = (
    *(f"self_attn.{name}_proj.weight" for name in "qkvo"),
    "model.embed_tokens.weight",
    "lm_head.weight",
)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_INCOMPLETE = "config.json and weights are not of one whole model, get both from the source again"
_INDEX_REMEDY = "get the index and all files it names from the source again"


@dataclass(slots=True)
class Expert:
    """One expert's float weights, rows = outputs; gate and up rows interleaved."""

    gate_up: torch.Tensor  # [2F, D]
    gate_up_bias: torch.Tensor  # [2F]
    down: torch.Tensor  # [D, F]
    down_bias: torch.Tensor  # [D]


def dense_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every tensor outside the experts, in model order."""
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab, config.hidden)}
    for i in range(config.layers):
        layer = f"model.layers.{i}."
        shapes[layer + "input_layernorm.weight"] = (config.hidden,)
        for name, rows, columns in (
            ("q_proj", q, config.hidden),
            ("k_proj", kv, config.hidden),
            ("v_proj", kv, config.hidden),
            ("o_proj", config.hidden, q),
        ):
            shapes[f"{layer}self_attn.{name}.weight"] = (rows, columns)
            if config.attention_bias:
                shapes[f"{layer}self_attn.{name}.bias"] = (rows,)
        shapes[layer + "self_attn.sinks"] = (config.heads,)
        shapes[layer + "post_attention_layernorm.weight"] = (config.hidden,)
        shapes[layer + "mlp.router.weight"] = (config.experts, config.hidden)
        shapes[layer + "mlp.router.bias"] = (config.experts,)
    shapes["model.norm.weight"] = (config.hidden,)
    if not config.tied:
        shapes["lm_head.weight"] = (config.vocab, config.hidden)
    return shapes


def q8_names(name: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """Return (codes, scales), each (name, shape), of a matrix that `--dense int8` stores; [] for other tensors."""
    if not name.endswith(Q8_MATRICES):
        return []
    return [(name + "_q8", shape), (name + "_q8_scale", (*shape[:-1], -(-shape[-1] // int8.GROUP_SIZE)))]


def expert_shapes(config: ModelConfig, expert_format: str, group_size: int) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every expert tensor of a format ("float", "mxfp4" or "int4")."""
    E, D, F = config.experts, config.hidden, config.intermediate
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(config.layers):
        base = f"model.layers.{i}.mlp.experts."
        if expert_format == "int4":
            for e in range(E):
                for name, rows, columns in (("w13", 2 * F, D), ("w2", D, F)):
                    shapes[f"{base}{e}.{name}_weight_packed"] = (rows, columns // int4.CODES_PER_WORD)
                    shapes[f"{base}{e}.{name}_weight_scale"] = (rows, columns // group_size)
                    shapes[f"{base}{e}.{name}_bias"] = (rows,)
            continue
        if expert_format == "float":
            shapes[base + "gate_up_proj"] = (E, D, 2 * F)
            shapes[base + "down_proj"] = (E, F, D)
        else:
            for name, rows, columns in (("gate_up_proj", 2 * F, D), ("down_proj", D, F)):
                shapes[f"{base}{name}_blocks"] = (E, rows, columns // 32, 16)
                shapes[f"{base}{name}_scales"] = (E, rows, columns // 32)
        shapes[base + "gate_up_proj_bias"] = (E, 2 * F)
        shapes[base + "down_proj_bias"] = (E, D)
    return shapes


class Checkpoint:
    """A checked gpt-oss directory: `config`, `expert_format`, and tensors on demand."""

    def __init__(self, path: Path, adapter: Adapter | None = None):
        self.path = path
        if not path.is_dir():
            raise InputError(f"{path}: not a directory; expected a Hugging Face gpt-oss directory")
        self.config = parse_config(read_json(path / "config.json"), str(path / "config.json"))
        self.adapter = adapter
        self._shard_of = _open_shards(path)
        self.expert_format = self._detect_format()
        self.dense_format = "int8" if "model.embed_tokens.weight_q8" in self._shard_of else "float"
        self.group_size = self._detect_group_size() if self.expert_format == "int4" else 0
        self._check_names_and_shapes()
        if adapter is not None:
            if self.expert_format == "int4":
                raise InputError(
                    f"{path}: an adapter cannot be merged into int4 experts; give the bf16 or MXFP4 base"
                )
            adapter.check(self.shapes())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return name -> shape of the unquantized model, fused expert names for every format."""
        return dense_shapes(self.config) | expert_shapes(self.config, "float", 0)

    def info(self, name: str) -> TensorInfo:
        """Return dtype, shape and place of a stored tensor."""
        return self._shard_of[name].tensors[name]

    def shard(self, name: str) -> ShardFile:
        """Return the file that holds a stored tensor."""
        return self._shard_of[name]

    def names(self) -> list[str]:
        """Return the names of all stored tensors, sorted."""
        return sorted(self._shard_of)

    def files(self) -> list[Path]:
        """Return the weight files, sorted."""
        return sorted({shard.path for shard in self._shard_of.values()})

    def read(self, name: str, index: int | None = None) -> torch.Tensor:
        """Return a stored tensor (or one slice of it) as stored, without any adapter; NaN and Inf are refused."""
        tensor = self._shard_of[name].read(name, index)
        # one pass: the extremes are NaN or infinite exactly when some element is
        if tensor.is_floating_point() and tensor.numel() and not all(map(torch.isfinite, torch.aminmax(tensor))):
            bad = int((~torch.isfinite(tensor)).sum())
            where = "" if index is None else f"[{index}]"
            raise InputError(
                f"{self._shard_of[name].path}: {name}{where} holds {bad} NaN or infinite values of "
                f"{tensor.numel()}; the source is damaged or diverged in training, fix it first"
            )
        return tensor

    def dense(self, name: str) -> torch.Tensor:
        """Return a tensor outside the experts, adapter merged (in the stored dtype; float32 where it is in int8)."""
        if self.dense_format == "int8" and name.endswith(Q8_MATRICES):
            return int8.dequantize(self.read(name + "_q8"), self.read(name + "_q8_scale"))
        tensor = self.read(name)
        if self.adapter is not None and name in self.adapter.targets:
            tensor = self.adapter.merge(name, tensor)
        return tensor

    def head(self) -> torch.Tensor:
        """Return the output head [vocab, D]: `lm_head.weight`, or the embedding of a tied model."""
        return self.dense("model.embed_tokens.weight" if self.config.tied else "lm_head.weight")

    def layer(self, index: int) -> dict[str, torch.Tensor]:
        """Return the tensors of a decoder layer outside its experts, by their name inside the layer."""
        prefix = f"model.layers.{index}."
        names = [name for name in dense_shapes(self.config) if name.startswith(prefix)]
        return {name.removeprefix(prefix): self.dense(name) for name in names}

    def expert(self, layer: int, expert: int, dtype: torch.dtype = torch.float32) -> Expert:
        """Return one expert's weights in `dtype`, whatever the stored format, adapter merged in float32."""
        base = f"model.layers.{layer}.mlp.experts."
        if self.expert_format == "int4":
            return Expert(
                gate_up=self._int4(f"{base}{expert}.w13", dtype),
                gate_up_bias=self.read(f"{base}{expert}.w13_bias").to(dtype),
                down=self._int4(f"{base}{expert}.w2", dtype),
                down_bias=self.read(f"{base}{expert}.w2_bias").to(dtype),
            )
        return Expert(
            gate_up=self._fused(base + "gate_up_proj", expert, dtype),
            gate_up_bias=self._fused_bias(base + "gate_up_proj_bias", expert, dtype),
            down=self._fused(base + "down_proj", expert, dtype),
            down_bias=self._fused_bias(base + "down_proj_bias", expert, dtype),
        )

    def experts(self, layer: int, dtype: torch.dtype = torch.float32) -> Iterator[Expert]:
        """Yield a layer's experts one after another."""
        return (self.expert(layer, e, dtype) for e in range(self.config.experts))

    def expert_bias(self, layer: int, expert: int, part: str) -> torch.Tensor:
        """Return one expert's bias as stored; `part` is "gate_up" (interleaved, [2F]) or "down" ([D])."""
        base = f"model.layers.{layer}.mlp.experts."
        if self.expert_format == "int4":
            return self.read(f"{base}{expert}.{'w13' if part == 'gate_up' else 'w2'}_bias")
        return self.read(f"{base}{part}_proj_bias", expert)

    def _int4(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        return int4.weights(self.read(name + "_weight_packed"), self.read(name + "_weight_scale"), dtype)

    def _fused(self, name: str, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """Return [rows, columns] of one expert from a fused float or MXFP4 tensor."""
        adapted = self.adapter is not None and name in self.adapter.targets
        if self.expert_format == "mxfp4":
            scales = self.read(name + "_scales", expert)
            if bool((scales == 255).any()):
                raise InputError(f"{self.path}: {name}_scales[{expert}] holds 255, the E8M0 code for NaN")
            weight = mxfp4.decode(self.read(name + "_blocks", expert), scales, torch.float32 if adapted else dtype)
            if not adapted:
                return weight
            weight = weight.T
        else:
            weight = self.read(name, expert)
        if adapted and self.adapter is not None:
            weight = self.adapter.merge(name, weight, expert, out_dtype=torch.float32)
        return weight.T.to(dtype).contiguous()

    def _fused_bias(self, name: str, expert: int, dtype: torch.dtype) -> torch.Tensor:
        return self.read(name, expert).to(dtype)

    def _detect_format(self) -> str:
        base = "model.layers.0.mlp.experts."
        for probe, expert_format in (
            ("gate_up_proj", "float"),
            ("gate_up_proj_blocks", "mxfp4"),
            ("0.w13_weight_packed", "int4"),
        ):
            if base + probe in self._shard_of:
                return expert_format
        found = sorted(name for name in self._shard_of if name.startswith(base))[:3]
        raise InputError(
            f"{self.path}: no expert tensors of a known layout in layer 0; expected {base}gate_up_proj (bf16/fp16/"
            f"fp32) or {base}gate_up_proj_blocks (MXFP4), found {found or 'none'}. A checkpoint that another tool "
            "already quantized cannot be a source: start from the bf16 or MXFP4 original"
        )

    def _detect_group_size(self) -> int:
        name = "model.layers.0.mlp.experts.0.w13_weight_scale"
        if name not in self._shard_of:
            raise InputError(f"{self.path}: tensor {name} is missing; {_INCOMPLETE}")
        shape, hidden = self.info(name).shape, self.config.hidden
        if len(shape) != 2 or not 1 <= shape[1] <= hidden or hidden % shape[1]:
            raise InputError(
                f"{self._shard_of[name].path}: {name} has shape {list(shape)}, expected one scale for every group "
                f"of hidden_size {hidden}; {_INCOMPLETE}"
            )
        return hidden // shape[1]

    def _check_names_and_shapes(self) -> None:
        expected = dense_shapes(self.config) | expert_shapes(self.config, self.expert_format, self.group_size)
        if self.dense_format == "int8":
            replaced = {name: q8_names(name, shape) for name, shape in dense_shapes(self.config).items()}
            stored = {name: shape for pair in replaced.values() for name, shape in pair}
            expected = {name: shape for name, shape in expected.items() if not replaced.get(name)} | stored
        for name, shape in expected.items():
            if name not in self._shard_of:
                raise InputError(f"{self.path}: tensor {name} is missing; {_INCOMPLETE}")
            info, file = self.info(name), self._shard_of[name].path
            if info.shape != shape:
                raise InputError(
                    f"{file}: {name} has shape {list(info.shape)}, config.json asks for {list(shape)}; {_INCOMPLETE}"
                )
            allowed = _allowed_dtypes(name)
            if info.dtype not in allowed:
                listed = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
                raise InputError(f"{file}: {name} has dtype {info.dtype}, expected one of {listed}; {_INCOMPLETE}")
        if unknown := sorted(self._shard_of.keys() - expected.keys()):
            raise InputError(
                f"{self._shard_of[unknown[0]].path}: {len(unknown)} unknown tensor(s), first {unknown[0]}; "
                f"a gpt-oss checkpoint with {self.expert_format} experts has none of that name, and dropping it "
                "would change the model: take it out of the files, or use the original"
            )


def _allowed_dtypes(name: str) -> tuple[torch.dtype, ...]:
    if name.endswith(("_blocks", "_scales")):
        return (torch.uint8,)
    if name.endswith("_q8"):
        return (torch.int8,)
    return (torch.int32,) if name.endswith("_packed") else FLOATS


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
