"""Adapters of other trainers, merged exactly: per expert, Tinker's, other vocabularies, single rows, own texts."""

import json
import shutil
from copy import deepcopy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GptOssForCausalLM

from gptoss_quantize.adapter import CONFIG_NAME, WEIGHTS_NAME, Adapter
from gptoss_quantize.calibration.text import load_tokenizer
from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.errors import InputError

# sums of r products of order 0.1, in another order
TOLERANCE = {"atol": 1e-6, "rtol": 1e-5}
PREFIX = "base_model.model.model.layers."

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*save_embedding_layers.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning"),
]


def clone(model) -> GptOssForCausalLM:
    # a copy: resizing writes into the config
    copied = GptOssForCausalLM(deepcopy(model.config)).float()
    copied.load_state_dict(model.state_dict())
    return copied


def train(model, path, **options) -> GptOssForCausalLM:
    """Save a random adapter made by PEFT; return PEFT's own merge."""
    torch.manual_seed(3)
    wrapped = get_peft_model(model, LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": [], **options}))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    wrapped.save_pretrained(str(path))
    return wrapped.merge_and_unload()


class Lists(nn.Module):
    """Experts as Unsloth builds them: one linear layer per expert."""

    def __init__(self, fused):
        super().__init__()
        for part in ("gate_up", "down"):
            weights, biases = getattr(fused, f"{part}_proj").data, getattr(fused, f"{part}_proj_bias").data
            linears = []
            for weight, bias in zip(weights, biases, strict=True):
                linear = nn.Linear(*weight.shape)
                linear.weight.data, linear.bias.data = weight.T.clone(), bias.clone()
                linears.append(linear)
            setattr(self, f"{part}_projs", nn.ModuleList(linears))


def expert_names(experts):
    return [f"{part}_projs.{e}" for part in ("gate_up", "down") for e in experts]


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", *expert_names(range(8))]},
        {"target_modules": expert_names([0, 5])},
        {
            "target_modules": expert_names(range(8)),
            "use_rslora": True,
            "rank_pattern": {"down_projs.3": 5, r"layers\.1\..*gate_up_projs\.\d+": 2},
            "alpha_pattern": {"gate_up_projs.7": 11},
        },
    ],
    ids=["all experts", "two experts", "patterns"],
)
def test_one_pair_per_expert_is_merged_as_peft_does(tiny, tmp_path, options):
    model = clone(tiny.model())
    for layer in model.model.layers:
        layer.mlp.experts = Lists(layer.mlp.experts)
    merged = train(model, tmp_path, **options)
    ours = Checkpoint(tiny.path("float32"), Adapter.open(tmp_path))
    base = Checkpoint(tiny.path("float32"))
    moved = 0
    for i, layer in enumerate(merged.model.layers):
        torch.testing.assert_close(
            ours.dense(f"model.layers.{i}.self_attn.q_proj.weight"), layer.self_attn.q_proj.weight.data, **TOLERANCE
        )
        for e in range(8):
            expert = ours.expert(i, e)
            torch.testing.assert_close(expert.gate_up, layer.mlp.experts.gate_up_projs[e].weight.data, **TOLERANCE)
            torch.testing.assert_close(expert.down, layer.mlp.experts.down_projs[e].weight.data, **TOLERANCE)
            moved += not torch.equal(expert.down, base.expert(i, e).down)
    assert moved == 3 * len({name for name in options["target_modules"] if name.startswith("down")})


def rename_stored(path, change):
    tensors = load_file(path / WEIGHTS_NAME)
    save_file({change(name): tensor for name, tensor in tensors.items()}, path / WEIGHTS_NAME)


def test_other_names_of_the_same_modules(tiny, tmp_path):
    model = clone(tiny.model())
    for layer in model.model.layers:
        layer.mlp.experts = Lists(layer.mlp.experts)
    train(model, tmp_path, target_modules=["q_proj", *expert_names(range(8))])
    train_path = tmp_path / "lora"
    train_path.mkdir()
    for file in tmp_path.glob("adapter_*"):
        shutil.copy(file, train_path)
    before = Checkpoint(tiny.path("float32"), Adapter.open(train_path))

    def renamed(name):
        name = name.replace("self_attn.", "attn.").replace("down_projs.", "down.").replace("gate_up_projs", "gate_up")
        return name.replace("lora_A.weight", "lora_A.default.weight")

    rename_stored(tmp_path, renamed)
    after = Checkpoint(tiny.path("float32"), Adapter.open(tmp_path))
    assert after.adapter.targets == before.adapter.targets
    name = "model.layers.2.self_attn.q_proj.weight"
    assert torch.equal(before.dense(name), after.dense(name))
    assert torch.equal(before.expert(2, 6).gate_up, after.expert(2, 6).gate_up)


# ---- Tinker


