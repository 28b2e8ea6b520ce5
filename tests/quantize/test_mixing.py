"""Bits chosen for a size: the knapsack against all choices, the losses against their definition, and whole runs."""

import itertools
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import gptoss_quantize
from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.errors import InputError
from gptoss_quantize.layouts import INT2, INT3, INT4, PARTS, WIDTHS, layout_of_bits
from gptoss_quantize.loading import load
from gptoss_quantize.model import (
    attend,
    embed,
    hidden_states,
    logits,
    mlp_input,
    moe,
    rms_norm,
    rope_tables,
    router,
)
from gptoss_quantize.quantize import mixing, run, sensitivity
from gptoss_quantize.quantize.job import Job
from gptoss_quantize.quantize.mixing import allot, loss_of, total_bytes
from gptoss_quantize.quantize.recipes import RECIPES
from gptoss_quantize.quantize.run import quantize_checkpoint
from gptoss_quantize.quantize.sensitivity import ROUNDING, sensitivities
from gptoss_quantize.quantize.solve import solve
from gptoss_quantize.runtimes import memory
from gptoss_quantize.runtimes.vllm_rules import marked
from gptoss_quantize.source import Expert
from gptoss_quantize.units import GIB

GRIDS = [layout.grid for layout in WIDTHS.values()]


def job_for(dest, method="gptq", **options):
    return Job(dest=dest, method=method, recipe=RECIPES[method], device="cpu", **options)


@pytest.fixture(scope="module")
def size(tiny):
    """Return a size between 2 and 4 bits with the rest in 8 bits."""
    source = Checkpoint(tiny.path("bf16"))
    low, high = (total_bytes(source, layout, 64, "int8") for layout in (INT2, INT4))
    return low + (high - low) * 55 // 100


@pytest.fixture(scope="module")
def mixed(tiny, tmp_path_factory, size):
    """Return a checkpoint made for that size, and its report."""
    dest = tmp_path_factory.mktemp("mixed") / "out"
    report = quantize_checkpoint(Checkpoint(tiny.path("bf16")), job_for(dest, size=size), tiny.tokens())
    return dest, report


@pytest.mark.parametrize("seed", range(4))
def test_the_knapsack_is_exact(seed):
    """For every budget the sum of losses is the least of all 729 choices."""
    generator = torch.Generator().manual_seed(seed)
    losses = [{p: (torch.rand(3, generator=generator) * 10**e).tolist() for p in PARTS} for e in (0, 1, -1)]
    choices = [tuple(zip(c[::2], c[1::2], strict=True)) for c in itertools.product(WIDTHS, repeat=6)]
    units = {c: sum(2 * wide + narrow for wide, narrow in c) for c in choices}
    for budget in range(18, 37):
        chosen = allot(losses, budget)
        assert units[chosen] <= budget
        least = min(loss_of(losses, c) for c in choices if units[c] <= budget)
        assert loss_of(losses, chosen) == pytest.approx(least, rel=1e-12)
    with pytest.raises(ValueError, match="17 units hold no bits"):
        allot(losses, 17)


def rounded(source, layer, part, grid, index, prob, x):
    """Yield a layer's experts, one projection rounded under the moments of its own tokens."""
    for e in range(source.config.experts):
        expert = source.expert(layer, e)
        token, slot = (index == e).nonzero(as_tuple=True)
        if not token.numel():
            yield expert
            continue
        seen, weight = x[token], prob[token, slot].square()
        if part == "down":
            gate_up = seen @ expert.gate_up.T + expert.gate_up_bias
            gate, up = gate_up[:, ::2].clamp(max=7), gate_up[:, 1::2].clamp(-7, 7)
            seen = (up + 1) * gate * torch.sigmoid(1.702 * gate)
        share = weight / weight.sum()
        stats = [sensitivity.MomentSums(seen.shape[1], centre=False, diagonal=True).finish()]
        stats[0].hessian, stats[0].tokens = (share @ seen.square()), len(seen)
        stats[0].effective_tokens = float(weight.sum() ** 2 / weight.square().sum())
        matrix, bias = getattr(expert, part), getattr(expert, part + "_bias")
        made = solve(matrix[None], bias[None], stats, ROUNDING, 64, grid, torch.float32).weight(0, torch.float32)
        parts = {name: getattr(expert, name) for name in ("gate_up", "gate_up_bias", "down", "down_bias")}
        yield Expert(**parts | {part: made})


