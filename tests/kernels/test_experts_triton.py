"""The Triton experts: interpreted kernels (triton_interpreted.py), routing, refusals, ahead-of-time compilation."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gptoss_quantize.kernels import experts_triton as et

HERE = Path(__file__).resolve()
AOT = HERE.parents[2] / "benchmarks" / "aot.py"
linux = pytest.mark.skipif(sys.platform != "linux", reason="triton has wheels for Linux only")


def python(*args: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python with more environment variables."""
    command, environment = [sys.executable, *args], os.environ | variables
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@linux
def test_in_the_interpreter() -> None:
    # whether kernels are interpreted is settled when triton is imported, so not in this process
    inner = str(HERE.with_name("triton_interpreted.py"))
    done = python("-m", "pytest", "-q", "-p", "no:cacheprovider", inner, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


def test_without_triton_it_imports_and_says_what_to_install() -> None:
    code = (
        "import sys, torch; sys.modules['triton'] = None\n"
        "from gptoss_quantize.kernels import experts_triton as et\n"
        "assert not et.interpreted()\n"
        "try: et.experts_triton(*[torch.zeros(1, 1)] * 9, 7.0, 1.7)\n"
        "except RuntimeError as error: print(error)"
    )
    done = python("-c", code)
    assert "pip install 'triton>=3.6,<4'" in done.stdout, done


@linux
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_it_says_so() -> None:
    with pytest.raises(RuntimeError, match="no GPU"):
        et.experts_triton(*[torch.zeros(1, 1)] * 9, 7.0, 1.7)


@linux
@pytest.mark.parametrize("arch", ["sm_90", "gfx1201"])
def test_compiles_ahead_of_time_without_spills(arch: str, tmp_path: Path) -> None:
    done = python(str(AOT), "--arch", arch, "--config", "direct-16", "--group", "32", "--bits", "4", "3",
                  "--dtype", "bfloat16",
                  TRITON_CACHE_DIR=str(tmp_path))  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 kernels compiled, 0 that spill" in done.stdout


@pytest.mark.parametrize("block_m", [1, 4, 16])
@pytest.mark.parametrize("case", ["random", "one expert", "absent", "one token"])
def test_block_table_holds_every_pair_once_in_order(case: str, block_m: int) -> None:
    experts = 6
    index = torch.randint(0, experts, (1 if case == "one token" else 37, 3), generator=torch.manual_seed(3))
    if case == "one expert":
        index[:] = 4
    if case == "absent":
        index[::2, 0], index[1::2, 1] = -1, experts
    order, blocks = et.block_table(index, experts, block_m)
    flat, seen = index.flatten().tolist(), []
    for expert, first, last in blocks.tolist():
        assert 0 <= expert < experts and first <= last <= min(first + block_m, len(flat))
        mine = order[first:last].tolist()
        assert all(flat[pair] == expert for pair in mine)
        seen += mine
    assert seen == sorted((p for p, e in enumerate(flat) if 0 <= e < experts), key=lambda p: (flat[p], p))
    assert order.dtype == blocks.dtype == torch.int32


def test_block_table_has_a_shape_that_no_routing_changes() -> None:
    spread = torch.arange(64).reshape(16, 4) % 32
    assert et.block_table(spread, 32, 16)[1].shape == et.block_table(spread * 0, 32, 16)[1].shape
    # the worst case needs every block: each of 3 experts with a block of one beyond full ones
    index = torch.tensor([0] * 5 + [1] * 5 + [2] * 1).unsqueeze(1)
    blocks = et.block_table(index, 3, 4)[1]
    assert int((blocks[:, 2] > blocks[:, 1]).sum()) == 5 == len(blocks)


def test_choose_by_size() -> None:
    def names(*counts: int, dtype: torch.dtype = torch.bfloat16) -> list[str]:
        return [et.choose(tokens, 4, 32, dtype) for tokens in counts]

    assert names(1, 2, 4, 5, 16) == ["pairs"] * 3 + ["direct-16"] * 2
    assert names(17, 128, 129, 768, 769, 8192) == ["sorted-16"] * 2 + ["sorted-64"] * 2 + ["sorted-128"] * 2
    assert names(1, 5, 17, dtype=torch.float32) == ["pairs", "float32-direct", "float32-sorted"]
    assert et.CONFIGS.keys() == et.CONFIGS_AMD.keys()
    assert {et.CONFIGS[name].block_m >= 16 for name in names(5, 16)} == {True}


def test_refuses_what_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(et, "problem", lambda: "")
    words, scales = torch.zeros(2, 128, 8, dtype=torch.int32), torch.ones(2, 128, 1).bfloat16()
    good = {
        "x": torch.zeros(1, 64),
        "index": torch.zeros(1, 1, dtype=torch.int64),
        "prob": torch.ones(1, 1),
        "w13_packed": words,
        "w13_scale": scales,
        "w13_bias": torch.zeros(2, 128),
        "w2_packed": torch.zeros(2, 64, 8, dtype=torch.int32),
        "w2_scale": torch.ones(2, 64, 1).bfloat16(),
        "w2_bias": torch.zeros(2, 64),
    }
    for name, value, message in (
        ("x", good["x"].double(), "x is torch.float64"),
        ("index", torch.zeros(2, 1, dtype=torch.int64), "not .1, K."),
        ("index", torch.zeros(1, 1), "int32 or int64"),
        ("w13_scale", torch.ones(2, 128, 4).bfloat16(), "groups of 32 or 64"),
        ("w2_packed", torch.zeros(2, 8, 64, dtype=torch.int32).mT, "contiguous"),
        ("w2_bias", torch.zeros(3, 64), "w2_bias is .3, 64."),
        ("w13_packed", words.float(), "int32 words"),
    ):
        with pytest.raises(ValueError, match=message):
            et.experts_triton(*(good | {name: value}).values(), 7.0, 1.7)
