"""`verify --runtime vllm` on our plugin as it is, and on plugins that were broken on purpose.

A second plugin of vLLM, in the engine's process only, changes the experts after they were loaded, so that every
tensor is in its place and the answers are wrong: what a wrong reading of the layout would do.
"""

import os

import pytest

from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.runtimes.agreement import AGREES, DISAGREES
from gptoss_quantize.runtimes.verify import COMPARISON, VerifyRequest, verify

BREAKS = """
import os

import torch


def halves(layer):
    # gate and up in turns, read as a half of gates and a half of ups
    for part in (layer.w13_weight_packed, layer.w13_weight_scale, layer.w13_bias):
        part.copy_(torch.cat([part[:, 0::2], part[:, 1::2]], 1))


def biases(layer):
    layer.w13_bias.zero_()
    layer.w2_bias.zero_()


def expert(layer):
    # one expert of one layer
    if ".1." in layer.layer_name:
        codes = layer.w2_weight_packed[3]
        generator = torch.Generator().manual_seed(0)
        codes.random_(-(2**31), 2**31 - 1, generator=generator)


def slightly(layer):
    layer.w13_bias += 0.01


def register():
    from gptoss_quantize.runtimes import vllm_config

    original = vllm_config.GptossQuantizeConfig.get_quant_method

    def get_quant_method(self, layer, prefix):
        method = original(self, layer, prefix)
        if type(method).__name__ == "Int4Experts":
            loaded = method.process_weights_after_loading

            def process(layer):
                loaded(layer)
                with torch.no_grad():
                    globals()[os.environ["GPTOSS_TEST_BREAK"]](layer)

            method.process_weights_after_loading = process
        return method

    vllm_config.GptossQuantizeConfig.get_quant_method = get_quant_method
"""


def asked(tiny, path, baseline=None):
    """3 sequences, 8 positions each, beyond window and original context."""
    ids = tiny.ids(3, 48).clamp(5, 280)
    positions = [3, 9, 15, 20, 28, 36, 42, 47]
    return VerifyRequest(
        checkpoint=Checkpoint(path), baseline=baseline, ids=ids, positions=positions, texts=["The sea was calm.\n"]
    )


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """Return what -> nothing: from here on vLLM's processes load a plugin that breaks ours in that way."""

    def install(what):
        (tmp_path / "breaks.py").write_text(BREAKS)
        facts = tmp_path / "breaks-1.0.dist-info"
        facts.mkdir()
        (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: breaks\nVersion: 1.0\n")
        (facts / "entry_points.txt").write_text("[vllm.general_plugins]\nzz-breaks = breaks:register\n")
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
        monkeypatch.setenv("GPTOSS_TEST_BREAK", what)

    return install


def test_the_plugin_agrees(tiny, checkpoint):
    found = {row.what: row for row in verify(asked(tiny, checkpoint(), Checkpoint(tiny.path())), ("vllm",))}
    assert {row.verdict for row in found.values()} == {AGREES, COMPARISON}
    row = found["int4, our plugin"]
    assert row.verdict == AGREES and row.got.max_difference < 1e-3 and row.got.kl < 1e-6


@pytest.mark.parametrize("what", ["halves", "biases", "expert", "slightly"])
def test_a_broken_plugin_disagrees(tiny, checkpoint, broken, what, record_property):
    broken(what)
    found = {row.what: row for row in verify(asked(tiny, checkpoint()), ("vllm",))}
    # every tensor is where it belongs, and only the answers tell
    assert found["loader"].verdict == AGREES
    row = found["int4, our plugin"]
    record_property("nats at most, KL", f"{row.got.max_difference:.3g}, {row.got.kl:.3g}")
    assert row.verdict == DISAGREES, row
