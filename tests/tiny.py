"""Tiny gpt-oss checkpoints in which everything is alive, made by transformers, with a real tokenizer.

YaRN beyond its original context, alternating windows, sinks, all biases non-zero, pre-activations beyond the
SwiGLU limit, logits of order 3. 320 is a multiple of 64 and of 32, and not of 128. Reached by the fixture `tiny`.
"""

import json
import shutil
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from torch import Tensor
from transformers import GptOssConfig, GptOssForCausalLM, PreTrainedTokenizerFast

from gptoss_quantize.calibration.text import Tokens
from gptoss_quantize.kernels import mxfp4

VOCAB = 300
YARN = {
    "rope_type": "yarn",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 32,
}
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 5000.0}
TEXT = "The sea was calm, and the lighthouse keeper counted the ships that passed before the rain came. "
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}<|message|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|message|>{% endif %}"
)
# standard deviations that keep every layer's contribution and the logits of order 1 to 10
STD = {
    "embed_tokens.weight": 1.0,
    "layernorm.weight": 0.2,
    "norm.weight": 0.2,
    "q_proj.weight": 0.12,
    "k_proj.weight": 0.12,
    "v_proj.weight": 0.07,
    "o_proj.weight": 0.07,
    "sinks": 1.0,
    "router.weight": 0.15,
    "router.bias": 0.5,
    "gate_up_proj": 0.2,
    "gate_up_proj_bias": 0.5,
    "down_proj": 0.02,
    "down_proj_bias": 0.3,
    "lm_head.weight": 0.25,
    "bias": 0.3,
}


def make_config(rope: dict[str, Any] = YARN, **changes: Any) -> GptOssConfig:
    """Return the configuration of the tiny model."""
    settings = {
        "hidden_size": 192,
        "intermediate_size": 320,
        "num_hidden_layers": 3,
        "num_local_experts": 8,
        "num_experts_per_tok": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "sliding_window": 16,
        "vocab_size": VOCAB,
        "max_position_embeddings": 128,
        "rope_parameters": dict(rope),
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    return GptOssConfig(**(settings | changes))


def make_model(config: GptOssConfig, seed: int = 0) -> GptOssForCausalLM:
    """Return a float32 model with every parameter random, none of them zero or one."""
    model = GptOssForCausalLM(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            std = next(value for end, value in STD.items() if name.endswith(end))
            parameter.normal_(std=std, generator=generator)
            if "norm" in name:
                parameter.add_(1)
        if config.tie_word_embeddings:
            # the head's scale, or logits would be four times larger
            model.lm_head.weight.mul_(STD["lm_head.weight"])
    return model


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of at most VOCAB tokens, with a chat template."""
    special = ["<|pad|>", "<|endoftext|>", "<|start|>", "<|message|>", "<|end|>"]
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 4,
        special_tokens=[AddedToken(name, special=True) for name in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|endoftext|>",
        chat_template=TEMPLATE,
    )


def byte_tokenizer(*special: str, **roles: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per byte, and the special tokens; roles such as eos_token, chat_template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(token, special=True) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=inner, **roles)


def to_mxfp4(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the same checkpoint with experts as OpenAI stores them: blocks and scales of [E, out, in]."""
    out = {}
    for name, tensor in tensors.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            blocks, scales = mxfp4.encode(tensor.float().transpose(1, 2).contiguous())
            out |= {name + "_blocks": blocks, name + "_scales": scales}
        else:
            out[name] = tensor
    return out


def edit_json(path: Path, **changes: Any) -> None:
    """Change fields of a JSON object in a file; None takes a field out."""
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not None}))


def load_all(path: Path) -> dict[str, Tensor]:
    """Return every tensor of a directory's safetensors files."""
    return {name: t for file in sorted(path.glob("*.safetensors")) for name, t in load_file(file).items()}


def snapshot(path: Path) -> dict[str, bytes]:
    """Return relative name -> bytes of every file below a directory."""
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


