"""A checkpoint as one GGUF file for llama.cpp, Ollama and LM Studio, codes and scales untouched.

Written directly, since llama.cpp's converter would dequantize our experts and its quantizer round them again:

    int4     -> Q4_0, the same codes; a scale for 64 weights stands in both of its blocks
    MXFP4    -> ggml's MXFP4, bit for bit
    int8     -> Q8_0, the same codes (attention, embedding and head of `--dense int8`)
    float    -> BF16, F16 or F32 as stored, or Q8_0 (`expert_type`), the baselines of `verify`

Experts are stacked [E, rows, columns], gate and up rows taken apart (even, odd). Attention, embedding and head are
written as stored or as `dense_type`; norms, biases, sinks and the router are F32, which llama.cpp asks for.
Sources: llama.cpp src/models/openai-moe.cpp and conversion/gpt_oss.py.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Ggml

from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.config import ModelConfig
from gptoss_quantize.errors import InputError
from gptoss_quantize.files import Progress, no_progress
from gptoss_quantize.kernels import ggml, int4
from gptoss_quantize.layouts import FLOAT, INT4, MXFP4, dense_shapes
from gptoss_quantize.runtimes.gguf_vocab import add_tokenizer
from gptoss_quantize.runtimes.staging import PendingTensor, write_chunks

ARCH = "gpt-oss"
STORED = {torch.bfloat16: Ggml.BF16, torch.float16: Ggml.F16, torch.float32: Ggml.F32}
TORCH = {ggml_type: dtype for dtype, ggml_type in STORED.items()}
TYPES: dict[str, Ggml | None] = {"stored": None, "bf16": Ggml.BF16, "f32": Ggml.F32, "q8_0": Ggml.Q8_0}
FILE_TYPES = {
    Ggml.Q4_0: gguf.LlamaFileType.MOSTLY_Q4_0,
    Ggml.MXFP4: gguf.LlamaFileType.MOSTLY_MXFP4_MOE,
    Ggml.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
    Ggml.BF16: gguf.LlamaFileType.MOSTLY_BF16,
    Ggml.F16: gguf.LlamaFileType.MOSTLY_F16,
    Ggml.F32: gguf.LlamaFileType.ALL_F32,
}
# name inside a layer -> name inside a block
LAYER_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.sinks": "attn_sinks.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "mlp.router": "ffn_gate_inp",
}
OUTER_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def gguf_name(name: str) -> str:
    """Return the GGUF name of a tensor outside the experts."""
    if name in OUTER_NAMES:
        return OUTER_NAMES[name]
    _, _, layer, inner = name.split(".", 3)
    stem, _, kind = inner.rpartition(".")
    return f"blk.{layer}." + (LAYER_NAMES.get(inner) or f"{LAYER_NAMES[stem]}.{kind}")


def byte_count(kind: Ggml, shape: tuple[int, ...]) -> int:
    """Return the bytes of a tensor of a ggml type."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return torch.Size(shape).numel() // block * size


def encode(weight: torch.Tensor, kind: Ggml) -> torch.Tensor:
    """Return float weights in a ggml type: a float tensor, or the bytes of Q8_0 (ggml's own rounding)."""
    if kind in TORCH:
        return weight.to(TORCH[kind])
    return torch.from_numpy(gguf.quants.quantize(weight.float().numpy(), kind))


def check_supported(config: ModelConfig, where: Path) -> None:
    """Raise InputError for a model that llama.cpp would compute differently, with no field to say so."""
    if (config.swiglu_limit, config.swiglu_alpha) != (7.0, 1.702):
        raise InputError(
            f"{where}: swiglu_limit {config.swiglu_limit}, swiglu_alpha {config.swiglu_alpha}; llama.cpp has 7.0 and "
            "1.702 built in. Use --to bf16 and a runtime that reads them"
        )
    usual = tuple("full_attention" if i % 2 else "sliding_attention" for i in range(config.layers))
    if config.layer_types != usual:
        raise InputError(
            f"{where}: layer_types do not alternate between sliding_attention and full_attention as llama.cpp's "
            "gpt-oss does; use --to bf16 and a runtime that reads them"
        )


def is_int8(checkpoint: Checkpoint, name: str) -> bool:
    """Return whether a matrix outside the experts is stored as `--dense int8` does."""
    return checkpoint.dense_layout.packs(name)


