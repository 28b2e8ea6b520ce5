"""The plan: bytes equal to what is written, caches counted as the runtimes count them, verdicts that follow."""

import json

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from gptoss_quantize import api
from gptoss_quantize.architectures import COMPARED, gptoss_config, gptoss_counts, parameter_counts, sparsity
from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.cli_sizes import print_plan
from gptoss_quantize.config import parse_config
from gptoss_quantize.errors import InputError
from gptoss_quantize.quantize.job import Job
from gptoss_quantize.quantize.recipes import RECIPES
from gptoss_quantize.quantize.run import quantize_checkpoint
from gptoss_quantize.runtimes.memory import RUNTIMES, card, fits, kv_bytes, longest_context, serve_command
from gptoss_quantize.runtimes.plan import CONTEXTS
from gptoss_quantize.shards import DTYPES
from gptoss_quantize.sizes import DTYPE_BYTES, dense_total, disk, expert_bytes, header_bytes, shard_tensors
from gptoss_quantize.units import GIB, parse_size

NAMES = {dtype: name for name, dtype in DTYPES.items()}


def bf16(name: str) -> str:
    return "BF16"


@pytest.fixture(scope="module")
def small():
    return parse_config(gptoss_config("gpt-oss-20b"), "gpt-oss-20b")


# ---- bytes on disk


@pytest.mark.parametrize("kind", ["bf16", "float32", "mxfp4"])
@pytest.mark.parametrize("group_size", [32, 64])
def test_bytes_are_those_of_the_written_files(tiny, tmp_path, kind, group_size):
    source = Checkpoint(tiny.path(kind))
    job = Job(dest=tmp_path / "out", method="rtn", recipe=RECIPES["rtn"], group_size=group_size, device="cpu")
    report = quantize_checkpoint(source, job, None)
    found = disk(shard_tensors(source.config, group_size, "source", lambda n: NAMES[source.info(n).dtype]))
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert found["files"] == [path.stat().st_size for path in files]
    assert found["total"] == sum(found["files"]) == sum(found["parts"].values())
    assert found["total"] - found["parts"]["file headers"] == report["bytes"]


