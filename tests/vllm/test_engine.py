"""vLLM's engine on our checkpoints, on a CPU: the log-probability of every token of a prompt, beside ours in float32.

The tiny model has every bias, sink, window and YaRN alive; hidden size 192 and intermediate size 320 are no multiples
of 128. All questions to one process are asked in one, since importing vLLM takes longer than answering.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptoss_quantize.calibration.text import load_tokenizer
from gptoss_quantize.runtimes import check_vllm

BOUND = 1e-3  # nats, of any token: what float32 in another order may cost
WITHOUT = {"VLLM_PLUGINS": ""}  # vLLM's own switch: no plugin is loaded
ROOT = Path(__file__).resolve().parents[2]
EAGER32 = {"dtype": "float32"}
# name -> (source, group size, dense, number of prompts): what must give our log-probabilities
KINDS = {
    "group 64": ("bf16", 64, "source", 32),
    "group 32": ("bf16", 32, "source", 4),
    # no YaRN, which ends in KeyError 'factor' inside vLLM's own model
    "default rope": ("default", 64, "source", 4),
    "tied head": ("tied", 64, "source", 4),
    "int8": ("bf16", 64, "int8", 4),
    "int8, tied head": ("tied", 64, "int8", 4),
}
MISSING = (
    "model.layers.1.mlp.experts.3.w2_bias",
    "model.layers.2.mlp.experts.0.w13_weight_scale",
    "model.layers.0.self_attn.k_proj.weight",
    "lm_head.weight",
)
EXTRA = "model.layers.0.mlp.experts.0.w13_weight_offset"
# name -> (change of config.json, options, words of the refusal)
REFUSED = {
    "limit": ({"swiglu_limit": 5.0}, {}, "swiglu_limit is 5.0"),
    "alpha": ({"swiglu_alpha": 1.0}, {}, "swiglu_alpha is 1.0"),
    "unknown format": ({"gptoss_quantize": {"format": "int5"}}, {}, "update gptoss-quantize"),
    "fewer bits": ({"gptoss_quantize": {"format": "int3"}}, {}, "quantize --bits 4"),
    "adapter": ({}, {"enable_lora": True}, "--adapter"),
    "backend": ({}, {"moe_backend": "triton"}, "leave it out"),
}


def prompts(tiny, count=4, length=127):
    """Random tokens beyond the window (16) and YaRN's original context (32); 32 x 127 = 4,064."""
    return tiny.ids(count, length).clamp(5, 280).tolist()


def question(path, asked=((5, 6, 7),), **options):
    """A question for every token of the prompts, in float32."""
    return check_vllm.question(path, [list(p) for p in asked], "prompts", **(EAGER32 | options))


def changed(path, dest, **fields):
    """A copy with other fields in config.json; None takes one out."""
    shutil.copytree(path, dest)
    raw = json.loads((dest / "config.json").read_text()) | fields
    (dest / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not None}))
    return dest


def without_tensor(path, dest, name):
    """A copy in which a tensor is neither in its shard nor in the index."""
    shutil.copytree(path, dest)
    index = json.loads((dest / "gptoss-int4.safetensors.index.json").read_text())
    shard = dest / index["weight_map"].pop(name)
    tensors = load_file(shard)
    del tensors[name]
    save_file(tensors, shard, metadata={"format": "pt"})
    (dest / "gptoss-int4.safetensors.index.json").write_text(json.dumps(index))
    return dest


def with_tensor(path, dest, name):
    """A copy with a tensor that no gpt-oss has."""
    shutil.copytree(path, dest)
    index = json.loads((dest / "gptoss-int4.safetensors.index.json").read_text())
    shard = dest / next(iter(index["weight_map"].values()))
    save_file(load_file(shard) | {name: torch.ones(4)}, shard, metadata={"format": "pt"})
    index["weight_map"][name] = shard.name
    (dest / "gptoss-int4.safetensors.index.json").write_text(json.dumps(index))
    return dest


@pytest.fixture(scope="session")
def other(checkpoint, tmp_path_factory):
    """Our files as another tool would have written them: without the marker."""
    return changed(checkpoint(), tmp_path_factory.mktemp("other") / "model", gptoss_quantize=None)


@pytest.fixture(scope="session")
def answers(tiny, checkpoint, other, tmp_path_factory):
    """Everything that one process is asked, with the plugin: name -> log-probabilities or why there are none."""
    damaged = tmp_path_factory.mktemp("damaged")
    questions = {name: question(checkpoint(*kind), prompts(tiny, count)) for name, (*kind, count) in KINDS.items()}
    questions |= {
        name: question(changed(checkpoint(), damaged / name, **fields), **options)
        for name, (fields, options, _) in REFUSED.items()
    }
    questions |= {
        name: question(without_tensor(checkpoint(), damaged / str(i), name)) for i, name in enumerate(MISSING)
    }
    questions["a tensor too many"] = question(with_tensor(checkpoint(), damaged / "more", EXTRA))
    questions["another tool's file"] = question(other)
    questions["bf16 model"] = question(tiny.path(), prompts(tiny, 2))
    questions["compiled"] = question(checkpoint(), prompts(tiny, 2, 48), dtype="bfloat16", enforce_eager=False)
    return dict(zip(questions, check_vllm.ask(list(questions.values())), strict=True))


