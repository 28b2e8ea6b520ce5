"""What the files of a PEFT LoRA adapter say: settings, and which base tensor each of its tensors changes."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gptoss_quantize.config import read_json
from gptoss_quantize.errors import InputError
from gptoss_quantize.names import nearest, plain_name
from gptoss_quantize.shards import ShardFile

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# the order in which PEFT wraps them: the order of the parameters in transformers' GptOssExperts
_EXPERT_PARAMETERS = ("gate_up_proj", "down_proj")
# module, nesting, part; an embedding's factors are bare parameters, without .weight
_LORA_NAME = re.compile(
    r"(.+?)((?:\.base_layer)*)\.lora_(?:([AB])(?:\.default)?\.weight|(embedding_[AB])(?:\.default)?)"
)
# Unsloth's and GPTQModel's lists of linear layers, and one layer per expert
_LISTED = re.compile(
    r"(.+\.mlp\.experts)\.(?:(gate_up_projs|gate_up|down_projs|down)\.(\d+)|(\d+)\.(gate_up_proj|down_proj))"
)
# Tinker's: w1 are the even columns of gate_up_proj, w3 the odd ones, w2 is down_proj
_TINKER = re.compile(r"(.+\.mlp\.experts)\.w([123])")
_APART = re.compile(r".+\.mlp\.experts\.\d+\.(gate_proj|up_proj|w1|w3)")
_TOKENS = re.compile(r"(.+)\.token_adapter\.trainable_tokens_delta(?:\.default)?")
WRITTEN_BY_PEFT = "expected the directory that PEFT's save_pretrained wrote"
CONVERT_PICKLE = "adapter_model.bin is a pickle: convert to safetensors (load it with PEFT, save_pretrained)"
ONE_SAVE = "take both files from one save"
MERGE_WITH_PEFT = "merge it with PEFT (merge_and_unload) and give the merged model"
# read below, or about where and how it was trained: the tensor names already say which modules were reached
# fmt: off
_KNOWN_KEYS = frozenset({
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "peft_version",
    "target_parameters", "init_lora_weights", "base_model_name_or_path", "auto_mapping", "revision",
    "task_type", "inference_mode", "target_modules", "exclude_modules", "modules_to_save", "lora_dropout",
    "layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size", "ensure_weight_tying",
    "runtime_config", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "trainable_token_indices",
})
# fmt: on
_WHY_REFUSED = {
    "use_dora": "DoRA rescales the whole merged weight",
    "bias": "biases of the base were trained too, and several PEFT versions do not save them",
    "layer_replication": "it repeats decoder layers, so the result is another architecture",
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
    # module (its last components) -> rows of its weight that were trained
    token_rows: dict[str, tuple[int, ...]]

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


def parse_config(path: Path) -> AdapterConfig:
    raw = read_json(path)
    if missing := [key for key in ("peft_type", "r", "lora_alpha") if raw.get(key) is None]:
        raise InputError(f"{path}: {', '.join(missing)} missing; {WRITTEN_BY_PEFT}")
    if raw["peft_type"] != "LORA":
        raise InputError(f"{path}: peft_type is {raw['peft_type']!r}, expected 'LORA'; {MERGE_WITH_PEFT}")
    for key in sorted(raw.keys() - _KNOWN_KEYS):
        if raw[key] and (key, raw[key]) != ("bias", "none"):
            why = _WHY_REFUSED.get(key, "not a part of plain LoRA that can be merged exactly here")
            raise InputError(f"{path}: {key} is {raw[key]!r}, expected it off: {why}; {MERGE_WITH_PEFT}")
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
        token_rows=_token_rows(path, raw.get("trainable_token_indices") or {}),
    )


def _token_rows(path: Path, value: Any) -> dict[str, tuple[int, ...]]:
    """Return trainable_token_indices by module; a plain list is about the embedding."""
    by_module = {"embed_tokens": value} if isinstance(value, list) else value
    if not isinstance(by_module, dict) or any(
        not isinstance(rows, list)
        or any(type(row) is not int or row < 0 for row in rows)
        or len(set(rows)) < len(rows)
        for rows in by_module.values()
    ):
        raise InputError(
            f"{path}: trainable_token_indices is {value!r}, expected lists of different token ids; {WRITTEN_BY_PEFT}"
        )
    return {module: tuple(rows) for module, rows in by_module.items()}


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
        raise InputError(f"{path}: {bad[0]!r} in {key} or {name}, expected {want}; {WRITTEN_BY_PEFT}")
    return patterns


@dataclass(frozen=True, slots=True)
class Pair:
    """A and B of one expert ("listed"), or of all experts for some columns ("tinker")."""

    number: int  # the expert; of Tinker's w1, w2 or w3
    a_name: str
    b_name: str
    scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What the adapter does to one base tensor: replaces it or some rows, adds scale * B @ A to it, or both."""

    kind: str  # "replace", "linear", "embedding", "experts", "listed", "tinker" or "rows"
    shapes: tuple[tuple[int, ...], ...]  # the base shapes it fits
    replacement: str = ""  # names inside the adapter's file, "" where there is none
    a_name: str = ""
    b_name: str = ""
    rank: int = 0
    scale: float = 0.0
    pairs: tuple[Pair, ...] = ()  # listed, tinker
    rows: tuple[int, ...] = ()  # of kind "rows": which rows `a_name` replaces

    @property
    def stored(self) -> str:
        """Return the tensor of the adapter's file to blame in a message."""
        return self.a_name or self.replacement

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Return whether the change can be made to a base tensor of a shape."""
        if self.kind == "listed":
            # the last experts may have no pair
            return len(shape) == 3 and shape[0] >= self.shapes[0][0] and shape[1:] == self.shapes[0][1:]
        if self.kind == "rows":
            return len(shape) == 2 and shape[0] > max(self.rows) and shape[1] == self.shapes[0][1]
        return shape in self.shapes

    def fits_slice(self, shape: tuple[int, ...]) -> bool:
        """Return whether it can be made to one expert's slice of a fused tensor."""
        return shape in [whole[1:] for whole in self.shapes]


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
            f"{ONE_SAVE}"
        )
    shapes: tuple[tuple[int, ...], ...] = ((b_rows, a_cols),)
    if kind == "embedding":
        shapes = ((a_cols, b_rows),)
    elif kind == "experts":
        shapes = ((experts, a_cols, b_rows), (experts, b_rows, a_cols))
    return Change(kind=kind, shapes=shapes, a_name=names[0], b_name=names[1], rank=rank, scale=scale)


