"""Routing and expert errors against a float64 twin that keeps every output, and on cases with a known answer."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptoss_quantize.checkpoint import Checkpoint
from gptoss_quantize.eval.experts import agreement, compare_experts, relative_error, router_kl
from gptoss_quantize.eval.trees import Layout, Tree, lay_out


@pytest.fixture(scope="module")
def layout(tiny) -> Layout:
    return lay_out([Tree((row[0],), (tuple(row[1:]),)) for row in tiny.ids(3, 40).tolist()])


@pytest.fixture(scope="module")
def noisy(tiny, tmp_path_factory) -> Path:
    """The float32 model with 5 % noise on every expert weight of layer 1, and one expert of layer 2 set to zero."""
    path = tiny.copy("float32", tmp_path_factory.mktemp("experts") / "noisy")
    tensors = load_file(path / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    for name in ("gate_up_proj", "down_proj"):
        weight = tensors[f"model.layers.1.mlp.experts.{name}"]
        weight *= 1 + 0.05 * torch.randn(weight.shape, generator=generator)
    tensors["model.layers.2.mlp.experts.down_proj"][5] = 0
    tensors["model.layers.2.mlp.experts.down_proj_bias"][5] = 0
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def twin_block(checkpoint: Checkpoint, layer: int, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Router logits, chosen experts, probabilities and every expert's output for every token, in float64."""
    own = {name: tensor.double() for name, tensor in checkpoint.layer(layer).items()}
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + checkpoint.config.rms_eps)
    x = x * own["post_attention_layernorm.weight"]
    logits = x @ own["mlp.router.weight"].T + own["mlp.router.bias"]
    values, index = logits.topk(checkpoint.config.top_k)
    outputs = []
    for expert in checkpoint.experts(layer, torch.float64):
        h = x @ expert.gate_up.T + expert.gate_up_bias
        gate, up = h[:, 0::2].clamp(max=7), h[:, 1::2].clamp(-7, 7)
        outputs.append((gate * torch.sigmoid(1.702 * gate) * (up + 1)) @ expert.down.T + expert.down_bias)
    return logits, index, values.softmax(-1), torch.stack(outputs, 1)


def test_entries_of_the_first_changed_layer_are_their_definitions(tiny, noisy, layout):
    from gptoss_quantize.eval.trees import Stream

    base, cand = Checkpoint(tiny.path("float32")), Checkpoint(noisy)
    (found,) = compare_experts(base, [cand], layout)
    # before the experts of layer 1 both streams are the same: clean and running agree
    stream = Stream(base, layout)
    stream.attend(0)
    stream.mlp(0)
    stream.attend(1)
    x = stream.h.double()
    _, index, prob, exact = twin_block(base, 1, x)
    _, _, _, got = twin_block(cand, 1, x)
    chosen = torch.zeros(len(x), base.config.experts, dtype=torch.float64).scatter_(1, index, prob)
    whole = (chosen[..., None] * exact).sum(1)
    error = (((chosen[..., None] * got).sum(1) - whole) ** 2).sum() / (whole**2).sum()
    entry = found[1]
    assert entry["error_clean"] == pytest.approx(float(error), rel=1e-3)
    assert entry["error_running"] == pytest.approx(float(error), rel=1e-3)
    assert entry["tokens"] == torch.bincount(index.flatten(), minlength=8).tolist() == entry["candidate_tokens"]
    for e, value in enumerate(entry["expert_error"]):
        mine = (index == e).any(1)
        expected = ((got[mine, e] - exact[mine, e]) ** 2).sum() / (exact[mine, e] ** 2).sum()
        assert value == pytest.approx(float(expected), rel=1e-3)
    assert entry["topk_agreement"] == 1 and abs(entry["router_kl"]) < 1e-9
    # what the noise does to the next layer's routing
    assert found[2]["topk_agreement"] < 1 and found[2]["router_kl"] > 1e-5


def test_errors_stay_where_they_are_made(tiny, noisy, layout):
    (found,) = compare_experts(Checkpoint(tiny.path("float32")), [Checkpoint(noisy)], layout)
    assert found[0]["error_clean"] == found[0]["error_running"] == 0 and set(found[0]["expert_error"]) == {0.0}
    # an expert that answers nothing is as wrong as its whole output; the others of its layer are untouched
    assert found[2]["expert_error"][5] == 1
    assert [e for i, e in enumerate(found[2]["expert_error"]) if i != 5] == [0.0] * 7
    # running: what layer 1 did wrong comes on top
    assert found[2]["error_running"] > found[2]["error_clean"] > 0


def test_the_baseline_against_itself_has_no_error(tiny, layout):
    base = Checkpoint(tiny.path("float32"))
    layers = []
    first, second = compare_experts(base, [base, base], layout, on_layer=lambda: layers.append(1))
    assert first == second and len(layers) == base.config.layers
    for entry in first:
        assert entry["error_clean"] == entry["error_running"] == 0 and entry["topk_agreement"] == 1


def test_an_expert_without_tokens_has_no_error(tiny, tmp_path):
    path = shutil.copytree(tiny.path("float32"), tmp_path / "unused")
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.0.mlp.router.bias"][3] = -1000
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    base = Checkpoint(path)
    (found,) = compare_experts(base, [base], lay_out([Tree((1, 2), ((3, 4),))]))
    assert found[0]["tokens"][3] == 0 and found[0]["expert_error"][3] is None


def test_agreement_and_router_kl_by_hand():
    base, cand = torch.tensor([[0, 1], [2, 3]]), torch.tensor([[1, 0], [3, 4]])
    assert agreement(base, cand) == 0.75
    logits = torch.tensor([[0.0, 0.0]])
    shifted = torch.tensor([[3.0, 3.0]])
    assert router_kl(logits, shifted) == pytest.approx(0, abs=1e-12)
    assert router_kl(logits, torch.log(torch.tensor([[0.25, 0.75]]))) == pytest.approx(0.143841, abs=1e-5)
    assert relative_error(torch.ones(3), torch.zeros(3)) is None
