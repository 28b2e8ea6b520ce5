"""`verify` on the tiny model, in Transformers and in llama.cpp: agreement, and that each kind of fault is seen."""

import importlib.util
import json
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gptoss_quantize import cli
from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.errors import InputError
from gptoss_quantize.runtimes import check_llamacpp, check_transformers, check_vllm, export_gguf
from gptoss_quantize.runtimes.agreement import AGREES, DISAGREES, FAILED, NOT_CHECKED, bound, compare
from gptoss_quantize.runtimes.verify import VerifyRequest, predictions, verify

needs_llamacpp = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="the extra `llamacpp` is not installed"
)


def request(tiny, path, baseline="bf16", **options):
    """A small comparison: 3 sequences, 4 positions each, beyond window and original context."""
    ids = tiny.ids(3, 48).clamp(5, 280)
    return VerifyRequest(
        checkpoint=Checkpoint(path),
        baseline=None if baseline is None else Checkpoint(tiny.path(baseline)),
        ids=ids,
        positions=[3, 20, 36, 47],
        texts=["The sea was calm, and  the ships\n", "rain <|end|> 12"],
        **options,
    )


def verdicts(rows):
    """what -> verdict."""
    return {row.what: row.verdict for row in rows}


@pytest.fixture
def quick(monkeypatch):
    """Keep transformers' progress bars out of the way."""
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def test_transformers_agrees_packed_and_dequantized(tiny, int4_path, quick):
    rows = verify(request(tiny, int4_path()), ("transformers",))
    assert verdicts(rows) == {
        "packed int4": AGREES,
        "float16 export, tensors": AGREES,
        "float16 export": AGREES,
    }
    assert all(row.got.max_difference < 1e-3 and row.got.top1 == 1 for row in rows if row.got)


def test_transformers_agrees_on_mxfp4(tiny, quick):
    assert verdicts(verify(request(tiny, tiny.path("mxfp4")), ("transformers",))) == {"as stored": AGREES}


def test_without_a_baseline_predictions_are_not_checked(tiny, int4_path, quick):
    rows = verify(request(tiny, int4_path(), baseline=None), ("transformers",))
    assert verdicts(rows)["packed int4"] == NOT_CHECKED
    assert rows[0].got is not None and rows[0].noise is None and "no baseline" in rows[0].note


def swap_gate_and_up(module):
    module.w13_packed = module.w13_packed.unflatten(1, (-1, 2)).flip(2).flatten(1, 2)


def halves(module):
    module.w13_packed = torch.cat((module.w13_packed[:, 0::2], module.w13_packed[:, 1::2]), dim=1)


def drop_biases(module):
    module.w2_bias = torch.zeros_like(module.w2_bias)


def shift_codes(module):
    module.w2_packed = module.w2_packed.roll(1, dims=2)


def damage_packed(module, damage):
    """Damage the experts of a module, which lie in a mapped file until they are stacked."""
    packed = module.experts().stack()
    damage(packed)
    module.__init__(packed, module.limit, module.alpha, module.kernel)


@pytest.mark.parametrize("damage", [swap_gate_and_up, halves, drop_biases, shift_codes])
def test_each_classic_fault_of_a_loader_disagrees(tiny, int4_path, monkeypatch, damage, quick):
    real = check_transformers.packed

    def wrong(path, dtype):
        model = real(path, dtype)
        for layer in model.model.layers:
            damage_packed(layer.mlp.experts, damage)
        return model

    monkeypatch.setattr(check_transformers, "packed", wrong)
    assert verdicts(verify(request(tiny, int4_path()), ("transformers",)))["packed int4"] == DISAGREES


# --- a runtime that misreads checkpoint and baseline alike


def one_expert_random(model, layer=1):
    experts = model.model.layers[layer].mlp.experts
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in (experts.gate_up_proj, experts.down_proj):
            weight[0] = torch.randn(weight[0].shape, generator=generator) * weight[0].std()


