"""How a checkpoint stores its weights: per format the names, shapes and dtypes, how to read and how to store.

Experts (`LAYOUTS`), one entry each; nothing outside this file compares a format's name:
    float   fused `experts.gate_up_proj` [E, D, 2F] and `down_proj` [E, F, D] in bf16, fp16 or fp32
    mxfp4   OpenAI's release: fused `*_blocks` and `*_scales` under the usual shard names, so that whatever runs
            gpt-oss runs it
    int4    ours: one tensor set per expert, `w13_*` and `w2_*` in compressed-tensors' "pack-quantized" words, under
            shard names of our own
    int3, int2   ours: the same sets, their codes in planes (`kernels.planes`) under names that no other reader knows
    mixed   ours: int4, int3 or int2 for each projection of each layer, in the names of that one
Everything else (`DENSE`): as the source has it, or attention, embedding and head in int8 with a scale for 32 columns.

docs/checkpoint-format.md describes the files tensor by tensor. A new number format is one grid (`kernels.grids`) and
one entry here. Shapes: E experts, R rows (outputs), C columns (inputs), G groups of a row.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gptoss_quantize.config import ModelConfig
from gptoss_quantize.errors import InputError
from gptoss_quantize.kernels import grids, int8, mxfp4, planes
from gptoss_quantize.kernels.grids import Grid
from gptoss_quantize.layout_configs import int4_config, mxfp4_config, planes_config

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
PARTS = ("gate_up", "down")
# what `--dense int8` stores in 8 bits; routers, norms, biases and sinks stay as they are
Q8_MATRICES = (
    *(f"self_attn.{name}_proj.weight" for name in "qkvo"),
    "model.embed_tokens.weight",
    "lm_head.weight",
)

Stored = dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]  # name or suffix -> (shape, allowed dtypes)
Read = Callable[[str, int | None], Tensor]  # (stored name, index along the first dimension or None)


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


def layer_of(name: str) -> int | None:
    """Return the decoder layer that a tensor belongs to, None for those outside the layers."""
    return int(name.split(".")[2]) if name.startswith("model.layers.") else None


# ---- experts


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One way to store experts."""

    name: str
    grid: Grid | None  # what the codes mean; None: float weights
    fused: bool  # one tensor for all experts of a layer, or one set per expert
    stems: tuple[str, str]  # stored names of the projections gate_up and down
    matrix: Callable[[int, int, int], Stored]  # (R, C, group size) -> suffix -> what one expert's matrix is stored as
    read: Callable[[dict[str, Tensor], torch.dtype], Tensor]  # its stored tensors by suffix -> weights [R, C]
    store: Callable[[Tensor, Tensor], dict[str, Tensor]] | None = None  # (codes [R, C], scale [R, G]) -> by suffix
    config: Callable[[int], dict[str, Any]] | None = None  # group size -> quantization_config
    shard_stem: str = "model"  # STEM-0000i-of-0000N.safetensors
    group_sizes: tuple[int, ...] = ()  # that it can have, the default first
    source: bool = False  # can be quantized: nothing of ours was lost yet
    packed: bool = False  # our loader keeps it packed in memory; stock transformers cannot load it
    bits: int = 0  # of a code, where it is packed and all codes have the same
    layers: "tuple[tuple[Layout, Layout], ...]" = ()  # of a mixed one: per layer that of gate_up and that of down

    def at(self, layer: int, part: str) -> "Layout":
        """Return the layout of one projection, "gate_up" or "down", of one layer: this one, unless it is mixed."""
        return self.layers[layer][PARTS.index(part)] if self.layers else self

    @property
    def index_name(self) -> str:
        """Return the file name of the index."""
        return f"{self.shard_stem}.safetensors.index.json"

    @property
    def suffixes(self) -> list[str]:
        """Return what the names of a matrix's stored tensors end with."""
        return list(self.matrix(mxfp4.GROUP_SIZE, mxfp4.GROUP_SIZE, mxfp4.GROUP_SIZE))

    def stem(self, part: str) -> str:
        """Return the stored name of a projection, "gate_up" or "down"."""
        return self.stems[PARTS.index(part)]

    def inner(self, expert: int, part: str) -> str:
        """Return what the names of one expert's projection begin with inside a layer."""
        return "mlp.experts." + (self.stem(part) if self.fused else f"{expert}.{self.stem(part)}")

    def base(self, layer: int, expert: int, part: str) -> str:
        """Return what the full names of one expert's projection begin with."""
        return f"model.layers.{layer}.{self.inner(expert, part)}"

    def stored(self, config: ModelConfig, group_size: int, layer: int = 0) -> Stored:
        """Return name below `mlp.experts.` -> (shape, allowed dtypes) of every expert tensor of a layer."""
        E, D, F = config.experts, config.hidden, config.intermediate
        found: Stored = {}
        for e in range(1 if self.fused else E):
            biases: Stored = {}
            for part, stem, rows, columns in zip(PARTS, self.stems, (2 * F, D), (D, F), strict=True):
                lead, base = ((E,), stem) if self.fused else ((), f"{e}.{stem}")
                for suffix, (shape, dtypes) in self.at(layer, part).matrix(rows, columns, group_size).items():
                    found[base + suffix] = ((*lead, *shape), dtypes)
                biases[base + "_bias"] = ((*lead, rows), FLOATS)
                if not self.fused:
                    found |= biases
            found |= biases
        return found

    def weight(self, read: Read, layer: int, expert: int, part: str, dtype: torch.dtype) -> Tensor:
        """Return one expert's weights [R, C] in a dtype; `read` is `Checkpoint.read`, ValueError for a bad value."""
        base, index, own = self.base(layer, expert, part), expert if self.fused else None, self.at(layer, part)
        stored = {suffix: read(base + suffix, index) for suffix in own.suffixes}
        try:
            return own.read(stored, dtype)
        except ValueError as error:
            raise ValueError(base + str(error).format(at="" if index is None else f"[{index}]")) from None

    def bias(self, read: Read, layer: int, expert: int, part: str) -> Tensor:
        """Return one expert's bias [R] as stored."""
        return read(self.base(layer, expert, part) + "_bias", expert if self.fused else None)

    def put(
        self,
        tensors: dict[str, Tensor],
        place: tuple[int, int],
        part: str,
        codes_RC: Tensor,
        scale_RG: Tensor,
        bias_R: Tensor,
    ) -> None:
        """Add an expert's projection to the tensors of a layer; `place` is (expert, experts of the layer)."""
        if self.store is None:
            raise ValueError(f"experts are not written as {self.name}")
        expert, experts = place
        base = self.inner(expert, part)
        parts = self.store(codes_RC, scale_RG) | {"_bias": bias_R.to(torch.bfloat16)}
        for suffix, tensor in parts.items():
            if not self.fused:
                tensors[base + suffix] = tensor.cpu()
                continue
            if base + suffix not in tensors:
                tensors[base + suffix] = torch.empty(experts, *tensor.shape, dtype=tensor.dtype)
            tensors[base + suffix][expert] = tensor.cpu()

    def group_size_of(self, config: ModelConfig, shape_of: Callable[[str], tuple[int, ...] | None]) -> int:
        """Return the group size that stored scales have, 0 for float; ValueError for shapes that no group fits."""
        if not self.group_sizes:
            return 0
        if len(self.group_sizes) == 1:
            return self.group_sizes[0]
        name = self.base(0, 0, "gate_up") + "_weight_scale"
        shape, hidden = shape_of(name), config.hidden
        if shape is None:
            raise ValueError(f"tensor {name} is missing")
        if len(shape) != 2 or not 1 <= shape[1] <= hidden or hidden % shape[1]:
            raise ValueError(
                f"{name} has shape {list(shape)}, expected one scale for every group of hidden_size {hidden}"
            )
        return hidden // shape[1]

    def bits_per_weight(self, columns: int, group_size: int) -> float:
        """Return the exact stored bits per expert weight of a matrix with `columns` inputs, without biases."""
        if group_size and columns % group_size:
            raise ValueError(f"{columns} columns are not a multiple of group size {group_size}")
        if self.layers:
            # gate_up has two thirds of the weights
            each = [(layout.bits_per_weight(columns, group_size) for layout in pair) for pair in self.layers]
            return sum(2 * wide + narrow for wide, narrow in each) / (3 * len(each))
        stored = self.matrix(1, columns, group_size).values()
        return sum(8 * dtypes[-1].itemsize * torch.Size(shape).numel() for shape, dtypes in stored) / columns


