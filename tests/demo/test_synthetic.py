"""The synthetic model: true shapes, alive, reproducible, and saying what it is."""

import json
from dataclasses import replace

import pytest
import torch

from gptoss_quantize.architectures import SIZES, gptoss_config
from gptoss_quantize.calibration.text import load_tokenizer
from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.config import parse_config
from gptoss_quantize.demo.synthetic import _mxfp4, _numbers, build_synthetic_model, synthetic_config
from gptoss_quantize.errors import InputError
from gptoss_quantize.layouts import MXFP4, dense_shapes, expert_shapes
from gptoss_quantize.model import hidden_states

TINY = {
    "model_type": "gpt_oss",
    "hidden_size": 192,
    "intermediate_size": 320,
    "num_hidden_layers": 3,
    "num_local_experts": 8,
    "num_experts_per_tok": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "sliding_window": 16,
    "vocab_size": 1000,
}


@pytest.fixture(scope="module")
def shape(tmp_path_factory):
    path = tmp_path_factory.mktemp("shape") / "config.json"
    path.write_text(json.dumps(TINY))
    return path


def build(dest, shape, **options):
    return build_synthetic_model(dest, like=str(shape), sample_text="The sea was calm.\n\nIt rained.", **options)


@pytest.fixture(scope="module")
def made(tmp_path_factory, shape):
    path = tmp_path_factory.mktemp("made") / "model"
    return path, build(path, shape)


def test_the_published_shapes():
    # sizes of openai/gpt-oss-20b and -120b on the hub
    for name, layers, experts in (("gpt-oss-20b", 24, 32), ("gpt-oss-120b", 36, 128)):
        config = parse_config(gptoss_config(name), name)
        assert (config.hidden, config.intermediate, config.heads, config.kv_heads) == (2880, 2880, 64, 8)
        assert (config.layers, config.experts, config.top_k, config.vocab) == (layers, experts, 4, 201088)
        assert (config.window(0), config.window(1), config.head_dim) == (128, None, 64)
        # bytes of the released MXFP4 files without their headers: 13.76 GB and 65.25 GB
        shapes = dense_shapes(config) | expert_shapes(config, MXFP4)
        wide = [torch.Size(s).numel() * (1 if n.endswith(("_blocks", "_scales")) else 2) for n, s in shapes.items()]
        assert sum(wide) == {24: 13_761_264_768, 36: 65_248_815_744}[layers]


def test_it_is_a_checkpoint_that_runs(made):
    path, facts = made
    checkpoint = Checkpoint(path)
    assert checkpoint.expert_format == "mxfp4"
    assert (checkpoint.config.hidden, checkpoint.config.layers) == (192, 3)
    files = sum(info.nbytes for name in checkpoint.names() if (info := checkpoint.info(name)))
    assert facts["bytes"] == files
    tokenizer = load_tokenizer(path)
    ids = torch.tensor([tokenizer("The sea was calm. " * 6)["input_ids"][:24]])
    assert int(ids.max()) < checkpoint.config.vocab
    assert tokenizer.decode(ids[0]).startswith("The sea was calm.")
    hidden = hidden_states(checkpoint, ids)
    assert torch.isfinite(hidden).all()
    assert 0.1 < float(hidden.std()) < 10


def test_it_says_what_it_is(made):
    path, _ = made
    config = json.loads((path / "config.json").read_text())
    assert "random weights" in config["gptoss_synthetic"]["what"]
    assert config["gptoss_synthetic"]["of_layers"] == 3
    card = (path / "README.md").read_text()
    assert "Random weights. It knows nothing" in card


def test_weights_look_like_trained_ones(made):
    # E2M1 codes as a Gaussian's: every code used, small ones often; scales that differ; a few loud channels
    path, _ = made
    checkpoint = Checkpoint(path)
    expert = checkpoint.expert(1, 3)
    scales = checkpoint.read("model.layers.1.mlp.experts.gate_up_proj_scales", 3)
    assert 3 <= scales.unique().numel() <= 20
    codes = checkpoint.read("model.layers.1.mlp.experts.gate_up_proj_blocks", 3) & 15
    counts = torch.bincount(codes.flatten().long(), minlength=16).float()
    assert (counts > 0).all()
    assert counts[1] > 2 * counts[7]
    power = expert.gate_up.square().mean(0).sqrt()
    assert 1 <= int((power > 4 * power.median()).sum()) <= 4
    # inputs of unit variance give outputs of the size asked for
    assert 0.5 < float((expert.gate_up.square().sum(1).sqrt()).median()) < 6


def test_scale_of_a_projection():
    blocks, scales = _mxfp4((2, 64, 90, 16), 1.5, _numbers(0, "x"))
    assert blocks.shape == (2, 64, 90, 16)
    assert scales.shape == (2, 64, 90)
    again, _ = _mxfp4((2, 64, 90, 16), 1.5, _numbers(0, "x"))
    assert torch.equal(blocks, again)
    other, _ = _mxfp4((2, 64, 90, 16), 1.5, _numbers(1, "x"))
    assert not torch.equal(blocks, other)


def test_fewer_layers_are_the_beginning(tmp_path, made, shape, tiny):
    build(tmp_path / "cut", shape, layers=1)
    cut, whole = tiny.load_all(tmp_path / "cut"), tiny.load_all(made[0])
    assert cut.keys() == {name for name in whole if not name.startswith(("model.layers.1.", "model.layers.2."))}
    assert all(torch.equal(tensor, whole[name]) for name, tensor in cut.items())
    assert json.loads((tmp_path / "cut" / "config.json").read_text())["num_hidden_layers"] == 1


def test_layers_of_a_published_model():
    raw = synthetic_config("gpt-oss-20b", 2, 5)
    config = parse_config(raw, "x")
    full = parse_config(gptoss_config("gpt-oss-20b"), "x")
    assert config.layers == 2
    assert config.layer_types == full.layer_types[:2]
    assert replace(config, layers=24, layer_types=full.layer_types, raw=full.raw) == full


@pytest.mark.parametrize(
    ("like", "options", "words"),
    [
        ("gpt-oss-7b", {}, "expected gpt-oss-20b, gpt-oss-120b, or a config.json"),
        ("gpt-oss-20b", {"layers": 25}, "--layers 25: gpt-oss-20b has 24; expected 1 to 24"),
        ({"hidden_size": 200}, {}, "hidden_size 200 is not a multiple of 32"),
        ({"vocab_size": 100}, {}, "vocab_size 100: a byte-level tokenizer needs"),
        ({"tie_word_embeddings": True}, {}, "an output head of its own"),
        ({"model_type": "llama"}, {}, "expected 'gpt_oss'"),
    ],
    ids=str,
)
def test_refused(tmp_path, like, options, words):
    if isinstance(like, dict):
        (tmp_path / "config.json").write_text(json.dumps(TINY | like))
        like = str(tmp_path)
    with pytest.raises(InputError) as error:
        build(tmp_path / "out", like, **options)
    assert words in str(error.value)
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_is_left_alone(tmp_path, shape):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").write_text("mine")
    with pytest.raises(InputError, match="already exists"):
        build(tmp_path / "out", shape)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes"]
    assert set(SIZES) == {"gpt-oss-20b", "gpt-oss-120b"}
