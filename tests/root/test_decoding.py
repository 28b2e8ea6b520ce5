"""One token of one sequence by the short way: what transformers says, but for rounding, and only where it is that."""

import inspect

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache, GptOssForCausalLM, StaticCache

import gptoss_quantize
from gptoss_quantize import decoding, loading
from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.quantize.job import Job
from gptoss_quantize.quantize.recipes import RECIPES
from gptoss_quantize.quantize.run import quantize_checkpoint

# transformers 5.24 gave it another name
CACHE = "cache" if "cache" in inspect.signature(GptOssForCausalLM.forward).parameters else "past_key_values"
# beyond the sliding window of 16
PROMPT = 24


@pytest.fixture(scope="module")
def path(tiny, tmp_path_factory):
    job = Job(dest=tmp_path_factory.mktemp("int4") / "out", method="rtn", recipe=RECIPES["rtn"], device="cpu")
    quantize_checkpoint(Checkpoint(tiny.path("bf16")), job, None)
    return job.dest


@pytest.fixture
def stepped(monkeypatch):
    """Count the calls that take the short way."""
    calls = []

    def counted(*args):
        calls.append(1)
        return decoding.step(*args)

    monkeypatch.setattr(loading, "step", counted)
    return calls


@pytest.mark.parametrize("windowed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_says_what_transformers_says(path, tiny, stepped, monkeypatch, dtype, windowed):
    model, ids = gptoss_quantize.load(path, dtype=dtype), tiny.ids(1, PROMPT + 12)
    with torch.inference_mode():
        wide = gptoss_quantize.load(path, dtype=torch.float32)
        want = wide(ids, use_cache=False).logits[:, PROMPT:].double()
    errors = {}
    for short in (True, False):
        monkeypatch.setattr(loading, "is_step", decoding.is_step if short else lambda *args: False)
        cache = DynamicCache(config=model.config) if windowed else DynamicCache()
        held = {CACHE: cache, "use_cache": True}
        with torch.inference_mode():
            model(ids[:, :PROMPT], **held)
            rows = [model(ids[:, i : i + 1], **held).logits for i in range(PROMPT, PROMPT + 12)]
        errors[short] = float((torch.cat(rows, 1) - want).norm() / want.norm())
        assert cache.get_seq_length() == PROMPT + 12
    assert len(stepped) == 12
    assert errors[True] < (1e-5 if dtype == torch.float32 else 1.2 * errors[False])


def test_generate_takes_it_and_answers_the_same(path, tiny, stepped, monkeypatch):
    model = gptoss_quantize.load(path, dtype=torch.float32)
    settings = {"do_sample": False, "max_new_tokens": 20, "min_new_tokens": 20, "pad_token_id": 0}
    short = model.generate(tiny.ids(1, PROMPT), **settings)
    assert len(stepped) == 19
    monkeypatch.setattr(loading, "is_step", lambda *args: False)
    assert torch.equal(model.generate(tiny.ids(1, PROMPT), **settings), short)
    assert len(stepped) == 19


def test_everything_else_goes_the_long_way(path, tiny, stepped):
    model = gptoss_quantize.load(path, dtype=torch.float32)
    ids, one = tiny.ids(2, PROMPT), tiny.ids(2, PROMPT)[:, -1:]

    def read(sequences=1, make=lambda: DynamicCache(config=model.config)):
        cache = make()
        with torch.no_grad():
            model(ids[:sequences], **{CACHE: cache}, use_cache=True)
        return cache

    def static():
        return StaticCache(config=model.config, max_cache_len=40)

    hidden = torch.ones(1, PROMPT + 1, dtype=torch.int64)
    hidden[0, 3] = 0
    with torch.no_grad():
        model(one, **{CACHE: read(2)})
        model(ids[:1, -2:], **{CACHE: read()})
        model(one[:1], **{CACHE: read()}, attention_mask=hidden)
        model(one[:1], **{CACHE: read(1, static)})
        model(one[:1])
        assert model(one[:1], **{CACHE: read()}, labels=one[:1]).logits is not None
        watched = model.model.layers[1].register_forward_hook(lambda *args: None)
        model(one[:1], **{CACHE: read()})
        watched.remove()
        model.train()
        model(one[:1], **{CACHE: read()})
        model.eval()
    assert model(one[:1], **{CACHE: read()}).logits.requires_grad
    assert not stepped
    with torch.no_grad():
        model(one[:1], **{CACHE: read()}, attention_mask=torch.ones_like(hidden))
        assert len(stepped) == 1
        # transformers leaves hooks behind, so from here on all goes the long way
        assert model(one[:1], **{CACHE: read()}, output_hidden_states=True).hidden_states is not None
        assert len(stepped) == 1


def test_shared_projections_are_the_same_weights(path, tiny):
    model, checkpoint = gptoss_quantize.load(path), Checkpoint(path)
    for number, layer in enumerate(model.model.layers):
        module = layer.self_attn
        assert len(decoding._projections(module)) == 1
        for name in ("q_proj", "k_proj", "v_proj"):
            stored = checkpoint.dense(f"model.layers.{number}.self_attn.{name}.weight")
            assert torch.equal(getattr(module, name).weight, stored)
    module = model.model.layers[0].self_attn
    assert "together" not in dict(module.named_modules())
    # other weights, or an adapter, are heeded
    module.k_proj.weight = torch.nn.Parameter(module.k_proj.weight * 2)
    assert len(decoding._projections(module)) == 3


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_an_adapter_is_heeded(path, tiny, stepped):
    model, ids = gptoss_quantize.load(path), tiny.ids(1, PROMPT)
    settings = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 0}
    plain = model.generate(ids, **settings)
    tuned = get_peft_model(model, LoraConfig(target_modules=["k_proj"], r=2, init_lora_weights=False)).eval()
    before = len(stepped)
    with torch.inference_mode():
        cache = DynamicCache(config=model.config)
        tuned(ids, **{CACHE: cache}, use_cache=True)
        got = tuned(ids[:, :1], **{CACHE: cache}, use_cache=True).logits.float()
        want = tuned(torch.cat((ids, ids[:, :1]), 1), use_cache=False).logits[:, -1:].float()
    assert len(stepped) == before + 1
    assert (got - want).abs().max() < 0.2
    with tuned.disable_adapter():
        assert torch.equal(tuned.generate(input_ids=ids, **settings), plain)
