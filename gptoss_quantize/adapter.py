"""A PEFT LoRA adapter, merged into a checkpoint tensor by tensor while it is read.

A fine-tuned gpt-oss is often a small adapter beside a large base. To quantize it nobody should have to write
the merged copy first (42 GB in bf16 for the 20b): the reader asks this module for each tensor as it passes.
A 2-D weight of `target_modules`, and a 2-D parameter of `target_parameters` (the router), becomes

    W [out, in] + s * B [out, r] @ A [r, in]     s = lora_alpha / r, with use_rslora lora_alpha / sqrt(r)

A fused expert tensor [E, in, out] of `target_parameters` has its E pairs packed into one A [E*r, in] and one
B [out, E*r], each in its own order: A's rows are (expert, rank), B's columns are (rank, expert):

    W[e] += s * (B.reshape(out, r, E)[:, :, e] @ A.reshape(E, r, in)[e]).T

Two properties of PEFT's files matter for experts. (1) The file does not say which parameter a pair belongs
to: the wrappers nest, so with both targeted `experts.base_layer.lora_A` is gate_up_proj (wrapped first) and
`experts.lora_A` is down_proj. (2) PEFT 0.19.0 with Transformers 5, and later PEFT with Transformers 4, took
gpt-oss for a model that stores [E, out, in]: there A is [E*r, out] and B [in, E*r]. Shapes tell the two
apart, except for a square down_proj (gpt-oss: 2880 x 2880); then gate_up_proj in the same adapter does.

Everything is added in float32 and rounded once. What cannot be merged exactly is refused before any work.
"""

