"""Other tools' files: every layout and both meanings of gate_proj, found by likelihood; refusals with a way out."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.errors import InputError
from gptoss_quantize.kernels import int4, legacy
from gptoss_quantize.model import hidden_states, logits
from gptoss_quantize.runtimes.exports import export_checkpoint
from gptoss_quantize.runtimes.foreign import Foreign
from gptoss_quantize.runtimes.imports import detect_split, import_checkpoint, suggested_split

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# what each tool's config.json says of itself
WRITERS = {
    "gptqmodel": {"quant_method": "gptq", "checkpoint_format": "gptq", "meta": {"quantizer": ["gptqmodel:7.7.0"]}},
    "autoround": {"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round:auto_gptq"},
    "llmcompressor": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "unknown": {"quant_method": "awq", "bits": 4, "version": "gemm"},
}  # fmt: skip


def matrices(checkpoint, layer, expert, split):
    """projection -> (codes, scales, bias) of one of our experts, gate and up as a tool with that split names them."""
    base = f"model.layers.{layer}.mlp.experts.{expert}."
    read = {m: [checkpoint.read(f"{base}{m}_{part}") for part in ("weight_packed", "weight_scale", "bias")]
            for m in ("w13", "w2")}  # fmt: skip
    half = checkpoint.config.intermediate
    rows = (slice(0, None, 2), slice(1, None, 2)) if split == "interleaved" else (slice(half), slice(half, None))
    parts = [[t[r] for t in read["w13"]] for r in rows] + [read["w2"]]
    return {
        p: (int4.unpack(packed), scale, bias) for p, (packed, scale, bias) in zip(PROJECTIONS, parts, strict=True)
    }


def write_foreign(source, dest, writer, split, edit=lambda tensors: None):
    """Write one of our checkpoints as another tool would have."""
    checkpoint = Checkpoint(source)
    tensors = {n: checkpoint.read(n) for n in checkpoint.names() if ".experts." not in n}
    config = dict(checkpoint.config.raw, quantization_config=WRITERS[writer] | {"group_size": checkpoint.group_size})
    del config["gptoss_quantize"]
    for layer in range(checkpoint.config.layers):
        for expert in range(checkpoint.config.experts):
            for projection, (codes, scale, bias) in matrices(checkpoint, layer, expert, split).items():
                name = f"model.layers.{layer}.mlp.experts.{expert}.{projection}."
                tensors[name + "bias"] = bias
                groups, rows = scale.shape[1], scale.shape[0]
                if writer == "llmcompressor":
                    tensors[name + "weight_packed"] = int4.pack(codes)
                    tensors[name + "weight_scale"] = scale
                    tensors[name + "weight_shape"] = torch.tensor(codes.shape)
                    continue
                tensors[name + "scales"] = scale.half().T.contiguous()
                if writer == "unknown":
                    tensors[name + "qweight"] = legacy.awq_qweight(codes)
                    tensors[name + "qzeros"] = legacy.awq_qzeros(groups, rows)
                    continue
                tensors[name + "qweight"] = legacy.gptq_qweight(int4.pack(codes))
                tensors[name + "qzeros"] = legacy.gptq_qzeros(groups, rows, version=1)
                if writer == "gptqmodel":
                    tensors[name + "g_idx"] = legacy.group_index(codes.shape[1], codes.shape[1] // groups)
    edit(tensors)
    dest.mkdir()
    save_file({n: t.clone() for n, t in tensors.items()}, dest / "model.safetensors", metadata={"format": "pt"})
    (dest / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, dest / name)
    return dest


@pytest.fixture(scope="module")
def spoken(int4_path):
    """Token ids [N, S] that the int4 model itself says: likely under the right reading, under no other."""
    checkpoint = Checkpoint(int4_path())
    head = checkpoint.head().float()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 290, (6, 4), generator=generator)
    for _ in range(20):
        last = logits(hidden_states(checkpoint, ids)[:, -1], head)
        ids = torch.cat((ids, torch.multinomial(torch.softmax(last, -1), 1, generator=generator)), dim=1)
    return ids


@pytest.mark.parametrize("split", ["interleaved", "halves"])
@pytest.mark.parametrize("writer", WRITERS)
def test_every_layout_and_split_is_found_out_and_imported_without_rounding(
    int4_path, tmp_path, spoken, writer, split
):
    path = write_foreign(int4_path(), tmp_path / "theirs", writer, split)
    decision = detect_split(path, spoken)
    assert decision["split"] == split and decision["because"] == "likelihood of real text"
    assert decision["nll"][split] + 0.3 < min(v for k, v in decision["nll"].items() if k != split)
    import_checkpoint(path, tmp_path / "ours", decision, to="int4", overwrite=False)
    ours, before = Checkpoint(tmp_path / "ours"), Checkpoint(int4_path())
    assert ours.names() == before.names()
    for name in ours.names():
        assert torch.equal(ours.read(name).float(), before.read(name).float()), name
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["quantization_config"] == before.config.raw["quantization_config"]
    assert config["gptoss_quantize"]["method"] == "imported"


def test_the_writer_is_only_a_suggestion():
    found = {name: suggested_split(config)[0] for name, config in WRITERS.items()}
    assert found == {
        "gptqmodel": "halves",
        "autoround": "interleaved",
        "llmcompressor": "interleaved",
        "unknown": None,
    }


@pytest.mark.parametrize("to", ["autogptq", "autogptq-v2", "autoawq"])
def test_our_own_exports_come_back_bit_for_bit_and_say_their_split(int4_path, tmp_path, to):
    export_checkpoint(Checkpoint(int4_path(32)), tmp_path / "theirs", to)
    decision = detect_split(tmp_path / "theirs", torch.zeros(1, 8, dtype=torch.long))
    assert (decision["split"], decision["because"]) == ("interleaved", "meta.gate_up_split")
    report = import_checkpoint(tmp_path / "theirs", tmp_path / "ours", decision, to="int4", overwrite=False)
    ours, before = Checkpoint(tmp_path / "ours"), Checkpoint(int4_path(32))
    assert report["group_size"] == 32 and report["scales_inexact_in_bfloat16"] == 0
    assert all(torch.equal(ours.read(n).float(), before.read(n).float()) for n in before.names())


def test_text_that_cannot_tell_is_refused_with_the_option(int4_path, tmp_path, tiny):
    path = write_foreign(int4_path(), tmp_path / "theirs", "gptqmodel", "halves")
    with pytest.raises(InputError, match=r"about as likely under both readings.*--split interleaved"):
        detect_split(path, tiny.ids(2, 16))


def asymmetric(tensors):
    """Another zero point for one output of one group."""
    name = "model.layers.1.mlp.experts.2.up_proj.qzeros"
    tensors[name] = tensors[name].clone()
    tensors[name][0, 0] += 1


def out_of_order(tensors):
    """The groups of the inputs as desc_act leaves them."""
    name = "model.layers.1.mlp.experts.2.down_proj.g_idx"
    tensors[name] = tensors[name].flip(0).contiguous()


@pytest.mark.parametrize(
    ("edit", "message"),
    [(asymmetric, "1 zero points other than 8"), (out_of_order, "g_idx puts inputs into groups out of order")],
)
def test_what_our_layout_cannot_hold_is_refused_with_the_way_out(int4_path, tmp_path, edit, message):
    path = write_foreign(int4_path(), tmp_path / "theirs", "gptqmodel", "halves", edit)
    decision = {"split": "halves", "because": "--split", "metadata": None, "nll": None}
    with pytest.raises(InputError, match=f"{message}.*--to bf16"):
        import_checkpoint(path, tmp_path / "ours", decision, to="int4", overwrite=False)
    assert not (tmp_path / "ours").exists()
    import_checkpoint(path, tmp_path / "bf16", decision, to="bf16", overwrite=False)
    exact, got = Foreign(path, "halves").expert(1, 2), Checkpoint(tmp_path / "bf16").expert(1, 2)
    assert torch.equal(exact.gate_up.bfloat16().float(), got.gate_up)
    assert torch.equal(exact.down.bfloat16().float(), got.down)
    plain = Checkpoint(int4_path()).expert(1, 2)
    assert not torch.equal(exact.gate_up if edit is asymmetric else exact.down,
                           plain.gate_up if edit is asymmetric else plain.down)  # fmt: skip


def drop(name):
    """An edit that takes a tensor out."""
    return lambda tensors: tensors.pop(name)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop("model.layers.2.mlp.experts.7.gate_proj.bias"), "the tool dropped the experts' biases"),
        (drop("model.layers.1.self_attn.sinks"), "self_attn.sinks is missing"),
        (drop("model.layers.1.mlp.experts.3.up_proj.scales"), r"experts\.3\.up_proj\.\* is missing"),
        (lambda t: t.update({"model.layers.0.mlp.extra": torch.ones(2)}), r"1 tensor\(s\) of unknown meaning"),
    ],
)
def test_a_file_that_is_not_whole_is_refused(int4_path, tmp_path, edit, message):
    path = write_foreign(int4_path(), tmp_path / "theirs", "autoround", "interleaved", edit)
    decision = {"split": "interleaved", "because": "--split", "metadata": None, "nll": None}
    with pytest.raises(InputError, match=message):
        import_checkpoint(path, tmp_path / "ours", decision, to="int4", overwrite=False)
    assert not (tmp_path / "ours").exists()


def test_a_model_that_is_not_quantized_is_refused(tiny):
    with pytest.raises(InputError, match="no quantization_config"):
        Foreign(tiny.path("bf16"), "halves")


def test_float16_scales_are_kept_and_counted(int4_path, tmp_path):
    def finer(tensors):
        name = "model.layers.0.mlp.experts.0.gate_proj.scales"
        tensors[name] = tensors[name] * (1 + 2.0**-10)

    path = write_foreign(int4_path(), tmp_path / "theirs", "gptqmodel", "halves", finer)
    decision = {"split": "halves", "because": "--split", "metadata": None, "nll": None}
    report = import_checkpoint(path, tmp_path / "ours", decision, to="int4", overwrite=False)
    assert report["scales_inexact_in_bfloat16"] > 0 and report["scales_inexact_in_float16"] == 0
    scales = load_file(path / "model.safetensors")["model.layers.0.mlp.experts.0.gate_proj.scales"]
    ours = Checkpoint(tmp_path / "ours").read("model.layers.0.mlp.experts.0.w13_weight_scale")
    assert ours.dtype == torch.float16 and torch.equal(ours[:320], scales.T)


# ---- attention in int4 too, and gate and up in one matrix


def pack_dense(names, group=32):
    """An edit that stores 2-D weights as GPTQModel does by default: int4, symmetric, groups of columns."""

    def edit(tensors):
        for name in names:
            weight = tensors.pop(name).float()
            rows, columns = weight.shape
            groups = weight.view(rows, columns // group, group)
            scale = (groups.abs().amax(-1) / 7).half()
            codes = (groups / scale.float()[..., None]).round().clamp(-8, 7).view(rows, columns).to(torch.int8)
            stem = name.removesuffix("weight")
            tensors[stem + "qweight"] = legacy.gptq_qweight(int4.pack(codes))
            tensors[stem + "qzeros"] = legacy.gptq_qzeros(columns // group, rows, version=1)
            tensors[stem + "scales"] = scale.T.contiguous()
            tensors[stem + "g_idx"] = legacy.group_index(columns, group)
            edit.expected[name] = (codes.double().view(rows, -1, group) * scale.double()[..., None]).view(
                rows, columns
            )

    edit.expected = {}
    return edit


ATTENTION = [f"model.layers.{i}.self_attn.{p}_proj.weight" for i in range(3) for p in "qkvo"]


def test_attention_in_int4_is_dequantized_exactly(int4_path, tmp_path):
    edit = pack_dense(ATTENTION)
    path = write_foreign(int4_path(), tmp_path / "theirs", "gptqmodel", "halves", edit)
    decision = {"split": "halves", "because": "--split", "metadata": None, "nll": None}
    report = import_checkpoint(path, tmp_path / "ours", decision, to="int4", overwrite=False)
    assert report["dequantized_outside_experts"] == 12
    ours, before = Checkpoint(tmp_path / "ours"), Checkpoint(int4_path())
    assert len(edit.expected) == 12
    for name, expected in edit.expected.items():
        assert torch.equal(ours.dense(name).double(), expected), name
    name = "model.layers.1.self_attn.q_proj.bias"
    assert torch.equal(ours.dense(name), before.dense(name))
    assert torch.equal(ours.expert(1, 2).gate_up, before.expert(1, 2).gate_up)


def test_attention_of_another_shape_is_refused(int4_path, tmp_path):
    def edit(tensors):
        pack_dense([ATTENTION[0]])(tensors)
        name = ATTENTION[0].removesuffix("weight") + "qweight"
        tensors[name] = tensors[name][:, :-1].contiguous()

    path = write_foreign(int4_path(), tmp_path / "theirs", "gptqmodel", "halves", edit)
    with pytest.raises(InputError, match=r"layers\.0\.self_attn\.q_proj\.\*"):
        Foreign(path, "halves").dense(ATTENTION[0])


def joined(writer):
    """An edit from gate_proj and up_proj to one gate_up matrix per expert, as GPTQModel named it in 2025."""

    def edit(tensors):
        for layer in range(3):
            for e in range(8):
                experts = f"model.layers.{layer}.mlp.experts."
                base = f"{experts}{e}."
                for suffix, dim in (("qweight", 1), ("qzeros", 1), ("scales", 1), ("bias", 0)):
                    gate, up = (tensors.pop(f"{base}{p}_proj.{suffix}") for p in ("gate", "up"))
                    if suffix == "qzeros":
                        whole = torch.cat((gate, up), dim)
                    else:
                        whole = torch.stack((gate, up), dim + 1).flatten(dim, dim + 1)
                    tensors[f"{experts}gate_up.{e}." + suffix] = whole
                    tensors[f"{experts}down.{e}." + suffix] = tensors.pop(f"{base}down_proj.{suffix}")
                if writer == "gptqmodel":
                    tensors[f"{experts}gate_up.{e}." + "g_idx"] = tensors.pop(base + "gate_proj.g_idx")
                    del tensors[base + "up_proj.g_idx"]
                    tensors[f"{experts}down.{e}." + "g_idx"] = tensors.pop(base + "down_proj.g_idx")

    return edit


@pytest.mark.parametrize("writer", ["gptqmodel", "autoround"])
def test_gate_and_up_in_one_matrix_need_no_guess(int4_path, tmp_path, writer):
    path = write_foreign(int4_path(), tmp_path / "theirs", writer, "interleaved", joined(writer))
    decision = detect_split(path, torch.zeros(1, 8, dtype=torch.long))
    assert decision["because"] == "gate and up are one matrix"
    import_checkpoint(path, tmp_path / "ours", decision, to="int4", overwrite=False)
    ours, before = Checkpoint(tmp_path / "ours"), Checkpoint(int4_path())
    assert all(torch.equal(ours.read(n).float(), before.read(n).float()) for n in before.names())


def test_import_reads_the_files_of_the_index_only(int4_path, tmp_path):
    path = write_foreign(int4_path(), tmp_path / "theirs", "gptqmodel", "halves")
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").rename(path / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    # a leftover of another save, which sorts behind
    save_file({n: torch.zeros_like(t) for n, t in tensors.items()}, path / "model-00002-of-00002.safetensors")
    source = Foreign(path, "halves")
    assert torch.equal(source.read("lm_head.weight"), tensors["lm_head.weight"])
    assert any("not read" in note for note in source.notes)


def test_the_description_may_lie_in_a_file_of_its_own(int4_path, tmp_path):
    path = write_foreign(int4_path(), tmp_path / "theirs", "gptqmodel", "halves")
    raw = json.loads((path / "config.json").read_text())
    (path / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 64, "desc_act": False}))
    del raw["quantization_config"]
    (path / "config.json").write_text(json.dumps(raw))
    source = Foreign(path, "halves")
    assert (source.layout, source.version) == ("gptq", 1)
    assert torch.equal(source.expert(1, 2).down, Checkpoint(int4_path()).expert(1, 2).down)