@pytest.fixture(scope="session")
def without(tiny, checkpoint, other):
    """The same without the plugin."""
    models = {"int4": checkpoint(), "int8": checkpoint("bf16", 64, "int8"), "another tool's file": other}
    asked = [*map(question, models.values()), question(tiny.path(), prompts(tiny, 2))]
    return dict(zip([*models, "bf16 model"], check_vllm.ask(asked, environment=WITHOUT), strict=True))


def distance(got, expected):
    """The largest difference of a log-probability."""
    assert isinstance(got, torch.Tensor), got
    assert got.shape == expected.shape
    return float((got - expected).abs().max())


@pytest.mark.parametrize("name", KINDS)
def test_every_token_has_our_log_probability(answers, tiny, checkpoint, ours, name, record_property):
    *kind, count = KINDS[name]
    expected = ours(checkpoint(*kind), prompts(tiny, count))
    assert expected.std() > 0.5
    record_property("nats at most", f"{distance(answers[name], expected):.3g} of {len(expected)}")
    assert distance(answers[name], expected) < BOUND


def test_compiled_in_bfloat16(answers, tiny, checkpoint, ours, record_property):
    got, expected = answers["compiled"], ours(checkpoint(), prompts(tiny, 2, 48))
    assert isinstance(got, torch.Tensor), got
    difference = (got - expected).abs()
    record_property(
        "median, mean, most", f"{difference.median():.3g}, {difference.mean():.3g}, {difference.max():.3g}"
    )
    # 16-bit engines are this far apart on single tokens; the eager float32 test is the sharp one
    assert difference.median() < 0.1 and difference.mean() < 0.2


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(answers, name):
    assert REFUSED[name][2] in answers[name]


@pytest.mark.parametrize("name", MISSING)
def test_a_missing_tensor_is_named(answers, name):
    assert name in answers[name]


def test_a_tensor_that_no_model_has_is_named(answers):
    # vLLM's own loader passes over such a name, or ends in a KeyError
    assert EXTRA in answers["a tensor too many"]


# --- what is not ours


def test_other_files_go_their_way(answers, without):
    # vLLM 0.32 has no int4 experts for gpt-oss on a CPU without AMX, and says so, plugin or not
    theirs = without["another tool's file"]
    assert answers["another tool's file"] == theirs
    assert "No WNA16 MoE backend" in theirs
    assert torch.equal(answers["bf16 model"], without["bf16 model"])


def test_without_the_plugin_both_kinds_end_here(without):
    assert without["int4"] == without["another tool's file"]
    assert "Unknown quantization method: gptoss-quantize" in without["int8"]


def test_a_dense_compressed_tensors_model_is_not_taken(tmp_path):
    # an int4 Llama, as llm-compressor describes it
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    described = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    raw = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 64, **sizes}
    (tmp_path / "config.json").write_text(json.dumps(raw | {"quantization_config": described}))
    from vllm.engine.arg_utils import EngineArgs

    options = {"skip_tokenizer_init": True, "dtype": "bfloat16", "max_model_len": 32}
    built = EngineArgs(model=str(tmp_path), **options).create_engine_config()
    assert type(built.quant_config).__name__ == "CompressedTensorsConfig"
    assert built.model_config.architecture == "LlamaForCausalLM"


# --- two processes


# one NUMA node is enough, and the ranks need not import everything again
RANKS = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_WORKER_MULTIPROC_METHOD": "fork"}
SPLITS = {
    "tensor parallel, group 32": (32, "source", {}),
    "expert parallel, group 64": (64, "source", {"enable_expert_parallel": True}),
    "tensor parallel, int8": (32, "int8", {}),
}


@pytest.fixture(scope="session")
def split_answers(tiny, checkpoint):
    """Everything that two ranks are asked."""
    questions = {
        name: question(checkpoint("bf16", group_size, dense), prompts(tiny), tensor_parallel_size=2, **options)
        for name, (group_size, dense, options) in SPLITS.items()
    }
    questions["cut"] = question(checkpoint(), tensor_parallel_size=2)
    return dict(zip(questions, check_vllm.ask(list(questions.values()), environment=RANKS), strict=True))


@pytest.mark.parametrize("name", SPLITS)
def test_two_ranks(split_answers, tiny, checkpoint, ours, name, record_property):
    group_size, dense, _ = SPLITS[name]
    expected = ours(checkpoint("bf16", group_size, dense), prompts(tiny))
    record_property("nats at most", f"{distance(split_answers[name], expected):.3g} of {len(expected)}")
    assert distance(split_answers[name], expected) < BOUND


def test_a_split_that_cuts_groups_names_the_size_that_works(split_answers):
    # 320 / 2 = 160 columns are no whole groups of 64
    assert "--group-size 32" in split_answers["cut"]


# --- the demo model


@pytest.mark.skipif("GPTOSS_DEMO" not in os.environ, reason="GPTOSS_DEMO names no int4 demo model")
def test_the_demo_model(ours, record_property):
    path = Path(os.environ["GPTOSS_DEMO"])
    pages = ("method", "checkpoint-format")
    text = "\n".join((ROOT / f"docs/{page}.md").read_text(encoding="utf-8") for page in pages)
    ids = load_tokenizer(path)(text, add_special_tokens=False)["input_ids"][:4160]
    asked = [ids[i : i + 260] for i in range(0, len(ids), 260)]
    (got,) = check_vllm.ask([question(path, asked)])
    expected = ours(path, asked)
    assert len(expected) > 4096
    record_property(
        "nats at most, on average, tokens",
        f"{distance(got, expected):.3g}, {(got - expected).abs().mean():.3g}, {len(got)}",
    )
    assert distance(got, expected) < BOUND
