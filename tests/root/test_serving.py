"""What people do with a model from `load`: caches, torch.compile, batches with left padding, pipelines, hub names."""

import pytest
import torch
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
from transformers.models.auto import modeling_auto

import gptoss_quantize
from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.packed_experts import PackedExpertsModule
from gptoss_quantize.quantize.job import Job
from gptoss_quantize.quantize.recipes import RECIPES
from gptoss_quantize.quantize.run import quantize_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"
GREEDY = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12, "pad_token_id": 0}


@pytest.fixture
def registered():
    mapping = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING
    before = dict(mapping._extra_content)
    gptoss_quantize.register()
    yield
    mapping._extra_content.clear()
    mapping._extra_content.update(before)


@pytest.fixture(scope="module")
def quantized(tiny, tmp_path_factory):
    """Return an int4 directory for a way to store attention, embedding and head; each made once."""
    root = tmp_path_factory.mktemp("int4")
    for dense in ("source", "int8"):
        job = Job(dest=root / dense, method="rtn", recipe=RECIPES["rtn"], device="cpu", dense=dense)
        quantize_checkpoint(Checkpoint(tiny.path("bf16")), job, None)
    return lambda dense="source": root / dense


@pytest.fixture(params=["source", "int8"])
def model(request, quantized):
    return gptoss_quantize.load(quantized(request.param), dtype=torch.float32)


def test_a_static_cache_gives_the_same_tokens(model, tiny):
    # longer than the sliding window of 16, so that a wrong window shows
    ids = tiny.ids(1, 24)
    dynamic = model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, cache_implementation="static", **GREEDY), dynamic)
    assert len(set(dynamic[0, 24:].tolist())) > 3


def test_the_whole_model_is_compiled_without_a_break(model, tiny):
    ids = tiny.ids(2, 24)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        want, got = (call(ids, use_cache=False).logits for call in (model, compiled))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


def test_a_batch_with_left_padding_says_what_each_row_says_alone(model, tiny):
    long, short = tiny.ids(1, 24)[0], tiny.ids(2, 24)[1, :9]
    padded = torch.cat((torch.zeros(15, dtype=torch.int64), short))
    mask = torch.ones(2, 24, dtype=torch.int64)
    mask[1, :15] = 0
    together = model.generate(torch.stack((long, padded)), attention_mask=mask, **GREEDY)[:, 24:]
    for row, ids in zip(together, (long, short), strict=True):
        assert torch.equal(row, model.generate(ids[None], **GREEDY)[0, len(ids) :])
    # without the mask the padding is read as text, and says something else
    unmasked = model.generate(torch.stack((long, padded)), attention_mask=torch.ones_like(mask), **GREEDY)[:, 24:]
    assert not torch.equal(unmasked[1], together[1])


def test_a_pipeline_of_a_loaded_model(quantized):
    path = quantized()
    model, tokenizer = gptoss_quantize.load(path, dtype=torch.float32), AutoTokenizer.from_pretrained(path)
    speak = pipeline("text-generation", model=model, tokenizer=tokenizer)
    prompt = "The lighthouse keeper"
    (said,) = speak(prompt, return_full_text=False, **GREEDY)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    want = tokenizer.decode(model.generate(ids, **GREEDY)[0, ids.shape[1] :], skip_special_tokens=True)
    assert said["generated_text"] == want


def test_a_pipeline_of_a_name(quantized, registered):
    speak = pipeline("text-generation", model=str(quantized()), dtype=torch.float32, device="cpu")
    assert isinstance(speak.model.model.layers[0].mlp.experts, PackedExpertsModule)
    assert speak("The sea", return_full_text=False, **GREEDY)[0]["generated_text"]


@pytest.mark.parametrize("revision", [None, "v1"])
def test_hub_names(quantized, registered, tiny, tmp_path, monkeypatch, revision):
    """From the hub's cache, without a network: `load`, and from_pretrained after `register`."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "models--owner--tiny"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / (revision or "main")).write_text(COMMIT)
    (folder / "snapshots").mkdir()
    (folder / "snapshots" / COMMIT).symlink_to(quantized())
    ids = tiny.ids(1)
    model = gptoss_quantize.load("owner/tiny", dtype=torch.float32, revision=revision)
    with torch.inference_mode():
        want = gptoss_quantize.load(quantized(), dtype=torch.float32)(ids).logits
        assert torch.equal(model(ids).logits, want)
    with pytest.raises(gptoss_quantize.InputError, match="owner/other: not in the cache"):
        gptoss_quantize.load("owner/other")
    if revision is None:
        named = AutoModelForCausalLM.from_pretrained("owner/tiny", dtype=torch.float32, cache_dir=None)
        assert isinstance(named.model.layers[0].mlp.experts, PackedExpertsModule)
