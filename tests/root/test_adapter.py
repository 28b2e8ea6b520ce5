"""The adapter merge against PEFT's own merge_and_unload on a random gpt-oss, every tensor compared."""

import json
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GptOssConfig, GptOssForCausalLM

from gptoss_quantize.adapter import CONFIG_NAME, WEIGHTS_NAME, Adapter
from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.errors import InputError

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
# sums of r products of order 0.1, in another order than PEFT's
TOLERANCE = {"atol": 1e-6, "rtol": 1e-5}

# PEFT's own: it calls a deprecated transformers property, and tells what it will save
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*save_embedding_layers.*:UserWarning"),
    # wrong for parameters: these patterns are applied
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
]


def tiny_model(intermediate: int = 24) -> GptOssForCausalLM:
    torch.manual_seed(0)
    config = GptOssConfig(
        num_hidden_layers=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        vocab_size=40,
        hidden_size=32,
        intermediate_size=intermediate,
        head_dim=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    model = GptOssForCausalLM(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    return model


def train(model: GptOssForCausalLM, path: Path, **options) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Save a random adapter made by PEFT; return the state dict before and after PEFT's own merge."""
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    peft_model = get_peft_model(model, LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": [], **options}))
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    peft_model.save_pretrained(str(path))
    return base, dict(peft_model.merge_and_unload().state_dict())


def merge_all(adapter: Adapter, base: dict[str, Tensor]) -> dict[str, Tensor]:
    """Merge the way the checkpoint reader does: fused expert tensors one expert at a time."""
    return {
        name: torch.stack([adapter.merge(name, weight, e) for e, weight in enumerate(tensor)])
        if name.endswith(("gate_up_proj", "down_proj"))
        else adapter.merge(name, tensor)
        for name, tensor in base.items()
    }


def shapes_of(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def assert_same_as_peft(path: Path, base: dict[str, Tensor], merged: dict[str, Tensor]) -> Adapter:
    adapter = Adapter.open(path)
    adapter.check(shapes_of(base))
    assert base.keys() == merged.keys()
    assert adapter.targets == {name for name in base if not torch.equal(base[name], merged[name])}
    ours = merge_all(adapter, base)
    for name, expected in merged.items():
        torch.testing.assert_close(ours[name], expected, **TOLERANCE, msg=lambda text, n=name: f"{n}: {text}")
    return adapter


@pytest.mark.parametrize("intermediate", [24, 32], ids=["down_proj wide", "down_proj square"])
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ATTENTION},
        {"target_modules": "all-linear"},
        {"target_parameters": EXPERTS},
        {"target_parameters": EXPERTS[::-1], "use_rslora": True},
        {"target_parameters": EXPERTS[:1]},
        {"target_parameters": EXPERTS[1:]},
        {"target_parameters": ["1.mlp.experts.down_proj", "0.mlp.experts.gate_up_proj"]},
        {"target_modules": ATTENTION, "target_parameters": [*EXPERTS, "mlp.router.weight"]},
        {"target_modules": ["o_proj"], "target_parameters": ["k_proj.weight"]},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "use_rslora": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["router", "lm_head", "norm"]},
        {
            "target_modules": ATTENTION,
            "target_parameters": [*EXPERTS, "router.weight"],
            "use_rslora": True,
            "rank_pattern": {"q_proj": 5, "0.mlp.experts.down_proj": 2, r"layers\.\d+.*gate_up_proj": 4},
            "alpha_pattern": {"v_proj": 11, "gate_up_proj": 7, "model.layers.1.mlp.router.weight": 13},
        },
        {
            "target_modules": ATTENTION,
            "rank_pattern": {"^model.layers.0.self_attn.q_proj": 2, "k_proj|o_proj": 1},
        },
    ],
    ids=lambda options: "+".join(options),
)
def test_every_tensor_matches_peft(tmp_path, options, intermediate):
    assert_same_as_peft(tmp_path, *train(tiny_model(intermediate), tmp_path, **options))