@torch.inference_mode()
def test_losses_are_what_they_are_defined_as(tiny):
    """Whole blocks with rounded experts, and the layers above run anew for every probe."""
    source, ids = Checkpoint(tiny.path("bf16")), tiny.tokens().ids[:3]
    config, (n, s) = source.config, sensitivity.PROBE
    assert ids.shape[0] > n
    s = min(s, ids.shape[1])
    rope, short = rope_tables(config, ids.shape[1]), rope_tables(config, s)
    got = sensitivities(source, ids, GRIDS, 64, torch.float32)

    def layer_of(h, index, cosines, experts=None):
        dense = source.layer(index)
        h = attend(h, dense, config, index, cosines, torch.float32)
        x = mlp_input(h.flatten(0, 1), dense, config)
        routing = router(x, dense, config)
        made = source.experts(index, torch.float32) if experts is None else experts(x, *routing)
        return h + moe(x, *routing, made, config).view_as(h)

    def predictions(h):
        last = rms_norm(h, source.dense("model.norm.weight"), config.rms_eps)
        return torch.log_softmax(logits(last, source.dense("lm_head.weight").float()), -1).double()

    h, probes = embed(source, ids), []
    errors = []
    for i in range(config.layers):
        after = layer_of(h, i, rope)
        energy, changes = after.square().sum(-1), {}
        for part in PARTS:
            for grid in GRIDS:
                with_it = layer_of(
                    h, i, rope, lambda x, index, prob, p=part, g=grid, i=i: rounded(source, i, p, g, index, prob, x)
                )
                changes[part, grid.name] = with_it - after
        errors.append({key: float((c.square().sum(-1) / energy).mean()) for key, c in changes.items()})
        moved = (changes["gate_up", "int3"] + changes["down", "int3"])[:n, :s]
        probe = after[:n, :s] + moved
        for above in range(i + 1, config.layers):
            probe = layer_of(probe, above, short)
        probes.append((probe, float((moved.square().sum(-1) / energy[:n, :s]).mean())))
        h = after
    base = predictions(h[:n, :s])
    for i, (probe, moved) in enumerate(probes):
        gain = float((base.exp() * (base - predictions(probe))).sum(-1).mean()) / moved
        for part in PARTS:
            for at, grid in enumerate(GRIDS):
                assert got[i][part][at] == pytest.approx(gain * errors[i][part, grid.name], rel=0.02)


def test_a_size_is_kept_and_foretold(mixed, size):
    """The files have the expected bytes to the byte; the report, the config and the names say the same bits."""
    dest, report = mixed
    files = sum(path.stat().st_size for path in dest.glob("*.safetensors"))
    chosen = report["mixture"]
    assert files == chosen["expected_bytes"] <= size
    assert len({tuple(pair) for pair in chosen["bits"]}) > 1
    config = json.loads((dest / "config.json").read_text())
    assert config["gptoss_quantize"]["format"] == "mixed"
    assert config["quantization_config"]["num_bits"] == chosen["bits"]
    checkpoint = Checkpoint(dest)
    for i, pair in enumerate(chosen["bits"]):
        assert [checkpoint.layout.at(i, part).bits for part in PARTS] == pair
    mean = sum(2 * wide + narrow for wide, narrow in chosen["bits"]) / (3 * len(chosen["bits"]))
    assert report["expert_bits_per_weight"] == pytest.approx(mean + 0.25)
    # one unit more would not have fitted
    assert files + 2 * mixing.unit_bytes(checkpoint.config) > size


def test_projections_are_those_of_uniform_runs(tiny, tmp_path):
    """Layers do not depend on each other: a mixture of layers is made of the uniform runs' own tensors."""
    source, tokens = Checkpoint(tiny.path("bf16")), tiny.tokens()
    bits = ((3, 3), (4, 4), (2, 2))[: source.config.layers]
    quantize_checkpoint(source, job_for(tmp_path / "mixed", format="mixed", bits=bits), tokens)
    got = Checkpoint(tmp_path / "mixed")
    for width in {wide for wide, _ in bits}:
        quantize_checkpoint(source, job_for(tmp_path / f"int{width}", format=f"int{width}"), tokens)
        want = Checkpoint(tmp_path / f"int{width}")
        for i in (i for i, pair in enumerate(bits) if pair == (width, width)):
            names = [name for name in want.names() if f".layers.{i}.mlp.experts." in name]
            assert names
            for name in names:
                assert torch.equal(got.read(name), want.read(name)), name