def test_header_of_a_file_with_every_dtype(tmp_path):
    tensors = {f"x.{name}": torch.zeros(3, 5 + i).to(DTYPES[name]) for i, name in enumerate(DTYPE_BYTES)}
    save_file(tensors, tmp_path / "x", metadata={"format": "pt"})
    stored = [(name, NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items()]
    data = sum(t.nbytes for t in tensors.values())
    assert header_bytes(stored) + data == (tmp_path / "x").stat().st_size


def test_the_released_models(small):
    # int4 of group 64 is the size of MXFP4; the 12.8 GiB and 11.2 GiB
    sizes = {dense: disk(shard_tensors(small, 64, dense, bf16))["total"] for dense in ("source", "int8")}
    assert sizes["source"] == 13_761_840_552
    assert sizes["source"] / GIB == pytest.approx(12.8, abs=0.05)
    assert sizes["int8"] / GIB == pytest.approx(11.2, abs=0.05)


# ---- bytes on the card


def test_experts_as_a_runtime_pads_them(small):
    # 5760 -> 5888 rows of 2880 -> 2944 columns, 2880 -> 3072 rows of 2944, codes in half bytes, scales in two
    padded = (5888 + 3072) * (2944 // 2 + 2944 // 64 * 2) + 2 * (5888 + 3072)
    vllm = RUNTIMES["vLLM"]
    assert expert_bytes(small, 64, vllm.pad_rows, vllm.pad_columns) == 24 * 32 * padded
    plain = disk(shard_tensors(small, 64, "source", bf16))["parts"]
    assert expert_bytes(small, 64) == sum(plain[f"expert {part}"] for part in ("codes", "scales", "biases"))


def test_kv_cache(small):
    # 12 full layers: 8 heads x 64 x 2 (keys and values) x 2 bytes for every token
    found = kv_bytes(small, 131072, RUNTIMES["vLLM"])
    assert found["full"] == 12 * 131072 * 2048 == 3 * GIB
    # 12 windowed layers: window - 1 + 2048 batched tokens in blocks of 16, and one more
    assert found["sliding"] == 12 * (-(-(127 + 2048) // 16) + 1) * 16 * 2048
    assert kv_bytes(small, 131072, RUNTIMES["llama.cpp"])["sliding"] == 12 * 768 * 2048
    assert kv_bytes(small, 100, RUNTIMES["vLLM"])["full"] == 12 * 112 * 2048
    assert kv_bytes(small, 131072, RUNTIMES["vLLM"], 1)["full"] == 1.5 * GIB


def test_verdicts_of_the_20b_on_16_gib(small):
    # the issue: int4 group 64 with bf16 attention and 128k of context does not fit, int8 helps where it loads
    verdicts = {(row["runtime"], row["context"]): row for row in fits(small, 64, "source", 16 * GIB, CONTEXTS, bf16)}
    assert [verdicts["vLLM", c]["fits"] for c in CONTEXTS] == [True, True, False]
    changes = {change["change"]: change for change in verdicts["vLLM", 131072]["changes"]}
    assert not any("int8" in name for name in changes)
    changes = {change["change"]: change for change in verdicts["llama.cpp", 131072]["changes"]}
    assert changes["--dense int8"]["fits"]
    small_dense = fits(small, 64, "int8", 16 * GIB, CONTEXTS, bf16)
    loads = {row["runtime"]: row["loads"] for row in small_dense}
    assert loads == {"vLLM": False, "llama.cpp": True}
    assert [row["fits"] for row in small_dense if row["runtime"] == "llama.cpp"] == [True] * 3


def test_every_change_that_is_proposed_does_what_it_says(small):
    runtime = RUNTIMES["vLLM"]
    weights = dense_total(small, "source", bf16)
    for memory in (13, 15, 16, 24):
        room = int(memory * GIB * runtime.utilization)
        longest = longest_context(small, 64, weights, room, runtime)
        if longest:
            assert card(small, 64, weights, longest, runtime)["total"] <= room
        if longest < 131072:
            assert card(small, 64, weights, longest + 16, runtime)["total"] > room
    command = serve_command("OUT", small, 64, 16 * GIB, 131072, bf16)["command"]
    longest = longest_context(small, 64, weights, int(16 * GIB * 0.95), runtime)
    assert f"--moe-backend humming --max-model-len {longest} " in command
    assert serve_command("OUT", small, 64, 8 * GIB, 4096, bf16)["command"].startswith("(no vLLM command")


# ---- where the model lies


def test_parameters_of_published_models(small):
    # totals of the hub, active parameters of OpenAI's model card
    assert gptoss_counts(small).total == 20_914_757_184
    large = gptoss_counts(parse_config(gptoss_config("gpt-oss-120b"), "x"))
    assert large.total == 116_829_156_672
    assert (round(gptoss_counts(small).active / 1e9, 2), round(large.active / 1e9, 2)) == (3.61, 5.13)
    # billions as their makers state them; the language models without their vision parts
    published = {
        "Mixtral 8x7B": (46.7, 12.9),
        "Mixtral 8x22B": (141, 39),
        "Llama 4 Scout": (109, 17),
        "Llama 4 Maverick": (400, 17),
        "DeepSeek-V3": (671, 37),
        "Kimi K2": (1040, 32),
    }
    assert published.keys() == COMPARED.keys()
    for name, (total, active) in published.items():
        counts = parameter_counts(COMPARED[name])
        assert counts.total / 1e9 == pytest.approx(total, rel=0.02), name
        # the embedding is not counted as active here, and in some of theirs it is
        assert counts.active / 1e9 == pytest.approx(active, rel=0.06), name


def test_order_of_the_curve(small):
    rows = sparsity("mine", small)
    shares = [row["share"] for row in rows]
    assert shares == sorted(shares, reverse=True)
    assert [row["model"] for row in rows if row["this"]] == ["mine"]
    assert len(rows) == 7


# ---- the command


def test_plan_of_a_directory_and_of_a_name(tiny, capsys):
    record = api.plan(tiny.path("mxfp4"), tokens=768, seq_len=48, gpu_memory=GIB).report
    assert record["time"]["seconds"] > 0
    phases = record["time"]["phases"]
    assert phases.keys() >= {"attention", "forward", "moments", "solve"}
    by_tokens = phases["attention"] + phases["forward"] + phases["moments"]
    more = record["time"]["more_tokens"]
    assert more["seconds"] == pytest.approx(record["time"]["seconds"] + 3 * by_tokens)
    print_plan(record, Console(width=300))
    printed = capsys.readouterr().out
    assert f"with --tokens 3072: {more['seconds'] / 60:.0f} minutes; " in printed
    assert "@" not in printed
    assert record["memory"]["peak"] >= record["memory"]["least"] > 0
    json.dumps(record)
    record = api.plan("gpt-oss-120b", gpu_memory="80GiB", measure=False).report
    assert "time" not in record
    assert [row["fits"] for row in record["card"]] == [True] * 6


def test_plan_without_calibration(tiny):
    record = api.plan(tiny.path("bf16"), "rtn", group_size=32, dense="int8", contexts=[100]).report
    assert record["time"]["phases"].keys() == {"read", "solve", "report"}
    assert {row["context"] for row in record["card"]} == {100}


@pytest.mark.parametrize("change", [{"method": "hqq"}, {"group_size": 128}, {"dense": "int4"}], ids=str)
def test_plan_refuses(change):
    with pytest.raises(InputError, match="expected one of"):
        api.plan("gpt-oss-20b", **change)


def test_sizes():
    assert parse_size("12GiB", "--memory") == 12 * GIB
    assert parse_size(" 16 GB ", "--memory") == 16 * 10**9
    assert parse_size("1.5g", "--memory") == 1_500_000_000
    assert parse_size("800MiB", "--memory") == 800 << 20
    for text in ("", "lots", "-1GiB", "0", "12 parsecs", "GiB"):
        with pytest.raises(InputError, match=r"--memory .* expected a size"):
            parse_size(text, "--memory")


def test_a_plan_says_what_the_release_loses_and_reads_an_int8_checkpoint(tiny, tmp_path, capsys):
    printed = []
    for kind in ("mxfp4", "bf16"):
        record = api.plan(tiny.path(kind), measure=False, gpu_memory=GIB).report
        assert record["source_is_mxfp4"] == (kind == "mxfp4")
        print_plan(record, Console(width=300))
        printed.append(capsys.readouterr().out)
    assert "int4 is never lossless for it. Where MXFP4 kernels exist, keep the release" in printed[0]
    assert "keep the release" not in printed[1]
    assert all("KV full" in text and "KV window" in text for text in printed)
    job = Job(dest=tmp_path / "out", method="rtn", recipe=RECIPES["rtn"], group_size=32, dense="int8", device="cpu")
    quantize_checkpoint(Checkpoint(tiny.path("bf16")), job, None)
    total = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert api.plan(tmp_path / "out", group_size=32, measure=False, gpu_memory=GIB).size == total