@pytest.mark.parametrize("parameters", [EXPERTS, EXPERTS[:1]], ids=["both", "gate_up_proj"])
@pytest.mark.parametrize("intermediate", [24, 32], ids=["down_proj wide", "down_proj square"])
def test_factors_stored_transposed(tmp_path, intermediate, parameters):
    # what PEFT 0.19.0 wrote: it took the experts for [E, out, in]
    model = tiny_model(intermediate)
    for layer in model.model.layers:
        layer.mlp.experts.is_transposed = False
    adapter = assert_same_as_peft(tmp_path, *train(model, tmp_path, target_parameters=parameters))
    stored = next(change for name, change in adapter.changes.items() if name.endswith("gate_up_proj"))
    assert load_file(tmp_path / WEIGHTS_NAME)[stored.a_name].shape[1] == 2 * intermediate


def test_square_and_nothing_tells(tmp_path):
    base, _ = train(tiny_model(32), tmp_path, target_parameters=EXPERTS[1:])
    edit_config(tmp_path, peft_version="0.19.0")
    with pytest.raises(InputError, match=r"PEFT 0\.19\.0 may have stored it transposed.*square"):
        Adapter.open(tmp_path).check(shapes_of(base))
    edit_config(tmp_path, peft_version="0.18.1")
    Adapter.open(tmp_path).check(shapes_of(base))


def test_scale_follows_rank_and_alpha(tmp_path):
    # independent of PEFT: the formula of the module docstring on one expert
    _, _ = train(tiny_model(), tmp_path, target_parameters=EXPERTS, use_rslora=True, lora_alpha=6)
    stored = load_file(tmp_path / WEIGHTS_NAME)
    prefix = "base_model.model.model.layers.1.mlp.experts.base_layer.lora_"
    A, B = stored[prefix + "A.weight"], stored[prefix + "B.weight"]
    expert, r, E = 2, 3, 4
    delta = 6 / math.sqrt(r) * (B[:, expert::E] @ A[expert * r : (expert + 1) * r]).T
    got = Adapter.open(tmp_path).merge("model.layers.1.mlp.experts.gate_up_proj", torch.zeros(32, 48), expert)
    torch.testing.assert_close(got, delta, **TOLERANCE)


def test_sum_is_rounded_once(tmp_path):
    base, merged = train(tiny_model(), tmp_path, target_modules=["q_proj"], target_parameters=EXPERTS)
    adapter = Adapter.open(tmp_path)
    name = "model.layers.0.mlp.experts.down_proj"
    low = base[name].to(torch.bfloat16)
    exact = low.float() + (merged[name] - base[name])
    got = adapter.merge(name, low)
    assert got.dtype == torch.bfloat16
    # half a unit in the last place of bf16
    torch.testing.assert_close(got.float(), exact, atol=1e-6, rtol=2**-8)
    # decoded MXFP4 comes as the transpose of [out, in]
    wide = adapter.merge(name, low[1].T.contiguous().T, 1, out_dtype=torch.float32)
    assert wide.dtype == torch.float32
    torch.testing.assert_close(wide, exact[1], **TOLERANCE)


def test_weight_is_not_changed_in_place(tmp_path):
    base, _ = train(tiny_model(), tmp_path, target_modules=["q_proj"], target_parameters=EXPERTS)
    before = {name: tensor.clone() for name, tensor in base.items()}
    merge_all(Adapter.open(tmp_path), base)
    assert all(torch.equal(before[name], base[name]) for name in base)


def test_checkpoint_reads_the_merged_model(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "base", max_shard_size="40KB")
    options = {"target_modules": ["q_proj", "lm_head"], "target_parameters": [*EXPERTS, "router.weight"]}
    _, merged = train(model, tmp_path / "adapter", **options)
    checkpoint = Checkpoint(tmp_path / "base", Adapter.open(tmp_path / "adapter"))
    for name in (
        "lm_head.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.0.mlp.router.weight",
    ):
        torch.testing.assert_close(checkpoint.dense(name), merged[name], **TOLERANCE)
    for layer in range(2):
        fused = {name: merged[f"model.layers.{layer}.mlp.experts.{name}"] for name in ("gate_up_proj", "down_proj")}
        for e, expert in enumerate(checkpoint.experts(layer)):
            torch.testing.assert_close(expert.gate_up, fused["gate_up_proj"][e].T, **TOLERANCE)
            torch.testing.assert_close(expert.down, fused["down_proj"][e].T, **TOLERANCE)


