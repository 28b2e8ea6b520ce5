"""The memory budget: what it resolves to, that results do not depend on it, that a resumed run keeps it."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from gptoss_quantize.architectures import gptoss_config
from gptoss_quantize.calibration import moments
from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.config import parse_config
from gptoss_quantize.errors import InputError
from gptoss_quantize.machine import free_memory
from gptoss_quantize.quantize import run as run_module
from gptoss_quantize.quantize.budget import Budget, Spill, needed, resolve, token_arrays
from gptoss_quantize.quantize.job import Job
from gptoss_quantize.quantize.recipes import RECIPES
from gptoss_quantize.quantize.run import quantize_checkpoint
from gptoss_quantize.units import GIB

BASE = GIB // 2


@pytest.fixture(scope="module")
def small():
    return parse_config(gptoss_config("gpt-oss-20b"), "gpt-oss-20b")


@pytest.fixture(scope="module")
def large():
    return parse_config(gptoss_config("gpt-oss-120b"), "gpt-oss-120b")


def found(config, tokens, memory, threads=2):
    return resolve(config, tokens, torch.bfloat16, memory, threads=threads, base=BASE)


def free_is(monkeypatch, size):
    """Let the machine say that so much memory is free."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=size, total=64 * GIB))


# ---- what it resolves to


def test_more_memory_never_means_less(small):
    last = None
    for size in range(3, 24):
        try:
            budget = found(small, 131072, size * GIB)
        except InputError:
            assert last is None
            continue
        assert needed(small, 131072, torch.bfloat16, BASE, budget.experts_at_once, budget.states) <= size * GIB
        if last is not None:
            assert budget.experts_at_once >= last.experts_at_once
            assert (budget.states, last.states) != ("disk", "memory") or budget.experts_at_once > last.experts_at_once
        last = budget
    assert last is not None
    assert (last.states, last.experts_at_once) == ("memory", 2)


def test_plain_rounding_without_room_is_refused_too(small):
    with pytest.raises(InputError, match=r"--memory 1\.00 GiB: one expert .* with 0 tokens needs about"):
        found(small, 0, GIB)


def test_the_budgets_of_the_issue(small, large):
    # one true-size layer with 128k tokens at 4, 8 and 16 GiB, the whole 20b at 12, the 120b at 24
    assert [found(small, 131072, size * GIB).states for size in (4, 8, 16)] == ["disk", "memory", "memory"]
    assert found(small, 32768, 12 * GIB) == Budget(bytes=12 * GIB, experts_at_once=2, states="memory")
    assert found(large, 131072, 24 * GIB).states == "memory"


def test_threads_have_an_expert_each_where_they_fit(small):
    assert found(small, 8192, 64 * GIB, threads=16).experts_at_once == 16
    assert found(small, 8192, 64 * GIB, threads=64).experts_at_once == 32


def test_too_little_is_refused_with_what_is_needed(small, monkeypatch):
    with pytest.raises(
        InputError, match=r"--memory 2\.00 GiB: one expert .* about 3\.\d+ GiB; give more \(--memory\)"
    ):
        found(small, 131072, 2 * GIB)
    free_is(monkeypatch, GIB)
    with pytest.raises(InputError, match=r"60% of the free memory, 1\.10 GiB"):
        found(small, 131072, None)


def test_free_memory_heeds_the_control_group(monkeypatch, tmp_path):
    (tmp_path / "memory.max").write_text("5000000000\n")
    (tmp_path / "memory.current").write_text("4000000000\n")
    (tmp_path / "memory.stat").write_text("anon 100\ninactive_file 300000000\nactive_file 200000000\n")
    free_is(monkeypatch, 9 * GIB)
    # what the system's cache holds of files is given up when it is wanted
    assert free_memory(tmp_path) == 1_500_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(tmp_path) == 9 * GIB
    assert free_memory(tmp_path / "nothing") == 9 * GIB


# ---- tensors in a file


def test_spilled_tensors_keep_their_values(tmp_path):
    shapes = [((70, 33), torch.bfloat16), ((70, 33), torch.float32)]
    (x, out), drop = token_arrays(shapes, "disk", tmp_path, "cpu")
    assert list(tmp_path.iterdir()) == []
    assert not out.any()
    wanted_x, wanted_out = torch.randn(70, 33).bfloat16(), torch.randn(70, 33)
    x.copy_(wanted_x)
    rows = torch.randperm(70)
    out.index_add_(0, rows, wanted_out)
    drop()
    assert torch.equal(x, wanted_x)
    assert torch.equal(out[rows], wanted_out)


