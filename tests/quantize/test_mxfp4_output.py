"""MXFP4 as a target: OpenAI's layout, read by stock transformers and by us, and better than rounding."""

import json

import pytest
import torch
from transformers import GptOssForCausalLM

from gptoss_quantize.adapter import Adapter
from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.errors import InputError
from gptoss_quantize.kernels import mxfp4
from gptoss_quantize.model import hidden_states, logits
from gptoss_quantize.quantize.job import Job
from gptoss_quantize.quantize.recipes import RECIPES, override
from gptoss_quantize.quantize.run import quantize_checkpoint


def run(source, dest, method, tokens=None, **options):
    options = {"recipe": RECIPES[method], "format": "mxfp4", "group_size": 32} | options
    job = Job(dest=dest, method=method, device="cpu", dtype=torch.float32, **options)
    return quantize_checkpoint(source, job, tokens)


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """Return method -> (directory, report), from the bf16 model."""
    root = tmp_path_factory.mktemp("mxfp4")
    source = Checkpoint(tiny.path("bf16"))
    return {m: (root / m, run(source, root / m, m, tiny.tokens())) for m in ("rtn", "gptq")}


def test_rtn_is_what_the_format_says(tiny, made):
    source, path = tiny.load_all(tiny.path("bf16")), made["rtn"][0]
    written = tiny.load_all(path)
    for name in ("gate_up_proj", "down_proj"):
        base = f"model.layers.1.mlp.experts.{name}"
        blocks, scales = mxfp4.encode(source[base].float().transpose(1, 2).contiguous())
        assert torch.equal(written[base + "_scales"], scales)
        assert torch.equal(mxfp4.decode(written[base + "_blocks"], scales), mxfp4.decode(blocks, scales))
        assert torch.equal(written[base + "_bias"], source[base + "_bias"])
    assert {n for n in source if "_proj" not in n or "self_attn" in n} <= written.keys()


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_stock_transformers_and_ours_read_the_same_model(tiny, made, method):
    path = made[method][0]
    assert sorted(p.name for p in path.glob("*.safetensors"))[0] == "model-00001-of-00004.safetensors"
    checkpoint, ids = Checkpoint(path), tiny.ids(2, 24)
    assert checkpoint.expert_format == "mxfp4"
    ours = logits(hidden_states(checkpoint, ids), checkpoint.head().float())
    stock = GptOssForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.inference_mode():
        torch.testing.assert_close(ours, stock(ids).logits, rtol=1e-4, atol=1e-4)


def test_config_and_report(tiny, made):
    path, report = made["gptq"]
    config = json.loads((path / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "mxfp4"
    assert config["gptoss_quantize"]["format"] == "mxfp4"
    assert report["expert_bits_per_weight"] == 4.25
    tensors = tiny.load_all(path)
    bits = 8 * sum(t.numel() for n, t in tensors.items() if n.endswith(("_blocks", "_scales")))
    weights = 3 * 8 * (2 * 320 * 192 + 192 * 320)
    assert bits / weights == report["expert_bits_per_weight"]


def test_gptq_loses_less_than_rounding(tiny, made):
    source, ids = Checkpoint(tiny.path("bf16")), tiny.ids(8, 48, seed=9)
    head = source.head().float()
    want = logits(hidden_states(source, ids), head).log_softmax(-1)

    def kl(path):
        got = logits(hidden_states(Checkpoint(path), ids), head).log_softmax(-1)
        return float((want.exp() * (want - got)).sum(-1).mean())

    # a random model has hardly any correlation to exploit: 0.78 of it
    assert kl(made["gptq"][0]) < 0.85 * kl(made["rtn"][0])


def test_an_adapter_on_the_release_becomes_mxfp4_again(tiny, tmp_path):
    source = Checkpoint(tiny.path("mxfp4"), Adapter.open(tiny.adapter(tmp_path / "lora")))
    run(source, tmp_path / "out", "rtn")
    assert Checkpoint(tmp_path / "out").expert_format == "mxfp4"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"group_size": 64}, "format mxfp4 has groups of 32, not 64"),
        ({"method": "awq"}, "use --method gptq or rtn"),
        ({"method": "rtn-signed"}, "no scale rule 'signed'"),
        ({"format": "nf4"}, "unknown format 'nf4'; known: int4, int3, int2, mxfp4, auto"),
        ({"format": "int4", "recipe": override(RECIPES["gptq"], ["scale=ceil"])}, "format int4 has no scale rule"),
    ],
)
def test_combinations_that_do_not_exist_are_refused(tiny, tmp_path, options, words):
    options = {"method": "gptq"} | options
    with pytest.raises(InputError, match=words):
        run(Checkpoint(tiny.path("bf16")), tmp_path / "out", tokens=tiny.tokens(), **options)
    assert not (tmp_path / "out").exists()


def test_mxfp4_to_mxfp4_is_refused(tiny, tmp_path):
    with pytest.raises(InputError, match="MXFP4 already"):
        run(Checkpoint(tiny.path("mxfp4")), tmp_path / "out", "rtn")
