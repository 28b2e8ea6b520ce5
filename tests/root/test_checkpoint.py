"""Checkpoints are read exactly, and everything that is not a whole gpt-oss model is refused with a remedy."""

import json
import math
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptoss_quantize import api
from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.errors import InputError
from gptoss_quantize.kernels import mxfp4
from gptoss_quantize.layouts import LAYOUTS, dense_shapes, expert_shapes
from gptoss_quantize.quantize.job import Job
from gptoss_quantize.quantize.recipes import RECIPES
from gptoss_quantize.quantize.run import quantize_checkpoint

INDEX = "model.safetensors.index.json"
EXPERTS = "model.layers.1.mlp.experts."


@pytest.mark.parametrize("kind", ["bf16", "float32", "mxfp4"])
def test_names_shapes_and_values(tiny, kind):
    path = tiny.path(kind)
    stored, checkpoint = tiny.load_all(path), Checkpoint(path)
    expert_format = "mxfp4" if kind == "mxfp4" else "float"
    assert checkpoint.expert_format == expert_format
    expected = dense_shapes(checkpoint.config) | expert_shapes(checkpoint.config, LAYOUTS[expert_format])
    assert {name: tuple(t.shape) for name, t in stored.items()} == expected
    assert checkpoint.files() == sorted(path.glob("*.safetensors"))
    for name, tensor in stored.items():
        assert torch.equal(checkpoint.read(name), tensor)
        assert checkpoint.info(name).dtype == tensor.dtype
    layer = checkpoint.layer(2)
    assert torch.equal(layer["self_attn.sinks"], stored["model.layers.2.self_attn.sinks"])
    assert len(layer) == 13
    assert torch.equal(checkpoint.head(), stored["lm_head.weight"])


@pytest.mark.parametrize("kind", ["bf16", "float32", "mxfp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts(tiny, kind, dtype):
    stored, checkpoint = tiny.load_all(tiny.path(kind)), Checkpoint(tiny.path(kind))
    if kind == "mxfp4":
        for name in ("gate_up_proj", "down_proj"):
            parts = stored[f"{EXPERTS}{name}_blocks"], stored[f"{EXPERTS}{name}_scales"]
            stored[EXPERTS + name] = mxfp4.decode(*parts).transpose(1, 2)
    assert len(list(checkpoint.experts(1))) == 8
    for e, expert in enumerate(checkpoint.experts(1, dtype)):
        assert torch.equal(expert.gate_up, stored[EXPERTS + "gate_up_proj"][e].T.to(dtype))
        assert torch.equal(expert.down, stored[EXPERTS + "down_proj"][e].T.to(dtype))
        assert torch.equal(expert.gate_up_bias, stored[EXPERTS + "gate_up_proj_bias"][e].to(dtype))
        assert torch.equal(expert.down_bias, stored[EXPERTS + "down_proj_bias"][e].to(dtype))
        assert expert.gate_up.is_contiguous()


def test_float16_source(tiny, tmp_path):
    path = tiny.copy("float32", tmp_path / "x")
    half = {name: t.to(torch.float16) for name, t in tiny.load_all(path).items()}
    save_file(half, path / "model.safetensors")
    expert = Checkpoint(path).expert(2, 3)
    assert torch.equal(expert.down, half["model.layers.2.mlp.experts.down_proj"][3].T.float())


def test_an_expert_is_read_alone(tiny):
    checkpoint = Checkpoint(tiny.path("bf16"))
    counter = Path("/proc/self/io")
    before = int(counter.read_text().split()[1])
    checkpoint.expert(0, 5)
    # what this process asked files for: one expert of eight, and the counter itself
    read = int(counter.read_text().split()[1]) - before
    expert = 2 * (192 * 640 + 640 + 320 * 192 + 192)
    assert expert <= read < 1.1 * expert


# ---- refusals: every damage through the whole of `quantize`, which must leave nothing behind


def quantize(path: Path, out: Path, method: str = "rtn") -> None:
    api.quantize(path, out, method, tokens=64, seq_len=32, device="cpu")


def edit_shard(path: Path, change, containing: str) -> None:
    """Rewrite the file that holds a tensor, after `change` was done to its tensors."""
    for file in path.glob("*.safetensors"):
        tensors = load_file(file)
        if containing in tensors:
            change(tensors)
            save_file(tensors, file)
            return
    raise AssertionError(f"no file has {containing}")


def set_value(name: str, index: tuple[int, ...], value: float):
    return lambda path: edit_shard(path, lambda tensors: tensors[name].__setitem__(index, value), name)


def drop(name: str):
    """Take a tensor out of file and index."""

    def damage(path: Path) -> None:
        edit_shard(path, lambda tensors: tensors.pop(name), name)
        edit_index(path, lambda weight_map: weight_map.pop(name))

    return damage


def edit_index(path: Path, change) -> None:
    index = json.loads((path / INDEX).read_text())
    change(index["weight_map"])
    (path / INDEX).write_text(json.dumps(index))


def point(name: str, file: str):
    return lambda path: edit_index(path, lambda weight_map: weight_map.update({name: file}))


def config(**changes):
    def damage(path: Path) -> None:
        raw = json.loads((path / "config.json").read_text()) | changes
        (path / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v != "DELETE"}))

    return damage


