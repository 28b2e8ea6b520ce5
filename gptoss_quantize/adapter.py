"""A PEFT LoRA adapter, merged into a checkpoint tensor by tensor while it is read.

A fine-tuned gpt-oss is often a small adapter beside a large base. To quantize it nobody should have to write
the merged copy first (42 GB in bf16 for the 20b): the reader asks this module for each tensor as it passes.
A 2-D weight of `target_modules`, and a 2-D parameter of `target_parameters` (the router), becomes

    W [out, in] + s * B [out, r] @ A [r, in]     s = lora_alpha / r, with use_rslora lora_alpha / sqrt(r)

A fused expert tensor [E, in, out] of `target_parameters` has its E pairs packed into one A [E*r, in] and one
B [out, E*r], each in its own order: A's rows are (expert, rank), B's columns are (rank, expert):

    W[e] += s * (B.reshape(out, r, E)[:, :, e] @ A.reshape(E, r, in)[e]).T

Experts come in two other ways. Unsloth trains one linear layer per expert (`experts.gate_up_projs.3`), and each
pair is added to its slice: W[e] += s * (B @ A).T. Tinker has factors of all experts, A [E or 1, r, in] and B [E or
1, out, r], for w1 (the even columns of gate_up_proj), w3 (the odd ones) and w2 (down_proj): the same, per expert.

`trainable_token_indices` replace single rows of the embedding. Whole tensors (modules_to_save, a resized embedding
and head) replace the base's; a vocabulary of another size becomes the model's.

Two properties of PEFT's files matter for experts. (1) The file does not say which parameter a pair belongs
to: the wrappers nest, so with both targeted `experts.base_layer.lora_A` is gate_up_proj (wrapped first) and
`experts.lora_A` is down_proj. (2) PEFT 0.19.0 with Transformers 5, and later PEFT with Transformers 4, took
gpt-oss for a model that stores [E, out, in]: there A is [E*r, out] and B [in, E*r]. Shapes tell the two
apart, except for a square down_proj (gpt-oss: 2880 x 2880); then gate_up_proj in the same adapter does.

Everything is added in float32 and rounded once. What cannot be merged exactly is refused before any work.
"""

import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptoss_quantize.adapter_format import (
    CONFIG_NAME,
    CONVERT_PICKLE,
    MERGE_WITH_PEFT,
    ONE_SAVE,
    WEIGHTS_NAME,
    WRITTEN_BY_PEFT,
    AdapterConfig,
    Change,
    collect,
    parse_config,
)
from gptoss_quantize.config import ModelConfig
from gptoss_quantize.errors import InputError
from gptoss_quantize.shards import ShardFile, same_bytes


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
                raise InputError(f"{path}: no {name}; {CONVERT_PICKLE if pickled else WRITTEN_BY_PEFT}")
        config, file = parse_config(path / CONFIG_NAME), ShardFile(path / WEIGHTS_NAME)
        changes = collect(file, config)
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
            if not change.fits(shape):
                raise InputError(
                    f"{where} fits a {name} of shape {list(change.shapes[0])}, the base has {list(shape)}; "
                    "it was trained on another model, or on a resized vocabulary without saving both embedding and "
                    "head"
                )
            if change.kind == "experts" and shape[1] == shape[2] and self._square_is_transposed is None:
                raise InputError(
                    f"{where}: PEFT {self.config.peft_version} may have stored it transposed, and since "
                    f"{name} is square nothing tells; with the versions of its training, {MERGE_WITH_PEFT}"
                )
        for name in sorted(shapes.keys() - self.changes.keys()):
            if self.config.targets_parameter(name):
                raise InputError(
                    f"{self._file.path}: no LoRA pair for {name}, which target_parameters name; the "
                    f"save lost it, or {CONFIG_NAME} is of another one: {ONE_SAVE}"
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
        if not (change.fits if expert is None else change.fits_slice)(tuple(weight.shape)):
            wanted = change.shapes[0] if expert is None else change.shapes[0][1:]
            raise InputError(
                f"{self._file.path}: {change.stored} fits a {name} of shape {list(wanted)}, got "
                f"{list(weight.shape)}; the adapter was trained on another model"
            )
        start = self._file.read(change.replacement) if change.replacement else weight
        merged = start.to(device=weight.device, dtype=torch.float32, copy=True)
        if change.kind == "experts":
            self._add_experts(change, merged, expert)
        elif change.pairs:
            for e, slice_io in enumerate(merged) if expert is None else [(expert, merged)]:
                self._add_pairs(change, slice_io, e)
        elif change.rows:
            merged[list(change.rows)] = self._file.read(change.a_name).to(merged.device, torch.float32)
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

    def replacement(self, name: str) -> Tensor | None:
        """Return the whole tensor that the adapter has for `name`, None where it only adds to the base's."""
        change = self.changes[name]
        return self._file.read(change.replacement) if change.replacement else None

    def onto(self, base: ModelConfig) -> tuple["Adapter", ModelConfig, list[str]]:
        """Return (adapter, config of the merged model, notes): a new vocabulary, or a head for a tied model."""
        embed, head = "model.embed_tokens.weight", "lm_head.weight"
        own = {name: self.changes[name] for name in (embed, head) if name in self.changes}
        whole = {name: self._file.tensors[c.replacement].shape for name, c in own.items() if c.replacement}
        notes: list[str] = []
        adapter, config, raw = self, base, dict(base.raw)
        if base.tied and head in whole:
            if own[head].kind == "replace" and embed in whole and same_bytes(
                (self._file, own[head].replacement), (self._file, own[embed].replacement)
            ):  # fmt: skip
                adapter = replace(self, changes={name: c for name, c in self.changes.items() if name != head})
            else:
                raw["tie_word_embeddings"] = False
                config = replace(config, tied=False)
                notes.append(f"{self.path}: the adapter brings a head of its own, so the result is not tied")
        needed = {embed} if config.tied else {embed, head}
        sizes = {whole[name][0] for name in needed if name in whole}
        if needed <= whole.keys() and len(sizes) == 1 and (vocab := sizes.pop()) != base.vocab:
            raw["vocab_size"] = vocab
            config = replace(config, vocab=vocab)
            notes.append(f"{self.path}: the adapter resized the vocabulary from {base.vocab} to {vocab}")
        return adapter, replace(config, raw=raw), notes

    def _add_pairs(self, change: Change, slice_io: Tensor, expert: int) -> None:
        """Add the pairs of one expert to its slice [in, out]."""
        for pair in change.pairs:
            if change.kind == "listed":
                if pair.number != expert:
                    continue
                A, B, target = self._file.read(pair.a_name), self._file.read(pair.b_name), slice_io
            else:
                A, B = (
                    self._file.read(name, expert if self._file.tensors[name].shape[0] > 1 else 0)
                    for name in (pair.a_name, pair.b_name)
                )
                target = slice_io if pair.number == 2 else slice_io[:, 0 if pair.number == 1 else 1 :: 2]
            A, B = (factor.to(slice_io.device, torch.float32) for factor in (A, B))
            target.add_(A.T @ B.T, alpha=pair.scale)

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