@dataclass
class Tiny:
    """Checkpoint kinds by name, built on first use: do not change a `path`, change a `copy`.

    bf16      sharded, YaRN             float32   one file, weights that bf16 cannot hold
    mxfp4     OpenAI's layout, sharded  default   float32 with default rope
    """

    root: Path
    models: dict[str, GptOssForCausalLM] = field(default_factory=dict)

    byte_tokenizer = staticmethod(byte_tokenizer)
    edit_json = staticmethod(edit_json)
    load_all = staticmethod(load_all)
    snapshot = staticmethod(snapshot)
    text = TEXT
    vocab = VOCAB

    def model(self, rope: str = "yarn") -> GptOssForCausalLM:
        """Return the float32 model that the checkpoints are made from."""
        if rope not in self.models:
            self.models[rope] = make_model(make_config(YARN if rope == "yarn" else DEFAULT_ROPE))
        return self.models[rope]

    def path(self, kind: str = "bf16") -> Path:
        """Return the directory of a kind of checkpoint."""
        path = self.root / kind
        if not path.exists():
            {"bf16": self._bf16, "float32": self._float32, "default": self._default, "mxfp4": self._mxfp4}[kind](path)
            make_tokenizer().save_pretrained(path)
        return path

    def build(self, path: Path, **changes: Any) -> None:
        """Write a float32 checkpoint of a changed configuration."""
        make_model(make_config(**changes)).save_pretrained(path)
        make_tokenizer().save_pretrained(path)

    def copy(self, kind: str, dest: Path) -> Path:
        """Return a private copy of a kind of checkpoint, to be damaged."""
        return Path(shutil.copytree(self.path(kind), dest))

    def adapter(self, path: Path) -> Path:
        """Save a random PEFT LoRA adapter on attention and on both expert tensors; `model` is not changed."""
        return self.train(path)[0]

    def train(self, path: Path) -> tuple[Path, GptOssForCausalLM]:
        """Save a random adapter; return its directory and the float32 model that PEFT itself merges it into."""
        model = GptOssForCausalLM(self.model().config).float()
        model.load_state_dict(self.model().state_dict())
        experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "o_proj"], target_parameters=experts)
        # PEFT warns of what it calls itself: deprecated properties of transformers, and what it will save
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            peft_model = get_peft_model(model, config)
            for parameter in peft_model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.1)
            peft_model.save_pretrained(str(path))
            return path, peft_model.merge_and_unload()

    def ids(self, sequences: int = 4, positions: int = 48, seed: int = 1) -> Tensor:
        """Return random token ids [N, S]; 48 positions are beyond windows and YaRN's original context."""
        return torch.randint(VOCAB, (sequences, positions), generator=torch.Generator().manual_seed(seed))

    def tokens(self, sequences: int = 16, positions: int = 48, seed: int = 2) -> Tokens:
        """Return calibration tokens: 4 of 8 experts each, so about 380 tokens an expert."""
        ids = self.ids(sequences, positions, seed)
        return Tokens(ids=ids, sha256=f"tiny-{sequences}-{seed}", source="tiny", documents=1, separator=None)

    def _bf16(self, path: Path) -> None:
        model = GptOssForCausalLM(self.model().config)
        model.load_state_dict(self.model().state_dict())
        model.to(torch.bfloat16).save_pretrained(path, max_shard_size="3MB")

    def _float32(self, path: Path) -> None:
        self.model().save_pretrained(path)

    def _default(self, path: Path) -> None:
        self.model("default").save_pretrained(path)

    def _mxfp4(self, path: Path) -> None:
        path.mkdir()
        tensors = to_mxfp4(load_all(self.path("bf16")))
        layers = [{n: t for n, t in tensors.items() if f"layers.{i}." in n} for i in range(3)]
        outer = {n: t for n, t in tensors.items() if ".layers." not in n}
        weight_map = {}
        for i, part in enumerate((outer, *layers)):
            name = f"model-{i + 1:05d}-of-00004.safetensors"
            save_file(part, path / name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, name)
        index = {"metadata": {}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
        shutil.copyfile(self.path("bf16") / "config.json", path / "config.json")
        quantization = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
        edit_json(path / "config.json", quantization_config=quantization)