def tinker(tiny, path, shared=True):
    """Tinker's file: factors of all experts, the one at the hidden side shared; attn, unembed_tokens."""
    config = tiny.model().config
    E, D, F, V, r = 8, config.hidden_size, config.intermediate_size, config.vocab_size, 4
    g = torch.Generator().manual_seed(5)
    tensors = {}

    def put(name, a, b):
        tensors[f"{name}.lora_A.weight"] = torch.randn(a, generator=g) * 0.1
        tensors[f"{name}.lora_B.weight"] = torch.randn(b, generator=g) * 0.1

    one = 1 if shared else E
    for i in range(3):
        put(f"{PREFIX}{i}.attn.q_proj", (r, D), (192, r))
        put(f"{PREFIX}{i}.mlp.experts.w1", (one, r, D), (E, F, r))
        put(f"{PREFIX}{i}.mlp.experts.w3", (one, r, D), (E, F, r))
        put(f"{PREFIX}{i}.mlp.experts.w2", (E, r, F), (one, D, r))
    put("base_model.model.model.unembed_tokens", (r, D), (V, r))
    path.mkdir()
    save_file(tensors, path / WEIGHTS_NAME)
    settings = {"peft_type": "LORA", "r": r, "lora_alpha": 32, "target_modules": "all-linear"}
    (path / CONFIG_NAME).write_text(json.dumps(settings))
    return {name: tensor.double() for name, tensor in tensors.items()}


@pytest.mark.parametrize("shared", [True, False])
def test_tinkers_experts_by_their_formula_in_float64(tiny, tmp_path, shared):
    stored = tinker(tiny, tmp_path / "t", shared)
    base, ours = Checkpoint(tiny.path("float32")), Checkpoint(tiny.path("float32"), Adapter.open(tmp_path / "t"))
    scale = 32 / 4

    def delta(name, e):
        A, B = stored[f"{name}.lora_A.weight"], stored[f"{name}.lora_B.weight"]
        A, B = (factor[e % factor.shape[0]] if factor.dim() == 3 else factor for factor in (A, B))
        return scale * (B @ A)

    for i in range(3):
        for e in range(8):
            before, after = base.expert(i, e, torch.float64), ours.expert(i, e)
            gate_up, stem = before.gate_up.clone(), f"{PREFIX}{i}.mlp.experts."
            gate_up[0::2] += delta(stem + "w1", e)
            gate_up[1::2] += delta(stem + "w3", e)
            torch.testing.assert_close(after.gate_up.double(), gate_up, **TOLERANCE)
            torch.testing.assert_close(after.down.double(), before.down + delta(stem + "w2", e), **TOLERANCE)
        name = f"model.layers.{i}.self_attn.q_proj.weight"
        expected = base.dense(name).double() + delta(f"{PREFIX}{i}.attn.q_proj", 0)
        torch.testing.assert_close(ours.dense(name).double(), expected, **TOLERANCE)
    expected = base.head().double() + delta("base_model.model.model.unembed_tokens", 0)
    torch.testing.assert_close(ours.head().double(), expected, **TOLERANCE)


# ---- vocabularies, rows, heads