def all_experts_random(model):
    for layer in range(3):
        experts = model.model.layers[layer].mlp.experts
        for weight in (experts.gate_up_proj, experts.down_proj):
            weight.data.normal_(std=float(weight.detach().std()), generator=torch.Generator().manual_seed(layer))


def no_biases_in_one_layer(model):
    experts = model.model.layers[1].mlp.experts
    experts.gate_up_proj_bias.data.zero_()
    experts.down_proj_bias.data.zero_()


def halves_in_one_layer(model):
    experts = model.model.layers[1].mlp.experts
    for tensor in (experts.gate_up_proj, experts.gate_up_proj_bias):
        tensor.data = torch.stack(tensor.data.chunk(2, -1), -1).flatten(-2).contiguous()


def window_off_by_one(model):
    model.config.sliding_window -= 1
    for layer in model.model.layers:
        if getattr(layer.self_attn, "sliding_window", None):
            layer.self_attn.sliding_window -= 1


def last_experts_only(model):
    # what an old name of num_experts_per_tok does: another number of experts per token
    for layer in model.model.layers:
        layer.mlp.router.top_k = 3


SHARED_FAULTS = [
    one_expert_random,
    all_experts_random,
    no_biases_in_one_layer,
    halves_in_one_layer,
    window_off_by_one,
    last_experts_only,
]


@pytest.mark.parametrize("baseline", ["bf16", None])
@pytest.mark.parametrize("damage", SHARED_FAULTS)
def test_a_fault_that_baseline_and_checkpoint_share_disagrees(tiny, monkeypatch, damage, baseline, quick):
    real = check_transformers.plain

    def wrong(path, dtype, **options):
        model = real(path, dtype, **options)
        damage(model)
        return model

    monkeypatch.setattr(check_transformers, "plain", wrong)
    rows = {row.what: row for row in verify(request(tiny, tiny.path("bf16"), baseline), ("transformers",))}
    assert "not finished" not in rows, rows["not finished"].note
    assert rows["as stored"].verdict == DISAGREES
    if baseline is not None:
        # twice the noise alone would have called it agreement
        assert rows["as stored"].got.kl <= bound(rows["as stored"].noise, rows["as stored"].got)
        assert rows["baseline"].verdict == DISAGREES and "float32 explains at most" in rows["baseline"].note
        assert "the unquantized model itself is far from ours" in rows["as stored"].note


@needs_llamacpp
def test_experts_that_llama_cpp_reads_wrongly_in_every_file_disagree(tiny, int4_path, monkeypatch):
    real = export_gguf.expert_entries
    monkeypatch.setattr(export_gguf, "expert_entries", lambda *args: without_biases(list(real(*args))))
    rows = {row.what: row for row in verify(request(tiny, int4_path()), ("llama.cpp",))}
    assert rows["Q4_0"].verdict == DISAGREES and "unquantized model itself" in rows["Q4_0"].note
    assert next(row for what, row in rows.items() if what.startswith("baseline")).verdict == DISAGREES


# --- one failing runtime


class OddError(RuntimeError):
    """Something that only other people's code raises."""


@pytest.mark.parametrize("error", [OddError("no such\nkernel"), MemoryError(), InputError("x: is damaged")])
def test_one_failing_runtime_leaves_the_other_lines_and_says_why(tiny, int4_path, monkeypatch, error, quick):
    def fails(*args, **options):
        raise error

    monkeypatch.setattr(check_transformers, "plain", fails)
    monkeypatch.setattr(check_llamacpp, "available", lambda: False)
    rows = verify(request(tiny, int4_path(), baseline=None), ("transformers", "llama.cpp"))
    # the line before the failure stands too
    assert [(row.runtime, row.what, row.verdict) for row in rows] == [
        ("transformers", "packed int4", NOT_CHECKED),
        ("transformers", "float16 export, tensors", AGREES),
        ("transformers", "not finished", FAILED),
        ("llama.cpp", "predictions", NOT_CHECKED),
    ]
    why = "x: is damaged" if isinstance(error, InputError) else f"{type(error).__name__}: {error}".replace("\n", " ")
    assert rows[2].note == why