@dataclass(frozen=True, slots=True)
class _Stored:
    """The stored names of an adapter's file, sorted by what they are."""

    pairs: dict[str, dict[int, dict[str, str]]]  # module -> nesting depth -> part -> name
    replaced: dict[str, str]  # base tensor -> name
    tokens: dict[str, str]  # base tensor -> name of its trained rows


def _group(file: ShardFile) -> _Stored:
    """Return what the names in the file say; InputError for one that nothing here knows."""
    found = _Stored({}, {}, {})
    for stored in sorted(file.tensors):
        name = stored.removeprefix(_PREFIX)
        if name != stored and (match := _LORA_NAME.fullmatch(name)):
            module, depth = match[1], match[2].count(".base_layer")
            found.pairs.setdefault(module, {}).setdefault(depth, {})[match[3] or match[4]] = stored
            continue
        if name != stored and (match := _TOKENS.fullmatch(name)):
            found.tokens[_base_module(match[1].replace(".base_layer", "")) + ".weight"] = stored
            continue
        base = plain_name(name)
        odd = re.search(r"lora_|token_adapter|modules_to_save|original_module|\.experts\.", name)
        if name == stored or odd or base in found.replaced:
            raise InputError(
                f"{file.path}: {stored} is not known in a LoRA adapter of gpt-oss; expected pairs such as "
                f"{_PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight, and whole tensors outside the "
                f"experts; save it with PEFT's save_pretrained, or {MERGE_WITH_PEFT}"
            )
        found.replaced[base] = stored
    return found


