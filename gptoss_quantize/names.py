"""One table of names: what other tools call gpt-oss's tensors, turned into transformers' names before any look-up.

Wrappers (DDP, FSDP, torch.compile, activation checkpointing, PEFT, a vision-language model around it) add
components to names; `plain_name` takes them off. Other layouts of the same weights are put together as they are
read, one expert at a time, and nothing is copied:

    transformers           experts.gate_up_proj [E, D, 2F], gate and up columns interleaved; router.weight
    Unsloth                experts.gate_up_projs.N.weight [2F, D], down_projs.N.weight; router.linear.weight
    GPTQModel of 2025      experts.gate_up.N.weight [2F, D], down.N.weight
    one linear per expert  experts.N.gate_up_proj.weight [2F, D], experts.N.down_proj.weight
    MLX                    experts.gate_proj.weight [E, F, D] (the even rows), up_proj.weight, down_proj.weight
    OpenAI's original      block.N.attn.qkv, block.N.mlp.mlp1_weight[.blocks, .scales], embedding, unembedding

Per-expert gate_proj and up_proj are not in it: tools mean two different things by them (`runtimes.foreign`).
"""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from gptoss_quantize.config import ModelConfig
from gptoss_quantize.errors import InputError
from gptoss_quantize.shards import Made, ReadStored, ShardFile, TensorInfo, Weights

# components that wrappers put anywhere into a name
_WRAPPERS = frozenset(
    {"_orig_mod", "module", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_forward_module", "base_layer"}
)
# components before the model's own
_LEADING = frozenset({"base_model", "model", "language_model", "text_model"})
_INNER_ROOTS = frozenset({"layers", "embed_tokens", "norm", "rotary_emb"})
_ROOTS = _INNER_ROOTS | {"lm_head", "block", "embedding", "unembedding"}

_RENAMINGS = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        (r"\.mlp\.router\.linear\.", ".mlp.router."),
        # OpenAI's original
        (r"^embedding\.", "model.embed_tokens."),
        (r"^unembedding\.", "lm_head."),
        (r"^model\.norm\.scale$", "model.norm.weight"),
        (r"^block\.(\d+)\.", r"model.layers.\1."),
        (r"^(model\.layers\.\d+)\.attn\.norm\.scale$", r"\1.input_layernorm.weight"),
        (r"^(model\.layers\.\d+)\.mlp\.norm\.scale$", r"\1.post_attention_layernorm.weight"),
        (r"^(model\.layers\.\d+)\.attn\.out\.", r"\1.self_attn.o_proj."),
        # Tinker's too
        (r"^(model\.layers\.\d+)\.attn\.", r"\1.self_attn."),
        (r"^(model\.layers\.\d+\.mlp)\.gate\.", r"\1.router."),
        (r"\.mlp\.mlp1_weight\.(blocks|scales)$", r".mlp.experts.gate_up_proj_\1"),
        (r"\.mlp\.mlp2_weight\.(blocks|scales)$", r".mlp.experts.down_proj_\1"),
        (r"\.mlp\.mlp1_bias$", ".mlp.experts.gate_up_proj_bias"),
        (r"\.mlp\.mlp2_bias$", ".mlp.experts.down_proj_bias"),
        (r"\.mlp\.mlp1_weight$", ".mlp.experts.gate_up_proj.weight"),
        (r"\.mlp\.mlp2_weight$", ".mlp.experts.down_proj.weight"),
    )
)
_PER_EXPERT = re.compile(
    r"(?P<base>.+\.mlp\.experts)\.(?:(?P<list>gate_up_projs|gate_up|down_projs|down)\.(?P<n>\d+)|"
    r"(?P<m>\d+)\.(?P<own>gate_up_proj|down_proj))\.(?P<what>weight|bias)"
)
_STACKED = re.compile(
    r"(?P<base>.+\.mlp\.experts)\.(?P<own>gate_proj|up_proj|gate_up_proj|down_proj)\.(?P<what>weight|bias)"
)
_QKV = re.compile(r"(?P<base>.+\.self_attn)\.qkv\.(?P<what>weight|bias)")