def _float_matrix(rows: int, columns: int, group_size: int) -> Stored:
    return {"": ((columns, rows), FLOATS)}


def _read_float(stored: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    return stored[""].T.to(dtype).contiguous()


def codes_suffix(bits: int) -> str:
    """Return what the name of a packed matrix's codes ends with: it says how many bits they have."""
    return "_weight_packed" if bits == 4 else f"_weight_int{bits}"


def _integer_matrix(bits: int, rows: int, columns: int, group_size: int) -> Stored:
    return {
        codes_suffix(bits): ((rows, planes.words(columns, bits)), (torch.int32,)),
        "_weight_scale": ((rows, columns // group_size), FLOATS),
    }


def _read_integers(bits: int, stored: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    return planes.weights(stored[codes_suffix(bits)], stored["_weight_scale"], bits, dtype)


def _store_integers(bits: int, codes_RC: Tensor, scale_RG: Tensor) -> dict[str, Tensor]:
    return {codes_suffix(bits): planes.pack(codes_RC, bits), "_weight_scale": scale_RG.to(torch.bfloat16)}


def _mxfp4_matrix(rows: int, columns: int, group_size: int) -> Stored:
    groups = columns // mxfp4.GROUP_SIZE
    return {
        "_blocks": ((rows, groups, mxfp4.BYTES_PER_GROUP), (torch.uint8,)),
        "_scales": ((rows, groups), (torch.uint8,)),
    }


def _read_mxfp4(stored: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    if bool((stored["_scales"] == mxfp4.SCALE_NAN).any()):
        raise ValueError("_scales{at} holds 255, the E8M0 code for NaN")
    return mxfp4.decode(stored["_blocks"], stored["_scales"], dtype)


def _store_mxfp4(codes_RC: Tensor, scale_RG: Tensor) -> dict[str, Tensor]:
    return {"_blocks": mxfp4.pack_codes(grids.halves_to_codes(codes_RC)), "_scales": grids.scale_bytes(scale_RG)}


FLOAT = Layout(
    name="float",
    grid=None,
    fused=True,
    stems=("gate_up_proj", "down_proj"),
    matrix=_float_matrix,
    read=_read_float,
    source=True,
)
MXFP4 = Layout(
    name="mxfp4",
    grid=grids.MXFP4,
    fused=True,
    stems=("gate_up_proj", "down_proj"),
    matrix=_mxfp4_matrix,
    read=_read_mxfp4,
    store=_store_mxfp4,
    config=mxfp4_config,
    group_sizes=(mxfp4.GROUP_SIZE,),
    source=True,
)


def _integers(bits: int, config: Callable[[int], dict[str, Any]]) -> Layout:
    """Return our layout of symmetric integers."""
    return Layout(
        name=f"int{bits}",
        grid=grids.GRIDS[f"int{bits}"],
        fused=False,
        stems=("w13", "w2"),
        matrix=partial(_integer_matrix, bits),
        read=partial(_read_integers, bits),
        store=partial(_store_integers, bits),
        config=config,
        # not model-*.safetensors: stock transformers would load that with random experts and only warn
        shard_stem=f"gptoss-int{bits}",
        group_sizes=(64, 32),
        packed=True,
        bits=bits,
    )


INT4 = _integers(4, int4_config)
INT3, INT2 = (_integers(bits, partial(planes_config, bits)) for bits in (3, 2))


def _no_matrix(*_: Any) -> Any:
    raise ValueError("a mixed layout has no matrix of its own; ask that of a projection, `at`")


# without its layers: what all mixed ones have in common
MIXED = replace(INT4, name="mixed", grid=None, matrix=_no_matrix, read=_no_matrix, store=None, bits=0,
                config=None, shard_stem="gptoss-mixed")  # fmt: skip
LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (FLOAT, INT4, INT3, INT2, MXFP4, MIXED)}
WIDTHS: dict[int, Layout] = {layout.bits: layout for layout in (INT2, INT3, INT4)}

Bits = tuple[tuple[int, int], ...]  # per layer, of the codes of gate_up and of down


def layout_of_bits(bits: Bits) -> Layout:
    """Return the layout that stores these bits: a mixed one, or that of one width where all are equal."""
    if len(widths := {width for pair in bits for width in pair}) == 1:
        return WIDTHS[widths.pop()]
    pairs = tuple((WIDTHS[wide], WIDTHS[narrow]) for wide, narrow in bits)
    return replace(MIXED, layers=pairs, config=partial(planes_config, [list(pair) for pair in bits]))


def quantization_config(layout: Layout, group_size: int = 0) -> dict[str, Any]:
    """Return what config.json says of the experts; ValueError for a layout that is not quantized."""
    if layout.config is None:
        raise ValueError(f"{layout.name} describes no quantization")
    return layout.config(group_size)


# MXFP4 where that is exact, else int4 (`quantize.auto`)
AUTO = "auto"
# what `quantize` can write
WRITTEN: dict[str, Layout] = {name: layout for name, layout in LAYOUTS.items() if layout.store is not None}


def layout_of(names: "dict[str, Any] | set[str]", layers: int) -> Layout | None:
    """Return the layout that the names of a checkpoint's expert tensors belong to, None for none of ours.

    The first layer says which; where it is packed, every projection of every layer says its bits.
    """
    for layout in (one for one in LAYOUTS.values() if one is not MIXED):
        if layout.base(0, 0, "gate_up") + layout.suffixes[0] in names:
            if not layout.packed:
                return layout
            stems = [[layout.base(i, 0, part) for part in PARTS] for i in range(layers)]
            bits = ([_bits_at(stem, names) or layout.bits for stem in pair] for pair in stems)
            return layout_of_bits(tuple((wide, narrow) for wide, narrow in bits))
    return None


def _bits_at(stem: str, names: "dict[str, Any] | set[str]") -> int | None:
    """Return the bits of a projection whose codes are among the names, None where there are none."""
    return next((bits for bits in WIDTHS if stem + codes_suffix(bits) in names), None)


def expert_shapes(config: ModelConfig, layout: Layout, group_size: int = 0) -> dict[str, tuple[int, ...]]:
    """Return full name -> shape of every expert tensor of a model."""
    inner = layout.stored(config, group_size)
    return {
        f"model.layers.{i}.mlp.experts.{name}": shape
        for i in range(config.layers)
        for name, (shape, _) in inner.items()
    }


def pick_layout(name: str, group_size: int | None, model: ModelConfig | None = None) -> tuple[Layout, int]:
    """Return (the layout to write, its group size); InputError for one that does not exist or does not fit."""
    if name not in (AUTO, *WRITTEN):
        raise InputError(f"unknown format {name!r}; known: {', '.join((*WRITTEN, AUTO))} (--format)")
    layout = INT4 if name == AUTO else WRITTEN[name]
    size = layout.group_sizes[0] if group_size is None else group_size
    if size not in layout.group_sizes:
        known = " or ".join(map(str, sorted(layout.group_sizes)))
        remedy = f"use {known}" if len(layout.group_sizes) > 1 else "leave --group-size away"
        raise InputError(f"format {name} has groups of {known}, not {size}; {remedy}")
    return layout, size


# ---- everything else


@dataclass(frozen=True, slots=True, kw_only=True)
class Dense:
    """One way to store what is not an expert."""

    name: str
    parts: Callable[[str, tuple[int, ...]], Stored]  # of a tensor (name, shape): what it is stored as
    read: Callable[[str, Read], Tensor]
    store: Callable[[str, Tensor], dict[str, Tensor]]
    dtype: torch.dtype | None = None  # that `read` gives for the matrices it packs; None: as stored

    def packs(self, name: str) -> bool:
        """Return whether a tensor is stored otherwise than by its own name."""
        return list(self.parts(name, (1, int8.GROUP_SIZE))) != [name]


def _as_it_is(name: str, shape: tuple[int, ...]) -> Stored:
    return {name: (shape, FLOATS)}


def _int8_parts(name: str, shape: tuple[int, ...]) -> Stored:
    if not name.endswith(Q8_MATRICES):
        return _as_it_is(name, shape)
    groups = (*shape[:-1], -(-shape[-1] // int8.GROUP_SIZE))
    return {name + "_q8": (shape, (torch.int8,)), name + "_q8_scale": (groups, FLOATS)}


def _read_int8(name: str, read: Read) -> Tensor:
    if not name.endswith(Q8_MATRICES):
        return read(name, None)
    return int8.dequantize(read(name + "_q8", None), read(name + "_q8_scale", None))


def _store_int8(name: str, tensor: Tensor) -> dict[str, Tensor]:
    if not name.endswith(Q8_MATRICES):
        return {name: tensor}
    codes, scale = int8.quantize(tensor)
    return {name + "_q8": codes, name + "_q8_scale": scale}


AS_SOURCE = Dense(
    name="source", parts=_as_it_is, read=lambda name, read: read(name, None), store=lambda name, t: {name: t}
)
INT8 = Dense(name="int8", parts=_int8_parts, read=_read_int8, store=_store_int8, dtype=torch.float32)
DENSE: dict[str, Dense] = {dense.name: dense for dense in (AS_SOURCE, INT8)}


def misfit(config: ModelConfig, dense: str) -> tuple[str, int] | None:
    """Return (name, columns) of a matrix that a form of the rest cannot pack, None where it packs all it wants to."""
    packs = DENSE[dense].packs
    shapes = dense_shapes(config).items()
    return next(((n, s[-1]) for n, s in shapes if packs(n) and s[-1] % int8.GROUP_SIZE), None)


def dense_of(names: "dict[str, Any] | set[str]") -> Dense:
    """Return how a checkpoint with these names stores what is not an expert."""
    probe = "model.embed_tokens.weight"
    return next(
        (d for d in DENSE.values() if d.packs(probe) and d.parts(probe, (1, 32)).keys() <= set(names)), AS_SOURCE
    )
