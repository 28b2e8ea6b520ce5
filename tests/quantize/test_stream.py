"""Experts read ahead: all of them, in order, one chunk ahead, with the reader's refusals raised where they belong."""

import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptoss_quantize.architectures import gptoss_config
from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.config import parse_config
from gptoss_quantize.errors import InputError
from gptoss_quantize.quantize import budget as budget_module
from gptoss_quantize.quantize.budget import resolve_card, solve_bytes
from gptoss_quantize.quantize.stream import chunks, stream_experts
from gptoss_quantize.units import GIB

CPU = torch.device("cpu")


def test_chunks():
    assert chunks(range(5, 12), 3) == [range(5, 8), range(8, 11), range(11, 12)]
    assert chunks(range(4, 4), 3) == []


@pytest.mark.parametrize("kind", ["bf16", "mxfp4"])
@pytest.mark.parametrize("at_once", [1, 3, 8])
def test_the_same_experts_in_order(tiny, kind, at_once):
    source = Checkpoint(tiny.path(kind))
    seen = []
    for part, experts in stream_experts(source, 1, chunks(range(2, 8), at_once), CPU):
        for e, expert in zip(part, experts, strict=True):
            seen.append(e)
            plain = source.expert(1, e)
            assert torch.equal(expert.gate_up, plain.gate_up)
            assert torch.equal(expert.gate_up_bias, plain.gate_up_bias)
            assert torch.equal(expert.down, plain.down)
            assert torch.equal(expert.down_bias, plain.down_bias)
    assert seen == list(range(2, 8))
    assert list(stream_experts(source, 1, [], CPU)) == []


def bytes_read() -> int:
    """Return how many bytes this process has asked files for."""
    return int(Path("/proc/self/io").read_text().split()[1])


def test_one_chunk_is_read_ahead_and_no_more(tiny):
    source = Checkpoint(tiny.path("bf16"))
    config = source.config
    expert = 2 * (2 * config.intermediate * (config.hidden + 1) + config.hidden * (config.intermediate + 1))
    start = bytes_read()
    for part, _ in stream_experts(source, 0, chunks(range(8), 2), CPU):
        wanted, end = min(8, part.stop + 2) * expert, time.monotonic() + 10
        while bytes_read() - start < wanted and time.monotonic() < end:
            time.sleep(0.001)
        # the reader has had time for a third chunk, had it wanted one
        time.sleep(0.02)
        assert wanted <= bytes_read() - start < wanted + expert


def test_what_the_reader_refuses_is_raised_where_it_belongs(tiny, tmp_path):
    path = tiny.copy("float32", tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.0.mlp.experts.down_proj"][2, 7, 11] = float("nan")
    save_file(tensors, path / "model.safetensors")
    stream = stream_experts(Checkpoint(path), 0, chunks(range(4), 1), CPU)
    assert next(stream)[0] == range(1)
    assert next(stream)[0] == range(1, 2)
    with pytest.raises(InputError, match=r"down_proj\[2\] holds 1 NaN"):
        next(stream)


def test_a_card_takes_as_many_experts_as_fit(monkeypatch):
    # arithmetic only: the path itself has not been run on a card
    config = parse_config(gptoss_config("gpt-oss-20b"), "x")
    monkeypatch.setattr(budget_module, "free_memory", lambda: 64 * GIB)
    budgets = [resolve_card(config, 131072, torch.bfloat16, size * GIB) for size in (6, 8, 24, 80)]
    counts = [budget.experts_at_once for budget in budgets]
    assert 1 <= counts[0] < counts[1] < counts[2]
    assert counts[1] - counts[0] == pytest.approx(2 * GIB / solve_bytes(config), abs=1)
    # a quarter of the layer, so that copies and work overlap; less where this machine has no room to pin them
    assert counts[2] == counts[3] == 8
    monkeypatch.setattr(budget_module, "free_memory", lambda: 3 * GIB)
    assert resolve_card(config, 131072, torch.bfloat16, 80 * GIB).experts_at_once == 6
    assert resolve_card(config, 131072, torch.bfloat16, 80 * GIB, 2, 2).experts_at_once == 3
    # other ranks' outputs wait on the card
    monkeypatch.setattr(budget_module, "free_memory", lambda: 64 * GIB)
    assert resolve_card(config, 131072, torch.bfloat16, 8 * GIB, 4).experts_at_once < counts[1]
    with pytest.raises(InputError, match=r"--device cuda with 2\.00 GiB: one expert .* or --device cpu"):
        resolve_card(config, 131072, torch.bfloat16, 2 * GIB)