def _base_module(module: str) -> str:
    """Return a module's name in transformers (Tinker: attn, unembed_tokens; Unsloth: router.linear; wrappers)."""
    module = re.sub(r"(^|\.)unembed_tokens$", r"\1lm_head", module)
    return plain_name(module + ".weight").removesuffix(".weight")


def _listed(file: ShardFile, modules: Mapping[str, Mapping[str, str]], config: AdapterConfig) -> dict[str, Change]:
    """Return the changes of per-expert pairs, experts fused; `modules` is module -> part -> stored name."""
    found: dict[str, list[tuple[int, Change]]] = {}
    for module, parts in modules.items():
        match = _LISTED.fullmatch(module)
        assert match is not None
        part = "gate_up_proj" if (match[2] or match[5]).startswith("gate_up") else "down_proj"
        base = f"{_base_module(match[1])}.{part}"
        found.setdefault(base, []).append((int(match[3] or match[4]), _pair(file, parts, "linear", module, config)))
    changes = {}
    for base, entries in found.items():
        first = entries[0][1]
        for number, change in entries:
            if change.shapes != first.shapes or [n for n, _ in entries].count(number) > 1:
                raise InputError(f"{file.path}: {change.a_name} and {first.a_name} do not fit one {base}; {ONE_SAVE}")
        (rows, columns), count = first.shapes[0], 1 + max(number for number, _ in entries)
        changes[base] = Change(
            kind="listed",
            shapes=((count, columns, rows),),
            a_name=first.a_name,
            pairs=tuple(Pair(number, change.a_name, change.b_name, change.scale) for number, change in sorted(
                entries, key=lambda entry: entry[0]
            )),
        )  # fmt: skip
    return changes


def _tinker(file: ShardFile, modules: Mapping[str, Mapping[str, str]], config: AdapterConfig) -> dict[str, Change]:
    """Return the changes of Tinker's pairs: A [E or 1, r, in], B [E or 1, out, r]; one of them may be shared."""
    found: dict[str, list[tuple[Pair, tuple[int, ...]]]] = {}
    for module, parts in modules.items():
        match = _TINKER.fullmatch(module)
        assert match is not None
        number = int(match[2])
        if set(parts) != {"A", "B"}:
            raise InputError(f"{file.path}: {next(iter(parts.values()))} has no other factor beside it; {ONE_SAVE}")
        A, B = (file.tensors[parts[part]].shape for part in "AB")
        if len(A) != 3 or len(B) != 3 or A[1] != B[2] or (A[0] != B[0] and 1 not in (A[0], B[0])):
            raise InputError(
                f"{file.path}: {parts['A']} {list(A)} and {parts['B']} {list(B)} do not fit; expected Tinker's "
                f"factors of all experts, [E or 1, r, in] and [E or 1, out, r]; {ONE_SAVE}"
            )
        scale = config.rank_and_scale(module)[1]
        shape = (max(A[0], B[0]), A[2], B[1] if number == 2 else 2 * B[1])
        base = f"{_base_module(match[1])}.{'down_proj' if number == 2 else 'gate_up_proj'}"
        found.setdefault(base, []).append((Pair(number, parts["A"], parts["B"], scale), shape))
    changes = {}
    for base, entries in found.items():
        if len({shape for _, shape in entries}) > 1:
            raise InputError(f"{file.path}: {entries[0][0].a_name} and {entries[1][0].a_name} do not fit one {base}")
        pairs = tuple(pair for pair, _ in entries)
        changes[base] = Change(kind="tinker", shapes=(entries[0][1],), a_name=pairs[0].a_name, pairs=pairs)
    return changes


