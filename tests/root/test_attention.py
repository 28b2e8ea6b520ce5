"""Attention in float32 for processors without fast bfloat16: transformers' own, but for rounding."""

from types import SimpleNamespace

import pytest
import torch
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

import gptoss_quantize
from gptoss_quantize import attention, loading
from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.quantize.job import Job
from gptoss_quantize.quantize.recipes import RECIPES
from gptoss_quantize.quantize.run import quantize_checkpoint


def given(dtype, queries, keys, sequences=2):
    generator = torch.Generator().manual_seed(queries)
    shapes = (sequences, 6, queries, 32), (sequences, 2, keys, 32), (sequences, 2, keys, 32)
    tensors = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    mask = torch.zeros(sequences, 1, queries, keys, dtype=dtype)
    later = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1)
    mask.masked_fill_(later, torch.finfo(dtype).min)
    mask[-1, :, :, :2] = torch.finfo(dtype).min  # padding on the left
    sinks = torch.randn(6, generator=generator).to(dtype)
    return SimpleNamespace(sinks=sinks, num_key_value_groups=3, training=False), tensors, mask


@pytest.mark.parametrize(("queries", "keys"), [(9, 9), (1, 12), (5, 12)])
@pytest.mark.parametrize("scores", [1 << 22, 40], ids=["one block", "blocks"])
def test_it_is_transformers_attention(monkeypatch, queries, keys, scores):
    monkeypatch.setattr(attention, "_SCORES", scores)
    module, tensors, mask = given(torch.float32, queries, keys)
    out, weights = attention.float32_attention(module, *tensors, mask, scaling=0.2)
    assert weights is None
    want, _ = eager_attention_forward(module, *tensors, mask, scaling=0.2)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-6)
    slopes = [torch.autograd.grad(o.square().sum(), tensors) for o in (out, want)]
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-5)
    # a mask that is not heeded, or a sink that is not there, is seen
    assert not torch.allclose(attention.float32_attention(module, *tensors, None, scaling=0.2)[0], want, atol=1e-2)
    module.sinks = module.sinks - 9
    assert not torch.allclose(attention.float32_attention(module, *tensors, mask, scaling=0.2)[0], want, atol=1e-2)


def test_in_bfloat16_it_is_nearer_to_float64_than_transformers():
    module, tensors, mask = given(torch.bfloat16, 24, 24)
    wide = SimpleNamespace(sinks=module.sinks.double(), num_key_value_groups=3, training=False)
    want, _ = eager_attention_forward(wide, *(t.double() for t in tensors), mask.double(), scaling=0.2)
    ours, _ = attention.float32_attention(module, *tensors, mask, scaling=0.2)
    theirs, _ = eager_attention_forward(module, *tensors, mask, scaling=0.2)
    assert ours.dtype == torch.bfloat16
    assert (ours.double() - want).norm() < 0.8 * (theirs.double() - want).norm()


@pytest.fixture
def model(tiny, tmp_path, monkeypatch):
    """Return (int4 in bfloat16 as such a processor has it, the same in float32)."""
    job = Job(dest=tmp_path / "int4", method="rtn", recipe=RECIPES["rtn"], device="cpu")
    quantize_checkpoint(Checkpoint(tiny.path("bf16")), job, None)
    monkeypatch.setattr(loading, "fast_bfloat16", lambda: False)
    return gptoss_quantize.load(job.dest), gptoss_quantize.load(job.dest, dtype=torch.float32)


def test_load_uses_it_where_bfloat16_is_slow(model, tiny):
    narrow, wide = model
    assert (narrow.config._attn_implementation, wide.config._attn_implementation) == (attention.NAME, "eager")
    ids = tiny.ids(2, 40)  # beyond the sliding window of 16
    errors = {}
    with torch.inference_mode():
        want = wide(ids).logits.log_softmax(-1)
        for name in (attention.NAME, "eager"):
            narrow.set_attn_implementation(name)
            errors[name] = float((narrow(ids).logits.float().log_softmax(-1) - want).norm() / want.norm())
    assert errors[attention.NAME] < 1.1 * errors["eager"] < 0.02


def test_with_caches_and_padding(model, tiny):
    narrow, _ = model
    ids, mask = tiny.ids(2, 24), torch.ones(2, 24, dtype=torch.int64)
    mask[1, :7] = 0
    settings = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
    dynamic = narrow.generate(ids, **settings)
    assert torch.equal(narrow.generate(ids, cache_implementation="static", **settings), dynamic)
    narrow.set_attn_implementation("eager")
    assert (narrow.generate(ids, **settings) == dynamic).float().mean() > 0.8
