"""Experts read ahead: all of them, in order, one chunk ahead, with the reader's refusals raised where they belong."""

import threading

import pytest
import torch

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


def test_one_chunk_is_read_ahead_and_no_more(tiny, monkeypatch):
    read, main = [], threading.get_ident()
    expert = Checkpoint.expert

    def noted(self, layer, e):
        assert threading.get_ident() != main
        read.append(e)
        return expert(self, layer, e)

    monkeypatch.setattr(Checkpoint, "expert", noted)
    for part, _ in stream_experts(Checkpoint(tiny.path("bf16")), 0, chunks(range(8), 2), CPU):
        assert read[: part.stop] == list(range(part.stop))
        assert len(read) <= part.stop + 2


def test_what_the_reader_refuses_is_raised(tiny, monkeypatch):
    def refuse(self, layer, e):
        if e == 2:
            raise InputError("damaged")
        return None

    monkeypatch.setattr(Checkpoint, "expert", refuse)
    monkeypatch.setattr("gptoss_quantize.quantize.stream._each", lambda expert, change: expert)
    stream = stream_experts(Checkpoint(tiny.path("bf16")), 0, chunks(range(4), 1), CPU)
    assert next(stream)[0] == range(1)
    assert next(stream)[0] == range(1, 2)
    with pytest.raises(InputError, match="damaged"):
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