def another_tool(path: Path) -> None:
    """Make the layout of GPTQ and AWQ tools: one linear layer per expert, with qweight, qzeros, scales."""

    def change(tensors) -> None:
        for name in [name for name in tensors if ".experts." in name]:
            del tensors[name]
        tensors["model.layers.0.mlp.experts.0.gate_proj.qweight"] = torch.zeros(24, 320, dtype=torch.int32)
        tensors["model.layers.0.mlp.experts.0.gate_proj.scales"] = torch.zeros(3, 320)

    edit_shard(path, change, "lm_head.weight")


def truncate(path: Path) -> None:
    file = sorted(path.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-4096])


def flip_header(path: Path) -> None:
    file = sorted(path.glob("*.safetensors"))[1]
    data = bytearray(file.read_bytes())
    data[30] ^= 0x80
    file.write_bytes(data)


def lie_about_offsets(path: Path) -> None:
    """Let two tensors overlap; safetensors must not hand out the same bytes twice."""
    file = path / "model.safetensors"
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    names = [n for n in header if n.endswith("self_attn.sinks")]
    header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


NORM = "model.norm.weight"
SHARD = "model-00002-of-00005.safetensors"
REFUSALS = {
    "other architecture": ("bf16", config(model_type="qwen3_moe"), "config.json", "'qwen3_moe'", "gpt-oss arch"),
    "no config": ("bf16", lambda p: (p / "config.json").unlink(), "config.json", "no such file", "expected a Hug"),
    "config is not JSON": (
        "bf16",
        lambda p: (p / "config.json").write_text("{"),
        "config.json",
        "not valid JSON",
        "copy the file again",
    ),
    "config is binary": ("bf16", lambda p: (p / "config.json").write_bytes(b"\xff\xfe"), "config.json", "copy the"),
    "config is nested": ("bf16", lambda p: (p / "config.json").write_text("[" * 99999), "config.json", "copy the"),
    "config is a list": (
        "bf16",
        lambda p: (p / "config.json").write_text("[]"),
        "config.json",
        "got list",
        "copy the file",
    ),
    "config is a folder": (
        "bf16",
        lambda p: ((p / "config.json").unlink(), (p / "config.json").mkdir()),
        "config.json",
        "cannot be read",
        "check",
    ),
    "size missing": (
        "bf16",
        config(intermediate_size="DELETE"),
        "config.json",
        "intermediate_size is None",
        "correct it",
    ),
    "size is text": ("bf16", config(hidden_size="192"), "config.json", "hidden_size is '192'", "correct it there"),
    "no kv heads": ("bf16", config(num_key_value_heads=0), "config.json", "num_key_value_heads is 0", "correct it"),
    "kv heads do not divide": ("bf16", config(num_key_value_heads=4), "config.json", "heads 6 is", "one model"),
    "top-k beyond experts": ("bf16", config(num_experts_per_tok=9), "config.json", "num_experts_per_tok 9", "1..8"),
    "layer types": ("bf16", config(layer_types=["chunked"] * 3), "config.json", "layer_types must", "for 3 layers"),
    "unknown rope": (
        "bf16",
        config(rope_parameters={"rope_type": "llama3", "factor": 8.0}),
        "config.json",
        "rope_type 'llama3'",
        "expected 'default' or 'yarn'",
    ),
    "rope per layer type": (
        "bf16",
        config(rope_parameters={"full_attention": {"rope_type": "default"}}),
        "config.json",
        "rope_parameters is",
        "expected one object",
    ),
    "yarn without factor": (
        "bf16",
        config(rope_parameters={"rope_type": "yarn"}),
        "config.json",
        "factor is None",
        "correct it there",
    ),
    "mscale": (
        "bf16",
        config(rope_parameters={"rope_type": "yarn", "factor": 4.0, "mscale": 1.0}),
        "config.json",
        "['mscale']",
        "not implemented",
    ),
    "no weights": ("float32", lambda p: (p / "model.safetensors").unlink(), "no weights", "download"),
    "missing tensor": ("bf16", drop(NORM), f"tensor {NORM} is missing", "get both from the source again"),
    "missing experts": (
        "mxfp4",
        drop(EXPERTS + "down_proj_scales"),
        f"{EXPERTS}down_proj_scales is missing",
        "get both from the source again",
    ),
    "wrong shape": (
        "bf16",
        lambda p: edit_shard(p, lambda t: t.update({NORM: torch.ones(191, dtype=torch.bfloat16)}), NORM),
        "-of-00005.safetensors",
        f"{NORM} has shape [191]",
        "asks for [192]",
        "get both from the source again",
    ),
    "config of another size": ("bf16", config(vocab_size=301), "-of-00005.safetensors", "[300, 192]", "[301, 192]"),
    "wrong dtype": (
        "bf16",
        lambda p: edit_shard(p, lambda t: t.update({NORM: torch.ones(192, dtype=torch.int32)}), NORM),
        "-of-00005.safetensors",
        f"{NORM} has dtype torch.int32",
        "expected one of float32, float16, bfloat16",
        "get both from the source again",
    ),
    "unknown tensor": (
        "float32",
        lambda p: edit_shard(p, lambda t: t.update({"model.layers.3.extra": torch.ones(2)}), NORM),
        "model.safetensors",
        "unknown tensor",
        "model.layers.3.extra",
        "take it out",
    ),
    "more layers than the config": (
        "bf16",
        config(num_hidden_layers=2, layer_types=["full_attention"] * 2),
        "-of-00005.safetensors",
        "unknown tensor",
        "model.layers.2.",
    ),
    "another tool's int4": (
        "float32",
        another_tool,
        "model.layers.0.mlp.experts.0.gate_proj.qweight",
        "another tool already quantized",
        "start from the bf16 or MXFP4 original",
    ),
    "truncated": ("bf16", truncate, SHARD, "truncated or damaged", "download it again"),
    "flipped bit in a header": ("bf16", flip_header, SHARD, "truncated or damaged", "download it again"),
    "overlapping tensors": ("float32", lie_about_offsets, "model.safetensors", "truncated or damaged", "download it"),
    "shard missing": ("bf16", lambda p: (p / SHARD).unlink(), SHARD, "is missing", "download it again"),
    "index outside, relative": ("bf16", point(NORM, "../x.safetensors"), INDEX, NORM, "'../x.safetensors'", "again"),
    "index outside, absolute": ("bf16", point(NORM, "/etc/passwd"), INDEX, NORM, "'/etc/passwd'", "again"),
    "index names the parent": ("bf16", point(NORM, ".."), INDEX, NORM, "'..'", "from the source again"),
    "index names nothing": ("bf16", point(NORM, ""), INDEX, NORM, "''", "from the source again"),
    "index names the wrong file": ("bf16", point("lm_head.weight", SHARD), SHARD, "lm_head.weight", INDEX, "again"),
    "index lacks a tensor": (
        "bf16",
        lambda p: edit_index(p, lambda weight_map: weight_map.pop("lm_head.weight")),
        "lm_head.weight is not in " + INDEX,
        "again",
    ),
    "index is empty": ("bf16", lambda p: (p / INDEX).write_text("{}"), INDEX, "no weight_map", "again"),
}


