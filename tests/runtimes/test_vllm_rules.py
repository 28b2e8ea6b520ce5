"""What the vLLM plugin decides without vLLM: which checkpoints are ours, versions, settings, splits, backends."""

import subprocess
import sys
import types
from importlib.metadata import entry_points

import pytest
import torch
from transformers import GptOssConfig

from gptoss_quantize.config import parse_config, rope_frequencies
from gptoss_quantize.errors import InputError
from gptoss_quantize.runtimes import vllm_plugin
from gptoss_quantize.runtimes import vllm_rules as rules


def config(**fields):
    """A transformers config of a small gpt-oss model, as vLLM hands it over."""
    sizes = {"num_hidden_layers": 2, "num_local_experts": 4, "hidden_size": 64, "intermediate_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 32}
    return GptOssConfig(**(sizes | heads | fields))


def test_the_entry_point_is_installed():
    (found,) = [point for point in entry_points(group="vllm.general_plugins") if point.name == "gptoss-quantize"]
    assert found.load() is vllm_plugin.register


def test_the_entry_point_imports_neither_torch_nor_vllm():
    # it is loaded by every vLLM, and must not slow those that serve other models
    code = (
        "import sys, gptoss_quantize.runtimes.vllm_plugin; "
        "print([m for m in ('torch', 'transformers', 'vllm') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("version", "known"),
    [
        ("0.31.0", True),
        ("0.32.0", True),
        ("0.32.1.dev3+gabc", True),
        ("0.33.0", True),
        ("0.30.2", False),
        ("0.34.0", False),
        ("1.32.0", False),
        ("0.3.2", False),
    ],
)
def test_versions(version, known):
    assert rules.known_version(version) is known


def test_only_our_int4_checkpoints_are_taken():
    ours = {"version": "0.1.0", "format": "int4", "method": "gptq", "group_size": 64}
    assert rules.marked(config(gptoss_quantize=ours)) == ours
    assert rules.marked(config(gptoss_quantize=ours | {"dense": "int8"})) is not None
    described = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    assert rules.marked(config(quantization_config=described)) is None
    assert rules.marked(config(gptoss_quantize=ours | {"format": "mxfp4"})) is None
    assert rules.marked(config()) is None
    assert rules.marked(None) is None


@pytest.mark.parametrize("change", [{"format": "int5"}, {"format": None}, {"dense": "int4"}])
def test_a_format_of_a_later_version_is_refused(change):
    with pytest.raises(InputError, match="update gptoss-quantize"):
        rules.marked(config(gptoss_quantize={"format": "int4"} | change))


@pytest.mark.parametrize(
    "change",
    [
        {"swiglu_limit": 6.0},
        {"swiglu_alpha": 1.5},
        {"rms_norm_eps": 1e-6},
        {"attention_bias": False},
        {"layer_types": ["full_attention", "sliding_attention"]},
    ],
)
def test_settings_that_vllm_has_written_in(change):
    rules.check_settings(config().to_dict())
    with pytest.raises(InputError, match=next(iter(change))):
        rules.check_settings(config(**change).to_dict())


def test_a_number_written_out_from_float32_is_the_same():
    # the demo model's 1e-5
    rules.check_settings(config(rms_norm_eps=9.999999747378752e-06, swiglu_alpha=1.7020000219345093).to_dict())
    with pytest.raises(InputError, match=r"rms_norm_eps is 1\.00001e-05"):
        rules.check_settings(config(rms_norm_eps=1.00001e-05).to_dict())


def test_an_attention_factor_of_its_own_is_refused():
    raw = config().to_dict()
    raw["rope_parameters"]["attention_factor"] = 1.5
    with pytest.raises(InputError, match="attention_factor"):
        rules.check_settings(raw)


def test_a_default_rope_becomes_yarn_that_changes_nothing():
    plain = config(rope_parameters={"rope_type": "default", "rope_theta": 5000.0})
    complete = rules.yarn(plain.rope_parameters, plain.max_position_embeddings)
    # the keys that OAIAttention reads; its KeyError is 'factor'
    assert {"rope_theta", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow"} <= complete.keys()
    raw = plain.to_dict()
    expected, scale = rope_frequencies(parse_config(raw, "test"))
    raw["rope_parameters"] = complete | {"rope_type": "yarn"}
    got, factor = rope_frequencies(parse_config(raw, "test"))
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    assert (factor, scale) == (1.0, 1.0)


def test_yarn_keeps_what_it_says_and_gets_the_defaults():
    rope = {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 16.0, "truncate": False}
    assert rules.yarn(rope, 4096) == rope | {"beta_slow": 1.0, "original_max_position_embeddings": 4096}
    with pytest.raises(InputError, match="linear"):
        rules.yarn({"rope_type": "linear"}, 4096)


@pytest.mark.parametrize(
    ("ranks", "group", "works"),
    [(1, 64, True), (2, 32, True), (2, 64, "32"), (3, 64, True), (4, 32, ""), (4, 64, ""), (7, 32, "")],
)
def test_splits_of_gpt_oss(ranks, group, works):
    # 2880 = 45 * 64 = 90 * 32
    if works is True:
        return rules.check_split(2880, ranks, group)
    with pytest.raises(InputError, match="--enable-expert-parallel") as refused:
        rules.check_split(2880, ranks, group)
    assert (f"--group-size {works}" in str(refused.value)) is bool(works)
    return None


def test_splits_of_8_bit_columns():
    rules.check_columns(4096, 2, 32, "o_proj")
    with pytest.raises(InputError, match="o_proj has 96"):
        rules.check_columns(96, 2, 32, "o_proj")


@pytest.mark.parametrize(
    ("backend", "humming", "capability", "who"),
    [
        ("auto", True, 75, "vLLM"),
        ("auto", True, 89, "vLLM"),
        ("auto", False, 89, "ours"),
        ("auto", False, None, "ours"),
        ("triton", True, 89, "ours"),
        ("emulation", False, 89, "vLLM"),
        ("humming", True, 90, "vLLM"),
        ("humming", False, 90, "not installed"),
        ("auto", False, 75, "needs humming"),
        ("marlin", True, 89, "biases"),
    ],
)
def test_who_runs_the_experts_on_a_card(backend, humming, capability, who):
    if who in ("vLLM", "ours"):
        assert rules.card_backend(backend, humming, capability) == who
    else:
        with pytest.raises(InputError, match=who):
            rules.card_backend(backend, humming, capability)


def test_only_openais_vocabulary_speaks_harmony():
    assert rules.speaks_harmony(201_088)
    assert not rules.speaks_harmony(49_152)


# --- a vLLM that the plugin does not know, as far as `register` sees it


class Base:
    """vLLM's QuantizationConfig, by what its subclasses must have."""

    __abstractmethods__ = frozenset({"get_name", "from_config"})


@pytest.fixture
def strange_vllm(monkeypatch):
    """Return a function that makes `import vllm` find version 0.99, and the dict of what is registered with it."""
    registered = {}

    def module(name, **attributes):
        found = types.ModuleType(name)
        vars(found).update(attributes)
        monkeypatch.setitem(sys.modules, name, found)

    def make(base=Base):
        for name in ("vllm", "vllm.model_executor", "vllm.model_executor.layers"):
            module(name)
        module("vllm.version", __version__="0.99.0")

        def wrapper(name):
            return lambda cls: registered.setdefault(name, cls)

        module("vllm.model_executor.layers.quantization", register_quantization_config=wrapper)
        has = {"QuantizationConfig": base} if base else {}
        module("vllm.model_executor.layers.quantization.base_config", **has)
        return registered

    return make


def test_another_version_serves_other_models_and_refuses_ours(strange_vllm):
    registered = strange_vllm()
    vllm_plugin.register()
    override = registered["gptoss-quantize"].override_quantization_method
    assert override({"quant_method": "compressed-tensors"}, None, hf_config=config()) is None
    assert override({"quant_method": "compressed-tensors"}, None) is None
    with pytest.raises(ValueError, match=r"vLLM 0\.99\.0.*0\.31\.x, 0\.32\.x, 0\.33\.x"):
        override({"quant_method": "compressed-tensors"}, None, hf_config=config(gptoss_quantize={"format": "int4"}))
    with pytest.raises(ValueError, match=r"0\.33\.x"):
        # the layout of `--dense int8`, which needs no config to be known
        override({"quant_method": "gptoss-quantize"}, None)


def test_a_version_without_the_seam_goes_on(strange_vllm, caplog):
    strange_vllm(base=None)
    vllm_plugin.register()
    assert "no plugin for vLLM 0.99.0" in caplog.text
