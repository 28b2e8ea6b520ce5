"""The same weights under the names of wrappers and of other tools are the same model; what is unknown is named."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.errors import InputError
from gptoss_quantize.names import nearest, plain_name

CANONICAL = "model.layers.1.self_attn.q_proj.weight"


def rewritten(tiny, tmp_path, change, kind="float32"):
    """A copy of a tiny checkpoint whose tensors went through `change`, in one file."""
    path = tiny.copy(kind, tmp_path / "renamed")
    tensors = change(tiny.load_all(path))
    for file in [*path.glob("*.safetensors"), *path.glob("*.index.json")]:
        file.unlink()
    save_file({n: t.contiguous().clone() for n, t in tensors.items()}, path / "model.safetensors")
    return path


def same(ours: Checkpoint, expected: Checkpoint) -> None:
    """Every tensor equal, whole and (experts) one at a time."""
    assert ours.names() == expected.names()
    for name in expected.names():
        want = expected.read(name)
        assert torch.equal(ours.read(name), want), name
        assert (ours.info(name).shape, ours.info(name).dtype) == (tuple(want.shape), want.dtype)
    for e in range(expected.config.experts):
        one, other = ours.expert(1, e), expected.expert(1, e)
        assert all(torch.equal(getattr(one, part), getattr(other, part)) for part in one.__slots__)


WRAPPERS = {
    "peft": lambda n: "base_model.model." + n,
    "compile": lambda n: "_orig_mod." + n,
    "ddp of compile": lambda n: "module._orig_mod." + n,
    "fsdp": lambda n: "_fsdp_wrapped_module." + n.replace(".mlp.", "._fsdp_wrapped_module.mlp."),
    "checkpointed": lambda n: n.replace(".self_attn", "._checkpoint_wrapped_module.self_attn"),
    "base_layer": lambda n: n.replace("q_proj.", "q_proj.base_layer."),
    "vlm": lambda n: "language_model." + n,
    "vlm of transformers 5": lambda n: n.replace("model.", "model.language_model."),
    "bare": lambda n: n.removeprefix("model."),
    "any common prefix": lambda n: "policy.actor." + n,
}


@pytest.mark.parametrize("rename", WRAPPERS.values(), ids=WRAPPERS)
def test_what_wrappers_add_is_taken_off(tiny, tmp_path, rename):
    path = rewritten(tiny, tmp_path, lambda tensors: {rename(n): t for n, t in tensors.items()})
    checkpoint = Checkpoint(path)
    same(checkpoint, Checkpoint(tiny.path("float32")))
    assert any("other names" in note for note in checkpoint.notes)


def test_names_of_transformers_stay(tiny):
    for kind in ("bf16", "mxfp4"):
        checkpoint = Checkpoint(tiny.path(kind))
        assert checkpoint.weights.plain and checkpoint.notes == []
        assert all(plain_name(name) == name for name in checkpoint.names())


def split(tensors, stem, bias, per_expert):
    """Fused experts as one linear layer each, weight [out, in]; `per_expert(name, e)` names one."""
    out = {}
    for name, tensor in tensors.items():
        if name.endswith(stem):
            out |= {per_expert(name, e) + ".weight": tensor[e].T for e in range(tensor.shape[0])}
        elif name.endswith(bias):
            base = name.removesuffix("_bias")
            out |= {per_expert(base, e) + ".bias": tensor[e] for e in range(tensor.shape[0])}
        else:
            out[name] = tensor
    return out


def listed(gate_up, down):
    """experts.LIST.E, as Unsloth and the GPTQModel of 2025 have them."""

    def change(tensors):
        for part, new in (("gate_up_proj", gate_up), ("down_proj", down)):
            tensors = split(
                tensors,
                f"experts.{part}",
                f"experts.{part}_bias",
                lambda n, e, part=part, new=new: n.replace(f"experts.{part}", f"experts.{new}.{e}"),
            )
        return {n.replace("mlp.router.", "mlp.router.linear."): t for n, t in tensors.items()}

    return change


def one_each(tensors):
    """experts.E.gate_up_proj."""
    for part in ("gate_up_proj", "down_proj"):
        tensors = split(
            tensors,
            f"experts.{part}",
            f"experts.{part}_bias",
            lambda n, e, part=part: n.replace(f"experts.{part}", f"experts.{e}.{part}"),
        )
    return tensors


def mlx(tensors):
    """mlx_lm.fuse --de-quantize: [E, out, in], gate and up apart."""
    out = {}
    for name, t in tensors.items():
        if name.endswith("experts.gate_up_proj"):
            rows = t.transpose(1, 2)
            out[name.replace("gate_up_proj", "gate_proj.weight")] = rows[:, 0::2]
            out[name.replace("gate_up_proj", "up_proj.weight")] = rows[:, 1::2]
        elif name.endswith("gate_up_proj_bias"):
            out[name.replace("gate_up_proj_bias", "gate_proj.bias")] = t[:, 0::2]
            out[name.replace("gate_up_proj_bias", "up_proj.bias")] = t[:, 1::2]
        elif name.endswith("experts.down_proj"):
            out[name + ".weight"] = t.transpose(1, 2)
        else:
            out[name.replace("down_proj_bias", "down_proj.bias")] = t
    return out


OPENAI = (
    ("model.layers.", "block."),
    ("mlp.experts.gate_up_proj_blocks", "mlp.mlp1_weight.blocks"),
    ("mlp.experts.gate_up_proj_scales", "mlp.mlp1_weight.scales"),
    ("mlp.experts.gate_up_proj_bias", "mlp.mlp1_bias"),
    ("mlp.experts.down_proj_blocks", "mlp.mlp2_weight.blocks"),
    ("mlp.experts.down_proj_scales", "mlp.mlp2_weight.scales"),
    ("mlp.experts.down_proj_bias", "mlp.mlp2_bias"),
    ("mlp.router", "mlp.gate"),
    ("self_attn.o_proj", "attn.out"),
    ("self_attn.sinks", "attn.sinks"),
    ("input_layernorm.weight", "attn.norm.scale"),
    ("post_attention_layernorm.weight", "mlp.norm.scale"),
    ("model.norm.weight", "norm.scale"),
    ("model.embed_tokens", "embedding"),
    ("lm_head", "unembedding"),
)


def openai(tensors):
    """The names in original/ of the release: q, k and v in one."""
    out = {}
    for name, t in tensors.items():
        if "q_proj" in name:
            parts = [tensors[name.replace("q_proj", p)] for p in ("q_proj", "k_proj", "v_proj")]
            name, t = name.replace("self_attn.q_proj", "attn.qkv"), torch.cat(parts)
        elif "k_proj" in name or "v_proj" in name:
            continue
        for old, new in OPENAI:
            name = name.replace(old, new)
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            # a fine-tune in bf16: [E, out, in]
            name, t = name.replace("experts.gate_up_proj", "mlp1_weight"), t.transpose(1, 2)
            name = name.replace("experts.down_proj", "mlp2_weight")
        out[name] = t
    return out


LAYOUTS = {
    "unsloth": (listed("gate_up_projs", "down_projs"), "float32"),
    "gptqmodel 2025": (listed("gate_up", "down"), "float32"),
    "one each": (one_each, "bf16"),
    "mlx": (mlx, "bf16"),
    "openai mxfp4": (openai, "mxfp4"),
    "openai bf16": (openai, "bf16"),
}


@pytest.mark.parametrize(("change", "kind"), LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_of_other_tools_are_the_same_model(tiny, tmp_path, change, kind):
    same(Checkpoint(rewritten(tiny, tmp_path, change, kind)), Checkpoint(tiny.path(kind)))


def test_openais_own_config(tiny, tmp_path):
    path = rewritten(tiny, tmp_path, openai, "mxfp4")
    ours = Checkpoint(tiny.path("mxfp4")).config
    (path / "config.json").write_text(json.dumps({
        "num_hidden_layers": 3, "num_experts": 8, "experts_per_token": 4, "vocab_size": 300, "hidden_size": 192,
        "intermediate_size": 320, "swiglu_limit": 7.0, "head_dim": 32, "num_attention_heads": 6,
        "num_key_value_heads": 2, "sliding_window": 16, "initial_context_length": 32, "rope_theta": 5000,
        "rope_scaling_factor": 4.0, "rope_ntk_alpha": 1, "rope_ntk_beta": 4,
    }))  # fmt: skip
    config = Checkpoint(path).config
    for name in ("hidden", "experts", "top_k", "rope", "max_positions", "layer_types", "swiglu_limit", "rms_eps"):
        assert getattr(config, name) == getattr(ours, name), name
    assert config.raw["quantization_config"]["quant_method"] == "mxfp4"


# ---- refusals


def refused(path, *words):
    with pytest.raises(InputError) as error:
        Checkpoint(path)
    missing = [word for word in words if word not in str(error.value)]
    assert not missing, f"{missing} not in: {error.value}"


def test_two_of_one_name_are_refused_with_both(tiny, tmp_path):
    path = rewritten(tiny, tmp_path, lambda t: t | {"module." + CANONICAL: t[CANONICAL] + 1})
    refused(path, "module." + CANONICAL, CANONICAL, "are both")


def test_a_missing_expert_is_named(tiny, tmp_path):
    def change(tensors):
        tensors = listed("gate_up_projs", "down_projs")(tensors)
        del tensors["model.layers.1.mlp.experts.down_projs.3.weight"]
        return tensors

    refused(rewritten(tiny, tmp_path, change), "expert 3 of model.layers.1.mlp.experts.down_proj is missing")


def pruned(tensors):
    """Layer 1 with six experts, the others with eight."""
    return {n: t[:6] if "layers.1.mlp." in n else t for n, t in tensors.items()}


def test_layers_with_different_numbers_of_experts_are_refused_by_name(tiny, tmp_path):
    refused(rewritten(tiny, tmp_path, pruned), "layer 0 has 8 experts, layer 1 has 6")


def test_qkv_of_another_size(tiny, tmp_path):
    def change(tensors):
        tensors = openai(tensors)
        name = "block.0.attn.qkv.weight"
        return tensors | {name: tensors[name][:-1]}

    refused(rewritten(tiny, tmp_path, change, "bf16"), "block.0.attn.qkv.weight has 319 rows", "192, 64 and 64")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.layers.0.mlp.experts.0.gate_proj.weight", "one linear layer per expert with gate and up apart"),
        ("model.layers.0.mlp.experts.gate_up_projs.0.weight.absmax", "a bitsandbytes checkpoint"),
        ("model.layers.0.self_attn.q_proj.lora_A.default.weight", "without merging"),
        ("model.layers.0.mlp.experts.3.gate_proj.qweight", "another tool already quantized"),
        ("model.layers.0.mlp.experts.gate_proj.biases", "that MLX quantized"),
        ("model.layers.0.mlp.experts.w13_weight", "vLLM's own names"),
        ("model.layers.0.mlp.experts.gate_upproj.weight", "nearest known layout is MLX's"),
    ],
)
def test_the_nearest_layout_is_named(name, words):
    assert words in nearest(name)


def test_experts_apart_are_refused_with_the_reason(tiny, tmp_path):
    def change(tensors):
        name = "model.layers.{}.mlp.experts.gate_up_proj"
        out = {n: t for n, t in tensors.items() if "gate_up_proj" not in n}
        for layer in range(3):
            for e in range(8):
                rows = tensors[name.format(layer)][e].T
                base = f"model.layers.{layer}.mlp.experts.{e}."
                out |= {base + "gate_proj.weight": rows[0::2], base + "up_proj.weight": rows[1::2]}
        return out

    refused(rewritten(tiny, tmp_path, change), "experts.0.gate_proj.weight", "even rows", "first half", "fused")


def test_renamed_weights_are_written_under_our_names(tiny, tmp_path):
    """The copy that `export --to bf16` writes has transformers' names, whatever the source had."""
    from gptoss_quantize.runtimes.exports import export_checkpoint

    path = rewritten(tiny, tmp_path, listed("gate_up_projs", "down_projs"), "bf16")
    export_checkpoint(Checkpoint(path), tmp_path / "out", "bf16")
    written = Checkpoint(tmp_path / "out")
    assert written.weights.plain
    same(written, Checkpoint(tiny.path("bf16")))
    shutil.rmtree(tmp_path / "out")