def dense_entries(checkpoint: Checkpoint, dense_type: str) -> Iterator[PendingTensor]:
    """Yield the tensors outside the experts."""
    config = checkpoint.config

    def read(name: str, kind: Ggml) -> list[torch.Tensor]:
        if kind is Ggml.Q8_0 and is_int8(checkpoint, name):
            stored = checkpoint.dense_layout.parts(name, dense_shapes(config)[name])
            codes, scale = (checkpoint.read(part) for part in stored)
            return [ggml.q8_0(codes, scale)]
        return [encode(checkpoint.dense(name), kind)]

    wanted = TYPES[dense_type]
    for name, shape in dense_shapes(config).items():
        stored = Ggml.Q8_0 if is_int8(checkpoint, name) else STORED[checkpoint.dense_dtype(name)]
        kind = stored if wanted is None else wanted
        if len(shape) == 1 or ".router." in name:
            kind = Ggml.F32
        yield PendingTensor(gguf_name(name), shape, kind, partial(read, name, kind))
        if name == "model.embed_tokens.weight" and config.tied:
            yield PendingTensor("output.weight", shape, kind, partial(read, name, kind))
    if not config.attention_bias:
        # llama.cpp's loader asks for them; zeros add nothing
        rows = {n.rsplit(".", 1)[0]: s[0] for n, s in dense_shapes(config).items() if n.endswith("_proj.weight")}
        for stem, count in rows.items():
            yield PendingTensor(gguf_name(stem + ".bias"), (count,), Ggml.F32, partial(_zeros, count))


def _zeros(count: int) -> Iterator[torch.Tensor]:
    yield torch.zeros(count)


def expert_entries(checkpoint: Checkpoint, layer: int, kind: Ggml) -> Iterator[PendingTensor]:
    """Yield the six expert tensors of one layer, read one expert at a time."""
    config = checkpoint.config
    E, D, F = config.experts, config.hidden, config.intermediate
    native, pack = NATIVE.get(checkpoint.layout.name, (None, _no_type))

    def weights(part: str, rows: slice) -> Iterator[torch.Tensor]:
        for expert in range(E):
            if kind is native:
                yield pack(checkpoint, layer, expert, part, rows)
            else:
                whole = checkpoint.expert(layer, expert)
                yield encode((whole.gate_up if part == "gate_up" else whole.down)[rows], kind)

    def biases(part: str, rows: slice) -> Iterator[torch.Tensor]:
        for expert in range(E):
            yield checkpoint.expert_bias(layer, expert, part)[rows].float()

    for name, part, rows, shape in (
        ("gate", "gate_up", slice(0, None, 2), (E, F, D)),
        ("up", "gate_up", slice(1, None, 2), (E, F, D)),
        ("down", "down", slice(None), (E, D, F)),
    ):
        base = f"blk.{layer}.ffn_{name}_exps"
        yield PendingTensor(base + ".weight", shape, kind, partial(weights, part, rows))
        yield PendingTensor(base + ".bias", shape[:2], Ggml.F32, partial(biases, part, rows))


def _as_q4_0(checkpoint: Checkpoint, layer: int, expert: int, part: str, rows: slice) -> torch.Tensor:
    base = checkpoint.layout.base(layer, expert, part) + "_weight_"
    codes, scale = int4.unpack(checkpoint.read(base + "packed")[rows]), checkpoint.read(base + "scale")[rows]
    if inexact := ggml.float16_scale(scale)[1]:
        raise InputError(
            f"{checkpoint.path}: {inexact} of {scale.numel()} scales of {base}scale are not exact in float16, which "
            "GGUF stores them in; the file would hold other weights. Quantize again with gptoss-quantize, which "
            "chooses scales that both can hold, or use --to bf16"
        )
    return ggml.q4_0(codes, scale)


def _as_mxfp4(checkpoint: Checkpoint, layer: int, expert: int, part: str, rows: slice) -> torch.Tensor:
    name = checkpoint.layout.base(layer, expert, part)
    blocks, scales = checkpoint.read(name + "_blocks", expert), checkpoint.read(name + "_scales", expert)
    return ggml.mxfp4(blocks[rows], scales[rows])


def _no_type(checkpoint: Checkpoint, layer: int, expert: int, part: str, rows: slice) -> torch.Tensor:
    raise InputError(f"{checkpoint.path}: ggml has no type for {checkpoint.layout.name} experts, layer {layer}")


