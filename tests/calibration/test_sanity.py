"""Whether a model can predict text: the rules, the look at a thousand tokens, and what `quantize` makes of it."""

import json
import math

import pytest
import torch

from gptoss_quantize import api
from gptoss_quantize.calibration import sanity
from gptoss_quantize.calibration.sanity import counting, look, suspicion
from gptoss_quantize.calibration.text import load_tokenizer
from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.model import hidden_states, logits
from gptoss_quantize.quantize.job import Job
from gptoss_quantize.quantize.recipes import RECIPES
from gptoss_quantize.quantize.run import quantize_checkpoint

V = 49152


@pytest.mark.parametrize(
    ("raw", "chat", "words"),
    [
        (28.0, 6.0, None),
        (28.0, None, None),
        # gpt-oss: hundreds on raw text, a handful in its own format
        (300.0, 4.0, None),
        (1.6e9, None, "above half of its vocabulary of 49152"),
        (V / 2 + 1, 6.0, "above half of its vocabulary"),
        (V / 2 - 1, V, "its own chat format, above half"),
        (400.0, 401.0, "counting this text's words gives 100"),
        (400.0, 399.0, None),
        (8001.0, 8.0, "the text is none that the model knows"),
        (7999.0, 8.0, None),
        (math.nan, None, "above half"),
        (math.inf, None, "above half"),
        (None, 6.0, None),
    ],
)
def test_the_rules(raw, chat, words):
    got = suspicion(raw, 1000, V, chat=chat, chat_counting=100.0)
    assert got is None if words is None else words in got


def test_counting_is_the_entropy_of_the_text():
    # four tokens alike are 4, one token only is 1; 8 a and 4 b: H = ln 3 - 2/3 ln 2
    assert counting(torch.tensor([1, 2, 3, 4])) == pytest.approx(4)
    assert counting(torch.tensor([7] * 9)) == pytest.approx(1)
    assert counting(torch.tensor([1] * 8 + [2] * 4)) == pytest.approx(3 / 2 ** (2 / 3))


def test_a_look_is_the_perplexity_of_the_first_tokens(tiny, monkeypatch):
    source, tokenizer = Checkpoint(tiny.path("float32")), load_tokenizer(tiny.path("float32"))
    monkeypatch.setattr(sanity, "LOOK_TOKENS", 160)
    monkeypatch.setattr(sanity, "LOOK_LENGTH", 40)
    ids = tiny.ids(8, 100)
    layers = []
    got = look(source, tokenizer, ids, on_layer=layers.append)
    # two pieces of 40 of the first sequence, one of the second, and 40 tokens of the conversation
    pieces = torch.stack((ids[0, :40], ids[0, 40:80], ids[1, :40]))
    scores = logits(hidden_states(source, pieces), source.head().float()).double().log_softmax(-1)
    loss = -scores[:, :-1].gather(-1, pieces[:, 1:, None])
    assert got["perplexity"] == pytest.approx(float(loss.mean().exp()), rel=1e-4)
    assert got["tokens"] == 160 and got["vocabulary"] == 300 and layers == [0, 1, 2]
    chat = torch.tensor(sanity._chat_ids(tokenizer)[:40])[None]
    scores = logits(hidden_states(source, chat), source.head().float()).double().log_softmax(-1)
    loss = -scores[:, :-1].gather(-1, chat[:, 1:, None])
    assert got["chat_perplexity"] == pytest.approx(float(loss.mean().exp()), rel=1e-4)


def test_a_model_without_a_template_is_looked_at_too(tiny):
    source, tokenizer = Checkpoint(tiny.path("float32")), load_tokenizer(tiny.path("float32"))
    tokenizer.chat_template = None
    got = look(source, tokenizer, tiny.ids(2, 48))
    assert got["chat_perplexity"] is None and got["tokens"] == 96


TEXT = {"tokens": 256, "seq_len": 64, "device": "cpu", "dtype": "float32"}


@pytest.mark.parametrize("method", ["rtn-signed", "gptq"])
def test_quantize_says_it_before_the_first_layer_and_in_the_report(tiny, tmp_path, method):
    phases = []
    with pytest.warns(UserWarning, match="above half of its vocabulary of 300") as said:
        made = api.quantize(
            tiny.path("float32"),
            tmp_path / "out",
            method,
            **TEXT,
            progress=lambda phase, *at: phases.append((phase, *at)),
        )
    assert len(said) == 1 and str(tiny.path("float32")) in str(said[0].message)
    looked = max(i for i, (phase, *_) in enumerate(phases) if "predict text" in phase)
    layers = [i for i, (phase, done, _) in enumerate(phases) if phase.startswith(method) and done]
    assert len(layers) == 3 and looked < min(layers)
    report = made.report
    assert report["suspect"] == report["sanity"]["suspect"] and report["suspect"] in str(said[0].message)
    written = json.loads((tmp_path / "out" / "quantization_report.json").read_text(encoding="utf-8"))
    assert written["suspect"] == report["suspect"]


@pytest.mark.filterwarnings("ignore:.*vocabulary:UserWarning")
def test_a_resumed_run_does_not_look_again_and_writes_the_same_bytes(tiny, tmp_path):
    phases = []

    def run(dest, stop_at=None, **options):
        def progress(phase, done, total):
            phases.append(phase)
            if done == stop_at and phase.startswith("gptq"):
                raise KeyboardInterrupt

        return api.quantize(tiny.path("float32"), dest, "gptq", **TEXT, progress=progress, **options).report

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", stop_at=1)
    assert any("predict text" in phase for phase in phases)
    phases.clear()
    report = run(tmp_path / "cut", resume=True)
    assert not any("predict text" in phase for phase in phases)
    assert report["sanity"] == whole["sanity"] and report["suspect"]
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes()


@pytest.mark.filterwarnings("ignore:.*vocabulary:UserWarning")
def test_the_look_changes_no_byte_of_the_weights(tiny, tmp_path):
    api.quantize(tiny.path("bf16"), tmp_path / "with", "rtn", device="cpu")
    job = Job(dest=tmp_path / "without", method="rtn", recipe=RECIPES["rtn"], device="cpu")
    assert quantize_checkpoint(Checkpoint(tiny.path("bf16")), job, None)["sanity"] is None
    for path in (tmp_path / "with").iterdir():
        # the report and the model card tell what was seen
        if path.name not in ("quantization_report.json", "README.md"):
            assert path.read_bytes() == (tmp_path / "without" / path.name).read_bytes(), path.name


def test_evaluate_names_a_suspect_baseline(tiny, tmp_path):
    job = Job(dest=tmp_path / "int4", method="rtn", recipe=RECIPES["rtn"], device="cpu")
    quantize_checkpoint(Checkpoint(tiny.path("float32")), job, None)
    record = api.evaluate(tmp_path / "int4", tiny.path("float32"), tokens=96, seq_len=48).report
    assert "above half of its vocabulary of 300" in record["suspect"]
    assert [record["suspect"] in words for words in record["warnings"]] == [True]
