"""The model that generates is the model that everything else measures: adapter, experts and config included."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from gptoss_quantize.adapter import Adapter
from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.eval.examples import load_model
from gptoss_quantize.model import hidden_states, logits


def same_as_streamed(checkpoint, ids):
    """Whether the whole model's logits are those of the streamed one."""
    with torch.inference_mode():
        got = load_model(checkpoint, torch.float32)(ids).logits
    expected = logits(hidden_states(checkpoint, ids), checkpoint.head().float())
    # two float32 implementations (tests/root/test_model.py)
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=0)
    return expected


@pytest.mark.parametrize("kind", ["bf16", "mxfp4", "float32"])
def test_a_whole_model_is_the_streamed_one(tiny, kind):
    same_as_streamed(Checkpoint(tiny.path(kind)), tiny.ids(2, 40))


@pytest.mark.parametrize("kind", ["bf16", "mxfp4"])
def test_the_adapter_is_in_it(tiny, tmp_path, kind):
    adapter = Adapter.open(tiny.adapter(tmp_path / "adapter"))
    ids = tiny.ids(2, 24)
    tuned = same_as_streamed(Checkpoint(tiny.path(kind), adapter), ids)
    plain = same_as_streamed(Checkpoint(tiny.path(kind)), ids)
    assert (tuned - plain).abs().max() > 0.1


@pytest.mark.parametrize(
    "changes",
    [{"num_experts_per_tok": None, "experts_per_token": 2}, {"quantization_config": None}, {"rms_norm_eps": None}],
)
def test_what_transformers_reads_otherwise_is_read_our_way(tiny, tmp_path, changes):
    copy = Path(shutil.copytree(tiny.path("mxfp4"), tmp_path / "copy"))
    raw = json.loads((copy / "config.json").read_text(encoding="utf-8")) | changes
    raw = {name: value for name, value in raw.items() if value is not None}
    (copy / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    same_as_streamed(Checkpoint(copy), tiny.ids(2, 24))