def refused(call, *words: str) -> str:
    with pytest.raises(InputError) as error:
        call()
    message = str(error.value)
    missing = [word for word in words if word not in message]
    assert not missing, f"{missing} not in: {message}"
    assert "\n" not in message
    return message


@pytest.mark.parametrize(("kind", "damage", "words"), [(r[0], r[1], r[2:]) for r in REFUSALS.values()], ids=REFUSALS)
def test_refused(tiny, tmp_path, kind, damage, words):
    path = tiny.copy(kind, tmp_path / "model")
    damage(path)
    before = tiny.snapshot(tmp_path)
    refused(lambda: quantize(path, tmp_path / "sub" / "out"), str(path), *words)
    assert tiny.snapshot(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_refused_places(tmp_path):
    out = tmp_path / "out"
    refused(lambda: quantize(tmp_path / "no", out), "no such directory", "owner/name")
    (tmp_path / "file").write_text("")
    refused(lambda: quantize(tmp_path / "file", out), "file", "not a directory", "expected a Hugging Face")
    assert not out.exists()


NOT_FINITE = {
    "NaN in the embedding": ("model.embed_tokens.weight", (7, 3), math.nan),
    "infinity in the router": ("model.layers.1.mlp.router.bias", (2,), math.inf),
    "NaN in an expert": ("model.layers.2.mlp.experts.gate_up_proj", (6, 100, 5), math.nan),
    "minus infinity in an expert's bias": ("model.layers.0.mlp.experts.down_proj_bias", (7, 191), -math.inf),
    "NaN in the sinks": ("model.layers.2.self_attn.sinks", (5,), math.nan),
}


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize(("name", "index", "value"), NOT_FINITE.values(), ids=NOT_FINITE)
def test_not_finite_is_refused(tiny, tmp_path, name, index, value, method):
    path, out = tiny.copy("bf16", tmp_path / "model"), tmp_path / "out"
    set_value(name, index, value)(path)
    message = refused(lambda: quantize(path, out, method), str(path), name, "1 NaN or infinite", "fix it first")
    if "experts" in name:
        assert f"{name}[{index[0]}]" in message
    # found while reading: finished layers may stay, for --resume, but nothing under the final name
    assert {p.name for p in tmp_path.iterdir()} <= {"model", "out.partial"}


def test_mxfp4_nan_scale_is_refused(tiny, tmp_path):
    path, name = tiny.copy("mxfp4", tmp_path / "model"), EXPERTS + "gate_up_proj_scales"
    set_value(name, (3, 11, 2), 255)(path)
    refused(lambda: quantize(path, tmp_path / "out"), str(path), f"{name}[3]", "255", "NaN")
    assert not (tmp_path / "out").exists()


def test_file_that_changes_during_the_run_is_refused(tiny, tmp_path):
    path, out = tiny.copy("bf16", tmp_path / "model"), tmp_path / "out"
    source = Checkpoint(path)

    def change(index: int) -> None:
        if index == 0:
            set_value("model.layers.2.self_attn.sinks", (0,), 1.0)(path)

    job = Job(dest=out, method="rtn", recipe=RECIPES["rtn"])
    refused(lambda: quantize_checkpoint(source, job, None, change), str(path), "changed while", "start again")
    assert not out.exists()


def test_int4_is_no_source(tiny, tmp_path):
    quantize(tiny.path("bf16"), tmp_path / "int4")
    before = tiny.snapshot(tmp_path)
    refused(lambda: quantize(tmp_path / "int4", tmp_path / "again"), "int4", "already", "bf16 or MXFP4 original")
    assert tiny.snapshot(tmp_path) == before