def test_a_resized_vocabulary_becomes_the_models(tiny, tmp_path):
    model = clone(tiny.model())
    model.resize_token_embeddings(307)
    merged = train(model, tmp_path, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    ours = Checkpoint(tiny.path("float32"), Adapter.open(tmp_path))
    assert ours.config.vocab == ours.config.raw["vocab_size"] == 307
    assert any("from 300 to 307" in note for note in ours.notes)
    assert ours.shapes()["lm_head.weight"] == (307, 192)
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.0.self_attn.q_proj.weight"):
        torch.testing.assert_close(ours.dense(name), merged.state_dict()[name], **TOLERANCE)


def test_half_a_resized_vocabulary_is_refused(tiny, tmp_path):
    model = clone(tiny.model())
    model.resize_token_embeddings(307)
    train(model, tmp_path, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    tensors = load_file(tmp_path / WEIGHTS_NAME)
    save_file({n: t for n, t in tensors.items() if "lm_head" not in n}, tmp_path / WEIGHTS_NAME)
    with pytest.raises(InputError, match="resized vocabulary without saving both embedding and head"):
        Checkpoint(tiny.path("float32"), Adapter.open(tmp_path))


@pytest.mark.parametrize(
    "indices", [[3, 299, 17], {"embed_tokens": [5, 2], "lm_head": [9, 200, 1]}], ids=["a list", "by module"]
)
def test_single_rows_are_replaced_as_peft_does(tiny, tmp_path, indices):
    model = clone(tiny.model())
    merged = train(model, tmp_path, target_modules=["q_proj"], trainable_token_indices=indices).state_dict()
    base, ours = Checkpoint(tiny.path("float32")), Checkpoint(tiny.path("float32"), Adapter.open(tmp_path))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        torch.testing.assert_close(ours.dense(name), merged[name], **TOLERANCE)
    changed = (ours.dense("model.embed_tokens.weight") != base.dense("model.embed_tokens.weight")).any(1).nonzero()
    wanted = indices if isinstance(indices, list) else indices["embed_tokens"]
    assert changed.flatten().tolist() == sorted(wanted)


def test_rows_that_the_base_has_not_and_rows_that_are_lost(tiny, tmp_path):
    train(clone(tiny.model()), tmp_path, target_modules=["q_proj"], trainable_token_indices=[3, 17])
    tiny.edit_json(tmp_path / CONFIG_NAME, trainable_token_indices=[3, 300])
    with pytest.raises(InputError, match=r"embed_tokens\.weight of shape \[301, 192\], the base has \[300, 192\]"):
        Checkpoint(tiny.path("float32"), Adapter.open(tmp_path))
    tiny.edit_json(tmp_path / CONFIG_NAME, trainable_token_indices=[3])
    with pytest.raises(InputError, match="name 1 rows"):
        Adapter.open(tmp_path)
    tiny.edit_json(tmp_path / CONFIG_NAME, trainable_token_indices={"embed_tokens": [3, 17], "lm_head": [1]})
    with pytest.raises(InputError, match="no trained rows of lm_head"):
        Adapter.open(tmp_path)


def test_a_head_of_its_own_unties_the_model(tiny, tmp_path):
    tiny.build(tmp_path / "tied", tie_word_embeddings=True)
    base = GptOssForCausalLM.from_pretrained(tmp_path / "tied", dtype=torch.float32)
    embed = base.model.embed_tokens.weight.detach().clone()
    head = torch.randn_like(embed)
    (tmp_path / "lora").mkdir()
    save_file({"base_model.model.lm_head.weight": head}, tmp_path / "lora" / WEIGHTS_NAME)
    (tmp_path / "lora" / CONFIG_NAME).write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
    ours = Checkpoint(tmp_path / "tied", Adapter.open(tmp_path / "lora"))
    assert ours.config.tied is False and ours.config.raw["tie_word_embeddings"] is False
    assert torch.equal(ours.head(), head) and torch.equal(ours.dense("model.embed_tokens.weight"), embed)
    # the same values as the embedding that is saved beside it: still tied
    both = {"base_model.model.lm_head.weight": head, "base_model.model.model.embed_tokens.weight": head.clone()}
    save_file(both, tmp_path / "lora" / WEIGHTS_NAME)
    ours = Checkpoint(tmp_path / "tied", Adapter.open(tmp_path / "lora"))
    assert ours.config.tied is True and torch.equal(ours.head(), head)


# ---- refusals


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["0.mlp.experts.3.gate_proj"], "even rows of gate_up_proj"),
        (["0.mlp.experts.gate_up_projs.9"], "the base has"),
        (["0.mlp.experts.down_projs.1", "0.mlp.experts.down.1"], "do not fit one"),
    ],
)
def test_what_cannot_be_merged_exactly_is_refused(tiny, tmp_path, names, words):
    tensors = {}
    for name in names:
        rows, columns = (192, 320) if "down" in name else (640, 192)
        tensors[f"{PREFIX}{name}.lora_A.weight"] = torch.ones(2, columns)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = torch.ones(rows, 2)
    save_file(tensors, tmp_path / WEIGHTS_NAME)
    (tmp_path / CONFIG_NAME).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 1}))
    with pytest.raises(InputError, match=words):
        Checkpoint(tiny.path("float32"), Adapter.open(tmp_path))


# ---- tokenizer and template


def test_the_adapters_own_tokenizer_and_template_win_and_it_is_said(tiny, tmp_path):
    base, lora = tiny.path("bf16"), tiny.adapter(tmp_path / "lora")
    tokenizer = load_tokenizer(base)
    tokenizer.chat_template = "MINE {{ messages[0].content }}"
    tokenizer.add_tokens(["<|mine|>"])
    tokenizer.save_pretrained(lora)
    checkpoint = Checkpoint(base, Adapter.open(lora))
    assert any("own tokenizer" in note for note in checkpoint.notes)
    assert any("own chat template" in note for note in checkpoint.notes)
    got = load_tokenizer(checkpoint.side)
    assert got.chat_template == tokenizer.chat_template and "<|mine|>" in got.get_vocab()
    (tmp_path / "out").mkdir()
    checkpoint.side.write(tmp_path / "out")
    assert load_tokenizer(tmp_path / "out").get_vocab() == tokenizer.get_vocab()
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == tokenizer.chat_template
    # a template alone
    (lora / "tokenizer.json").unlink()
    (lora / "tokenizer_config.json").unlink()
    checkpoint = Checkpoint(base, Adapter.open(lora))
    got = load_tokenizer(checkpoint.side)
    assert got.chat_template == tokenizer.chat_template and "<|mine|>" not in got.get_vocab()


def test_an_adapter_that_saved_the_bases_own_tokenizer_says_nothing(tiny, tmp_path):
    base, lora = tiny.path("bf16"), tiny.adapter(tmp_path / "lora")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (lora / name).write_bytes((base / name).read_bytes())
    assert Checkpoint(base, Adapter.open(lora)).notes == []
