"""The plan: bytes equal to what is written, caches counted as the runtimes count them, verdicts that follow."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from gptoss_quantize import api
from gptoss_quantize.architectures import COMPARED, gptoss_config, gptoss_counts, parameter_counts, sparsity
from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.cli_sizes import print_plan, print_time
from gptoss_quantize.config import parse_config
from gptoss_quantize.errors import InputError
from gptoss_quantize.layouts import LAYOUTS
from gptoss_quantize.published import published
from gptoss_quantize.quantize.job import Job
from gptoss_quantize.quantize.recipes import RECIPES
from gptoss_quantize.quantize.run import quantize_checkpoint
from gptoss_quantize.runtimes.memory import (
    RUNTIMES,
    card,
    fewer_bits,
    fits,
    kv_bytes,
    llamacpp_command,
    longest_context,
    serve_command,
    size_to_fit,
    weights_on_card,
)
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
    for runtime in RUNTIMES:
        changes = {change["change"]: change for change in verdicts[runtime, 131072]["changes"]}
        assert changes["--dense int8 and 8-bit KV cache"]["fits"]
        # humming pads the experts, by 0.5 GiB
        assert changes["--dense int8"]["fits"] is (runtime == "llama.cpp")
    small_dense = fits(small, 64, "int8", 16 * GIB, CONTEXTS, bf16)
    loads = {row["runtime"]: row["loads"] for row in small_dense}
    assert loads == {"vLLM": True, "llama.cpp": True}
    assert {(row["runtime"], row["context"]) for row in small_dense if not row["fits"]} == {("vLLM", 131072)}


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
    served = serve_command("OUT", small, 64, "source", 16 * GIB, 131072, bf16)
    command = served["command"]
    longest = longest_context(small, 64, weights, int(16 * GIB * 0.95), runtime)
    assert f"vllm serve OUT --max-model-len {longest} " in command
    assert "--moe-backend humming" in served["why"] and "--enable-expert-parallel" in served["two_cards"]
    assert "--max-model-len 101904 " in serve_command("OUT", small, 64, "int8", 16 * GIB, 131072, bf16)["command"]
    assert serve_command("OUT", small, 32, "source", 16 * GIB, 4096, bf16)["two_cards"] == "--tensor-parallel-size 2"
    assert serve_command("OUT", small, 64, "source", 8 * GIB, 4096, bf16)["command"].startswith("(no vLLM command")


def test_llamacpp_keeps_the_embedding_in_ram(small):
    runtime, embedding = RUNTIMES["llama.cpp"], 201088 * 2880 * 2
    everything = dense_total(small, "source", bf16)
    assert weights_on_card(small, "source", bf16, runtime) == everything - embedding
    assert weights_on_card(small, "source", bf16, RUNTIMES["vLLM"]) == everything
    # 8.5 bits a weight
    small_dense = dense_total(small, "int8", bf16)
    assert weights_on_card(small, "int8", bf16, runtime) == small_dense - 201088 * 2880 * 17 // 16
    # a tied embedding is the head, which the card needs
    tied = replace(small, tied=True)
    assert weights_on_card(tied, "source", bf16, runtime) == dense_total(tied, "source", bf16)


@pytest.mark.parametrize(("memory", "words"), [(8, "-c 32768 -ngl 99 --n-cpu-moe 16"), (16, "-c 96256 -ngl 99"),
                                               (24, "-c 131072 -ngl 99"), (2, "-c 32768")])  # fmt: skip
def test_llamacpp_takes_what_fits_the_card_and_leaves_experts_in_ram(small, memory, words):
    # a layer of Q4_0: 4.5 bits and bf16 biases, of which ggml's float32 are counted as half
    layer = 32 * (3 * 2880 * 2880 * 9 // 16 + 3 * 2880 * 2)
    found = llamacpp_command("G", small, 64, "source", memory * GIB, CONTEXTS, bf16)
    assert found["command"] == f"llama-server -m G/model.gguf {words}"
    runtime = RUNTIMES["llama.cpp"]
    weights, room = weights_on_card(small, "source", bf16, runtime), int(memory * GIB * 0.97)
    total = card(small, 64, weights, found["context"], runtime)["total"]
    if found["offload"] is None:
        assert total - 24 * layer > room
        return
    layers = found["offload"]["layers"]
    assert found["offload"]["bytes"] == layers * layer
    assert total - layers * layer <= room
    assert layers == 0 or total - (layers - 1) * layer > room


def test_vllm_offloads_nothing(small):
    rows = fits(small, 64, "source", 8 * GIB, (4096,), bf16)
    assert {row["runtime"]: row["offload"] for row in rows}["vLLM"] is None
    assert {row["runtime"]: row["offload"]["layers"] for row in rows if row["offload"]} == {"llama.cpp": 14}


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
    print_time({**record["time"], "more_tokens": {"tokens": 3072, "seconds": 3 * 3600}}, Console(width=300))
    printed = capsys.readouterr().out
    assert "with --tokens 3072: 3.0 h; " in printed
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
        print_plan(record, Console(width=300), details=True)
        printed.append(capsys.readouterr().out)
    assert "int4 is never lossless for it. Where MXFP4 kernels exist, keep the release" in printed[0]
    assert "keep the release" not in printed[1]
    assert all("KV full" in text and "KV window" in text for text in printed)
    job = Job(dest=tmp_path / "out", method="rtn", recipe=RECIPES["rtn"], group_size=32, dense="int8", device="cpu")
    quantize_checkpoint(Checkpoint(tiny.path("bf16")), job, None)
    total = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert api.plan(tmp_path / "out", group_size=32, measure=False, gpu_memory=GIB).size == total


@pytest.mark.parametrize("name", ["gpt-oss-20b", "openai/gpt-oss-20b", "20b", "20B"])
def test_names_of_the_release_need_no_download(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record = api.plan(name, measure=False).report
    assert record["disk"]["total"] == 13_761_840_552
    assert record["commands"]["quantize"] == "gptoss-quantize quantize openai/gpt-oss-20b gpt-oss-20b-int4"
    # a directory of that name is that directory
    (tmp_path / name).mkdir(parents=True)
    assert published(name) is None


def test_commands_have_the_options_that_were_asked_for(tiny):
    record = api.plan(tiny.path(), "awq", group_size=32, tokens=512, contexts=[64], measure=False).report
    made = f"{tiny.path().name}-int4"
    assert record["commands"] == {
        "quantize": f"gptoss-quantize quantize {tiny.path()} {made} --method awq --group-size 32 --tokens 512",
        "export": f"gptoss-quantize export {made} {made}-gguf --to gguf",
        "fit": f"gptoss-quantize quantize {tiny.path()} bf16-fit --fit 16GiB --context 64 --group-size 32",
    }
    assert record["llama.cpp"]["command"] == f"llama-server -m {made}-gguf/model.gguf -c 64 -ngl 99"


def test_context_beyond_the_model_is_refused(tiny):
    with pytest.raises(InputError, match=r"--context 131073: gpt-oss-20b was made for 131072 tokens"):
        api.plan("gpt-oss-20b", contexts=[4096, 131073], measure=False)
    positions = Checkpoint(tiny.path()).config.max_positions
    assert positions < CONTEXTS[0]
    assert api.plan(tiny.path(), measure=False).report["contexts"] == (positions,)


@pytest.mark.parametrize(("memory", "answer"), [("24GiB", "YES; "), ("3GiB", "NO: "),
    ("8GiB", "PARTLY: in llama.cpp, with the experts of 16 of 24 layers in 6.68 GiB of RAM")])  # fmt: skip
def test_the_answer_comes_first_and_fits_80_columns(memory, answer, capsys):
    seen = []

    def show(plan):
        seen.append("time" in plan.report)
        print_plan(plan.report, Console(width=80))

    api.plan("20b", gpu_memory=memory, measure=False, before_measuring=show)
    lines = capsys.readouterr().out.splitlines()
    assert seen == [False]
    assert lines[0].startswith("Does it fit? gpt-oss-20b, int4 in groups of 64")
    assert lines[2].startswith(answer)
    # commands are one line each, to be copied
    assert all(len(line) <= 80 or " -m " in line or "serve " in line or " export " in line for line in lines)
    assert not any("…" in line for line in lines)


@pytest.mark.parametrize("model", ["20b", "a directory"])
def test_a_plan_does_not_wait_for_transformers(tiny, model):
    heavy = ("transformers", "datasets", "accelerate", "lm_eval", "pandas")
    code = f"import atexit, sys; atexit.register(lambda: print('LOADED', [x for x in {heavy} if x in sys.modules])); "
    code += "from gptoss_quantize.cli import main; main()"
    given = model if model == "20b" else str(tiny.path("bf16"))
    command = [sys.executable, "-P", "-c", code, "plan", given, "--no-measure"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Does it fit?" in done.stdout and done.stdout.splitlines()[-1] == "LOADED []"
    assert "loading torch\n" in done.stderr


@pytest.mark.parametrize("memory", [8, 12, 48])
def test_fewer_bits_are_counted_and_their_contexts_fit(small, memory):
    """Bytes are those of the tensors that would be written; one more token of context does not fit."""
    rows = fewer_bits(small, 64, memory * GIB, bf16)
    for row in rows:
        if row["bits"] in (2, 3, 4):
            tensors = shard_tensors(small, 64, "int8", bf16, LAYOUTS[f"int{row['bits']}"])
            found = disk(tensors)
            assert row["bytes"] == found["total"] - found["parts"]["file headers"]
        if row["context"] > 0:
            assert row["bytes"] <= size_to_fit(small, memory * GIB, row["context"])
        if row["context"] < small.max_positions:
            with_more = max(1, row["context"] + 1)
            try:
                assert row["bytes"] > size_to_fit(small, memory * GIB, with_more)
            except InputError:
                assert not row["context"]
    contexts = [row["context"] for row in rows]
    assert contexts == sorted(contexts) and len(set(row["bytes"] for row in rows)) == len(rows)


@pytest.mark.parametrize(("memory", "shown"), [("12GiB", True), ("8GiB", True), ("80GiB", False)])
def test_fewer_bits_are_shown_where_int4_does_not_fit(memory, shown, capsys):
    found = api.plan("20b", gpu_memory=memory, measure=False)
    print_plan(found.report, Console(width=80, emoji=False))
    out = capsys.readouterr().out
    assert ("with fewer bits" in out) is shown
    assert ("--fit 12GiB --context" in out) is (memory == "12GiB")
    table = out[out.index("with fewer bits") : out.index("and so    gptoss-quantize")] if memory == "12GiB" else ""
    assert all(len(line) <= 80 for line in table.splitlines())