def _trained_rows(file: ShardFile, tokens: Mapping[str, str], config: AdapterConfig) -> dict[str, Change]:
    """Return the changes of `trainable_token_indices`: these rows of a weight are replaced."""
    changes = {}
    for base, stored in tokens.items():
        module = base.removesuffix(".weight")
        rows = next((r for m, r in config.token_rows.items() if module == m or module.endswith(f".{m}")), ())
        shape = file.tensors[stored].shape
        if not rows or len(shape) != 2 or shape[0] != len(rows):
            raise InputError(
                f"{file.path}: {stored} has shape {list(shape)}, but trainable_token_indices of {CONFIG_NAME} name "
                f"{len(rows)} rows of {module}; {ONE_SAVE}"
            )
        changes[base] = Change(kind="rows", shapes=((max(rows) + 1, shape[1]),), a_name=stored, rows=rows)
    reached = {m for m in config.token_rows if any(b == f"{m}.weight" or b.endswith(f".{m}.weight") for b in tokens)}
    if lost := sorted(config.token_rows.keys() - reached):
        raise InputError(f"{file.path}: no trained rows of {lost[0]}, which trainable_token_indices name; {ONE_SAVE}")
    return changes


def _wrapped(
    file: ShardFile, module: str, wrappers: Mapping[int, Mapping[str, str]], config: AdapterConfig
) -> Iterator[tuple[str, Change]]:
    """Yield base tensor name -> change for every LoRA pair on one module."""
    depths = sorted(wrappers, reverse=True)  # the wrapper put on first lies innermost
    where = f"{file.path}: {next(iter(wrappers[depths[0]].values()))}"
    if module.rpartition(".")[2] != "experts":
        if depths != [0]:
            raise InputError(f"{where}: nested LoRA on {module}, expected one pair; {MERGE_WITH_PEFT}")
        name = f"{_base_module(module)}.weight"
        kind = "embedding" if any(part.startswith("embedding") for part in wrappers[0]) else "linear"
        stored_name = f"{module}.weight"
        key = stored_name if config.targets_parameter(stored_name) else module
        yield name, _pair(file, wrappers[0], kind, key, config)
        return
    names = [name for p in _EXPERT_PARAMETERS if config.targets_parameter(name := f"{module}.{p}")]
    if depths != list(range(len(names)))[::-1]:
        raise InputError(
            f"{where}: {len(depths)} LoRA pair(s) on {module}, but target_parameters of {CONFIG_NAME} name "
            f"{names or 'no weight there'}; {ONE_SAVE}, or {MERGE_WITH_PEFT}"
        )
    for depth, name in zip(depths, names, strict=True):
        yield plain_name(name), _pair(file, wrappers[depth], "experts", name, config)


def collect(file: ShardFile, config: AdapterConfig) -> dict[str, Change]:
    """Return base tensor name -> what happens to it, for every tensor of the adapter's file."""
    stored = _group(file)
    listed, tinker = {}, {}
    changes: dict[str, Change] = {}
    for module, wrappers in stored.pairs.items():
        if _APART.fullmatch(module):
            there = next(iter(next(iter(wrappers.values())).values()))
            raise InputError(f"{file.path}: {there}: {nearest(module + '.weight')}, then {MERGE_WITH_PEFT}")
        if _LISTED.fullmatch(module) and wrappers.keys() == {0}:
            listed[module] = wrappers[0]
        elif _TINKER.fullmatch(module) and wrappers.keys() == {0}:
            tinker[module] = wrappers[0]
        else:
            _add(file, changes, dict(_wrapped(file, module, wrappers, config)))
    for more in (
        _listed(file, listed, config), _tinker(file, tinker, config), _trained_rows(file, stored.tokens, config)
    ):  # fmt: skip
        _add(file, changes, more)
    for name, whole in stored.replaced.items():
        shape = file.tensors[whole].shape
        change = changes.get(name, Change(kind="replace", shapes=(shape,)))
        if not change.fits(shape):
            raise InputError(f"{file.path}: {whole} {list(shape)} does not fit {change.stored}; {ONE_SAVE}")
        # rows of it: now the size of the whole counts
        changes[name] = replace(
            change, replacement=whole, shapes=(shape,) if change.kind == "rows" else change.shapes
        )
    if not changes:
        raise InputError(f"{file.path}: no tensors; {WRITTEN_BY_PEFT}")
    return changes


def _add(file: ShardFile, changes: dict[str, Change], more: Mapping[str, Change]) -> None:
    for name, change in more.items():
        if name in changes:
            raise InputError(
                f"{file.path}: {changes[name].stored} and {change.stored} both change {name}; {MERGE_WITH_PEFT}"
            )
        changes[name] = change
