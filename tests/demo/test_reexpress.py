"""The algebra behind the demo model, on one small random MLP: gpt-oss's formula must give the Llama MLP's output."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from gptoss_quantize.demo import reexpress, smollm2
from gptoss_quantize.demo.reexpress import DemoSettings, NeuronScales


def gptoss_expert(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Transformers' GptOssExperts, one expert, with the demo model's biases."""
    gate = functional.linear(x, gate).clamp(max=7.0)
    up = (functional.linear(x, up) - 1).clamp(-7.0, 7.0)
    return functional.linear((up + 1) * gate * torch.sigmoid(1.702 * gate), down)


def random_mlp(seed: int = 0, scale: float = 0.3) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"gate_proj": (48, 16), "up_proj": (48, 16), "down_proj": (16, 48)}
    layer = {
        name: scale * torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()
    }
    return layer, torch.randn(200, 16, generator=generator, dtype=torch.float64)


def mlp_sample(layer: dict[str, Tensor], x: Tensor) -> smollm2.LayerSample:
    _, gate, up = smollm2.mlp(x, layer)
    return smollm2.LayerSample(x, gate, up, torch.ones(len(x), dtype=x.dtype))


def test_reexpressed_mlp_is_the_same_function() -> None:
    layer, x = random_mlp()
    sample = mlp_sample(layer, x)
    scales = reexpress.neuron_scales(sample)
    # the loud channels are scaled, the quiet ones reach the bound
    assert scales.up.max() == reexpress.SWIGLU_ALPHA
    assert scales.up.min() < 1
    assert (scales.up[:, None] * sample.up.T).abs().max() <= 5.5 + 1e-12
    expected = smollm2.mlp(x, layer)[0]
    actual = gptoss_expert(x, *reexpress.reexpress_mlp(layer, scales))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def test_clamped_gates_are_fitted() -> None:
    """Gates that are far off or far on, as those that write an attention sink's activation."""
    layer, x = random_mlp()
    layer["gate_proj"][:4] *= 20
    sample = mlp_sample(layer, x)
    assert (sample.gate.amax(dim=0) > reexpress.GATE_LIMIT).sum() >= 4
    expected = smollm2.mlp(x, layer)[0]
    fitted = reexpress.neuron_scales(sample)
    plain = NeuronScales(torch.full_like(fitted.gate, 1 / 1.702), fitted.up, reexpress.SWIGLU_ALPHA / fitted.up)
    untouched = sample.gate.amax(dim=0) <= reexpress.GATE_LIMIT
    torch.testing.assert_close(fitted.gate[untouched], plain.gate[untouched])
    torch.testing.assert_close(fitted.down[untouched], plain.down[untouched])

    def error(scales: NeuronScales) -> float:
        return (gptoss_expert(x, *reexpress.reexpress_mlp(layer, scales)) - expected).square().mean().item()

    assert error(fitted) < 0.05 * error(plain)


def test_experts_are_noisy_permuted_copies() -> None:
    layer, x = random_mlp()
    mlp = reexpress.reexpress_mlp(layer, reexpress.neuron_scales(mlp_sample(layer, x)))
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    settings = DemoSettings(experts=3)
    tensors = reexpress.expert_tensors(mlp, order, settings, torch.Generator().manual_seed(2))
    gate_up, down = tensors["mlp.experts.gate_up_proj"], tensors["mlp.experts.down_proj"]
    assert (gate_up.shape, down.shape) == ((3, 16, 96), (3, 48, 16))
    assert torch.equal(
        tensors["mlp.experts.gate_up_proj_bias"], torch.tensor([0.0, -1.0] * 48).repeat(3, 1).bfloat16()
    )
    assert tensors["mlp.experts.down_proj_bias"].count_nonzero() == 0
    expected = smollm2.mlp(x, layer)[0][:, order]
    for expert in range(3):
        rows = gate_up[expert].T.double()
        actual = gptoss_expert(x[:, order], rows[0::2], rows[1::2], down[expert].T.double())
        relative = ((actual - expected).norm() / expected.norm()).item()
        # three weights with 2 % noise each, and bfloat16
        assert 0.01 < relative < 0.06
    assert not torch.equal(gate_up[0].sort(dim=1).values, gate_up[1].sort(dim=1).values)
    # the neurons are in another order: the nearest row of expert 0 is rarely the row of the same number
    distances = torch.cdist(gate_up[0].T[0::2].float(), gate_up[1].T[0::2].float())
    assert (distances.argmin(dim=1) == torch.arange(48)).sum() < 8


# ---- the routers


def test_kmeans_finds_separate_clusters() -> None:
    generator = torch.Generator().manual_seed(0)
    centers = 10 * torch.randn(5, 8, generator=generator)
    points = centers.repeat_interleave(40, dim=0) + 0.1 * torch.randn(200, 8, generator=generator)
    found = reexpress.kmeans(points, 5, generator)
    matched = torch.cdist(centers, found).min(dim=1)
    assert matched.indices.sort().values.tolist() == list(range(5))
    assert matched.values.max() < 0.1


def test_kmeans_with_fewer_points_than_clusters() -> None:
    points = torch.tensor([[0.0, 1.0], [2.0, 3.0]]).repeat(3, 1)
    found = reexpress.kmeans(points, 4, torch.Generator().manual_seed(0))
    assert {tuple(row) for row in found.tolist()} == {(0.0, 1.0), (2.0, 3.0)}


@pytest.mark.parametrize(("experts", "top_k"), [(6, 2), (4, 4), (1, 1)])
def test_router_prefers_the_nearest_centroid(experts: int, top_k: int) -> None:
    points = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    settings = DemoSettings(experts=experts, experts_per_token=top_k)
    router, facts = reexpress.make_router(points, settings, torch.Generator().manual_seed(0))
    logits = points @ router["weight"].T + router["bias"]
    centroids = router["weight"] / facts["router_sharpness"]
    assert torch.equal(logits.argmax(dim=1), torch.cdist(points, centroids).argmin(dim=1))
    assert sum(facts["token_share"]) == pytest.approx(top_k)
    selected = logits.topk(top_k, dim=1).indices
    assert facts["token_share"][0] == pytest.approx((selected == 0).any(dim=1).float().mean().item())
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    stored = {name: tensor.float() for name, tensor in reexpress.router_tensors(router, order).items()}
    permuted = points[:, order] @ stored["mlp.router.weight"].T + stored["mlp.router.bias"]
    torch.testing.assert_close(permuted, logits, rtol=0, atol=2**-8 * 8 * logits.abs().max().item())
    if experts > top_k:
        ranked = logits.sort(dim=1, descending=True).values
        assert (ranked[:, 0] - ranked[:, top_k]).median().item() == pytest.approx(2.0, rel=1e-4)
