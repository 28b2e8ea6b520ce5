"""A gpt-oss checkpoint of true shape with made-up weights, to measure time and memory without the real one.

What makes quantization work hard or easy is imitated, what makes a model speak is not:
* experts are MXFP4 blocks: E2M1 codes distributed as a Gaussian's, E8M0 scales that differ between rows and groups;
* a few input channels carry weights 8 times larger, and a few residual channels are loud in the embedding;
* norm weights are log-normal, routers have biases, so some experts are popular and some starve;
* the tokenizer is a byte-level BPE trained on the text given, so calibration text becomes real, varied tokens.

Every tensor comes from a stream of its own (seed, its name): a model with fewer layers is the beginning of the
larger one. Tensors are made and written one after another; the largest is the embedding.
"""

import time
import zlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from gptoss_quantize.architectures import MXFP4_NOT_CONVERTED, shape_of
from gptoss_quantize.config import ModelConfig, parse_config
from gptoss_quantize.demo.model import ShardWriter
from gptoss_quantize.errors import InputError
from gptoss_quantize.files import check_dest, staged, write_json
from gptoss_quantize.kernels import mxfp4
from gptoss_quantize.layouts import MXFP4, dense_shapes, expert_shapes

CODE_STD = 2.2  # of E2M1 values in trained weights: a group's largest lies between 4 and 8 before saturation
OUTLIERS = 4  # input channels of every projection with larger weights
OUTLIER_GAIN = 8.0
LOUD = 6  # residual channels that are loud in the embedding
LOUD_GAIN = 12.0
BPE_VOCAB = 8192
SPECIAL = ("<|endoftext|>", "<|return|>", "<|start|>", "<|channel|>", "<|message|>", "<|end|>")
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}<|message|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|message|>{% endif %}"
)
_CHUNK = 1 << 22

Progress = Callable[[int, int], None]