# what a name that nothing here reads belongs to: (pattern, the layout, what to do)
_KNOWN_OTHERS = tuple(
    (re.compile(pattern), layout, remedy)
    for pattern, layout, remedy in (
        (
            r"lora_|token_adapter|modules_to_save|original_module",
            "a PEFT model that was saved without merging",
            "save its adapter alone (save_pretrained) and give it with --adapter, or merge it (merge_and_unload)",
        ),
        (
            r"\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*|SCB)$",
            "a bitsandbytes checkpoint",
            "save the model in 16 bit (Unsloth: save_pretrained_merged(..., save_method='merged_16bit')) and give "
            "that",
        ),
        (
            r"\.(qweight|qzeros|g_idx|weight_packed|weight_zero_point|weight_shape)$",
            "what another tool already quantized (GPTQModel, AutoGPTQ, AutoAWQ, AutoRound, llm-compressor)",
            "`gptoss-quantize import` reads those; to quantize, start from the bf16 or MXFP4 original",
        ),
        (
            r"\.experts\.\d+\.(gate_proj|up_proj|down_proj|w[123])\.(weight|bias)$",
            "one linear layer per expert with gate and up apart (llm-compressor, Defuser)",
            "some tools mean the even rows of gate_up_proj by gate_proj and others its first half, so it is not "
            "guessed: save the model with its experts fused (experts.gate_up_proj), as transformers writes it",
        ),
        (
            r"\.(scales|biases)$",
            "a checkpoint that MLX quantized",
            "fuse it with `mlx_lm.fuse --de-quantize`, which writes 16-bit weights that can be read",
        ),
        (
            r"\.(w13|w2)_(weight|bias)",
            "vLLM's own names for the experts",
            "save the model as transformers does (experts.gate_up_proj, experts.down_proj)",
        ),
        (
            r"\.(weight_scale|weight_scale_inv|input_scale|weight_scale_2)$",
            "an fp8 or fp4 checkpoint",
            "start from the bf16 or MXFP4 original",
        ),
    )
)
_EXAMPLES = (
    ("transformers", "model.layers.N.mlp.experts.gate_up_proj"),
    ("transformers", "model.layers.N.mlp.experts.gate_up_proj_bias"),
    ("transformers", "model.layers.N.mlp.experts.down_proj"),
    ("transformers", "model.layers.N.mlp.router.weight"),
    ("transformers", "model.layers.N.self_attn.q_proj.weight"),
    ("transformers", "model.layers.N.self_attn.sinks"),
    ("transformers", "model.layers.N.input_layernorm.weight"),
    ("transformers", "model.embed_tokens.weight"),
    ("transformers", "lm_head.weight"),
    ("OpenAI's MXFP4", "model.layers.N.mlp.experts.gate_up_proj_blocks"),
    ("Unsloth's", "model.layers.N.mlp.experts.gate_up_projs.N.weight"),
    ("Unsloth's", "model.layers.N.mlp.experts.down_projs.N.weight"),
    ("GPTQModel's of 2025", "model.layers.N.mlp.experts.gate_up.N.weight"),
    ("MLX's", "model.layers.N.mlp.experts.gate_proj.weight"),
    ("OpenAI's original", "block.N.mlp.mlp1_weight.blocks"),
    ("OpenAI's original", "block.N.attn.qkv.weight"),
)


def nearest(name: str) -> str:
    """Return which known layout a name that is not read here is nearest to, and what to do: for messages."""
    for pattern, layout, remedy in _KNOWN_OTHERS:
        if pattern.search(name):
            return f"it looks like {layout}: {remedy}"
    shape = re.sub(r"\d+", "N", name)
    best = max(_EXAMPLES, key=lambda example: difflib.SequenceMatcher(None, shape, example[1]).ratio())
    return f"the nearest known layout is {best[0]}, which has {best[1]}"


