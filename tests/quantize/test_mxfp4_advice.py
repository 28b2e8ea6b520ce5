"""What is found out about MXFP4 values in a source: of every expert of every layer; what is then said, and done."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from gptoss_quantize import advice
from gptoss_quantize.adapter import Adapter
from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.errors import InputError
from gptoss_quantize.kernels import mxfp4
from gptoss_quantize.quantize.auto import settle_format
from gptoss_quantize.quantize.job import Job
from gptoss_quantize.quantize.mxfp4_values import look_at
from gptoss_quantize.quantize.recipes import RECIPES
from gptoss_quantize.quantize.run import quantize_checkpoint
from gptoss_quantize.source import Expert

GROUPS = {"int4": 64, "mxfp4": 32, "auto": 64}


def job(out: Path, method: str = "rtn", form: str = "int4", **options) -> Job:
    return Job(
        dest=out, method=method, recipe=RECIPES[method], format=form, group_size=GROUPS[form], dtype=torch.float32,
        **options,
    )  # fmt: skip


def tune(tiny, home: Path, layers: dict[int, list[int]]) -> Path:
    """Write a bf16 copy of the MXFP4 model whose attention was tuned, and some experts' weights; return it."""
    path = tiny.copy("bf16", home)
    for file in path.glob("*.safetensors*"):
        file.unlink()
    tensors = {}
    for name, tensor in tiny.load_all(tiny.path("mxfp4")).items():
        if name.endswith("_blocks"):
            scales = tiny.load_all(tiny.path("mxfp4"))[name.replace("_blocks", "_scales")]
            weight = mxfp4.decode(tensor, scales, torch.float32).transpose(1, 2).contiguous()
            layer = int(name.split(".")[2])
            for expert in layers.get(layer, []):
                # one weight of one row: of the last block of 32
                weight[expert, -1, -1] += 0.3 * weight[expert].abs().max()
            tensors[name.removesuffix("_blocks")] = weight.bfloat16()
        elif not name.endswith("_scales"):
            tensors[name] = tensor * 1.25 if "q_proj" in name else tensor
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def lora(tiny, path: Path, *, experts: bool = False) -> Path:
    """Save an adapter on attention, or on the experts of layer 1 too."""
    model = type(tiny.model())(tiny.model().config).float()
    model.load_state_dict(tiny.model().state_dict())
    more = {"target_parameters": ["1.mlp.experts.gate_up_proj", "1.mlp.experts.down_proj"]} if experts else {}
    # PEFT warns of what it calls itself
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        tuned = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "o_proj"], **more))
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
        tuned.save_pretrained(str(path))
    return path


def said(report: dict) -> str:
    return advice.after_quantizing(json.loads(json.dumps(report)))


def same_experts(a: Checkpoint, b: Checkpoint) -> bool:
    return all(
        torch.equal(getattr(a.expert(layer, e), part), getattr(b.expert(layer, e), part))
        for layer in range(3)
        for e in range(8)
        for part in Expert.__slots__
    )


# ---- every expert of every layer is looked at


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize(
    "moved", [{}, {0: [0]}, {1: [5]}, {0: [7], 2: [1, 3]}, {0: [0], 1: [0], 2: [0]}], ids=lambda m: f"moved {m}"
)
def test_what_moved_is_found_wherever_it_is(tiny, tmp_path, method, moved):
    source = Checkpoint(tune(tiny, tmp_path / "tuned", moved))
    tokens = tiny.tokens(4) if method == "gptq" else None
    report = quantize_checkpoint(source, job(tmp_path / "out", method), tokens)
    assert report["off_mxfp4_grid"] == {str(layer): experts for layer, experts in moved.items()}
    assert report["source_is_mxfp4"] == (not moved)
    assert report["source_experts"] == "float"
    words = said(report)
    if not moved:
        assert "Every expert of the source is an MXFP4 value" in words
        assert "--format mxfp4 --method rtn (or --format auto) keeps every expert exactly" in words
        assert "rms" in words and "keep the release" not in words
    elif len(moved) == 3:
        assert words == ""
    else:
        assert f"The experts of {3 - len(moved)} of 3 layers are MXFP4 values" in words
        assert ("those of layer 0 were" if 0 in moved and len(moved) == 1 else "those of layer") in words
        assert "keeps every expert exactly" not in words
    seen = look_at(source)
    # a glance: one expert of each layer
    assert set(seen["moved_layers"]) <= set(moved)


def test_the_release_is_told_to_keep_itself(tiny, tmp_path):
    report = quantize_checkpoint(Checkpoint(tiny.path("mxfp4")), job(tmp_path / "out"), None)
    assert report["source_is_mxfp4"] and report["source_experts"] == "mxfp4"
    assert "keep the release" in said(report)
    report = quantize_checkpoint(Checkpoint(tiny.path()), job(tmp_path / "plain"), None)
    assert not report["source_is_mxfp4"] and list(report["off_mxfp4_grid"]) == ["0", "1", "2"]
    assert said(report) == ""


def test_an_adapter_on_the_release(tiny, tmp_path):
    attention = Adapter.open(lora(tiny, tmp_path / "attention"))
    report = quantize_checkpoint(Checkpoint(tiny.path("mxfp4"), attention), job(tmp_path / "a"), None)
    assert report["source_is_mxfp4"]
    assert "keeps every expert exactly" in said(report) and "keep the release" not in said(report)
    experts = Adapter.open(lora(tiny, tmp_path / "experts", experts=True))
    report = quantize_checkpoint(Checkpoint(tiny.path("mxfp4"), experts), job(tmp_path / "b"), None)
    assert report["off_mxfp4_grid"] == {"1": list(range(8))}
    assert "The experts of 2 of 3 layers are MXFP4 values; those of layer 1 were moved" in said(report)