def edit_config(path: Path, **changes) -> None:
    config = json.loads((path / CONFIG_NAME).read_text())
    config.update(changes)
    config = {key: value for key, value in config.items() if value != "DELETE"}
    (path / CONFIG_NAME).write_text(json.dumps(config))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, dict[str, Tensor]]:
    path = tmp_path_factory.mktemp("adapter")
    base, _ = train(tiny_model(), path, target_modules=ATTENTION, target_parameters=EXPERTS)
    return path, base


@pytest.fixture
def damaged(saved, tmp_path) -> Path:
    """Return a private copy of a good adapter, to be damaged."""
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        (tmp_path / name).write_bytes((saved[0] / name).read_bytes())
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3', expected 'LORA'"),
        ({"peft_type": "LOKR"}, "peft_type is 'LOKR'"),
        ({"use_dora": True}, "use_dora is True.*DoRA"),
        ({"layer_replication": [[0, 2]]}, "layer_replication.*another architecture"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"bias": "all"}, "bias is 'all'.*biases of the base"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"use_qalora": True}, "use_qalora"),
        ({"alora_invocation_tokens": [7]}, "alora_invocation_tokens"),
        ({"kasa_config": {"beta": 1}}, "kasa_config"),
        ({"use_tomorrows_lora": True}, "use_tomorrows_lora is True, expected it off"),
        (
            {"init_lora_weights": "pissa_niter_16"},
            "init_lora_weights is 'pissa_niter_16'.*changed base weights",
        ),
        ({"r": "DELETE"}, "r missing"),
        ({"r": 0}, "0 in r or rank_pattern, expected positive integers"),
        ({"r": True}, "True in r"),
        ({"r": 2}, r"lora_A\.weight \[3, 32\].* do not fit adapter_config\.json"),
        ({"lora_alpha": float("nan")}, "nan in lora_alpha or alpha_pattern, expected finite"),
        ({"rank_pattern": {"q_proj": 2.5}}, "2.5 in r or rank_pattern"),
        ({"rank_pattern": {"q_proj(": 3}}, r"rank_pattern is .*no object of patterns"),
        ({"alpha_pattern": [1]}, r"alpha_pattern is \[1\], no object"),
        ({"target_parameters": EXPERTS[:1]}, r"2 LoRA pair\(s\) on model\.layers\.0\.mlp\.experts, but"),
        ({"target_parameters": None}, "name no weight there"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_config_is_refused(damaged, changes, message):
    edit_config(damaged, **changes)
    with pytest.raises(InputError, match=message) as error:
        Adapter.open(damaged)
    assert str(damaged) in str(error.value)


Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj."


def swap(tensors: dict[str, Tensor], old: str, new: str) -> None:
    tensors[new] = tensors.pop(old)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda t: t[Q_PROJ + "lora_A.weight"].fill_(math.nan),
            r"layers\.0.*q_proj\.lora_A\.weight holds NaN",
        ),
        (
            lambda t: t[Q_PROJ + "lora_B.weight"][0].fill_(math.inf),
            r"q_proj\.lora_B\.weight holds NaN or inf",
        ),
        (lambda t: t.pop(Q_PROJ + "lora_B.weight"), r"q_proj\.lora_A\.weight has no lora_B beside it"),
        (lambda t: t.update({Q_PROJ + "lora_A.weight": torch.zeros(96)}), r"shape \[96\], expected a matrix"),
        (
            lambda t: t.update({Q_PROJ + "lora_A.weight": torch.zeros(3, 32, dtype=torch.int32)}),
            "dtype torch.int32, expected a float type",
        ),
        (lambda t: t.update({Q_PROJ + "lora_B.weight": torch.zeros(32, 4)}), r"\[32, 4\] do not fit"),
        (
            lambda t: t.update({Q_PROJ + "lora_magnitude_vector": torch.ones(32)}),
            "magnitude_vector is not known",
        ),
        (
            lambda t: swap(t, Q_PROJ + "lora_A.weight", "q_proj.lora_A.weight"),
            "q_proj.lora_A.weight is not known",
        ),
        (
            lambda t: t.update({"base_model.model.model.layers.0.mlp.experts.down_proj": torch.zeros(4, 24, 32)}),
            "experts.down_proj is not known in a LoRA adapter",
        ),
        (
            lambda t: t.update({Q_PROJ + "base_layer.weight": torch.zeros(31, 32)}),
            r"q_proj\.base_layer\.weight \[31, 32\] does not fit",
        ),
        (lambda t: t.clear(), "no tensors"),
    ],
    ids=[
        "nan",
        "inf",
        "unpaired",
        "flat",
        "int",
        "rank",
        "dora",
        "prefix",
        "whole experts",
        "two saves",
        "empty",
    ],
)
def test_file_is_refused(damaged, damage, message):
    tensors = load_file(damaged / WEIGHTS_NAME)
    damage(tensors)
    save_file(tensors, damaged / WEIGHTS_NAME)
    with pytest.raises(InputError, match=message) as error:
        Adapter.open(damaged)
    assert str(damaged / WEIGHTS_NAME) in str(error.value)


