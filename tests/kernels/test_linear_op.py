"""int8 and bfloat16 linear layers against float64, in every instruction set here, with their gradients."""

import pytest
import torch
from torch.nn import functional

from gptoss_quantize.kernels import int8, linear_op, native, native_products
from gptoss_quantize.kernels.linear_op import Bf16Linear, bf16_linear, int8_linear, use_bf16_linear

needs_compiler = pytest.mark.skipif(not native.available(), reason=native.problem())
each_isa = pytest.mark.parametrize("isa", native_products.instruction_sets())
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGEST = {torch.bfloat16: 2.5e-3, torch.float16: 3.5e-4, torch.float32: 1e-6}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@needs_compiler
@each_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 8, 70])
@pytest.mark.parametrize("columns", [32, 192, 2880])
@pytest.mark.parametrize("bias", [None, torch.bfloat16, torch.float32])
def test_int8(isa, dtype, rows, columns, bias):
    weight = normal(130, columns) * normal(130, 1, seed=1).exp()
    weight[3, :32] = 0
    codes, scale = int8.quantize(weight)
    scale[5] *= 2.0**-14  # subnormal scales
    x = normal(rows, columns, seed=2).to(dtype)
    b = None if bias is None else normal(130, seed=3).to(bias)
    want = x.double() @ int8.dequantize(codes, scale, torch.float64).T + (0 if b is None else b.double())
    got = native_products.int8_linear(x, codes, scale, b, isa)
    assert got.dtype == dtype
    assert relative(got, want) <= LARGEST[dtype]
    assert relative(got, want) <= 2 * relative(linear_op.int8_torch(x, codes, scale, b), want) + 1e-7


@needs_compiler
@each_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 8, 70])
@pytest.mark.parametrize("columns", [5, 48, 64, 192, 2880])
def test_bf16(isa, dtype, rows, columns):
    weight, bias = normal(130, columns).bfloat16(), normal(130, seed=3).bfloat16()
    x = normal(rows, columns, seed=2).to(dtype)
    x[:, 1] *= 50
    want = x.double() @ weight.double().T + bias.double()
    got = native_products.bf16_linear(x, weight, bias, isa)
    assert relative(got, want) <= LARGEST[dtype]
    plain = functional.linear(x, weight.to(dtype), bias.to(dtype))
    assert relative(got, want) <= (2 if dtype == torch.float32 else 1.1) * relative(plain, want) + 1e-7


@needs_compiler
@each_isa
def test_the_same_for_any_number_of_threads(isa):
    weight, x = normal(300, 192).bfloat16(), normal(9, 192)
    codes, scale = int8.quantize(weight.float())
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            made = (
                native_products.int8_linear(x, codes, scale, None, isa),
                native_products.bf16_linear(x, weight, None, isa),
            )
            results.append(torch.cat(made))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_gradients():
    codes, scale = int8.quantize(normal(40, 64))
    weight = normal(40, 64).bfloat16()
    x, bias, slope = normal(2, 3, 64).double(), normal(40).double(), normal(2, 3, 40, seed=4).double()
    for call, matrix in (
        (lambda x, b: int8_linear(x, codes, scale, b), int8.dequantize(codes, scale, torch.float64)),
        (lambda x, b: bf16_linear(x, weight, b), weight.double()),
    ):
        ours, plain = ((x.clone().requires_grad_(), bias.clone().requires_grad_()) for _ in range(2))
        got = torch.autograd.grad(call(*ours), ours, slope)
        want = torch.autograd.grad(functional.linear(plain[0], matrix, plain[1]), plain, slope)
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="no gradient for its scales"):
        int8_linear(x, codes, scale.clone().requires_grad_(), None)


def test_a_module_trains_as_nn_linear_does(monkeypatch):
    monkeypatch.setattr(linear_op, "fast_bfloat16", lambda: False)
    plain = torch.nn.Linear(64, 40).bfloat16()
    ours = torch.nn.Sequential(torch.nn.Linear(64, 40).bfloat16())
    ours[0].load_state_dict(plain.state_dict())
    use_bf16_linear(ours)
    assert type(ours[0]) is Bf16Linear
    x = normal(3, 64).bfloat16()
    for module in (plain, ours[0]):
        module(x).float().square().sum().backward()
    torch.testing.assert_close(ours[0].weight.grad, plain.weight.grad, rtol=2e-2, atol=1e-1)
    torch.testing.assert_close(ours[0].bias.grad, plain.bias.grad, rtol=2e-2, atol=1e-1)
    with torch.no_grad():
        assert torch.equal(ours[0](x), bf16_linear(x, ours[0].weight, ours[0].bias))
    compiled = torch.compile(ours[0], fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), ours[0](x))


def test_the_operators_fit_torch():
    codes, scale = int8.quantize(normal(40, 64))
    x = normal(3, 64).requires_grad_()
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(int8_linear, (x, codes, scale, None), test_utils=tests)
    torch.library.opcheck(bf16_linear, (x, normal(40, 64).bfloat16(), normal(40)), test_utils=tests)