def test_dropping_frees_memory(tmp_path):
    spill = Spill(tmp_path, 64 << 20)
    tensor = spill.tensor((16 << 20,), torch.float32)
    before = psutil.Process().memory_info().rss
    tensor.fill_(1.0)
    full = psutil.Process().memory_info().rss
    spill.release()
    after = psutil.Process().memory_info().rss
    assert full - before > 48 << 20
    assert after - before < 16 << 20
    assert float(tensor.sum()) == 16 << 20


@pytest.mark.parametrize("system", ["Linux", "macOS"])
def test_a_disk_without_room_is_refused_before_anything_is_mapped(tmp_path, full_disk, system, monkeypatch):
    if system == "macOS":
        monkeypatch.delattr(os, "posix_fallocate")
    with (
        full_disk(1 << 16),
        pytest.raises(InputError, match=r"spill\.bin: .* cannot be taken .*File too large.* --resume"),
    ):
        Spill(tmp_path, 1 << 20)
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert list(tmp_path.iterdir()) == []


# ---- results


def quantize(tiny, dest, method="gptq", budget=None, **options):
    job = Job(dest=dest, method=method, recipe=RECIPES[method], device="cpu", dtype=torch.float32, **options)
    return quantize_checkpoint(
        Checkpoint(tiny.path("bf16")), job, tiny.tokens(), **({} if budget is None else budget)
    )


def stop(index: int) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("method", ["gptq", "awq+gptq"])
def test_codes_do_not_depend_on_the_budget(tiny, tmp_path, method):
    made = []
    for count, states in ((8, "memory"), (3, "memory"), (1, "disk")):
        out, state = tmp_path / f"{count}{states}", tmp_path / f"{count}{states}.partial" / "state.json"
        with pytest.raises(KeyboardInterrupt):
            quantize(tiny, out, method, budget={"on_layer": stop})
        # a continued run keeps the budget that it was begun with: here another one for what is left
        given = asdict(Budget(bytes=GIB, experts_at_once=count, states=states))
        state.write_text(json.dumps(json.loads(state.read_text()) | {"budget": given}))
        assert quantize(tiny, out, method, resume=True)["memory"] == given
        made.append(tiny.load_all(out))
    first, *others = made
    for other in others:
        assert other.keys() == first.keys()
        assert [name for name in first if not torch.equal(first[name], other[name])] == []


def test_a_resumed_run_keeps_its_budget(tiny, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        quantize(tiny, out, budget={"on_layer": stop})
    stored = json.loads((tmp_path / "out.partial" / "state.json").read_text())["budget"]
    # much less is free now
    free_is(monkeypatch, 0)
    with pytest.raises(InputError, match=r"--memory 0\.00 GiB: one expert of this model"):
        quantize(tiny, out, resume=True, memory=9)
    report = quantize(tiny, out, resume=True)
    assert report["memory"] == stored


def test_a_resumed_run_takes_another_budget_when_it_is_given_one(tiny, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        quantize(tiny, tmp_path / "out", memory=8 * GIB, budget={"on_layer": stop})
    report = quantize(tiny, tmp_path / "out", resume=True, memory=9 * GIB)
    assert report["memory"]["bytes"] == 9 * GIB
    quantize(tiny, tmp_path / "undisturbed")
    first, second = (tiny.load_all(tmp_path / name) for name in ("out", "undisturbed"))
    assert [name for name in first | second if not torch.equal(first[name], second[name])] == []


def test_the_peak_is_in_the_report(tiny, tmp_path):
    report = quantize(tiny, tmp_path / "out", memory=8 * GIB)
    assert report["memory"]["bytes"] == 8 * GIB
    assert 50 < report["peak_rss_mib"] < 9 * 1024


@pytest.mark.parametrize("method", ["gptq", "awq+gptq"])
def test_tokens_on_disk_are_dropped_after_every_block(tiny, tmp_path, monkeypatch, method):
    # an expert may see nearly all tokens: what it has touched must not wait for its end
    dropped, arrays = [], run_module.token_arrays
    monkeypatch.setattr(moments, "BLOCK_TOKENS", 8)

    def counted(*args):
        tensors, drop = arrays(*args)
        return tensors, lambda: (dropped.append(1), drop())

    monkeypatch.setattr(run_module, "token_arrays", counted)
    report = quantize(tiny, tmp_path / "out", method)
    blocks = sum(-(-count // 8) for layer in report["layers"] for count in layer["tokens"])
    assert blocks > 100
    assert len(dropped) > (3 if "awq" in method else 2) * blocks
