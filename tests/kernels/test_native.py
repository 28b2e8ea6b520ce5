"""The compiled loops against the torch code that defines them; column steps are in tests/quantize/test_gptq.py."""

import subprocess
import sys

import pytest
import torch

from gptoss_quantize.calibration.moments import MomentSums
from gptoss_quantize.kernels import int4, native
from gptoss_quantize.kernels.experts import swiglu, swiglu_slope
from gptoss_quantize.quantize import awq
from gptoss_quantize.quantize.scales import searched_scale

needs_compiler = pytest.mark.skipif(not native.available(), reason=native.problem())


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@needs_compiler
@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("lead", [(), (3,)])
@pytest.mark.parametrize("extras", [0, 2])
def test_scale_search_equals_torch(group, lead, extras):
    weight = normal(*lead, 37, 320) * 0.05
    weight[..., 0, :group] = 0  # a group without any weight
    importance = normal(*lead, 320, seed=1).exp()
    extra = normal(*lead, 37, 320 // group, extras, seed=2) * 0.01 if extras else None
    want = searched_scale(weight, importance, group, extra)
    got = searched_scale(weight, importance, group, extra, compiled=True)
    assert torch.equal(got, want)
    narrow = searched_scale(weight.float(), importance.float(), group, None, compiled=True)
    # a tie between candidates may fall the other way in float32
    same = narrow == searched_scale(weight.float(), importance.float(), group)
    assert float(same.float().mean()) > 0.99


@needs_compiler
@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 2**-8), (torch.float32, 0.0)])
@pytest.mark.parametrize("tokens", [1, 200])
def test_swiglu_is_rounded_once(tokens, dtype, error):
    rows = normal(tokens, 2 * 96, dtype=dtype) * 6  # both clamps bind
    rows[0, :8] = torch.tensor([-100.0, 100, 7, -7, 0, 1e-30, 60, -60])
    gate, up = rows.double().chunk(2, dim=-1)
    exact = swiglu(gate, up, 7.0, 1.702)
    got = native.swiglu(rows, 7.0, 1.702).double()
    # float32 inside: alpha * gate is rounded before the exponential; e^-87 is as small as it gets
    inside = 2**-22 * (1 + 1.702 * gate.abs())
    assert bool(((got - exact).abs() <= (error + inside) * exact.abs() + 1e-30).all())


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_of_no_tokens_is_empty(dtype):
    # an expert that no token was routed to
    assert native.swiglu(torch.empty(0, 64, dtype=dtype), 7.0, 1.702).shape == (0, 32)


@needs_compiler
@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("centre", [True, False])
def test_moments_with_and_without_compiled_passes(paired, centre):
    x, weight = normal(3000, 72, dtype=torch.bfloat16) + 0.5, normal(3000, seed=3).abs().float()
    original = x + 0.2 * normal(3000, 72, seed=4, dtype=torch.bfloat16) if paired else None

    def moments(kind, compiled):
        sums = MomentSums(72, centre=centre)
        with native.switched(compiled):
            for part in (slice(0, 1111), slice(1111, 3000)):
                sums.add(x[part].to(kind), weight[part], None if original is None else original[part].to(kind))
        return sums.finish()

    exact, plain, got = (
        moments(torch.float64, False),
        moments(torch.bfloat16, False),
        moments(torch.bfloat16, True),
    )
    assert got.effective_tokens == pytest.approx(exact.effective_tokens)
    for name in ("mean", "hessian", "original_mean") + (("drift",) if paired else ()):
        wanted = getattr(exact, name)
        error, allowed = ((getattr(m, name) - wanted).norm() for m in (got, plain))
        # the compiled pass rounds (x - shift) sqrt(w) to bfloat16 once more, 2^-9, and then sums in float32
        rounding = 2**-9 if name == "hessian" and native.has_products() else 1e-6
        assert float(error) <= 2 * float(allowed) + rounding * float(wanted.norm()), name
    assert torch.equal(got.hessian, got.hessian.T)
    assert float(torch.linalg.eigvalsh(got.hessian.double()).min()) > 0


@pytest.mark.skipif(not native.has_products(), reason="no AVX512-BF16 here")
@pytest.mark.parametrize(("tokens", "columns"), [(1, 8), (259, 72), (600, 320), (513, 97)])
def test_products_are_summed_in_float32(tokens, columns):
    x, y = normal(tokens, columns, dtype=torch.bfloat16), normal(tokens, columns, seed=1, dtype=torch.bfloat16)
    start = normal(columns, columns, seed=2, dtype=torch.float32)
    got, square = start.clone(), start.clone()
    left, right = native.Pairs(x), native.Pairs(y)
    native.add_product(left, right, got)
    native.add_product(left, left, square)
    # the classical bound of a float32 sum: one rounding of 2^-24 a term
    bound = (tokens + 2) * 2**-24 * (x.double().abs().T @ y.double().abs() + start.abs())
    assert bool(((got - (start + x.double().T @ y.double())).abs() <= bound).all())
    bound = (tokens + 2) * 2**-24 * (x.double().abs().T @ x.double().abs() + start.abs())
    assert bool(((square - (start + x.double().T @ x.double())).abs().triu() <= bound).all())


