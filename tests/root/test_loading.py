"""Our checkpoints as transformers models: packed in memory, exact, complete or refused; never random experts."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM

import gptoss_quantize
from gptoss_quantize import loading
from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.errors import InputError
from gptoss_quantize.kernels import int4, native
from gptoss_quantize.kernels.experts import PackedExperts
from gptoss_quantize.layouts import INT4, dense_shapes, expert_shapes
from gptoss_quantize.model import hidden_states, logits
from gptoss_quantize.quantize.job import Job
from gptoss_quantize.quantize.recipes import RECIPES
from gptoss_quantize.quantize.run import quantize_checkpoint

INDEX = "gptoss-int4.safetensors.index.json"
EXPERT_WEIGHTS = 3 * 8 * 3 * 192 * 320


@pytest.fixture(scope="module")
def quantized(tiny, tmp_path_factory):
    """Return a function from (source kind, method, group size) to an int4 directory, each made once."""
    root, made = tmp_path_factory.mktemp("int4"), {}

    def make(kind="bf16", method="rtn", group_size=64):
        key = f"{kind}-{method}-{group_size}"
        if key not in made:
            job = Job(dest=root / key, method=method, recipe=RECIPES[method], group_size=group_size, device="cpu")
            tokens = tiny.tokens() if job.recipe.calibrated else None
            quantize_checkpoint(Checkpoint(tiny.path(kind)), job, tokens)
            made[key] = root / key
        return made[key]

    return make


@pytest.fixture
def damaged(quantized, tmp_path, tiny):
    """Return a private int4 directory, to be damaged."""
    path = tmp_path / "damaged"
    path.mkdir()
    for name, data in tiny.snapshot(quantized()).items():
        (path / name).write_bytes(data)
    return path


def streamed(path, ids):
    checkpoint = Checkpoint(path)
    return logits(hidden_states(checkpoint, ids), checkpoint.head().float())


@pytest.mark.parametrize(
    ("kind", "method", "group_size"),
    [("bf16", "rtn", 64), ("bf16", "rtn-signed", 32), ("float32", "gptq", 64), ("mxfp4", "awq+gptq", 32)],
)
def test_logits_equal_the_dequantized_reference(tiny, quantized, kind, method, group_size):
    path, ids = quantized(kind, method, group_size), tiny.ids()
    model = gptoss_quantize.load(path, dtype=torch.float32)
    with torch.inference_mode():
        got = model(ids).logits
    torch.testing.assert_close(got, streamed(path, ids), atol=1e-4, rtol=0)
    # and it is the quantized model: near the original, not the same
    original = streamed(tiny.path(kind), ids)
    assert 0.01 < (got - original).square().mean().sqrt() / original.std() < 0.7


@pytest.mark.parametrize(
    ("bits", "method", "group_size", "bound"),
    [(3, "rtn", 64, 1.2), (3, "gptq", 32, 0.8), (3, "awq", 64, 1.2), (2, "awq+gptq", 32, 1.5), (2, "gptq", 64, 1.5)],
)
def test_below_four_bits_is_written_read_and_run(tiny, tmp_path, bits, method, group_size, bound):
    path, ids, name = tmp_path / "out", tiny.ids(), f"int{bits}"
    job = Job(
        dest=path, method=method, recipe=RECIPES[method], format=name, group_size=group_size, device="cpu"
    )  # fmt: skip
    report = quantize_checkpoint(Checkpoint(tiny.path("bf16")), job, tiny.tokens() if job.recipe.calibrated else None)
    assert report["expert_bits_per_weight"] == bits + 16 / group_size
    checkpoint = Checkpoint(path)
    assert (checkpoint.expert_format, checkpoint.group_size) == (name, group_size)
    codes = [checkpoint.read(n) for n in checkpoint.names() if n.endswith(f"_weight_int{bits}")]
    # exactly so many bits in the file, and no more
    assert 8 * sum(c.nbytes for c in codes) == bits * EXPERT_WEIGHTS
    assert sorted(f.name for f in path.glob("*.safetensors"))[0].startswith(f"gptoss-int{bits}-")
    model = gptoss_quantize.load(path, dtype=torch.float32)
    with torch.inference_mode():
        got = model(ids).logits
    torch.testing.assert_close(got, streamed(path, ids), atol=1e-4, rtol=0)
    original = streamed(tiny.path("bf16"), ids)
    assert 0.05 < (got - original).square().mean().sqrt() / original.std() < bound
    model.save_pretrained(tmp_path / "again")
    for name in checkpoint.names():
        assert torch.equal(Checkpoint(tmp_path / "again").read(name), checkpoint.read(name))
    for to in ("gguf", "autogptq", "autoawq", "mxfp4"):
        with pytest.raises(InputError, match=f"int{bits}"):
            gptoss_quantize.export(path, tmp_path / to, to)
    # as a 16-bit model it is the same function, up to that rounding
    gptoss_quantize.export(path, tmp_path / "whole", "bf16")
    found = gptoss_quantize.evaluate(tmp_path / "whole", path, tokens=512)["whole"]
    # the median: where rounding makes a router choose another expert, a token is far off
    assert 0 <= found.kl_median < 1e-3 and found.top1_agreement > 0.97
    with pytest.raises((OSError, ValueError)):
        GptOssForCausalLM.from_pretrained(path)
    loading.register()
    assert isinstance(AutoModelForCausalLM.from_pretrained(path), loading.PackedGptOssForCausalLM)


def test_logits_equal_transformers_on_dequantized_weights(tiny, quantized):
    # without our model code: stock transformers on weights that codes and scales are multiplied out into
    path, ids = quantized(), tiny.ids(2)
    stored, state = tiny.load_all(path), {}
    for name, tensor in stored.items():
        base, _, last = name.rpartition(".")
        if ".experts." not in name:
            state[name] = tensor.float()
        elif last.endswith("_packed"):
            codes = torch.stack([(tensor >> 4 * i) & 15 for i in range(8)], dim=-1).flatten(-2) - 8
            scale = stored[name.replace("_packed", "_scale")].float().repeat_interleave(64, dim=-1)
            state[f"{base}.{last}"] = (codes * scale).T
    for i in range(3):
        base = f"model.layers.{i}.mlp.experts."
        for ours, theirs in (("w13", "gate_up_proj"), ("w2", "down_proj")):
            state[base + theirs] = torch.stack([state.pop(f"{base}{e}.{ours}_weight_packed") for e in range(8)])
            state[base + theirs + "_bias"] = torch.stack([stored[f"{base}{e}.{ours}_bias"].float() for e in range(8)])
    model = GptOssForCausalLM(tiny.model().config).float().eval()
    model.load_state_dict(state)
    packed = gptoss_quantize.load(path, dtype=torch.float32)
    with torch.inference_mode():
        torch.testing.assert_close(packed(ids).logits, model(ids).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("group_size", [64, 32])
def test_experts_stay_packed(quantized, group_size):
    path = quantized(group_size=group_size, method="rtn-signed")
    model = gptoss_quantize.load(path)
    dense = sum(p.numel() * p.element_size() for p in model.parameters())
    layers = [block.mlp.experts.experts() for block in model.model.layers]
    parts = [
        (name, getattr(layer.of(e), name)) for layer in layers for e in range(8) for name in PackedExperts.__slots__
    ]
    biases = sum(t.nbytes for name, t in parts if name.endswith("_bias"))
    experts = loading.weight_bytes(model.model.layers) - sum(
        p.numel() * p.element_size() for p in model.model.layers.parameters()
    )
    assert 8 * (experts - biases) / EXPERT_WEIGHTS == int4.bits_per_weight(320, group_size) == 4 + 16 / group_size
    assert {t.dtype for name, t in parts if name.endswith("_packed")} == {torch.int32}
    assert {t.dtype for name, t in parts if not name.endswith("_packed")} == {torch.bfloat16}
    assert not [name for name, _ in model.named_parameters() if ".experts." in name]
    rotary = sum(b.numel() * b.element_size() for n, b in model.named_buffers() if "rotary" in n)
    assert loading.weight_bytes(model) == dense + experts + rotary
    assert not any(p.is_meta for p in (*model.parameters(), *model.buffers()))
    # transformers keeps norms in float32
    assert {p.dtype for n, p in model.named_parameters() if "norm" in n} == {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if "norm" not in n} == {torch.bfloat16}


def stock(path, config) -> GptOssForCausalLM:
    """Stock transformers in float32, its weights multiplied out of codes and scales; eager, as ours is."""
    checkpoint = Checkpoint(path)
    state = {name: checkpoint.dense(name).float() for name in dense_shapes(checkpoint.config)}
    for i in range(checkpoint.config.layers):
        base, experts = f"model.layers.{i}.mlp.experts.", list(checkpoint.experts(i))
        state[base + "gate_up_proj"] = torch.stack([e.gate_up.T for e in experts])
        state[base + "down_proj"] = torch.stack([e.down.T for e in experts])
        state[base + "gate_up_proj_bias"] = torch.stack([e.gate_up_bias for e in experts])
        state[base + "down_proj_bias"] = torch.stack([e.down_bias for e in experts])
    model = GptOssForCausalLM(config).float().eval()
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("kernel", ["auto", "torch"])
def test_gradients_are_those_of_stock_transformers(tiny, quantized, kernel):
    # what trains through packed experts must not be wrong in silence: attention, and the router's weights
    path, ids = quantized("bf16", "gptq"), tiny.ids(2, 24)
    gradients = []
    for model in (stock(path, tiny.model().config), gptoss_quantize.load(path, dtype=torch.float32, kernel=kernel)):
        model.requires_grad_(True)
        model(ids, labels=ids).loss.backward()
        layers = model.model.layers
        names = [("q_proj", layer.self_attn.q_proj.weight.grad) for layer in layers]
        gradients.append(names + [("router", layer.mlp.router.weight.grad) for layer in layers])
    for (name, theirs), (_, ours) in zip(*gradients, strict=True):
        assert torch.cosine_similarity(theirs.flatten(), ours.flatten(), dim=0) > 1 - 1e-6, name
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))


def test_compiled_without_a_break(tiny, quantized):
    model = gptoss_quantize.load(quantized(), dtype=torch.float32)
    experts = model.model.layers[1].mlp.experts
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 192, generator=generator)
    index = torch.stack([torch.randperm(8, generator=generator)[:4] for _ in range(9)])
    prob = torch.softmax(torch.randn(9, 4, generator=generator), -1)
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    for call, given in zip((experts, compiled), plain, strict=True):
        call(given, index, prob).square().sum().backward()
    assert torch.equal(plain[0].grad, plain[1].grad)
    with torch.no_grad():
        assert torch.equal(compiled(x, index, prob), experts(x, index, prob))


def test_experts_are_mapped_not_copied(quantized):
    model = gptoss_quantize.load(quantized())
    experts = [block.mlp.experts.experts() for block in model.model.layers]
    sizes = {file.stat().st_size for file in quantized().glob("*.safetensors")}
    assert all(storage.nbytes in sizes for layer in experts for storage in layer.storages)
    # stacked for another device, the same numbers
    stacked = experts[1].stack()
    one = stacked.of(3)
    for name in PackedExperts.__slots__:
        assert torch.equal(getattr(one, name), getattr(experts[1].of(3), name))


def test_a_file_that_changed_is_not_mapped(damaged, monkeypatch):
    shard = sorted(damaged.glob("*.safetensors"))[-1]
    checkpoint = Checkpoint(damaged)
    file = next(checkpoint.shard(name) for name in checkpoint.names() if checkpoint.shard(name).path == shard)
    shard.write_bytes(shard.read_bytes() + b" ")
    refused(file.map, str(shard), "changed", "start again")


def test_slow_paths_say_so(quantized, monkeypatch):
    monkeypatch.setattr(native, "available", lambda: False)
    monkeypatch.setattr(native, "problem", lambda: "no C++ compiler found")
    with pytest.warns(UserWarning, match=r"experts run in plain torch.*slower.*no C\+\+ compiler found"):
        gptoss_quantize.load(quantized())


@pytest.mark.parametrize("name", ["w13_weight_scale", "w2_bias"])
def test_damaged_numbers_are_refused(damaged, name):
    name = f"model.layers.1.mlp.experts.3.{name}"

    def poison(tensors):
        tensors[name].view(-1)[5] = float("nan")

    edit_shard(damaged, name, poison)
    refused(lambda: gptoss_quantize.load(damaged), name, "1 NaN or infinite values")


def test_every_tensor_is_the_expected_one(quantized):
    path = quantized()
    checkpoint = Checkpoint(path)
    expected = dense_shapes(checkpoint.config) | expert_shapes(checkpoint.config, INT4, 64)
    index = json.loads((path / INDEX).read_text())
    assert index["weight_map"].keys() == expected.keys()
    found = {}
    for file in path.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            assert index["weight_map"][name] == file.name
            found[name] = tuple(tensor.shape)
    assert found == expected
    assert checkpoint.group_size == 64


def test_generate(tiny, quantized):
    path, ids = quantized("bf16", "gptq"), tiny.ids(1, 12)
    model = gptoss_quantize.load(path, dtype=torch.float32)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, min_length=20)
    assert out.shape == (1, 20)
    for position in range(12, 20):
        # greedy with a cache is greedy without one; min_length forbids the end of text
        scores = streamed(path, out[:, :position])[0, -1].clone()
        scores[1] = -torch.inf
        assert out[0, position] == scores.argmax()
    assert model.generation_config.eos_token_id == 1


def test_tied_and_biasless_models(tiny, tmp_path):
    tiny.build(tmp_path / "model", tie_word_embeddings=True, attention_bias=False)
    job = Job(dest=tmp_path / "int4", method="rtn", recipe=RECIPES["rtn"])
    quantize_checkpoint(Checkpoint(tmp_path / "model"), job, None)
    model = gptoss_quantize.load(tmp_path / "int4", dtype=torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = tiny.ids(1)
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, streamed(tmp_path / "int4", ids), atol=1e-4, rtol=0)


def test_a_tied_head_in_8_bits(tiny, tmp_path):
    tiny.build(tmp_path / "model", tie_word_embeddings=True)
    job = Job(dest=tmp_path / "int4", method="rtn", recipe=RECIPES["rtn"], dense="int8")
    quantize_checkpoint(Checkpoint(tmp_path / "model"), job, None)
    model, ids = gptoss_quantize.load(tmp_path / "int4", dtype=torch.float32), tiny.ids(1)
    assert model.lm_head.codes is model.model.embed_tokens.codes
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, streamed(tmp_path / "int4", ids), atol=1e-4, rtol=0)


# ---- what is refused


def edit_shard(path, containing, change) -> None:
    file = path / json.loads((path / INDEX).read_text())["weight_map"][containing]
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def edit_index(path, change) -> None:
    index = json.loads((path / INDEX).read_text())
    change(index["weight_map"])
    (path / INDEX).write_text(json.dumps(index))


def refused(call, *words: str) -> None:
    with pytest.raises(InputError) as error:
        call()
    missing = [word for word in words if word not in str(error.value)]
    assert not missing, f"{missing} not in: {error.value}"


EXPERT = "model.layers.2.mlp.experts.5.w2_weight_scale"
FIRST = "model.layers.0.mlp.experts.0.w13_weight_scale"


@pytest.mark.parametrize(
    "name",
    [
        EXPERT,
        FIRST,
        "model.layers.0.mlp.experts.0.w13_weight_packed",
        "model.layers.1.mlp.experts.7.w2_weight_packed",
        "model.layers.1.mlp.experts.0.w13_bias",
        "model.layers.1.mlp.router.bias",
        "lm_head.weight",
    ],
)
def test_missing_tensor(damaged, name):
    edit_shard(damaged, name, lambda tensors: tensors.pop(name))
    refused(lambda: gptoss_quantize.load(damaged), ".safetensors", name, "missing", "from the source again")
    edit_index(damaged, lambda weight_map: weight_map.pop(name))
    words = ("no expert tensors",) if name == FIRST.replace("scale", "packed") else (name, "missing", "again")
    refused(lambda: gptoss_quantize.load(damaged), str(damaged), *words)


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.experts.8.w2_bias", "model.layers.1.mlp.experts.0.w2_weight_zero_point"]
)
def test_unknown_tensor(damaged, name):
    edit_shard(damaged, EXPERT, lambda tensors: tensors.update({name: torch.ones(2)}))
    refused(lambda: gptoss_quantize.load(damaged), name, "is not in " + INDEX)
    shard = json.loads((damaged / INDEX).read_text())["weight_map"][EXPERT]
    edit_index(damaged, lambda weight_map: weight_map.update({name: shard}))
    refused(lambda: gptoss_quantize.load(damaged), str(damaged / shard), name, "unknown tensor", "take it out")


@pytest.mark.parametrize("shape", [(192, 4), (5, 192), (192, 5, 1), (0,), (192, 0)], ids=str)
@pytest.mark.parametrize("name", [EXPERT, FIRST], ids=["any", "first"])
def test_wrong_shape(damaged, name, shape):
    wrong = torch.ones(shape, dtype=torch.bfloat16)
    edit_shard(damaged, name, lambda tensors: tensors.update({name: wrong}))
    refused(lambda: gptoss_quantize.load(damaged), ".safetensors", name, str(list(shape)), "from the source again")


def test_wrong_dtype(damaged):
    name = "model.layers.0.mlp.experts.3.w13_weight_packed"
    edit_shard(damaged, name, lambda tensors: tensors.update({name: tensors[name].float()}))
    refused(lambda: gptoss_quantize.load(damaged), ".safetensors", name, "float32", "expected one of int32")


def test_truncated_shard(damaged):
    shard = sorted(damaged.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-1])
    refused(lambda: gptoss_quantize.load(damaged), str(shard), "truncated or damaged")


def test_not_int4_and_not_there(tiny, tmp_path):
    refused(
        lambda: gptoss_quantize.load(tiny.path("bf16")), "experts are float, not int4", "gptoss-quantize quantize"
    )
    refused(lambda: gptoss_quantize.load(tiny.path("mxfp4")), "experts are mxfp4, not int4")
    refused(lambda: gptoss_quantize.load(tmp_path / "no"), "no", "no such directory")


def test_unknown_kernel(quantized):
    refused(lambda: gptoss_quantize.load(quantized(), kernel="fast"), "kernel 'fast'", "known: auto, torch")


def test_adapter_on_int4(quantized, tiny, tmp_path):
    adapter = tiny.adapter(tmp_path / "adapter")
    path = str(quantized())
    words = (path, "adapter cannot be merged into int4", "give the bf16 or MXFP4 base")
    refused(lambda: gptoss_quantize.quantize(path, tmp_path / "out", "rtn", adapter=adapter), *words)
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


# ---- transformers itself


@pytest.fixture
def registered():
    mapping = AutoModelForCausalLM._model_mapping
    before = dict(mapping._extra_content)
    gptoss_quantize.register()
    yield
    mapping._extra_content.clear()
    mapping._extra_content.update(before)


def test_registered_auto_model(tiny, quantized, registered):
    ids = tiny.ids(1)
    gptoss_quantize.register()  # twice is once
    model = AutoModelForCausalLM.from_pretrained(quantized(), dtype=torch.float32)
    assert isinstance(model.model.layers[0].mlp.experts, loading.PackedExpertsModule)
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, streamed(quantized(), ids), atol=1e-4, rtol=0)
    assert AutoModelForCausalLM.from_pretrained(quantized()).lm_head.weight.dtype == torch.bfloat16
    assert AutoModelForCausalLM.from_pretrained(quantized(), dtype="auto").lm_head.weight.dtype == torch.bfloat16
    stock = AutoModelForCausalLM.from_pretrained(tiny.path("float32"), dtype=torch.float32)
    assert type(stock) is GptOssForCausalLM
    assert stock.model.layers[0].mlp.experts.gate_up_proj.dtype == torch.float32
    with torch.inference_mode():
        torch.testing.assert_close(stock(ids).logits, streamed(tiny.path("float32"), ids), atol=1e-4, rtol=0)
    fresh = AutoModelForCausalLM.from_config(GptOssConfig(**tiny.model().config.to_dict()))
    assert isinstance(fresh, GptOssForCausalLM)


def test_registered_auto_model_refuses_a_damaged_directory(damaged, registered):
    edit_shard(damaged, EXPERT, lambda tensors: tensors.pop(EXPERT))
    refused(lambda: AutoModelForCausalLM.from_pretrained(damaged), EXPERT, "missing")


def test_ignored_options_are_named(quantized, registered):
    with pytest.warns(UserWarning, match=r"ignores \['offload_folder'\]"):
        AutoModelForCausalLM.from_pretrained(quantized(), offload_folder="x")


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}], ids=str)
def test_device_map(quantized, registered, device_map, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = AutoModelForCausalLM.from_pretrained(quantized(), device_map=device_map)
    assert model.device == torch.device("cpu")


def test_several_devices_are_refused(quantized, registered):
    device_map = {"model": "cpu", "lm_head": "meta"}
    refused(
        lambda: AutoModelForCausalLM.from_pretrained(quantized(), device_map=device_map),
        "device_map",
        "one device",
        "'auto'",
    )


STOCK = """
import json, sys
from transformers import AutoModelForCausalLM, GptOssForCausalLM
errors = []
for cls in (AutoModelForCausalLM, GptOssForCausalLM):
    for options in ({}, {"use_safetensors": True}, {"device_map": "cpu"}):
        try:
            cls.from_pretrained(sys.argv[1], **options)
            errors.append("")
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
assert not any(name.startswith("gptoss_quantize") for name in sys.modules)
print(json.dumps(errors))
"""


def test_stock_transformers_refuses_our_directory(quantized):
    # processes without our package; transformers treats quantization_config differently without compressed-tensors
    without = "import sys; sys.modules['compressed_tensors'] = None\n"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(quantized())], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for code in (STOCK, without + STOCK)
    ]
    for process in processes:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        errors = json.loads(out.splitlines()[-1])
        assert len(errors) == 6
        assert all(errors), errors