def plain_name(name: str) -> str:
    """Return a tensor's name without what wrappers added, and as transformers has it where only the name differs."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    lead = 0
    while lead < len(parts) and parts[lead] in _LEADING:
        lead += 1
    if lead < len(parts) and parts[lead] in _ROOTS:
        inner = parts[lead] in _INNER_ROOTS
        parts = (["model"] if inner else []) + parts[lead:]
    name = ".".join(parts)
    for pattern, new in _RENAMINGS:
        name = pattern.sub(new, name)
    return name


def _without_common(names: Iterable[str]) -> Callable[[str], str]:
    """Return what takes off a prefix that all names share and nothing of gpt-oss begins with."""
    split = [name.split(".") for name in names]
    known = _WRAPPERS | _LEADING | _ROOTS
    count = 0
    while split and all(len(parts) > count + 1 for parts in split):
        first = split[0][count]
        if first in known or any(parts[count] != first for parts in split):
            break
        count += 1
    return lambda name: ".".join(name.split(".")[count:])


def canonical(shard_of: Mapping[str, ShardFile], config: ModelConfig, where: str) -> tuple[Weights, list[str]]:
    """Return (the tensors by transformers' names, notes on what was renamed); InputError for two of one name."""
    strip = _without_common(shard_of)
    stored = {name: shard.tensors[name] for name, shard in shard_of.items()}
    renamed: dict[str, str] = {}
    for name in sorted(stored):
        new = plain_name(strip(name))
        if new in renamed:
            raise InputError(
                f"{where}: {renamed[new]} and {name} are both {new}; keep the one that is meant, in a folder of its "
                "own"
            )
        renamed[new] = name
    made = _assembled({new: (old, stored[old]) for new, old in renamed.items()}, config, where)
    odd = [name for name, m in sorted(made.items()) if m.parts != (name,)]
    if not odd:
        return Weights(shard_of, made), []
    first = made[odd[0]].parts
    more = f" and {len(first) - 1} more" if len(first) > 1 else ""
    return Weights(shard_of, made), [
        f"{len(odd)} tensors have other names here, such as {first[0]}{more} for {odd[0]}"
    ]


def renamed(shard_of: Mapping[str, ShardFile], where: str, more: Callable[[str], str]) -> Weights:
    """Return the tensors of another tool's int4 file by plain names, none put together; `more` renames further."""
    strip = _without_common(shard_of)
    made: dict[str, Made] = {}
    for name, shard in sorted(shard_of.items()):
        new = more(plain_name(strip(name)))
        if new in made:
            raise InputError(f"{where}: {made[new].parts[0]} and {name} are both {new}; keep the one that is meant")
        made[new] = Made.stored(name, shard.tensors[name])
    return Weights(shard_of, made)


_Entry = tuple[str, TensorInfo]  # stored name and what is there


def _assembled(found: Mapping[str, _Entry], config: ModelConfig, where: str) -> dict[str, Made]:
    """Return transformers' name -> how it is made, from plain names; names that nothing matches stay."""
    made: dict[str, Made] = {}
    lists: dict[str, dict[int, _Entry]] = {}
    stacked: dict[tuple[str, str], dict[str, _Entry]] = {}

    for name, entry in found.items():
        if match := _PER_EXPERT.fullmatch(name):
            _note_expert(lists, match, entry, where)
        elif match := _STACKED.fullmatch(name):
            stacked.setdefault((match["base"], match["what"]), {})[match["own"]] = entry
        elif match := _QKV.fullmatch(name):
            for proj, value in _qkv(*entry, config, where).items():
                _put(made, f"{match['base']}.{proj}.{match['what']}", value, where)
        else:
            _put(made, name, Made.stored(*entry), where)
    for target, entries in lists.items():
        _put(made, target, _listed(target, entries, where), where)
    for (base, what), parts in stacked.items():
        for name, value in _from_stacked(base, what, parts, where).items():
            _put(made, name, value, where)
    return made


def _put(made: dict[str, Made], name: str, value: Made, where: str) -> None:
    if name in made:
        raise InputError(
            f"{where}: {made[name].parts[0]} and {value.parts[0]} are both {name}; keep the one that is meant"
        )
    made[name] = value


def _note_expert(lists: dict[str, dict[int, _Entry]], match: re.Match[str], entry: _Entry, where: str) -> None:
    """Put one expert's linear layer among those of the fused tensor that it belongs to."""
    part = "gate_up_proj" if (match["own"] or match["list"]).startswith("gate_up") else "down_proj"
    target = f"{match['base']}.{part}" + ("_bias" if match["what"] == "bias" else "")
    entries, number = lists.setdefault(target, {}), int(match["n"] or match["m"])
    if number in entries:
        raise InputError(f"{where}: {entries[number][0]} and {entry[0]} are both expert {number} of {target}")
    entries[number] = entry


def _turned(info: TensorInfo, shape: tuple[int, ...]) -> TensorInfo:
    return replace(info, shape=shape, start=-1, nbytes=prod(shape) * info.dtype.itemsize)


def _turn(tensor: Tensor) -> Tensor:
    """Return [in, out] for a matrix [out, in], a bias as it is."""
    return tensor.T if tensor.dim() == 2 else tensor


def _listed(target: str, entries: Mapping[int, tuple[str, TensorInfo]], where: str) -> Made:
    """Return the fused tensor [E, in, out] (or bias [E, out]) of one linear layer per expert."""
    names = [entries[e][0] for e in sorted(entries)]
    infos = [entries[e][1] for e in sorted(entries)]
    if sorted(entries) != list(range(len(entries))):
        missing = min(set(range(max(entries) + 1)) - set(entries))
        raise InputError(f"{where}: {names[0]} and others are there, but expert {missing} of {target} is missing")
    for name, info in zip(names, infos, strict=True):
        if (info.shape, info.dtype) != (infos[0].shape, infos[0].dtype):
            raise InputError(
                f"{where}: {name} has shape {list(info.shape)} and dtype {info.dtype}, {names[0]} has "
                f"{list(infos[0].shape)} and {infos[0].dtype}; experts of different sizes are not supported"
            )
    shape = tuple(reversed(infos[0].shape))

    def read(read: ReadStored, index: int | None) -> Tensor:
        if index is not None:
            return _turn(read(names[index], None))
        return torch.stack([_turn(read(name, None)) for name in names])

    return Made(tuple(names), _turned(infos[0], (len(names), *shape)), read)


def _from_stacked(base: str, what: str, parts: Mapping[str, tuple[str, TensorInfo]], where: str) -> dict[str, Made]:
    """Return fused tensors made of `experts.{gate,up,gate_up,down}_proj.{weight,bias}`, [E, out, in] and [E, out]."""
    end = "_bias" if what == "bias" else ""
    out: dict[str, Made] = {}
    for own in ("down_proj", "gate_up_proj"):
        if own in parts:
            old, info = parts[own]
            # only the last two of the three dimensions turn
            shape = info.shape if what == "bias" else (*info.shape[:-2], *reversed(info.shape[-2:]))
            out[f"{base}.{own}{end}"] = Made((old,), _turned(info, shape), _transposed(old, what))
    if ("gate_proj" in parts) != ("up_proj" in parts):
        there = next(parts[own][0] for own in ("gate_proj", "up_proj") if own in parts)
        raise InputError(f"{where}: {there} has no gate_proj or up_proj beside it; the model is not whole")
    if "gate_proj" in parts:
        (gate, info), (up, other) = parts["gate_proj"], parts["up_proj"]
        if (info.shape, info.dtype) != (other.shape, other.dtype) or len(info.shape) != (2 if what == "bias" else 3):
            raise InputError(
                f"{where}: {gate} {list(info.shape)} and {up} {list(other.shape)} are not gate and up of stacked "
                "experts, [E, F, D]; the nearest known layout is MLX's"
            )
        rows = 2 * info.shape[1]
        shape = (info.shape[0], rows) if what == "bias" else (info.shape[0], info.shape[2], rows)

        def read(read: ReadStored, index: int | None) -> Tensor:
            # the rows of an expert are the first dimension after its own
            pair = torch.stack((read(gate, index), read(up, index)), dim=2 if index is None else 1)
            joined = pair.flatten(1, 2) if index is None else pair.flatten(0, 1)
            return joined if what == "bias" else joined.mT

        out[f"{base}.gate_up_proj{end}"] = Made((gate, up), _turned(info, shape), read)
    return out


def _transposed(old: str, what: str) -> Callable[[ReadStored, "int | None"], Tensor]:
    return lambda read, index: read(old, index) if what == "bias" else read(old, index).mT


def _qkv(old: str, info: TensorInfo, config: ModelConfig, where: str) -> dict[str, Made]:
    """Return q, k and v as the rows of one tensor, in this order."""
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    if info.shape[0] != q + 2 * kv:
        raise InputError(f"{where}: {old} has {info.shape[0]} rows, expected q, k and v of {q}, {kv} and {kv} rows")

    def rows(start: int, count: int) -> Made:
        def read(read: ReadStored, index: int | None) -> Tensor:
            return read(old, start + index) if index is not None else read(old, None)[start : start + count].clone()

        return Made((old,), _turned(info, (count, *info.shape[1:])), read)

    return {"q_proj": rows(0, q), "k_proj": rows(q, kv), "v_proj": rows(q + kv, kv)}