def test_it_loads_and_runs(mixed, tiny, tmp_path):
    """Packed in memory, in C++ and in torch, and written again: the logits of the streamed checkpoint."""
    dest, _ = mixed
    ids, checkpoint = tiny.tokens().ids[:2, :24], Checkpoint(dest)
    want = logits(hidden_states(checkpoint, ids), checkpoint.head().float())
    for kernel in ("auto", "torch"):
        model = load(dest, dtype=torch.float32, kernel=kernel)
        with torch.inference_mode():
            assert torch.allclose(model(ids).logits, want, atol=2e-3)
    model.save_pretrained(tmp_path / "again")
    for name in checkpoint.names():
        assert torch.equal(Checkpoint(tmp_path / "again").read(name), checkpoint.read(name)), name
    gptoss_quantize.register()
    assert AutoModelForCausalLM.from_pretrained(dest).loaded_from.layout.name == "mixed"


def test_other_readers_refuse(mixed, tmp_path):
    """vLLM's plugin by name; exports that have no such codes; stock transformers finds no weights."""
    dest, _ = mixed
    config = type("Config", (), {"gptoss_quantize": {"format": "mixed"}})
    with pytest.raises(InputError, match="experts in mixed, which vLLM and our plugin do not run"):
        marked(config())
    with pytest.raises(InputError, match="ggml has no type for mixed experts; use --expert-type bf16"):
        gptoss_quantize.export(dest, tmp_path / "gguf", "gguf")
    with pytest.raises(InputError, match="mixed"):
        gptoss_quantize.export(dest, tmp_path / "awq", "autoawq")
    assert not any(dest.glob("model*.safetensors"))


def test_a_layer_without_its_codes_is_refused(mixed, tmp_path):
    """The names decide, and what is missing is missing."""
    dest, _ = mixed
    index = json.loads((dest / "gptoss-mixed.safetensors.index.json").read_text())
    lost = next(name for name in index["weight_map"] if ".layers.1.mlp.experts.0.w2_weight_" in name)
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in dest.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    from safetensors.torch import load_file, save_file

    shard = copy / index["weight_map"].pop(lost)
    tensors = load_file(shard)
    del tensors[lost]
    save_file(tensors, shard, metadata={"format": "pt"})
    (copy / "gptoss-mixed.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.experts\.0\.w2"):
        Checkpoint(copy)


def test_resume_measures_nothing_anew(tiny, tmp_path, size, mixed, monkeypatch):
    """A run that was stopped goes on with the bits that it chose, to the same bytes; another size is refused."""
    source, dest = Checkpoint(tiny.path("bf16")), tmp_path / "out"

    def stop(index):
        if index == 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, job_for(dest, size=size), tiny.tokens(), stop)
    with monkeypatch.context() as patch:
        patch.setattr(run, "measured", lambda *_: pytest.fail("measured again"))
        quantize_checkpoint(source, job_for(dest, size=size, resume=True), tiny.tokens())
    for path in mixed[0].glob("*.safetensors"):
        assert path.read_bytes() == (dest / path.name).read_bytes()

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, job_for(tmp_path / "other", size=size), tiny.tokens(), stop)
    with pytest.raises(InputError, match="size was"):
        quantize_checkpoint(source, job_for(tmp_path / "other", size=size + 1, resume=True), tiny.tokens())


def test_sizes_at_both_ends(tiny, tmp_path):
    """Too small is refused before anything is written; where int4 fits beside the rest, that is written."""
    source = Checkpoint(tiny.path("bf16"))
    least = total_bytes(source, INT2, 64, "int8")
    with pytest.raises(InputError, match=r"2 bits everywhere take .*; give more, or use a smaller model"):
        quantize_checkpoint(source, job_for(tmp_path / "out", size=least - 1), tiny.tokens())
    with pytest.raises(InputError, match="needs a method that looks at calibration text; rtn does not, use gptq"):
        quantize_checkpoint(source, job_for(tmp_path / "out", "rtn", size=2 * least), None)
    assert not list(tmp_path.iterdir())
    report = quantize_checkpoint(source, job_for(tmp_path / "least", size=least), tiny.tokens())
    assert report["mixture"]["bits"] == [[2, 2]] * source.config.layers
    assert Checkpoint(tmp_path / "least").layout is INT2
    whole = total_bytes(source, INT4, 64, "source")
    report = quantize_checkpoint(source, job_for(tmp_path / "whole", size=whole), tiny.tokens())
    assert (Checkpoint(tmp_path / "whole").layout, report["mixture"]["dense"]) == (INT4, "source")
    assert sum(path.stat().st_size for path in (tmp_path / "whole").glob("*.safetensors")) == whole