def test_directory_is_refused(damaged):
    with pytest.raises(InputError, match=r"no adapter_config\.json; expected the directory that PEFT"):
        Adapter.open(damaged / "nowhere")
    good = (damaged / CONFIG_NAME).read_text()
    (damaged / CONFIG_NAME).write_text("{")
    with pytest.raises(InputError, match=r"adapter_config\.json: not valid JSON"):
        Adapter.open(damaged)
    (damaged / CONFIG_NAME).write_text(good)
    whole = (damaged / WEIGHTS_NAME).read_bytes()
    (damaged / WEIGHTS_NAME).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        Adapter.open(damaged)
    (damaged / WEIGHTS_NAME).unlink()
    with pytest.raises(InputError, match=r"no adapter_model\.safetensors; expected the directory"):
        Adapter.open(damaged)
    (damaged / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"adapter_model\.bin is a pickle: convert to safetensors"):
        Adapter.open(damaged)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("model.layers.1.self_attn.v_proj.weight", None, r"v_proj\.lora_A\.weight changes model\.layers\.1"),
        ("model.layers.1.self_attn.v_proj.weight", (16, 33), r"fits a .*v_proj.weight of shape \[16, 32\]"),
        (
            "model.layers.0.mlp.experts.gate_up_proj",
            (8, 32, 48),
            r"base_layer\.lora_A\.weight fits a .*gate_up",
        ),
        ("model.layers.0.mlp.experts.down_proj", (4, 24, 48), r"experts\.lora_A\.weight fits a .*down_proj"),
        ("model.layers.2.mlp.experts.down_proj", (4, 24, 32), r"no LoRA pair for model\.layers\.2\.mlp"),
    ],
    ids=["missing", "columns", "experts", "expert columns", "layer without a pair"],
)
def test_base_that_does_not_fit_is_refused(saved, name, shape, message):
    path, base = saved
    adapter = Adapter.open(path)
    shapes = shapes_of(base)
    adapter.check(shapes)
    shapes[name] = shape
    with pytest.raises(InputError, match=message) as error:
        adapter.check({key: value for key, value in shapes.items() if value is not None})
    assert WEIGHTS_NAME in str(error.value)


def test_merge_refuses_wrong_shape_and_overflow(saved):
    adapter = Adapter.open(saved[0])
    name = "model.layers.0.mlp.experts.down_proj"
    with pytest.raises(InputError, match=r"down_proj of shape \[24, 32\], got \[24, 31\]"):
        adapter.merge(name, torch.zeros(24, 31), 0)
    with pytest.raises(InputError, match=r"overflows torch\.float16"):
        adapter.merge(name, torch.full((24, 32), 1e6), 0, out_dtype=torch.float16)