import math
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptoss_quantize.config import read_json
from gptoss_quantize.errors import InputError
from gptoss_quantize.shards import ShardFile

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# the order in which PEFT wraps them: the order of the parameters in transformers' GptOssExperts
_EXPERT_PARAMETERS = ("gate_up_proj", "down_proj")
# module, nesting, part; an embedding's factors are bare parameters, without .weight
_LORA_NAME = re.compile(r"(.+?)((?:\.base_layer)*)\.lora_(?:([AB])\.weight|(embedding_[AB]))")
_WRITTEN_BY_PEFT = "expected the directory that PEFT's save_pretrained wrote"
_CONVERT_PICKLE = "adapter_model.bin is a pickle: convert to safetensors (load it with PEFT, save_pretrained)"
_ONE_SAVE = "take both files from one save"
_MERGE_WITH_PEFT = "merge it with PEFT (merge_and_unload) and give the merged model"
# read below, or about where and how it was trained: the tensor names already say which modules were reached
# fmt: off
_KNOWN_KEYS = frozenset({
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "peft_version",
    "target_parameters", "init_lora_weights", "base_model_name_or_path", "auto_mapping", "revision",
    "task_type", "inference_mode", "target_modules", "exclude_modules", "modules_to_save", "lora_dropout",
    "layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size", "ensure_weight_tying",
    "runtime_config", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
})
# fmt: on
_WHY_REFUSED = {
    "use_dora": "DoRA rescales the whole merged weight",
    "bias": "biases of the base were trained too, and several PEFT versions do not save them",
    "layer_replication": "it repeats decoder layers, so the result is another architecture",
    "trainable_token_indices": "single embedding rows were trained, in tensors of another form",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """What adapter_config.json says about the rank and the scale of each pair."""

    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: dict[str, Any]
    alpha_pattern: dict[str, Any]
    target_parameters: tuple[str, ...]
    peft_version: str

    def targets_parameter(self, name: str) -> bool:
        """Return whether target_parameters reach base tensor `name`; PEFT matches whole dotted suffixes."""
        return any(name == target or name.endswith(f".{target}") for target in self.target_parameters)

    def rank_and_scale(self, key: str) -> tuple[int, float]:
        """Return r and s of the module (or targeted parameter) `key`; the first matching pattern counts."""
        rank = _by_pattern(self.rank_pattern, key, self.rank)
        alpha = _by_pattern(self.alpha_pattern, key, self.alpha)
        return rank, alpha / (math.sqrt(rank) if self.use_rslora else rank)


def _by_pattern(patterns: Mapping[str, Any], key: str, default: Any) -> Any:
    matches = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", key))
    return next(matches, patterns.get(key, default))


def _parse_config(path: Path) -> AdapterConfig:
    raw = read_json(path)
    if missing := [key for key in ("peft_type", "r", "lora_alpha") if raw.get(key) is None]:
        raise InputError(f"{path}: {', '.join(missing)} missing; {_WRITTEN_BY_PEFT}")
    if raw["peft_type"] != "LORA":
        raise InputError(f"{path}: peft_type is {raw['peft_type']!r}, expected 'LORA'; {_MERGE_WITH_PEFT}")
    for key in sorted(raw.keys() - _KNOWN_KEYS):
        if raw[key] and (key, raw[key]) != ("bias", "none"):
            why = _WHY_REFUSED.get(key, "not a part of plain LoRA that can be merged exactly here")
            raise InputError(f"{path}: {key} is {raw[key]!r}, expected it off: {why}; {_MERGE_WITH_PEFT}")
    init = raw.get("init_lora_weights")
    if not (init is None or isinstance(init, bool) or init in ("gaussian", "eva", "orthogonal")):
        raise InputError(
            f"{path}: init_lora_weights is {init!r}, expected true, 'gaussian', 'eva' or 'orthogonal': other "
            "ones train on changed base weights; PEFT converts such an adapter to plain LoRA with "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    rank_pattern, alpha_pattern = _patterns(path, raw, "r"), _patterns(path, raw, "lora_alpha")
    return AdapterConfig(
        rank=raw["r"],
        alpha=raw["lora_alpha"],
        use_rslora=bool(raw.get("use_rslora")),
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        target_parameters=tuple(raw.get("target_parameters") or ()),
        peft_version=str(raw.get("peft_version") or ""),
    )


def _patterns(path: Path, raw: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return rank_pattern for key "r", alpha_pattern for "lora_alpha", after checking them and raw[key]."""
    name = "rank_pattern" if key == "r" else "alpha_pattern"
    patterns = raw.get(name) or {}
    try:
        values = [raw[key], *patterns.values()]
        for pattern in patterns:
            re.compile(pattern)
    except (AttributeError, re.error) as error:
        raise InputError(f"{path}: {name} is {patterns!r}, no object of patterns ({error})") from None
    want = "positive integers" if key == "r" else "finite numbers"
    kinds, least = ((int,), 1) if key == "r" else ((int, float), -math.inf)
    # type(), because True is an int
    if bad := [v for v in values if type(v) not in kinds or not math.isfinite(v) or v < least]:
        raise InputError(f"{path}: {bad[0]!r} in {key} or {name}, expected {want}; {_WRITTEN_BY_PEFT}")
    return patterns


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What the adapter does to one base tensor: replaces it, adds scale * B @ A to it, or both."""

    kind: str  # "replace", "linear", "embedding" or "experts"
    shapes: tuple[tuple[int, ...], ...]  # the base shapes it fits
    replacement: str = ""  # names inside the adapter's file, "" where there is none
    a_name: str = ""
    b_name: str = ""
    rank: int = 0
    scale: float = 0.0

    @property
    def stored(self) -> str:
        """Return the tensor of the adapter's file to blame in a message."""
        return self.a_name or self.replacement


def _pair(file: ShardFile, parts: Mapping[str, str], kind: str, key: str, config: AdapterConfig) -> Change:
    """Return the change of one A/B pair after checking that its shapes and the config agree."""
    names = []
    for part in ("embedding_A", "embedding_B") if kind == "embedding" else ("A", "B"):
        if part not in parts:
            there = next(iter(parts.values()))
            raise InputError(f"{file.path}: {there} has no lora_{part} beside it; the file is not complete")
        shape = file.tensors[parts[part]].shape
        if len(shape) != 2 or 0 in shape:
            raise InputError(
                f"{file.path}: {parts[part]} has shape {list(shape)}, expected a matrix; if a ZeRO-3 or FSDP "
                "run saved it, gather the parameters before save_pretrained"
            )
        names.append(parts[part])
    (a_rows, a_cols), (b_rows, b_cols) = (file.tensors[name].shape for name in names)
    rank, scale = config.rank_and_scale(key)
    experts, rest = divmod(a_rows, rank)
    if a_rows != b_cols or rest or (kind != "experts" and experts != 1):
        want = f"a multiple of {rank}" if kind == "experts" else rank
        raise InputError(
            f"{file.path}: {names[0]} {[a_rows, a_cols]} and {names[1]} {[b_rows, b_cols]} do not fit "
            f"{CONFIG_NAME}: expected as many rows of A as columns of B, {want} by r or rank_pattern; "
            f"{_ONE_SAVE}"
        )
    shapes: tuple[tuple[int, ...], ...] = ((b_rows, a_cols),)
    if kind == "embedding":
        shapes = ((a_cols, b_rows),)
    elif kind == "experts":
        shapes = ((experts, a_cols, b_rows), (experts, b_rows, a_cols))
    return Change(kind=kind, shapes=shapes, a_name=names[0], b_name=names[1], rank=rank, scale=scale)


def _group(file: ShardFile) -> tuple[dict[str, dict[int, dict[str, str]]], dict[str, str]]:
    """Return the stored names of pairs by module, nesting depth and part, and of the rest by base tensor."""
    pairs: dict[str, dict[int, dict[str, str]]] = {}
    replaced: dict[str, str] = {}
    for stored in sorted(file.tensors):
        name = stored.removeprefix(_PREFIX)
        if name != stored and (match := _LORA_NAME.fullmatch(name)):
            module, depth = match[1], match[2].count(".base_layer")
            pairs.setdefault(module, {}).setdefault(depth, {})[match[3] or match[4]] = stored
            continue
        base = name.replace(".base_layer", "")
        odd = re.search(r"lora_|token_adapter|modules_to_save|original_module|\.experts\.", name)
        if name == stored or odd or base in replaced:
            raise InputError(
                f"{file.path}: {stored} is not known in a LoRA adapter of gpt-oss; expected pairs such as "
                f"{_PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight, and whole tensors outside the "
                f"experts; save it with PEFT's save_pretrained, or {_MERGE_WITH_PEFT}"
            )
        replaced[base] = stored
    return pairs, replaced


def _wrapped(
    file: ShardFile, module: str, wrappers: Mapping[int, Mapping[str, str]], config: AdapterConfig
) -> Iterator[tuple[str, Change]]:
    """Yield base tensor name -> change for every LoRA pair on one module."""
    depths = sorted(wrappers, reverse=True)  # the wrapper put on first lies innermost
    where = f"{file.path}: {next(iter(wrappers[depths[0]].values()))}"
    if module.rpartition(".")[2] != "experts":
        if depths != [0]:
            raise InputError(f"{where}: nested LoRA on {module}, expected one pair; {_MERGE_WITH_PEFT}")
        name = f"{module}.weight"
        kind = "embedding" if any(part.startswith("embedding") for part in wrappers[0]) else "linear"
        key = name if config.targets_parameter(name) else module
        yield name, _pair(file, wrappers[0], kind, key, config)
        return
    names = [name for p in _EXPERT_PARAMETERS if config.targets_parameter(name := f"{module}.{p}")]
    if depths != list(range(len(names)))[::-1]:
        raise InputError(
            f"{where}: {len(depths)} LoRA pair(s) on {module}, but target_parameters of {CONFIG_NAME} name "
            f"{names or 'no weight there'}; {_ONE_SAVE}, or {_MERGE_WITH_PEFT}"
        )
    for depth, name in zip(depths, names, strict=True):
        yield name, _pair(file, wrappers[depth], "experts", name, config)


def _collect(file: ShardFile, config: AdapterConfig) -> dict[str, Change]:
    """Return base tensor name -> what happens to it, for every tensor of the adapter's file."""
    pairs, replaced = _group(file)
    changes: dict[str, Change] = {}
    for module, wrappers in pairs.items():
        changes.update(_wrapped(file, module, wrappers, config))
    for name, stored in replaced.items():
        shape = file.tensors[stored].shape
        change = changes.get(name, Change(kind="replace", shapes=(shape,)))
        if shape not in change.shapes:
            raise InputError(f"{file.path}: {stored} {list(shape)} does not fit {change.stored}; {_ONE_SAVE}")
        changes[name] = replace(change, replacement=stored)
    if not changes:
        raise InputError(f"{file.path}: no tensors; {_WRITTEN_BY_PEFT}")
    return changes


def _finite(tensor: Tensor) -> bool:
    # one pass, 40 times faster than isfinite().all(); NaN propagates into both ends
    return not tensor.numel() or bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def _check_values(file: ShardFile) -> None:
    for name, info in sorted(file.tensors.items()):
        if not info.dtype.is_floating_point:
            raise InputError(f"{file.path}: {name} has dtype {info.dtype}, expected a float type")
        if not _finite(file.read(name)):
            raise InputError(
                f"{file.path}: {name} holds NaN or infinite values; the training diverged or the file is "
                "damaged, take an earlier save"
            )


def _square_is_transposed(changes: Mapping[str, Change], peft_version: str) -> bool | None:
    """Return whether square expert pairs are stored as [E, out, in] (module docstring), None if unknown."""
    found = {n.rpartition(".")[2]: c.shapes[0][1:] for n, c in changes.items() if c.kind == "experts"}
    if len(found) == 2:
        gate_a, gate_b = found["gate_up_proj"]
        down_a, down_b = found["down_proj"]
        if (gate_a, gate_b) == (down_b, 2 * down_a):
            return False
        if (gate_a, gate_b) == (2 * down_b, down_a):
            return True
    return None if re.match(r"0\.19\.0$|0\.1[89]\.\d+\.dev", peft_version) else False


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """A checked PEFT LoRA adapter; its tensors are read when a base tensor that they change passes by."""

    path: Path
    config: AdapterConfig
    changes: Mapping[str, Change]
    _file: ShardFile = field(repr=False)
    _square_is_transposed: bool | None = field(repr=False)
    # the two expert pairs used last, so that E experts do not read them E times
    _cache: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False, compare=False)
    _lock: Any = field(default_factory=threading.Lock, repr=False, compare=False)

    @classmethod
    def open(cls, path: Path | str) -> "Adapter":
        """Open and check an adapter directory; every value is read once.

        Raises InputError for what is no LoRA adapter, is damaged, or cannot be merged exactly.
        """
        path = Path(path)
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            if not (path / name).is_file():
                pickled = name == WEIGHTS_NAME and (path / "adapter_model.bin").exists()
                raise InputError(f"{path}: no {name}; {_CONVERT_PICKLE if pickled else _WRITTEN_BY_PEFT}")
        config, file = _parse_config(path / CONFIG_NAME), ShardFile(path / WEIGHTS_NAME)
        changes = _collect(file, config)
        _check_values(file)
        square = _square_is_transposed(changes, config.peft_version)
        return cls(path=path, config=config, changes=changes, _file=file, _square_is_transposed=square)

    @property
    def targets(self) -> frozenset[str]:
        """Return the names of the base tensors that the adapter changes."""
        return frozenset(self.changes)

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Check the adapter against the base's names and shapes (experts fused, unquantized).

        Raises InputError when a tensor of the adapter has no place in the base, or when a parameter trained
        according to adapter_config.json is not in the file.
        """
        for name, change in sorted(self.changes.items()):
            where = f"{self._file.path}: {change.stored}"
            shape = shapes.get(name)
            if shape is None:
                raise InputError(f"{where} changes {name}, which the base has not; expected another base")
            if shape not in change.shapes:
                raise InputError(
                    f"{where} fits a {name} of shape {list(change.shapes[0])}, the base has {list(shape)}; "
                    "it was trained on another model, or on a resized vocabulary"
                )
            if change.kind == "experts" and shape[1] == shape[2] and self._square_is_transposed is None:
                raise InputError(
                    f"{where}: PEFT {self.config.peft_version} may have stored it transposed, and since "
                    f"{name} is square nothing tells; with the versions of its training, {_MERGE_WITH_PEFT}"
                )
        for name in sorted(shapes.keys() - self.changes.keys()):
            if self.config.targets_parameter(name):
                raise InputError(
                    f"{self._file.path}: no LoRA pair for {name}, which target_parameters name; the "
                    f"save lost it, or {CONFIG_NAME} is of another one: {_ONE_SAVE}"
                )

    def merge(
        self, name: str, weight: Tensor, expert: int | None = None, *, out_dtype: torch.dtype | None = None
    ) -> Tensor:
        """Return base tensor `name` with the adapter added in float32, then rounded to out_dtype.

        `out_dtype` is weight.dtype unless given. With `expert`, `weight` is that expert's slice [in, out] of
        a fused tensor. A tensor that the adapter does not change comes back as it is. Raises InputError for a
        shape that does not fit and for a sum that overflows.
        """
        out_dtype = out_dtype or weight.dtype
        change = self.changes.get(name)
        if change is None:
            return weight.to(out_dtype)
        shapes = [shape if expert is None else shape[1:] for shape in change.shapes]
        if tuple(weight.shape) not in shapes:
            raise InputError(
                f"{self._file.path}: {change.stored} fits a {name} of shape {list(shapes[0])}, got "
                f"{list(weight.shape)}; the adapter was trained on another model"
            )
        start = self._file.read(change.replacement) if change.replacement else weight
        merged = start.to(device=weight.device, dtype=torch.float32, copy=True)
        if change.kind == "experts":
            self._add_experts(change, merged, expert)
        elif change.a_name:
            A = self._file.read(change.a_name).to(merged.device, torch.float32)
            B = self._file.read(change.b_name).to(merged.device, torch.float32)
            merged.addmm_(*((A.T, B.T) if change.kind == "embedding" else (B, A)), alpha=change.scale)
        result = merged.to(out_dtype)
        if not _finite(result):
            raise InputError(
                f"{self._file.path}: {change.stored} on {name} overflows {out_dtype}; the adapter diverged, "
                "or the base must be converted to bf16 first"
            )
        return result

    def _add_experts(self, change: Change, merged: Tensor, expert: int | None) -> None:
        A_ERi, B_oRE = self._expert_pair(change)
        for e, slice_io in enumerate(merged) if expert is None else [(expert, merged)]:
            A = A_ERi[e].to(merged.device, torch.float32)
            B = B_oRE[:, :, e].to(merged.device, torch.float32)
            rows, columns = slice_io.shape
            transposed = self._square_is_transposed if rows == columns else A.shape[1] == columns
            slice_io.addmm_(*((B, A) if transposed else (A.T, B.T)), alpha=change.scale)

    def _expert_pair(self, change: Change) -> tuple[Tensor, Tensor]:
        """Return A [E, r, in] and B [out, r, E] in their stored dtype."""
        with self._lock:
            if change.a_name not in self._cache:
                while len(self._cache) > 1:
                    self._cache.pop(next(iter(self._cache)))
                A_ERi = self._file.read(change.a_name).unflatten(0, (-1, change.rank))
                B_oRE = self._file.read(change.b_name).unflatten(1, (change.rank, -1))
                self._cache[change.a_name] = A_ERi, B_oRE
            return self._cache[change.a_name]
