"""Several ranks on one quantization: shares, the same bits as one process, a lost rank, another number of ranks."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.errors import InputError
from gptoss_quantize.layouts import INT2, INT4
from gptoss_quantize.quantize.job import Job
from gptoss_quantize.quantize.mixing import total_bytes
from gptoss_quantize.quantize.ranks import SINGLE, Ranks, everyone, from_first, gather_tensors, in_turn, joined
from gptoss_quantize.quantize.recipes import RECIPES
from gptoss_quantize.quantize.run import quantize_checkpoint

DRIVER = Path(__file__).with_name("ranks_driver.py")
SCENARIOS = [
    {"ranks": 2, "method": "gptq", "dest": "two"},
    {"ranks": 2, "method": "gptq", "dest": "lost", "lose": [1, 0]},
    {"ranks": 3, "method": "gptq", "dest": "lost", "resume": True},
    {"ranks": 2, "method": "rtn", "dest": "rounded"},
    {"ranks": 2, "method": "rtn", "dest": "other", "other": 1},
    {"ranks": 2, "method": "rtn", "dest": "two"},
    {"ranks": 3, "method": "rtn", "dest": "fused", "format": "mxfp4"},
    {"ranks": 2, "method": "awq+gptq", "dest": "folded", "dtype": "bfloat16"},
    {"ranks": 2, "method": "gptq", "dest": "polished", "polish": 2},
    {"ranks": 2, "method": "rtn", "dest": "apart", "apart": 1},
    {"ranks": 2, "method": "gptq", "dest": "three bits", "format": "int3"},
]


@pytest.fixture(scope="module")
def size(tiny):
    """Return a size that 2 bits are below and 4 above."""
    source = Checkpoint(tiny.path("bf16"))
    low, high = (total_bytes(source, layout, 32, "int8") for layout in (INT2, INT4))
    return (low + high) // 2


@pytest.fixture(scope="module")
def ran(tiny, tmp_path_factory, size):
    """Return (folder, messages of the ranks of every scenario)."""
    root = tmp_path_factory.mktemp("ranks")
    ids = json.dumps(tiny.tokens(7).ids.tolist())
    scenarios = [*SCENARIOS, {"ranks": 2, "method": "gptq", "dest": "sized", "size": size}]
    command = [sys.executable, "-P", str(DRIVER), str(tiny.path("bf16")), ids, str(root), json.dumps(scenarios)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ, timeout=300)
    assert done.returncode == 0, done.stderr
    return root, json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def single(tiny, tmp_path_factory):
    """Return a function from a method to the files that one process writes."""
    root = tmp_path_factory.mktemp("single")

    @cache
    def make(method, kind, dtype):
        tokens = tiny.tokens(7)
        tokens = type(tokens)(ids=tokens.ids, sha256="driver", source="driver", documents=1, separator=None)
        options = {
            "recipe": RECIPES[method],
            "format": kind,
            "group_size": 32,
            "device": "cpu",
            "dtype": getattr(torch, dtype),
        }
        job = Job(dest=root / (method + kind + dtype), method=method, **options)
        report = quantize_checkpoint(
            Checkpoint(tiny.path("bf16")), job, tokens if RECIPES[method].calibrated else None
        )
        return files(tiny, job.dest), report

    return make


def files(tiny, path):
    return {name: data for name, data in tiny.snapshot(path).items() if name != "quantization_report.json"}


@pytest.mark.parametrize(
    ("number", "dest", "method"),
    [
        (0, "two", "gptq"),
        (2, "lost", "gptq"),
        (3, "rounded", "rtn"),
        (6, "fused", "rtn"),
        (7, "folded", "awq+gptq"),
        (10, "three bits", "gptq"),
    ],
)
def test_the_same_bits_as_one_process(tiny, ran, single, number, dest, method):
    root, messages = ran
    assert set(messages[number]) == {"done"}
    scenario = SCENARIOS[number]
    expected, report = single(method, scenario.get("format", "int4"), scenario.get("dtype", "float32"))
    assert files(tiny, root / dest) == expected
    ours = json.loads((root / dest / "quantization_report.json").read_text())
    theirs = json.loads(json.dumps(report["layers"]))
    for layer in (*ours["layers"], *theirs):
        # a sum in float32, for the report only, whose order depends on where arrays lie
        for entry in layer.get("experts", []):
            entry["output_error"] = float(f"{entry['output_error']:.3g}")
    assert ours["layers"] == theirs
    assert len(ours["peak_rss_mib_of_ranks"]) == SCENARIOS[number]["ranks"]


def test_a_lost_rank_is_an_error_of_the_others(ran):
    # rank 1 was killed after the first layer, 3 ranks went on from there (scenario 2)
    survivor, dead = ran[1][1]
    assert dead == ""
    assert "the ranks cannot talk to each other any more" in survivor
    assert "--resume, with any number of ranks" in survivor


def test_the_first_rank_polishes_and_the_others_wait(ran):
    root, messages = ran
    assert messages[8] == ["done", "done"]
    report = json.loads((root / "polished" / "quantization_report.json").read_text())
    assert report["polish"]["steps"] == 2


def test_bits_are_chosen_by_the_first_rank(tiny, ran, size, tmp_path):
    root, messages = ran
    assert messages[len(SCENARIOS)] == ["done", "done"]
    tokens = tiny.tokens(7)
    tokens = type(tokens)(ids=tokens.ids, sha256="driver", source="driver", documents=1, separator=None)
    options = {"recipe": RECIPES["gptq"], "group_size": 32, "device": "cpu", "dtype": torch.float32, "size": size}
    report = quantize_checkpoint(
        Checkpoint(tiny.path("bf16")), Job(dest=tmp_path / "one", method="gptq", **options), tokens
    )
    assert len({bits for pair in report["mixture"]["bits"] for bits in pair}) > 1
    assert files(tiny, root / "sized") == files(tiny, tmp_path / "one")


def test_ranks_that_disagree(ran):
    messages = ran[1][4]
    assert all("rank 1 sees another dense than rank 0; all ranks need the same options" in m for m in messages)
    assert not (ran[0] / "other").exists()


def test_what_rank_0_refuses_is_refused_by_all(ran):
    first, second = ran[1][5]
    assert "already exists" in first
    assert second.startswith("rank 0 refused: ")
    assert "already exists" in second


def test_nothing_is_left_behind(ran):
    kept = [
        "apart.partial",
        "folded",
        "fused",
        "lost",
        "other.partial",
        "polished",
        "rounded",
        "sized",
        "three bits",
        "two",
    ]
    assert sorted(p.name for p in ran[0].iterdir()) == kept


@pytest.mark.parametrize("items", [0, 1, 5, 32, 128])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shares_cover_all(items, count):
    shares = [Ranks(rank=rank, count=count).share(items) for rank in range(count)]
    assert [item for share in shares for item in share] == list(range(items))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_process_exchanges_nothing(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined("cpu") as ranks:
        assert ranks is SINGLE
    out = torch.zeros(3)
    in_turn(SINGLE, out, lambda: out.add_(1))
    assert out.tolist() == [1, 1, 1]
    mine = {"a": out}
    assert gather_tensors(SINGLE, 0, mine) is mine
    assert everyone(SINGLE, 5) == [5]
    assert from_first(SINGLE, lambda: 7) == 7


def test_half_an_environment_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with (
        pytest.raises(InputError, match="RANK, MASTER_ADDR, MASTER_PORT not set; start with torchrun"),
        joined("cpu"),
    ):
        pass


def test_ranks_that_do_not_share_the_folder_are_refused(ran):
    root, messages = ran
    first, second = messages[9]
    assert f"rank 1 does not see rank 0's {root / 'apart.partial'}; ranks on several machines need OUT on" in first
    # the other knows its own name for the folder only
    assert "rank 1 does not see rank 0's" in second
    assert not (root / "apart").exists()