def test_ctrl_c_is_no_failing_runtime(tiny, int4_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(check_transformers, "packed", stop)
    with pytest.raises(KeyboardInterrupt):
        verify(request(tiny, int4_path(), baseline=None), ("transformers",))


def test_our_own_predictions_are_computed_once_for_all_runtimes(tiny, int4_path):
    asked = request(tiny, int4_path())
    layers = []
    first = predictions(asked.checkpoint, asked, on_layer=lambda *_: layers.append(1))
    assert predictions(asked.checkpoint, asked, on_layer=lambda *_: layers.append(1)) is first and len(layers) == 3
    # another model, or other rope settings, are other predictions
    assert not torch.equal(predictions(asked.baseline, asked), first)
    rope = check_llamacpp.reference_rope(asked.checkpoint.config)
    assert not torch.equal(predictions(asked.checkpoint, asked, rope=rope), first)


def test_what_is_not_installed_is_not_checked(tiny, int4_path, monkeypatch):
    for module in (check_llamacpp, check_vllm):
        monkeypatch.setattr(module, "available", lambda: False)
    rows = verify(request(tiny, int4_path()), ("llama.cpp", "vllm"))
    assert [(row.runtime, row.verdict) for row in rows] == [("llama.cpp", NOT_CHECKED), ("vllm", NOT_CHECKED)]
    assert all("not installed" in row.note for row in rows)


def test_a_baseline_of_another_model_is_refused(tiny, int4_path, tmp_path):
    tiny.build(tmp_path / "other", num_local_experts=4)
    wrong = replace(request(tiny, int4_path()), baseline=Checkpoint(tmp_path / "other"))
    with pytest.raises(InputError, match="experts is 8, the baseline"):
        verify(wrong, ("transformers",))


# --- llama.cpp


@needs_llamacpp
@pytest.mark.parametrize("kind", ["int4-64", "int4-32", "mxfp4"])
def test_llama_cpp_agrees_with_everything_alive(tiny, int4_path, kind):
    path = tiny.path("mxfp4") if kind == "mxfp4" else int4_path(int(kind[-2:]))
    rows = verify(request(tiny, path, exact=True), ("llama.cpp",))
    found = verdicts(rows)
    name = "MXFP4" if kind == "mxfp4" else "Q4_0"
    assert {found[what] for what in ("tensors", "tokenizer", name, "F32, same weights")} == {AGREES}
    exact = next(row for row in rows if row.what == "F32, same weights").got
    # as far from ours as transformers is in float32
    assert exact.max_difference < 1e-3 and exact.top1 == 1
    # llama.cpp rounds the YaRN ramp, which matters at 32 dimensions
    assert next(row for row in rows if row.what == "YaRN ramp").got.kl > 0.01


def gate_and_up_swapped(entries):
    chunks = {e.name: e.chunks for e in entries}
    other = {"_gate_": "_up_", "_up_": "_gate_", "_down_": "_down_"}
    return [replace(e, chunks=chunks[e.name.replace(n, other[n])]) for e in entries for n in other if n in e.name]


def without_biases(entries):
    return [replace(e, chunks=lambda e=e: [torch.zeros(e.shape)]) if "bias" in e.name else e for e in entries]


def gate_and_up_as_halves(entries):
    chunks = {e.name: e.chunks for e in entries}

    def half(name, number):
        pairs = (chunks[name.replace("_up_", "_gate_")](), chunks[name.replace("_gate_", "_up_")]())
        return (torch.stack(pair, dim=1).flatten(0, 1).chunk(2)[number] for pair in zip(*pairs, strict=True))

    return [
        e if "_down_" in e.name else replace(e, chunks=lambda e=e: half(e.name, int("_up_" in e.name)))
        for e in entries
    ]


@needs_llamacpp
@pytest.mark.parametrize("damage", [gate_and_up_swapped, without_biases, gate_and_up_as_halves])
def test_faults_of_a_gguf_file_disagree_in_tensors_and_predictions(tiny, int4_path, monkeypatch, damage):
    real = export_gguf.expert_entries

    def wrong(checkpoint, layer, kind):
        entries = list(real(checkpoint, layer, kind))
        # the checkpoint's own file only: the noise stays that of a right one
        return damage(entries) if checkpoint.expert_format == "int4" else entries

    monkeypatch.setattr(export_gguf, "expert_entries", wrong)
    found = verdicts(verify(request(tiny, int4_path()), ("llama.cpp",)))
    assert found["tensors"] == found["Q4_0"] == DISAGREES


@needs_llamacpp
def test_the_reference_for_llama_cpp_rounds_the_ramp_and_leaves_the_checkpoint_alone(tiny, int4_path):
    comparison = request(tiny, int4_path())
    checkpoint = comparison.checkpoint
    before = checkpoint.config
    rounded = predictions(checkpoint, comparison, rope=check_llamacpp.reference_rope(before))
    assert checkpoint.config is before
    assert compare(predictions(checkpoint, comparison), rounded).kl > 0.01
    # a model without YaRN is the same in both
    default = replace(comparison, checkpoint=Checkpoint(tiny.path("default")))
    rope = check_llamacpp.reference_rope(default.checkpoint.config)
    assert torch.equal(predictions(default.checkpoint, default), predictions(default.checkpoint, default, rope=rope))


# stands in for llama-server: its options, its address, the same engine
SERVER = """#!{python}
import sys, time, xllamacpp
given = dict(zip(sys.argv[1::1], sys.argv[2::1]))
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.port = given["-m"], int(given["-c"]), int(given["--port"])
params.n_parallel, params.verbosity, params.warmup, params.swa_full = 1, -1, False, True
assert given["-fa"] == "off" and given["-ctk"] == given["-ctv"] == "f32"
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(params)
time.sleep(600)
"""


@needs_llamacpp
def test_a_llama_server_binary_is_used_when_given(tiny, int4_path, tmp_path):
    binary = tmp_path / "llama-server"
    binary.write_text(SERVER.format(python=sys.executable))
    binary.chmod(binary.stat().st_mode | stat.S_IXUSR)
    path = tmp_path / "model.gguf"
    export_gguf.write_gguf(Checkpoint(int4_path()), path, name="tiny")
    ids = tiny.ids(1, 12)
    with check_llamacpp.serve(path, 64, binary) as address:
        got = check_llamacpp.log_probs(address, ids, [3, 11], tiny.vocab)
    with check_llamacpp.serve(path, 64, None) as address:
        expected = check_llamacpp.log_probs(address, ids, [3, 11], tiny.vocab)
    assert compare(expected, got).kl < 1e-4


def test_a_server_that_cannot_run_or_load_is_refused(tmp_path):
    with (
        pytest.raises(InputError, match="cannot be run"),
        check_llamacpp.serve(tmp_path / "model.gguf", 64, tmp_path / "no-such-binary"),
    ):
        pass
    false = tmp_path / "llama-server"
    false.write_text("#!/bin/sh\nexit 3\n")
    false.chmod(false.stat().st_mode | stat.S_IXUSR)
    with (
        pytest.raises(InputError, match="llama-server ended with 3"),
        check_llamacpp.serve(tmp_path / "model.gguf", 64, false),
    ):
        pass


# --- the command


def test_the_command_prints_the_table_and_fails_when_one_disagrees(
    tiny, int4_path, tmp_path, monkeypatch, capsys, quick
):
    real = check_transformers.packed

    def wrong(path, dtype):
        model = real(path, dtype)
        damage_packed(model.model.layers[0].mlp.experts, swap_gate_and_up)
        return model

    numbers = tmp_path / "rows.json"
    words = ["gptoss-quantize", "verify", int4_path(), "--runtime", "transformers", "--json", numbers]
    words += ["--sequences", 2, "--seq-len", 40, "--positions", 4]
    baseline = ["--baseline", tiny.path("bf16")]

    def run(*more) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [str(word) for word in (*words, *more)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, capsys.readouterr().out

    code, out = run(*baseline)
    assert code == 0 and AGREES in out and DISAGREES not in out
    found = json.loads(numbers.read_text())
    packed = next(row for row in found if row["what"] == "packed int4")
    assert {row["runtime"] for row in found} == {"the file", "transformers"}
    # 2 sequences of 4 positions
    assert packed["got"]["positions"] == 8
    code, out = run()
    assert code == 0 and NOT_CHECKED in out
    monkeypatch.setattr(check_transformers, "packed", wrong)
    code, out = run(*baseline)
    assert code == 1 and DISAGREES in out
    verdict = {row["what"]: row["verdict"] for row in json.loads(numbers.read_text())}
    assert verdict["packed int4"] == DISAGREES
    assert run("--runtime", "ollama")[0] == 2


@pytest.mark.parametrize("engine", ["right", "wrong", "absent"])
@pytest.mark.parametrize("place", ["CPU", "CPU with plugin", "card"])
def test_predictions_of_vllm_are_compared_with_ours(tiny, int4_path, monkeypatch, engine, place):
    # stands in for vLLM's processes: the loader says all is in place, the engine answers with ours and some noise
    asked = request(tiny, int4_path())
    prompts = check_vllm.prefixes(asked.ids, asked.positions)
    assert [len(p) for p in prompts[: len(asked.positions)]] == [p + 1 for p in asked.positions]

    def run(module, *arguments, environment=None):
        if module == "vllm_loader":
            out = json.dumps({"version": "0", "backend": "none", "placed": 1, "wrong": []})
            return subprocess.CompletedProcess([], 0, out, "")
        (question,) = json.loads(Path(arguments[0]).read_text())
        path, options, answer = question["model"], question["options"], Path(arguments[1], "0.safetensors")
        assert (question["prompts"], question["what"]) == (prompts, "next")
        # the baseline comes as a folder of links to exactly its files
        links = [p.resolve() for p in Path(path).glob("*.safetensors") if p.is_symlink()]
        candidate = sorted(links) != [p.resolve() for p in asked.baseline.files()]
        if candidate and engine == "absent":
            answer.with_suffix(".txt").write_text("ValueError: no such kernel")
            return subprocess.CompletedProcess([], 0, "", "")
        got = predictions(Checkpoint(Path(path)), asked)
        exact = options["dtype"] == "float32"
        got += (1e-5 if exact else 0.1) * torch.randn(got.shape, generator=torch.Generator().manual_seed(0))
        # the backend chosen by default is the one that may be wrong
        wrong = candidate and engine == "wrong" and options.get("moe_backend", "auto") == "auto"
        save_file({"log_probs": got.roll(1, -1) if wrong else got}, answer)
        return subprocess.CompletedProcess([], 0, "", "")

    monkeypatch.setattr(check_vllm, "_run", run)
    monkeypatch.setattr(check_vllm, "available", lambda: True)
    monkeypatch.setattr(check_vllm, "plugin", lambda: place == "CPU with plugin")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: place == "card")
    found = {row.what: row for row in verify(asked, ("vllm",))}
    expected = {"right": AGREES, "wrong": DISAGREES, "absent": FAILED}[engine]
    assert found["loader"].verdict == AGREES
    assert found["baseline"].got.kl > 1e-4
    assert found["bfloat16 export"].verdict == expected
    if place == "card":
        assert found["int4, --moe-backend auto"].verdict == expected
        others = {found[f"int4, --moe-backend {name}"].verdict for name in ("humming", "emulation", "triton")}
        assert others == {NOT_CHECKED if engine == "absent" else AGREES}
    elif place == "CPU with plugin":
        assert found["int4, our plugin"].verdict == expected
        assert found["baseline, float32"].got.kl < 1e-6
    else:
        assert found["int4"].verdict == NOT_CHECKED
    if engine == "absent":
        assert "ValueError: no such kernel" in found["bfloat16 export"].note
