"""--dense int8: written, refused, loaded packed, planned to the byte, and close to the model it was."""

import json

import pytest
import torch

from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.dense_int8 import Int8Embedding, Int8Linear
from gptoss_quantize.errors import InputError
from gptoss_quantize.eval.divergence import evaluate
from gptoss_quantize.kernels import int8
from gptoss_quantize.kernels.linear_op import int8_torch
from gptoss_quantize.layouts import INT8, dense_shapes
from gptoss_quantize.loading import load, weight_bytes
from gptoss_quantize.model import hidden_states, logits
from gptoss_quantize.quantize.job import Job
from gptoss_quantize.quantize.recipes import RECIPES
from gptoss_quantize.quantize.run import quantize_checkpoint
from gptoss_quantize.sizes import disk, shard_tensors


def quantize(source, dest, method="rtn", tokens=None, **options):
    job = Job(dest=dest, method=method, recipe=RECIPES[method], device="cpu", dtype=torch.float32, **options)
    return quantize_checkpoint(Checkpoint(source), job, tokens)


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    root = tmp_path_factory.mktemp("int8")
    for dense in ("source", "int8"):
        quantize(tiny.path("bf16"), root / dense, dense=dense)
    return root


def test_what_is_written(tiny, made):
    source, ours = tiny.load_all(tiny.path("bf16")), tiny.load_all(made / "int8")
    plain = tiny.load_all(made / "source")
    config = Checkpoint(made / "int8").config
    matrices = 0
    for name, shape in dense_shapes(config).items():
        if INT8.packs(name):
            stored = list(INT8.parts(name, shape).items())
            matrices += 1
            codes, scale = int8.quantize(source[name])
            assert name not in ours
            assert torch.equal(ours.pop(stored[0][0]), codes)
            assert torch.equal(ours.pop(stored[1][0]), scale)
        else:
            assert torch.equal(ours.pop(name), source[name])
    # four projections in each of three layers, embedding, head
    assert matrices == 14
    # the experts do not know of it
    assert all(torch.equal(tensor, plain[name]) for name, tensor in ours.items())
    assert all(".mlp.experts." in name for name in ours)


def test_calibration_sees_the_original(tiny, tmp_path):
    # codes of the experts are the same: only what is stored of the rest differs
    for dense in ("source", "int8"):
        quantize(tiny.path("bf16"), tmp_path / dense, "awq+gptq", tiny.tokens(8), dense=dense)
    ours, plain = (tiny.load_all(tmp_path / dense) for dense in ("int8", "source"))
    experts = [name for name in plain if ".mlp." in name]
    assert all(torch.equal(ours[name], plain[name]) for name in experts)


def test_runtimes_that_do_not_know_it_must_refuse(made):
    config = json.loads((made / "int8" / "config.json").read_text())
    assert config["gptoss_quantize"]["dense"] == "int8"
    assert config["quantization_config"]["quant_method"] == "gptoss-quantize"
    config = json.loads((made / "source" / "config.json").read_text())
    assert "dense" not in config["gptoss_quantize"]
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"


@pytest.mark.parametrize("group_size", [32, 64])
def test_the_plan_is_exact(tiny, tmp_path, group_size):
    quantize(tiny.path("bf16"), tmp_path / "out", dense="int8", group_size=group_size)
    found = disk(shard_tensors(Checkpoint(tiny.path("bf16")).config, group_size, "int8", lambda name: "BF16"))
    assert found["files"] == [path.stat().st_size for path in sorted((tmp_path / "out").glob("*.safetensors"))]


def test_its_cost_is_measured_and_small(tiny, made):
    ids = tiny.ids(8, seed=5)
    base = Checkpoint(tiny.path("bf16"))
    plain, ours = evaluate(base, [Checkpoint(made / "source"), Checkpoint(made / "int8")], ids)
    # 8 bits cost little beside 4: random weights, plain rounding
    assert ours["kl_mean"] < 1.2 * plain["kl_mean"]
    assert ours["kl_mean"] != plain["kl_mean"]


def test_loaded_it_stays_packed_and_equals_the_streamed_model(tiny, made):
    model = load(made / "int8", dtype=torch.float32)
    plain = load(made / "source", dtype=torch.float32)
    assert isinstance(model.model.layers[1].self_attn.q_proj, Int8Linear)
    assert isinstance(model.model.embed_tokens, Int8Embedding)
    shapes = dense_shapes(Checkpoint(made / "int8").config)
    elements = sum(shape[0] * shape[1] for name, shape in shapes.items() if INT8.packs(name))
    # 8.5 bits where float32 takes 32
    assert weight_bytes(plain) - weight_bytes(model) == elements * (4 - 1 - 2 / 32)
    ids = tiny.ids(2, 24)
    checkpoint = Checkpoint(made / "int8")
    wanted = logits(hidden_states(checkpoint, ids), checkpoint.head())
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, wanted, atol=2e-4, rtol=2e-4)
        assert model.generate(ids[:1], max_new_tokens=4, do_sample=False).shape == (1, 28)


def test_rows_in_blocks_are_the_same(monkeypatch):
    weight = torch.randn(100, 64, generator=torch.Generator().manual_seed(0))
    linear = Int8Linear(*int8.quantize(weight), bias=False)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    whole = linear(x)
    monkeypatch.setattr("gptoss_quantize.kernels.linear_op.BLOCK_ROWS", 33)
    torch.testing.assert_close(int8_torch(x, linear.codes, linear.scale, None), whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(whole, x @ int8.dequantize(linear.codes, linear.scale).T)


def test_refused(tiny, tmp_path, made):
    with pytest.raises(InputError, match="--dense int4: expected source or int8"):
        quantize(tiny.path("bf16"), tmp_path / "out", dense="int4")
    tiny.build(tmp_path / "model", num_attention_heads=3, num_key_value_heads=1, head_dim=16)
    with pytest.raises(InputError, match=r"o_proj.weight has 48 columns, not a multiple of 32; --dense int8 works"):
        quantize(tmp_path / "model", tmp_path / "out", dense="int8")
    with pytest.raises(InputError, match="int4 already"):
        quantize(made / "int8", tmp_path / "out")
    assert not (tmp_path / "out").exists()