def test_a_resumed_run_knows_of_the_layers_before(tiny, tmp_path):
    class StopError(Exception):
        pass

    def stop(index: int) -> None:
        if index == 1:
            raise StopError

    source = Checkpoint(tune(tiny, tmp_path / "tuned", {0: [3]}))
    with pytest.raises(StopError):
        quantize_checkpoint(source, job(tmp_path / "out"), None, stop)
    report = quantize_checkpoint(source, job(tmp_path / "out", resume=True), None)
    assert report["off_mxfp4_grid"] == {"0": [3]}


# ---- and then kept


@pytest.mark.parametrize("kind", ["merged", "adapter"])
@pytest.mark.parametrize("form", ["mxfp4", "auto"])
def test_a_fine_tune_of_attention_is_kept_exactly(tiny, tmp_path, kind, form):
    if kind == "merged":
        source = Checkpoint(tune(tiny, tmp_path / "tuned", {}))
    else:
        source = Checkpoint(tiny.path("mxfp4"), Adapter.open(lora(tiny, tmp_path / "lora")))
    # auto needs no method of its own where rounding changes nothing, and no text
    wanted = job(tmp_path / "out", "gptq" if form == "auto" else "rtn", form)
    report = quantize_checkpoint(source, wanted, tiny.tokens(4) if form == "auto" else None)
    made = Checkpoint(tmp_path / "out")
    assert (made.expert_format, report["settings"]["format"], report["settings"]["method"]) == (
        "mxfp4",
        "mxfp4",
        "rtn",
    )
    assert same_experts(source, made)
    assert same_experts(Checkpoint(tiny.path("mxfp4")), made)
    query = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(made.dense(query), Checkpoint(tiny.path("mxfp4")).dense(query))
    assert report["weight_error"] == 0
    assert said(report).startswith("every expert kept exactly")


def test_mxfp4_of_a_mixed_model_keeps_the_rest_exactly(tiny, tmp_path):
    source = Checkpoint(tune(tiny, tmp_path / "tuned", {1: [2]}))
    report = quantize_checkpoint(source, job(tmp_path / "out", form="mxfp4"), None)
    made = Checkpoint(tmp_path / "out")
    differing = {
        (layer, e)
        for layer in range(3)
        for e in range(8)
        if not torch.equal(source.expert(layer, e).gate_up, made.expert(layer, e).gate_up)
        or not torch.equal(source.expert(layer, e).down, made.expert(layer, e).down)
    }
    assert differing == {(1, 2)}
    assert "all layers but layer 1 kept exactly" in said(report)


def test_auto_is_int4_as_soon_as_one_expert_moved(tiny, tmp_path):
    source = Checkpoint(tune(tiny, tmp_path / "tuned", {2: [7]}))
    looked: list[int] = []
    settled = settle_format(source, job(tmp_path / "out", "gptq", "auto"), looked.append)
    assert (settled.format, settled.method, settled.group_size) == ("int4", "gptq", 64)
    assert looked == [1, 2]
    report = quantize_checkpoint(source, job(tmp_path / "out", "rtn", "auto"), None)
    assert Checkpoint(tmp_path / "out").expert_format == "int4"
    assert "those of layer 2 were moved" in said(report)
    # the same bytes as without auto
    quantize_checkpoint(source, job(tmp_path / "int4", "rtn"), None)
    shards = [p.name for p in sorted((tmp_path / "int4").glob("*.safetensors"))]
    assert all((tmp_path / "int4" / n).read_bytes() == (tmp_path / "out" / n).read_bytes() for n in shards)


def test_auto_of_the_release_is_told_to_use_it(tiny, tmp_path):
    with pytest.raises(InputError, match=r"MXFP4 already, 4\.25 bits: use that directory as it is"):
        settle_format(Checkpoint(tiny.path("mxfp4")), job(tmp_path / "out", "gptq", "auto"))


def test_files_that_say_mxfp4_are_not_read_twice(tiny, tmp_path, monkeypatch):
    source = Checkpoint(tiny.path("mxfp4"), Adapter.open(lora(tiny, tmp_path / "lora")))
    monkeypatch.setattr(Checkpoint, "expert", lambda *_, **__: pytest.fail("an expert was read"))
    assert settle_format(source, job(tmp_path / "out", "gptq", "auto")).format == "mxfp4"
    assert look_at(source)["source_is_mxfp4"]


def test_plan_glances_at_every_layer(tiny, tmp_path):
    record = look_at(Checkpoint(tune(tiny, tmp_path / "a", {})))
    assert (record["source_is_mxfp4"], record["stored_as_mxfp4"], record["moved_layers"]) == (True, False, [])
    assert "--format auto looks at all of them" in advice.before_quantizing(record)
    every = {1: list(range(8))}
    record = look_at(Checkpoint(tune(tiny, tmp_path / "b", every)))
    assert record["moved_layers"] == [1]
    assert "those of layer 1 were moved" in advice.before_quantizing(record)
    assert advice.before_quantizing(look_at(Checkpoint(tiny.path()))) == ""
    assert "keep the release" in advice.before_quantizing(look_at(Checkpoint(tiny.path("mxfp4"))))


@pytest.mark.parametrize(
    ("layers", "words"), [([4], "layer 4"), ([0, 1, 2, 5, 7, 8], "layers 0-2, 5, 7-8"), ([1, 3], "layers 1, 3")]
)
def test_layers_are_listed_by_runs(layers, words):
    assert advice._listed(layers) == words
