"""Whole quantization runs on a tiny model: what is written, interrupted and resumed at any moment, refused."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GptOssForCausalLM

from gptoss_quantize import __version__
from gptoss_quantize.adapter import Adapter
from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.errors import InputError
from gptoss_quantize.files import MARK
from gptoss_quantize.kernels import int4
from gptoss_quantize.layouts import INT4, dense_shapes, quantization_config
from gptoss_quantize.machine import pick_device
from gptoss_quantize.model import hidden_states, logits
from gptoss_quantize.quantize.job import Job
from gptoss_quantize.quantize.recipes import RECIPES, override
from gptoss_quantize.quantize.run import quantize_checkpoint

METHODS = ["rtn", "gptq", "awq", "awq+gptq"]


def quantize(source: Path, dest: Path, method="rtn", *, tokens=None, adapter=None, on_layer=None, **options):
    # in float32, so that machines with and without bfloat16 products do the same
    defaults = {"recipe": RECIPES[method], "device": "cpu", "dtype": torch.float32}
    job = Job(dest=dest, method=method, **(defaults | options))
    checkpoint = Checkpoint(source, None if adapter is None else Adapter.open(adapter))
    return quantize_checkpoint(checkpoint, job, tokens, on_layer or (lambda index: None))


def refused(call, *words: str) -> None:
    with pytest.raises(InputError) as error:
        call()
    missing = [word for word in words if word not in str(error.value)]
    assert not missing, f"{missing} not in: {error.value}"


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    """Return a function from a method to (its directory, its report), each run once."""
    root, made = tmp_path_factory.mktemp("undisturbed"), {}

    def make(method):
        if method not in made:
            tokens = tiny.tokens() if RECIPES[method].calibrated else None
            made[method] = root / method, quantize(tiny.path("bf16"), root / method, method, tokens=tokens)
        return made[method]

    return make


# ---- what is written


@pytest.mark.parametrize("method", METHODS)
def test_dense_tensors_are_copied_bit_for_bit(tiny, undisturbed, method):
    source, (path, report) = tiny.load_all(tiny.path("bf16")), undisturbed(method)
    written = tiny.load_all(path)
    folded = {
        f"model.layers.{i}.{name}"
        for i, layer in enumerate(report["layers"])
        if layer.get("awq", {}).get("alpha")
        for name in ("post_attention_layernorm.weight", "mlp.router.weight")
    }
    assert bool(folded) == method.startswith("awq")
    for name in dense_shapes(Checkpoint(path).config):
        assert written[name].dtype == source[name].dtype
        assert torch.equal(written[name], source[name]) != (name in folded), name


def test_rtn_codes_are_the_nearest(tiny, undisturbed):
    # the definition again: absmax / 7.5 in bfloat16, nearest code, biases as they were
    path, _ = undisturbed("rtn")
    source, checkpoint = Checkpoint(tiny.path("bf16")), Checkpoint(path)
    for e in (0, 7):
        original, base = source.expert(2, e), f"model.layers.2.mlp.experts.{e}."
        for name, weight, bias in (
            ("w13", original.gate_up, original.gate_up_bias),
            ("w2", original.down, original.down_bias),
        ):
            groups = weight.unflatten(-1, (-1, 64))
            scale = (groups.abs().amax(-1) / 7.5).to(torch.bfloat16)
            codes = (groups / scale.float()[..., None]).round().clamp(-8, 7).flatten(-2).to(torch.int8)
            assert torch.equal(checkpoint.read(f"{base}{name}_weight_scale"), scale)
            assert torch.equal(int4.unpack(checkpoint.read(f"{base}{name}_weight_packed")), codes)
            assert torch.equal(checkpoint.read(f"{base}{name}_bias").float(), bias)


@pytest.mark.parametrize("group_size", [32, 64])
def test_config_says_what_it_is(tiny, tmp_path, group_size):
    report = quantize(tiny.path("mxfp4"), tmp_path / "out", group_size=group_size)
    assert report["source_is_mxfp4"]
    error = size = 0.0
    original, rounded = Checkpoint(tiny.path("mxfp4")), Checkpoint(tmp_path / "out")
    for layer in range(3):
        for e in range(8):
            for name in ("gate_up", "down"):
                wanted, got = (getattr(c.expert(layer, e), name).double() for c in (original, rounded))
                error, size = error + float((got - wanted).square().sum()), size + float(wanted.square().sum())
    assert report["weight_error"] == pytest.approx(error / size, rel=1e-5)
    source = json.loads((tiny.path("mxfp4") / "config.json").read_text())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert source.pop("quantization_config")["quant_method"] == "mxfp4"
    marker = config.pop("gptoss_quantize")
    assert config == source
    assert marker == {"version": __version__, "format": "int4", "method": "rtn", "group_size": group_size}
    assert quantization == quantization_config(INT4, group_size)
    assert quantization["quant_method"] == "compressed-tensors"
    assert quantization["config_groups"]["group_0"]["weights"]["group_size"] == group_size
    assert Checkpoint(tmp_path / "out").group_size == group_size


def test_files(tiny, undisturbed):
    path, report = undisturbed("rtn")
    source = tiny.path("bf16")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (path / name).read_bytes() == (source / name).read_bytes()
    shards = sorted(p.name for p in path.glob("*.safetensors"))
    assert shards == [f"gptoss-int4-{i:05d}-of-00004.safetensors" for i in range(1, 5)]
    assert not {p.name for p in path.iterdir()} & {"state.json", "hidden-0.bin", "hidden-1.bin"}
    stored = sum(t.numel() * t.element_size() for shard in shards for t in load_file(path / shard).values())
    index = json.loads((path / "gptoss-int4.safetensors.index.json").read_text())
    assert report["bytes"] == index["metadata"]["total_size"] == stored


@pytest.mark.parametrize("method", METHODS)
def test_report(tiny, undisturbed, method):
    path, returned = undisturbed(method)
    report = json.loads((path / "quantization_report.json").read_text())
    assert report == json.loads(json.dumps(returned))
    settings = report["settings"]
    assert settings["source"] == str(tiny.path("bf16").resolve())
    assert (settings["method"], settings["group_size"], settings["device"]) == (method, 64, "cpu")
    assert settings["recipe"]["gptq"] == method.endswith("gptq")
    weights = {p.name for p in tiny.path("bf16").glob("*.safetensors")}
    assert settings["source_files"].keys() == {"config.json", *weights}
    assert report["expert_bits_per_weight"] == 4.25
    assert not report["source_is_mxfp4"]
    errors = [e["output_error"] for layer in report["layers"] for e in layer.get("experts", [])]
    assert report["mean_output_error"] == (pytest.approx(sum(errors) / 24) if errors else None)
    assert report["seconds"] > 0
    assert report["peak_rss_mib"] > 10
    assert report["machine"]["torch"] == torch.__version__
    assert len(report["layers"]) == 3
    if method == "rtn":
        assert report["calibration"] is None
        return
    tokens = tiny.tokens()
    assert report["calibration"] == {**tokens.record(), "shape": [16, 48]}
    assert settings["calibration"] == tokens.sha256
    for layer in report["layers"]:
        # every token goes to four experts, and is counted there
        assert sum(layer["tokens"]) == 4 * tokens.tokens
        assert [e["tokens"] for e in layer["experts"]] == layer["tokens"]
        assert [e["expert"] for e in layer["experts"]] == list(range(8))
        assert all(0 < e["output_error"] < 1 for e in layer["experts"])
    if method.startswith("awq"):
        assert all({"alpha", "gain"} <= layer["awq"].keys() for layer in report["layers"])


def test_token_counts_are_the_models_routing(tiny, undisturbed):
    # transformers' own routers, on the same tokens
    stock = GptOssForCausalLM.from_pretrained(tiny.path("bf16"), dtype=torch.float32)
    choices = []
    for block in stock.model.layers:
        block.mlp.router.register_forward_hook(lambda module, given, out: choices.append(out[-1]))
    with torch.inference_mode():
        stock(tiny.tokens().ids)
    for index, layer in zip(choices, undisturbed("gptq")[1]["layers"], strict=True):
        counts = torch.bincount(index.flatten(), minlength=8)
        # sums in another order decide a near tie another way
        assert sum(layer["tokens"]) == index.numel()
        assert int((counts - torch.tensor(layer["tokens"])).abs().sum()) <= 0.02 * index.numel()


def test_calibrated_methods_are_better(tiny, undisturbed):
    ids = tiny.ids(8, seed=77)
    source = Checkpoint(tiny.path("bf16"))
    exact = logits(hidden_states(source, ids), source.head().float())

    def divergence(method: str) -> float:
        checkpoint = Checkpoint(undisturbed(method)[0])
        got = logits(hidden_states(checkpoint, ids), checkpoint.head().float()).log_softmax(-1)
        expected = exact.log_softmax(-1)
        return float((expected.exp() * (expected - got)).sum(-1).mean())

    rtn, gptq, both = divergence("rtn"), divergence("gptq"), divergence("awq+gptq")
    assert gptq < 0.8 * rtn
    assert both < 0.8 * rtn
    # random weights have no outliers for AWQ to move
    assert divergence("awq") < rtn


def test_experts_without_tokens_are_reported(tiny, tmp_path):
    path = tiny.copy("float32", tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.mlp.router.bias"][5] = -1000.0
    save_file(tensors, path / "model.safetensors")
    report = quantize(path, tmp_path / "out", "gptq", tokens=tiny.tokens())
    assert report["experts_without_tokens"] == [[1, 5]]
    assert report["layers"][1]["experts"][5]["output_error"] is None
    assert torch.isfinite(Checkpoint(tmp_path / "out").expert(1, 5).down).all()


# ---- interrupted and resumed


# shares of a run's operations on files: the first, the last, and some between
MOMENTS = (0.0, 0.2, 0.4, 0.6, 0.8, 0.95, 1.0)


@pytest.mark.parametrize(
    ("method", "moments"), [("rtn", MOMENTS), ("gptq", MOMENTS[3:6]), ("awq+gptq", MOMENTS[1::2])]
)
def test_a_killed_run_ends_with_the_same_bytes(tiny, tmp_path, child, method, moments):
    """Killed with SIGKILL before an operation on a file, wherever it falls, and continued."""
    tokens = tiny.tokens(4) if RECIPES[method].calibrated else None
    source, out = tiny.path("bf16"), tmp_path / "out"

    def run(resume: bool) -> None:
        quantize(source, out, method, tokens=tokens, resume=resume)

    operations = child.run(lambda: run(False))
    assert operations > 20
    expected = out.rename(tmp_path / "undisturbed")
    report = json.loads((expected / "quantization_report.json").read_text())
    for moment in moments:
        child.run(lambda: run(False), kill_at=round(moment * (operations - 1)))
        begun = (tmp_path / "out.partial" / MARK).exists()
        if not out.exists():
            # killed before anything of it was on disk, it begins anew
            child.run(lambda begun=begun: run(begun))
        assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "undisturbed"], moment
        assert compared(tiny.snapshot(out)) == compared(tiny.snapshot(expected)), moment
        again = json.loads((out / "quantization_report.json").read_text())
        assert (again["layers"], again["settings"]) == (report["layers"], report["settings"]), moment
        shutil.rmtree(out)


def test_a_resumed_run_tells_of_all_layers(tiny, tmp_path):
    def stop(index: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(tiny.path("bf16"), tmp_path / "out", on_layer=stop)
    assert [p.name for p in tmp_path.iterdir()] == ["out.partial"]
    seen = []
    quantize(tiny.path("bf16"), tmp_path / "out", on_layer=seen.append, resume=True)
    assert seen == [0, 1, 2]


def compared(files: dict[str, bytes]) -> dict[str, bytes]:
    """Return what must be the same: everything but the report, which has times."""
    return {name: data for name, data in files.items() if name != "quantization_report.json"}


def spoil(source: Path, shard: str) -> None:
    """Turn all values of a shard into NaN, under the same name, size and time: to read it again is to be refused."""
    (path,) = source.glob(f"*-{shard}-of-*.safetensors")
    stat = path.stat()
    with path.open("r+b") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        file.seek(start)
        file.write(b"\xff" * (stat.st_size - start))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_resume_does_not_read_finished_layers(tiny, tmp_path, method):
    source, out = tiny.copy("mxfp4", tmp_path / "model"), tmp_path / "out"
    tokens = tiny.tokens(4) if method == "gptq" else None

    def stop(index: int) -> None:
        if index == 1:
            raise KeyboardInterrupt

    quantize(source, tmp_path / "undisturbed", method, tokens=tokens)
    with pytest.raises(KeyboardInterrupt):
        quantize(source, out, method, tokens=tokens, on_layer=stop)
    for shard in ("00002", "00003"):
        spoil(source, shard)
    quantize(source, out, method, tokens=tokens, resume=True)
    assert compared(tiny.snapshot(out)) == compared(tiny.snapshot(tmp_path / "undisturbed"))
    # and it would have been noticed
    refused(
        lambda: quantize(source, tmp_path / "again", method, tokens=tokens),
        "layers.0",
        "NaN or infinite" if method == "gptq" else "holds 255",
    )


def test_resumed_twice(tiny, undisturbed, tmp_path):
    out, tokens = tmp_path / "out", tiny.tokens()

    def stop_at(layer: int):
        def stop(index: int) -> None:
            if index == layer:
                raise KeyboardInterrupt

        return stop

    for layer, resume in ((0, False), (1, True)):
        with pytest.raises(KeyboardInterrupt):
            quantize(tiny.path("bf16"), out, "gptq", tokens=tokens, on_layer=stop_at(layer), resume=resume)
    state = tmp_path / "out.partial" / "state.json"
    known = json.loads(state.read_text())
    assert known["elapsed"] > 0 and known["peak_rss_mib"] > 10
    state.write_text(json.dumps(known | {"elapsed": 1000.0, "peak_rss_mib": 10**7}))
    report = quantize(tiny.path("bf16"), out, "gptq", tokens=tokens, resume=True)
    # time and memory of all three processes
    assert 1000 < report["seconds"] < 1100 and report["peak_rss_mib"] == 10**7
    assert compared(tiny.snapshot(out)) == compared(tiny.snapshot(undisturbed("gptq")[0]))


def test_same_bytes_every_time(tiny, undisturbed, tmp_path):
    quantize(tiny.path("bf16"), tmp_path / "out", "awq+gptq", tokens=tiny.tokens())
    assert compared(tiny.snapshot(tmp_path / "out")) == compared(tiny.snapshot(undisturbed("awq+gptq")[0]))


# ---- overwrite


def test_overwrite(tiny, undisturbed, tmp_path):
    out, source = tmp_path / "out", tiny.copy("mxfp4", tmp_path / "model")
    shutil.copytree(undisturbed("rtn")[0], out)
    before = tiny.snapshot(tmp_path)
    refused(lambda: quantize(source, out), str(out), "already exists", "--overwrite")
    refused(lambda: quantize(source, out, resume=True), "out.partial", "nothing to resume", "without --resume")
    assert tiny.snapshot(tmp_path) == before

    def stop(index: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(source, out, "rtn-signed", overwrite=True, on_layer=stop)
    # the old one stands until the new one is whole
    assert tiny.snapshot(out) == tiny.snapshot(undisturbed("rtn")[0])
    # an interrupted run that was to replace it still is, and goes on where it was
    spoil(source, "00002")
    quantize(source, out, "rtn-signed", resume=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]
    assert json.loads((out / "config.json").read_text())["gptoss_quantize"]["method"] == "rtn-signed"


def test_resume_beside_a_result_that_came_later(tiny, undisturbed, tmp_path):
    def stop(index: int) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        quantize(tiny.path("bf16"), out, "rtn", on_layer=stop)
    shutil.copytree(undisturbed("rtn")[0], out)
    before = tiny.snapshot(tmp_path)
    refused(lambda: quantize(tiny.path("bf16"), out, "rtn", resume=True), str(out), "already exists", "move it away")
    assert tiny.snapshot(tmp_path) == before


def test_overwrite_of_the_model_itself(tiny, tmp_path):
    path = tiny.copy("bf16", tmp_path / "model")
    (path / "quantization_report.json").write_text("{}")
    before = tiny.snapshot(tmp_path)
    for out in (path, tmp_path):
        refused(lambda out=out: quantize(path, out, overwrite=True), f"{out}: holds the input", "choose another")
    assert tiny.snapshot(tmp_path) == before


# ---- adapter


@pytest.mark.parametrize("kind", ["float32", "mxfp4"])
def test_adapter_equals_peft_merged_model(tiny, tmp_path, kind):
    adapter, merged = tiny.train(tmp_path / "adapter")
    base = tiny.path(kind)
    if kind == "mxfp4":
        # PEFT's merge of the decoded experts: the adapter's change on top of them
        state, plain = merged.state_dict(), tiny.model().state_dict()
        stored, source = tiny.load_all(base), Checkpoint(base)
        for name in state:
            if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                layer = int(name.split(".")[2])
                part = "gate_up" if "gate_up" in name else "down"
                decoded = torch.stack([getattr(e, part).T for e in source.experts(layer)])
                state[name] = decoded + (state[name] - plain[name])
            else:
                state[name] = (stored[name].float() + (state[name] - plain[name])).to(stored[name].dtype).float()
        merged.load_state_dict(state)
    merged.save_pretrained(tmp_path / "merged")
    quantize(base, tmp_path / "a", adapter=adapter)
    quantize(tmp_path / "merged", tmp_path / "b")
    ours, theirs, plain = Checkpoint(tmp_path / "a"), Checkpoint(tmp_path / "b"), Checkpoint(base)
    same, count = 0, 0
    for layer in range(3):
        for e in range(8):
            for name in ("w13", "w2"):
                base_name = f"model.layers.{layer}.mlp.experts.{e}.{name}_weight_"
                codes = [int4.unpack(c.read(base_name + "packed")) for c in (ours, theirs)]
                scales = [c.read(base_name + "scale").float() for c in (ours, theirs)]
                # sums in another order move a weight by an ulp, which is a code at a tie
                same, count = same + int((codes[0] == codes[1]).sum()), count + codes[0].numel()
                assert (codes[0] - codes[1]).abs().max() <= 1
                torch.testing.assert_close(*scales, atol=0, rtol=2**-7)
    assert same > 0.9999 * count
    for name in dense_shapes(ours.config):
        torch.testing.assert_close(ours.read(name).float(), theirs.read(name).float(), atol=1e-5, rtol=2**-7)
    # and the adapter did something
    name = "model.layers.1.self_attn.q_proj.weight"
    assert (ours.read(name).float() - plain.read(name).float()).abs().max() > 0.05


# ---- refused


def test_group_size_that_does_not_divide(tiny, tmp_path):
    tiny.build(tmp_path / "model", intermediate_size=352)
    words = (str(tmp_path / "model"), "352 is not a multiple of group size 64", "use --group-size 32")
    refused(lambda: quantize(tmp_path / "model", tmp_path / "out", group_size=64), *words)
    # the compiled loops would read past their arrays
    for group_size in (0, 8, 48, 352):
        words = (f"format int4 has groups of 32 or 64, not {group_size}",)
        refused(lambda g=group_size: quantize(tmp_path / "model", tmp_path / "out", group_size=g), *words)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    quantize(tmp_path / "model", tmp_path / "out", group_size=32)


def test_tokens_of_another_vocabulary(tiny, tmp_path):
    tokens = tiny.tokens(2)
    tokens.ids[1, 3] = 300
    call = lambda: quantize(tiny.path("bf16"), tmp_path / "out", "gptq", tokens=tokens)  # noqa: E731
    refused(call, "token id 300", "ends at 299", "tokenizer and model do not belong together")
    assert list(tmp_path.iterdir()) == []


def test_method_without_its_text(tiny, tmp_path):
    refused(lambda: quantize(tiny.path("bf16"), tmp_path / "out", "gptq"), "method gptq needs", "--calibration")
    assert list(tmp_path.iterdir()) == []


def test_devices(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (pick_device("auto"), pick_device("cpu")) == ("cpu", "cpu")
    for device, words in (("cuda", "use --device cpu"), ("cuda:1", "use --device cpu"), ("tpu", "auto, cpu or cuda")):
        call = lambda d=device: quantize(tiny.path("bf16"), tmp_path / "out", device=d)  # noqa: E731
        refused(call, f"--device {device}", words)
    assert list(tmp_path.iterdir()) == []


CHANGES = {
    "method": {"method": "awq"},
    "recipe": {"recipe": override(RECIPES["gptq"], ["damping=0.1"])},
    "group_size": {"group_size": 32},
    "calibration": {"tokens": 3},
    "dtype": {"dtype": torch.bfloat16},
    "source": {"source": "float32"},
}


@pytest.mark.parametrize("name", CHANGES)
def test_resume_with_a_changed_option(tiny, tmp_path, name):
    def stop(index: int) -> None:
        raise KeyboardInterrupt

    out, source = tmp_path / "out", tiny.path("bf16")
    options = {"method": "gptq", "tokens": tiny.tokens(4), "dtype": torch.float32}
    with pytest.raises(KeyboardInterrupt):
        quantize(source, out, **options, on_layer=stop)
    change = dict(CHANGES[name])
    if name == "calibration":
        change = {"tokens": tiny.tokens(4, seed=3)}
    if name == "source":
        source = tiny.path(change.pop("source"))
    before = tiny.snapshot(tmp_path)
    words = (str(tmp_path / "out.partial"), "cannot resume", f"{name} was ", "start again with --overwrite")
    refused(lambda: quantize(source, out, **(options | change), resume=True), *words)
    assert tiny.snapshot(tmp_path) == before
    # dropping the old run is the way out
    quantize(source, out, "rtn", overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_places_that_cannot_be_written(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    refused(lambda: quantize(tiny.path("bf16"), tmp_path / "file" / "out"), "out.partial", "choose another place")
    refused(
        lambda: quantize(tiny.path("bf16"), tmp_path / "new", resume=True), "nothing to resume", "without --resume"
    )
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