# layout of the experts -> the ggml type that holds the same codes and scales, and how to write one matrix in it
NATIVE: dict[str, tuple[Ggml, Callable[..., torch.Tensor]]] = {
    INT4.name: (Ggml.Q4_0, _as_q4_0),
    MXFP4.name: (Ggml.MXFP4, _as_mxfp4),
}


def expert_kind(checkpoint: Checkpoint, expert_type: str) -> Ggml:
    """Return the ggml type of the experts: as stored, or a float type or Q8_0 on request."""
    # F32 is 0 and so false
    if (wanted := TYPES[expert_type]) is not None:
        return wanted
    layout = checkpoint.layout
    if layout is FLOAT:
        return STORED[checkpoint.info(layout.base(0, 0, "gate_up")).dtype]
    if layout.name not in NATIVE:
        raise InputError(f"{checkpoint.path}: ggml has no type for {layout.name} experts; use --expert-type bf16")
    return NATIVE[layout.name][0]


def add_metadata(writer: gguf.GGUFWriter, config: ModelConfig, name: str, file_type: int) -> None:
    """Add what llama.cpp needs to know about the architecture."""
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(config.layers)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden)
    writer.add_feed_forward_length(config.intermediate)
    writer.add_expert_feed_forward_length(config.intermediate)
    writer.add_expert_count(config.experts)
    writer.add_expert_used_count(config.top_k)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_eps)
    writer.add_sliding_window(config.sliding_window)
    writer.add_vocab_size(config.vocab)
    rope = config.rope
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope["rope_type"] != "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
        return
    factor = float(rope["factor"])
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(factor)
    writer.add_rope_scaling_orig_ctx_len(rope.get("original_max_position_embeddings") or config.max_positions)
    writer.add_rope_scaling_yarn_beta_fast(float(rope.get("beta_fast") or 32))
    writer.add_rope_scaling_yarn_beta_slow(float(rope.get("beta_slow") or 1))
    if given := rope.get("attention_factor"):
        # llama.cpp multiplies its own factor with this one
        writer.add_rope_scaling_attn_factors(float(given) / yarn_attention_factor(factor))


def yarn_attention_factor(factor: float) -> float:
    """Return YaRN's usual factor on attention, 0.1 ln(factor) + 1, as llama.cpp computes it."""
    return float(0.1 * torch.tensor(factor).log() + 1) if factor > 1 else 1.0


def write_gguf(
    checkpoint: Checkpoint,
    path: Path,
    *,
    name: str,
    dense_type: str = "stored",
    expert_type: str = "stored",
    on_tensor: Progress = no_progress,
) -> dict[str, Any]:
    """Write the GGUF file and return facts about it: types, bytes, tensors, pre-tokenizer."""
    config = checkpoint.config
    check_supported(config, checkpoint.path / "config.json")
    kind = expert_kind(checkpoint, expert_type)
    entries = list(dense_entries(checkpoint, dense_type))
    for layer in range(config.layers):
        entries += expert_entries(checkpoint, layer, kind)
    for entry in entries:
        block, _ = gguf.GGML_QUANT_SIZES[entry.kind]
        if entry.shape[-1] % block:
            raise InputError(
                f"{checkpoint.path}: {entry.name} has rows of {entry.shape[-1]}, {entry.kind.name} needs multiples "
                f"of {block}; use --dense-type stored"
            )
    writer = gguf.GGUFWriter(path, ARCH)
    add_metadata(writer, config, name, FILE_TYPES[kind])
    pre = add_tokenizer(writer, checkpoint.side, config)
    try:
        _write_tensors(writer, entries, on_tensor)
    finally:
        writer.close()
    return {"experts": kind.name, "tensors": len(entries), "bytes": path.stat().st_size, "pre_tokenizer": pre}


def _write_tensors(writer: gguf.GGUFWriter, entries: list[PendingTensor], on_tensor: Progress) -> None:
    """Write header, metadata and the tensors one after the other, as their chunks come."""
    for entry in entries:
        # a float dtype makes the writer take the shape as given, not as bytes
        nbytes = byte_count(entry.kind, entry.shape)
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), nbytes, entry.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if not writer.fout:
        raise RuntimeError("gguf opened no file")
    file = writer.fout[0]
    writer.write_padding(file, file.tell())
    for done, entry in enumerate(entries, 1):
        nbytes = byte_count(entry.kind, entry.shape)
        write_chunks(file, entry, nbytes)
        writer.write_padding(file, nbytes)
        on_tensor(done, len(entries))