@needs_compiler
def test_centred_blocks_are_rounded_once():
    x, original = normal(200, 72, dtype=torch.bfloat16), normal(200, 72, seed=1, dtype=torch.bfloat16)
    weight, shift = normal(200, seed=2).abs().float(), normal(72, seed=3, dtype=torch.bfloat16).float()
    block = native.centre(x, original, weight, shift)
    exact = x.double() - shift
    for got, want in (
        (block.scaled, exact * weight.double().sqrt()[:, None]),
        (block.plain, exact),
        (block.gap, (original.double() - x.double()) * weight[:, None]),
    ):
        assert bool(((got.double() - want).abs() <= 2**-8 * want.abs() * (1 + 1e-5)).all())
    torch.testing.assert_close(block.sum.double(), weight.double() @ exact, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(block.gap_sum, block.gap.float().sum(0), rtol=1e-5, atol=1e-5)


@needs_compiler
def test_signed_rounding_for_the_awq_search():
    weight, fold = normal(75, 192, dtype=torch.float32), normal(192, seed=1).exp().float()
    weight[3, :64] = 0
    got = awq.nearest(weight, fold, 64, torch.bfloat16)
    want = awq.nearest(weight, fold, 64, torch.float32).to(torch.bfloat16)
    assert got.dtype == torch.bfloat16
    assert float((got == want).float().mean()) > 0.999
    torch.testing.assert_close(got, want, rtol=2**-7, atol=0)


@needs_compiler
@pytest.mark.parametrize(("rows", "columns", "group"), [(5, 64, 32), (300, 192, 64), (0, 64, 64)])
def test_dequantizing_is_that_of_int4(rows, columns, group):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (rows, columns), generator=generator, dtype=torch.int8)
    scale = normal(rows, columns // group, seed=1).bfloat16()
    packed = int4.pack(codes)
    assert torch.equal(native.dequantize(packed, scale), int4.dequantize(codes, scale, torch.bfloat16))
    for dtype in (torch.bfloat16, torch.float32):
        assert torch.equal(int4.weights(packed, scale, dtype), int4.dequantize(codes, scale, dtype))
    slope = normal(rows, columns, seed=2).bfloat16()
    got = native.scale_gradient(packed, slope, columns // group)
    want = (codes.double() * slope.double()).unflatten(-1, (-1, group)).sum(-1)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)


@needs_compiler
@pytest.mark.parametrize("tokens", [0, 1, 300])
def test_slope_of_swiglu_is_autograds(tokens):
    # a third of the values beyond a clamp
    gate_up = normal(tokens, 2 * 96).mul_(7).bfloat16()
    slope = normal(tokens, 96, seed=1).bfloat16()
    wide = gate_up.double().requires_grad_()
    # a value that is the bound has the slope of those inside; torch's own clamp gives it 1 before 2.15, and 0 since
    gate, up = wide[:, :96], wide[:, 96:]
    gate, up = torch.where(gate <= 7, gate, 7.0), torch.where(up.abs() <= 7, up, 7 * up.sign())
    assert tokens < 300 or bool((gate_up.abs() == 7).any())
    ((up + 1) * gate * torch.sigmoid(1.702 * gate)).backward(slope.double())
    torch.testing.assert_close(swiglu_slope(gate_up, slope, 7.0, 1.702).double(), wide.grad, rtol=2**-8, atol=1e-5)
    plain = swiglu_slope(gate_up.float(), slope.float(), 7.0, 1.702)
    torch.testing.assert_close(plain.double(), wide.grad, rtol=1e-5, atol=1e-6)


@needs_compiler
def test_sums_do_not_depend_on_the_number_of_threads():
    x, original, weight = normal(1500, 96).bfloat16(), normal(1500, 96, seed=1).bfloat16(), torch.rand(1500)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            sums = MomentSums(96)
            sums.add(x, weight, original)
            found.append(sums.finish(paired=True))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for name in ("mean", "hessian", "drift", "original_mean"):
            assert torch.equal(getattr(other, name), getattr(found[0], name)), name


def test_wrong_tensors_are_refused():
    with pytest.raises(ValueError, match="contiguous"):
        native._at(torch.zeros(4, 4).T[:, :2])
    assert native._at(None).value is None


WITHOUT_COMPILER = """
import torch
from gptoss_quantize.kernels import native
assert not native.available() and "no C++ compiler" in native.problem(), native.problem()
from gptoss_quantize.kernels.experts import gated
out = gated(torch.ones(2, 8, dtype=torch.bfloat16), torch.ones(4, 8, dtype=torch.bfloat16),
            torch.zeros(4, dtype=torch.bfloat16), 7.0, 1.702)
assert out.shape == (2, 2)
"""


def test_without_a_compiler_torch_does_the_work(tmp_path):
    done = subprocess.run(
        [sys.executable, "-P", "-c", WITHOUT_COMPILER],
        env={"PATH": str(tmp_path), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@needs_compiler
def test_the_library_is_compiled_once_and_a_bad_compiler_is_reported(tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exec echo fake 1.0\necho sorry >&2\nexit 1\n')
    compiler.chmod(0o755)
    code = "from gptoss_quantize.kernels import native; print(native.available(), native.problem())"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={"PATH": f"{tmp_path}:/bin:/usr/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("False")
    assert "sorry" in done.stdout
    made = native._build(native._compiler())
    before = made.stat().st_mtime_ns
    assert native._build(native._compiler()) == made
    assert made.stat().st_mtime_ns == before
