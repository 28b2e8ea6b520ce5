"""The streamed model is transformers' GptOssForCausalLM, to 1e-4 on float32 logits of order 10."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GptOssConfig, GptOssForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding

from gptoss_quantize import model as streamed
from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.config import parse_config, rope_frequencies

# sums of some hundred products in another order; logits reach 15
LOGITS = {"atol": 1e-4, "rtol": 0}
KINDS = ["bf16", "float32", "default", "mxfp4"]


def ours(path, ids, dtype=torch.float32):
    checkpoint = Checkpoint(path)
    return streamed.logits(streamed.hidden_states(checkpoint, ids, dtype), checkpoint.head().to(dtype))


@torch.inference_mode()
def theirs(path, ids):
    return GptOssForCausalLM.from_pretrained(path, dtype=torch.float32)(ids).logits


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_transformers(tiny, kind):
    ids = tiny.ids()
    expected = theirs(tiny.path(kind), ids)
    assert 1 < expected.std() < 10
    torch.testing.assert_close(ours(tiny.path(kind), ids), expected, **LOGITS)


@pytest.mark.parametrize("without", ["sinks", "self_attn.o_proj.bias", "router.bias", "down_proj_bias", "norm"])
def test_every_part_is_alive(tiny, without):
    # the comparison above is worth something only if leaving a part out would be seen
    path, ids = tiny.path("float32"), tiny.ids(1)
    whole = ours(path, ids)
    checkpoint = Checkpoint(path)
    read = checkpoint.read
    checkpoint.read = lambda name, index=None: (
        torch.zeros_like(read(name, index)) if name.endswith(without) else read(name, index)
    )
    if without == "norm":
        whole = whole * 2
    cut = streamed.logits(streamed.hidden_states(checkpoint, ids), checkpoint.head())
    assert (cut - whole).abs().max() > 0.1


def test_windows_and_yarn_matter(tiny):
    path, ids = tiny.path("float32"), tiny.ids(1)
    checkpoint = Checkpoint(path)
    whole = streamed.hidden_states(checkpoint, ids)
    for field, value in (
        ("sliding_window", 15),
        ("layer_types", ("full_attention",) * 3),
        ("rope", checkpoint.config.rope | {"rope_type": "default"}),
        ("rope", checkpoint.config.rope | {"truncate": True}),
        ("rope", checkpoint.config.rope | {"attention_factor": 1.0}),
        ("swiglu_limit", 8.0),
    ):
        values = {name: getattr(checkpoint.config, name) for name in checkpoint.config.__slots__}
        changed = Checkpoint(path)
        changed.config = SimpleNamespace(**(values | {field: value}))
        changed.config.window = lambda i, c=changed.config: type(checkpoint.config).window(c, i)
        assert (streamed.hidden_states(changed, ids) - whole).abs().max() > 1e-2, field
    # the first window is not full: a sequence inside it sees no difference
    assert checkpoint.config.window(0) == 16
    assert checkpoint.config.window(1) is None


def test_mask_in_pieces(tiny, monkeypatch):
    ids = tiny.ids(2)
    whole = ours(tiny.path("float32"), ids)
    monkeypatch.setattr(streamed, "MAX_MASK_ELEMENTS", 49 * 7)
    monkeypatch.setattr(streamed, "BATCH_TOKENS", 48)
    torch.testing.assert_close(ours(tiny.path("float32"), ids), whole, atol=1e-5, rtol=0)


def test_mxfp4_is_read_as_transformers_dequantizes_it(tiny):
    stock = GptOssForCausalLM.from_pretrained(tiny.path("mxfp4"), dtype=torch.bfloat16)
    checkpoint = Checkpoint(tiny.path("mxfp4"))
    assert checkpoint.expert_format == "mxfp4"
    for layer in range(3):
        experts = stock.model.layers[layer].mlp.experts
        for e, expert in enumerate(checkpoint.experts(layer, torch.bfloat16)):
            assert torch.equal(expert.gate_up, experts.gate_up_proj[e].T)
            assert torch.equal(expert.down, experts.down_proj[e].T)
            assert torch.equal(expert.gate_up_bias, experts.gate_up_proj_bias[e])
            assert torch.equal(expert.down_bias, experts.down_proj_bias[e])


@pytest.mark.parametrize("changes", [{"tie_word_embeddings": True}, {"attention_bias": False}], ids=str)
def test_other_configurations(tiny, tmp_path, changes):
    tiny.build(tmp_path, **changes)
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.config.tied == changes.get("tie_word_embeddings", False)
    ids = tiny.ids(1)
    torch.testing.assert_close(ours(tmp_path, ids), theirs(tmp_path, ids), **LOGITS)


class Dtypes(TorchDispatchMode):
    """Collects the dtypes of everything that is computed."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, torch.Tensor):
                self.seen.add(value.dtype)
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_float64_and_a_float32_residual_stream(tiny, dtype):
    checkpoint = Checkpoint(tiny.path("bf16"))
    with Dtypes() as dtypes:
        hidden = streamed.hidden_states(checkpoint, tiny.ids(1), dtype)
    assert hidden.dtype == torch.float32
    assert torch.float64 not in dtypes.seen
    assert dtype in dtypes.seen


def test_bfloat16_products_are_close(tiny):
    ids = tiny.ids()
    exact = ours(tiny.path("bf16"), ids)
    stock = GptOssForCausalLM.from_pretrained(tiny.path("bf16"), dtype=torch.bfloat16)
    with torch.inference_mode():
        plain = stock(ids).logits.float()
    error = (ours(tiny.path("bf16"), ids, torch.bfloat16) - exact).square().mean()
    # rounding flips a choice of the router here and there, in both
    assert error <= 2 * (plain - exact).square().mean()


YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "beta_fast": 4.0}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}},
        {"rope_parameters": {**YARN, "rope_theta": 777.0, "beta_slow": 2.0, "truncate": False}},
        {"rope_parameters": {**YARN, "rope_theta": 777.0, "truncate": True}},
        {"rope_parameters": {**YARN, "rope_theta": 777.0, "attention_factor": 1.25}},
        {"rope_parameters": {**YARN, "rope_theta": 777.0, "factor": 1.0}},
        {"rope_theta": 777.0, "rope_scaling": {**YARN, "truncate": False}},
        {"rope_theta": 777.0, "rope_scaling": {"type": "yarn", **{k: v for k, v in YARN.items() if "type" not in k}}},
        {"rope_scaling": YARN},
        {"rope_theta": 777.0, "rope_scaling": None},
        {"rope_theta": 777.0},
        {"rope_parameters": {"rope_type": "yarn", "factor": 8.0}},
        {"rope_parameters": {"rope_type": "default"}, "rope_scaling": YARN},
        {"rope_parameters": {}, "rope_theta": 777.0},
        {"rope_parameters": None},
        {},
    ],
    ids=lambda rope: json.dumps(rope),
)
def test_rope_is_read_as_transformers_reads_it(rope):
    sizes = {
        "model_type": "gpt_oss",
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_local_experts": 2,
        "num_experts_per_tok": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 8,
        "max_position_embeddings": 512,
    }
    # a copy, since transformers completes the dictionary that it is given
    stock = GptOssRotaryEmbedding(GptOssConfig.from_dict(copy.deepcopy(sizes | rope)))
    inverse, factor = rope_frequencies(parse_config(sizes | rope, "config.json"))
    torch.testing.assert_close(inverse, stock.inv_freq, atol=0, rtol=1e-6)
    assert factor == pytest.approx(stock.attention_scaling, rel=1e-6)