def build_synthetic_model(
    dest: Path,
    *,
    like: str,
    sample_text: str,
    layers: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a synthetic model to `dest` and return facts about it.

    `like` is gpt-oss-20b, gpt-oss-120b, or a config.json of the gpt-oss architecture; `layers` cuts it. The
    tokenizer is trained on `sample_text`. `progress` is called with (layers done, layers in all).
    """
    started = time.perf_counter()
    check_dest(dest, overwrite=None)
    raw = synthetic_config(like, layers, seed)
    config = parse_config(raw, like)
    if config.tied:
        raise InputError(f"{like}: tie_word_embeddings is set; gpt-oss has an output head of its own")
    for name, size in (("hidden_size", config.hidden), ("intermediate_size", config.intermediate)):
        if size % mxfp4.GROUP_SIZE:
            raise InputError(f"{like}: {name} {size} is not a multiple of {mxfp4.GROUP_SIZE}, the MXFP4 block")
    tokenizer = make_tokenizer(sample_text, config.vocab)
    raw |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    shapes = dense_shapes(config) | expert_shapes(config, MXFP4)
    with staged(dest, "synthetic-model", overwrite=None) as folder, torch.inference_mode():
        shards = ShardWriter(folder)
        for prefix, done in _order(config):
            for name in (n for n in shapes if n.startswith(prefix)):
                shards.add(_tensors(name, shapes, seed))
            if progress and done:
                progress(done, config.layers)
        total_bytes, parameters = shards.close()
        for file, value in (("config.json", raw), ("generation_config.json", {"eos_token_id": raw["eos_token_id"]})):
            write_json(folder / file, value)
        tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(model_card(raw), encoding="utf-8")
    seconds = time.perf_counter() - started
    return raw["gptoss_synthetic"] | {"parameters": parameters, "bytes": total_bytes, "seconds": round(seconds, 1)}


def synthetic_config(like: str, layers: int | None, seed: int) -> dict[str, Any]:
    """Return the config.json of the synthetic model: that of `like`, cut to `layers`, saying what it is."""
    raw = shape_of(like)
    whole = raw["num_hidden_layers"]
    layers = whole if layers is None else layers
    if not 1 <= layers <= whole:
        raise InputError(f"--layers {layers}: {like} has {whole}; expected 1 to {whole}")
    raw["num_hidden_layers"] = layers
    if raw.get("layer_types"):
        raw["layer_types"] = raw["layer_types"][:layers]
    raw["quantization_config"] = {"modules_to_not_convert": MXFP4_NOT_CONVERTED, "quant_method": "mxfp4"}
    raw["gptoss_synthetic"] = {
        "what": "random weights of true shape, for measuring time and memory; it knows nothing",
        "like": like,
        "layers": layers,
        "of_layers": whole,
        "seed": seed,
    }
    return raw


def _order(config: ModelConfig) -> Iterator[tuple[str, int]]:
    """Yield (name prefix, layers done) in the order of writing."""
    yield "model.embed_tokens.", 0
    for i in range(config.layers):
        yield f"model.layers.{i}.", i + 1
    yield "model.norm.", 0
    yield "lm_head.", 0


# ---- one tensor


def _numbers(seed: int, name: str) -> np.random.Generator:
    return np.random.Generator(np.random.SFC64([seed, zlib.crc32(name.encode())]))


def _normal(shape: tuple[int, ...], std: float, rng: np.random.Generator, gain: Tensor | None = None) -> Tensor:
    """Return a bfloat16 Gaussian tensor, its last dimension scaled by `gain`; made in pieces."""
    out = torch.empty(shape, dtype=torch.bfloat16)
    rows = out.view(-1, shape[-1])
    step = max(1, _CHUNK // shape[-1])
    for start in range(0, rows.shape[0], step):
        part = rows[start : start + step]
        values = torch.from_numpy(rng.standard_normal(part.shape, dtype=np.float32)).mul_(std)
        part.copy_(values if gain is None else values.mul_(gain))
    return out


def _tensors(name: str, shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """Return a stored tensor under its name; blocks bring their scales, scales alone bring nothing."""
    shape = shapes[name]
    if name.endswith("_scales"):
        return {}
    rng = _numbers(seed, name)
    if name.endswith("_blocks"):
        blocks, scales = _mxfp4(shape, 0.5 if "down_proj" in name else 1.5, rng)
        return {name: blocks, name.removesuffix("_blocks") + "_scales": scales}
    if "norm" in name:
        return {name: torch.from_numpy(np.exp(0.3 * rng.standard_normal(shape, dtype=np.float32))).bfloat16()}
    if name.endswith(("bias", "sinks")):
        return {name: _normal(shape, 1.0 if name.endswith(("sinks", "router.bias")) else 0.2, rng)}
    if name == "model.embed_tokens.weight":
        gain = torch.ones(shape[-1])
        gain[rng.choice(shape[-1], min(LOUD, shape[-1]), replace=False)] = LOUD_GAIN
        return {name: _normal(shape, 1.0, rng, gain)}
    # inputs have unit variance, so this is the standard deviation of the outputs
    wanted = 1.5 if name.endswith("router.weight") else 1.0
    return {name: _normal(shape, wanted * shape[-1] ** -0.5, rng)}


@lru_cache(maxsize=1)
def _byte_table() -> np.ndarray:
    """Return the byte of two E2M1 codes for every 16 random bits: each code as frequent as a Gaussian makes it."""
    quantiles = (torch.arange(256, dtype=torch.float64) + 0.5) / 256
    values = CODE_STD * torch.special.ndtri(quantiles)
    codes = mxfp4.nearest_codes(values.float()).numpy()
    return (codes[None, :] | (codes[:, None] << 4)).reshape(-1)


def _mxfp4(shape: tuple[int, ...], wanted: float, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Return (blocks [E, R, G, 16], scales [E, R, G]) of weights whose output has about the standard deviation given.

    Row gains are log-normal, and a group's exponent differs from its row's now and then.
    """
    *rows, groups, _bytes = shape
    columns = groups * mxfp4.GROUP_SIZE
    std = wanted * columns**-0.5
    blocks = np.empty(int(np.prod(shape)), dtype=np.uint8)
    for start in range(0, blocks.size, _CHUNK):
        part = blocks[start : start + _CHUNK]
        words = rng.integers(0, 2**64 - 1, size=-(-part.size // 4), dtype=np.uint64, endpoint=True)
        np.take(_byte_table(), words.view(np.uint16)[: part.size], out=part, mode="clip")
    gain = rng.standard_normal((*rows, 1), dtype=np.float32) * 0.5 + np.log2(std / CODE_STD)
    shift = rng.choice(np.array([-1, 0, 0, 0, 0, 0, 0, 1], dtype=np.float32), size=(*rows, groups))
    exponent = np.clip(np.rint(gain + shift) + mxfp4.SCALE_BIAS, 1, 254)
    blocks_t, scales = torch.from_numpy(blocks.reshape(shape)), torch.from_numpy(exponent.astype(np.uint8))
    for channel in rng.choice(columns, min(OUTLIERS, columns), replace=False):
        group, column = divmod(int(channel), mxfp4.GROUP_SIZE)
        weights = torch.from_numpy(rng.standard_normal((*rows, mxfp4.GROUP_SIZE), dtype=np.float32)) * std
        weights[..., column] *= OUTLIER_GAIN
        coded, scale = mxfp4.encode(weights)
        blocks_t[..., group, :], scales[..., group] = coded[..., 0, :], scale[..., 0]
    return blocks_t, scales


# ---- tokenizer and card


def make_tokenizer(text: str, vocab: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of at most `vocab` tokens, trained on a text, with Harmony's markers."""
    if vocab < 256 + len(SPECIAL):
        raise InputError(f"vocab_size {vocab}: a byte-level tokenizer needs at least {256 + len(SPECIAL)}")
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(BPE_VOCAB, vocab),
        special_tokens=[AddedToken(name, special=True) for name in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.split("\n\n"), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|return|>",
        pad_token="<|endoftext|>",
        chat_template=TEMPLATE,
    )


def model_card(raw: dict[str, Any]) -> str:
    """README.md of the checkpoint."""
    facts = raw["gptoss_synthetic"]
    return f"""---
license: apache-2.0
tags: [synthetic, benchmark]
---

# Synthetic model of the shape of {facts["like"]}

**Random weights. It knows nothing, and what it generates means nothing.** Made by gptoss-quantize
(`synthetic-model --like {facts["like"]} --layers {facts["layers"]} --seed {facts["seed"]}`) to measure the time and
memory of quantization at true size: hidden {raw["hidden_size"]}, {raw["num_local_experts"]} experts, top
{raw["num_experts_per_tok"]}, vocabulary {raw["vocab_size"]}, {facts["layers"]} of {facts["of_layers"]} layers,
experts in MXFP4. Scales, outlier channels and routing are imitated; qualities measured on it say nothing of gpt-oss.
The tokenizer is a byte-level BPE of {BPE_VOCAB} tokens at most. It is no gpt-oss model, and OpenAI has no part in it.
"""