def test_polish_keeps_the_rest_as_it_is(tiny, tmp_path):
    """A polish moves norms and scales of a mixture; what it would round again stays in the source's form."""
    source, ids = Checkpoint(tiny.path("bf16")), tiny.tokens()
    low, high = (total_bytes(source, layout, 64, "source") for layout in (INT2, INT4))
    job = job_for(tmp_path / "out", size=(low + high) // 2, polish=2, polish_text=tiny.tokens(seed=5))
    report = quantize_checkpoint(source, job, ids)
    assert (report["mixture"]["dense"], report["polish"]["steps"]) == ("source", 2)
    assert Checkpoint(tmp_path / "out").layout.name == "mixed"


@pytest.mark.parametrize("method", ["awq", "awq+gptq"])
def test_awq_folds_for_both_grids(tiny, tmp_path, size, method):
    source = Checkpoint(tiny.path("bf16"))
    quantize_checkpoint(source, job_for(tmp_path / "out", method, size=size), tiny.tokens())
    ids = tiny.tokens().ids[:2, :24]
    base, made = (
        torch.log_softmax(logits(hidden_states(c, ids), c.head().float()), -1).double()
        for c in (source, Checkpoint(tmp_path / "out"))
    )
    divergence = float((base.exp() * (base - made)).sum(-1).mean())
    quantize_checkpoint(source, job_for(tmp_path / "int2", method, format="int2"), tiny.tokens())
    checkpoint = Checkpoint(tmp_path / "int2")
    low = torch.log_softmax(logits(hidden_states(checkpoint, ids), checkpoint.head().float()), -1).double()
    assert divergence < 0.7 * float((base.exp() * (base - low)).sum(-1).mean())


def test_layouts_of_bits():
    assert layout_of_bits(((3, 3), (3, 3))) is INT3
    layout = layout_of_bits(((3, 4), (2, 2)))
    assert (layout.name, layout.at(0, "down"), layout.at(1, "gate_up")) == ("mixed", INT4, INT2)
    with pytest.raises(ValueError, match="no matrix of its own"):
        layout.matrix(64, 64, 64)


@pytest.mark.parametrize(("gib", "context"), [(12, 32768), (8, 4096), (16, None)])
def test_fit_leaves_what_the_card_needs_beside_the_weights(gib, context):
    from gptoss_quantize.architectures import gptoss_config
    from gptoss_quantize.config import parse_config

    config = parse_config(gptoss_config("gpt-oss-20b"), "gpt-oss-20b")
    left = memory.size_to_fit(config, gib * GIB, context)
    tokens = context or 32768
    full = config.layers // 2 * tokens * 2 * 8 * 64 * 2
    window = config.layers // 2 * min(128, tokens) * 2 * 8 * 64 * 2
    assert left == int(0.97 * gib * GIB) - GIB - full - window
    with pytest.raises(InputError, match="made for 131072 tokens"):
        memory.size_to_fit(config, 64 * GIB, 200_000)
    with pytest.raises(InputError, match="nothing is left for weights"):
        memory.size_to_fit(config, 2 * GIB, 131072)


def test_words_of_a_choice():
    record = {
        "size": GIB,
        "bits": [[4, 4], [4, 4], [3, 2]],
        "dense": "int8",
        "expected_bytes": GIB // 2,
        "expected_loss": 0.5,
        "expected_loss_uniform": {"2": 2.0, "4": 0.25},
    }
    assert mixing.chosen_words(record).splitlines() == [
        "chosen for 1.00 GiB: 0.50 GiB, codes of 3.56 bits on average, attention, embedding and head in 8 bits",
        "  layers, bits of gate_up/down: 0-1 4/4; 2 3/2",
        "  expected loss 1; everywhere the same: 4.00 with 2 bits, 0.50 with 4 bits",
    ]
    record |= {"expected_loss": 0.0, "expected_loss_uniform": {"2": 0.0}}
    assert mixing.chosen_words(record).splitlines()[-1] == "  nothing is expected to be lost"
