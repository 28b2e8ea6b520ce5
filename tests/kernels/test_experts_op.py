"""The operator `experts` and every C++ instruction set here against the definition in float64; gradients; refusals.

Inputs are made to hurt: pre-activations beyond both clamps, negative scales, outliers, experts with no token and with
all. Outputs are allocated from poisoned memory, so that an element that nobody writes is seen.
"""

import pytest
import torch
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from gptoss_quantize.kernels import experts_op, int4, native, native_products
from gptoss_quantize.kernels.experts import MappedExperts, PackedExperts, experts_torch

LIMIT, ALPHA = 7.0, 1.702
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
needs_compiler = pytest.mark.skipif(not native.available(), reason=native.problem())
# one rounding at the end; sums of float32 of 2880 products
BOUNDS = {torch.bfloat16: 2.5e-3, torch.float16: 3.5e-4, torch.float32: 1e-6}
each_isa = pytest.mark.parametrize("isa", native_products.instruction_sets())


def random_experts(
    experts=8, hidden=192, width=320, group=64, seed=0, bias=torch.bfloat16, bits=(4, 4)
) -> PackedExperts:
    """Packed experts whose scales have both signs and whose pre-activations reach beyond the limit."""
    g = torch.Generator().manual_seed(seed)

    def packed(rows: int, columns: int, width: int) -> torch.Tensor:
        shape = (experts, rows, columns * width // 32)
        return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, generator=g)

    def scale(rows: int, columns: int, size: float) -> torch.Tensor:
        values = torch.randn(experts, rows, columns // group, generator=g) * size / columns**0.5
        return int4.round_scale(values).bfloat16()

    return PackedExperts(
        w13_packed=packed(2 * width, hidden, bits[0]),
        w13_scale=scale(2 * width, hidden, 1.5 * 2 ** (4 - bits[0])),
        w13_bias=torch.randn(experts, 2 * width, generator=g).to(bias),
        w2_packed=packed(hidden, width, bits[1]),
        w2_scale=scale(hidden, width, 0.2 * 2 ** (4 - bits[1])),
        w2_bias=torch.randn(experts, hidden, generator=g).to(bias),
    )


def random_tokens(tokens, hidden=192, experts=8, choices=4, seed=1):
    """x [T, D] with outliers, index [T, K] without expert 1 (if there are enough) and with expert 0 for all, prob."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=g)
    x[:, 5] *= 60
    others = torch.stack([torch.randperm(experts - 2, generator=g)[: choices - 1] + 2 for _ in range(tokens)])
    index = torch.cat((torch.zeros(tokens, 1, dtype=torch.int64), others), 1).roll(1, 1)
    return x, index, torch.softmax(torch.randn(tokens, choices, generator=g), -1)


def mapped(packed: PackedExperts, odd: int = 0) -> MappedExperts:
    """The same experts, every tensor at an address of its own in one of two storages."""
    place, chunks, sizes = torch.empty(6, len(packed.w13_bias), 2, dtype=torch.int64), ([], []), [0, 0]
    for part, name in enumerate(PackedExperts.__slots__):
        for e, tensor in enumerate(getattr(packed, name)):
            data = torch.cat(
                (tensor.reshape(-1).view(torch.uint8), torch.full((4 + 4 * (e % 3),), 255, dtype=torch.uint8))
            )
            place[part, e] = torch.tensor((e % 2, sizes[e % 2]))
            chunks[e % 2].append(data)
            sizes[e % 2] += len(data)
    sizes = (packed.hidden, packed.intermediate, packed.group, packed.w13_bias.dtype, packed.bits)
    return MappedExperts([torch.cat(c) for c in chunks], place, *sizes)


def parts(packed: PackedExperts) -> list[torch.Tensor]:
    return [getattr(packed, name) for name in PackedExperts.__slots__]


def exact(x, index, prob, packed) -> torch.Tensor:
    return experts_torch(x.double(), index, prob.double(), packed, LIMIT, ALPHA)


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Fill every new output with NaN."""
    empty = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty(*a, **k).fill_(torch.nan))


def held(x: torch.Tensor, group: int) -> torch.Tensor:
    """Return x [T, D] as the kernels hold 16-bit activations: integers of 16 bits times a power of two per group."""
    groups = x.double().reshape(len(x), -1, group)
    step = 2.0 ** (groups.abs().amax(-1, keepdim=True).clamp(min=1e-300).log2().ceil() - 15)
    return ((groups / step).round().clamp(-(2**15), 2**15 - 1) * step).reshape(x.shape)


def check(x, index, prob, packed, isa, dtype) -> None:
    """The error is at most twice that of the same block in plain torch of the same dtype, and small.

    A float16 value beside an outlier has more bits than the kernels hold: what that alone costs is allowed too.
    """
    x, prob = x.to(dtype), prob.to(dtype)
    want = exact(x, index, prob, packed)
    allowed = BOUNDS[dtype]
    if dtype == torch.float16:
        allowed += float((exact(held(x, packed.group), index, prob, packed) - want).norm() / want.norm())
    got = experts_op.experts_native(x, index, prob, packed, LIMIT, ALPHA, isa)
    assert got.dtype == dtype
    assert got.isfinite().all()
    error = float((got.double() - want).norm() / want.norm())
    plain = experts_torch(x, index, prob, packed, LIMIT, ALPHA)
    assert error <= 2 * float((plain.double() - want).norm() / want.norm()), error
    assert error <= allowed


@needs_compiler
@each_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 8, 33])
@pytest.mark.parametrize(("hidden", "width", "group"), [(192, 320, 64), (576, 192, 32), (96, 160, 32), (64, 64, 64)])
def test_each_instruction_set_is_the_definition(isa, dtype, tokens, hidden, width, group):
    packed = random_experts(8, hidden, width, group)
    check(*random_tokens(tokens, hidden), packed, isa, dtype)


@needs_compiler
@each_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [(3, 3), (2, 2), (3, 4), (4, 2)], ids=str)
@pytest.mark.parametrize(("hidden", "width", "group"), [(192, 320, 64), (576, 192, 32), (96, 160, 32), (64, 64, 64)])
def test_each_instruction_set_is_the_definition_below_four_bits(isa, dtype, bits, hidden, width, group):
    packed = random_experts(8, hidden, width, group, bits=bits)
    for tokens in (1, 3, 8, 33):
        check(*random_tokens(tokens, hidden), packed, isa, dtype)


@needs_compiler
@pytest.mark.parametrize("bits", [(3, 3), (2, 2), (4, 3)], ids=str)
@pytest.mark.parametrize("kind", ["stacked", "mapped"])
def test_operators_below_four_bits(kind, bits):
    packed = random_experts(6, 96, 64, 32, bits=bits)
    x, index, prob = random_tokens(5, 96, 6)
    at = mapped(packed)
    settings = (at.storages, at.place, at.intermediate, at.group, at.bias_dtype)
    run = {
        "stacked": lambda *r: experts_op.experts(*r, *parts(packed), LIMIT, ALPHA, *bits),
        "mapped": lambda *r: experts_op.experts_mapped(*r, *settings, LIMIT, ALPHA, *bits),
    }[kind]
    assert torch.equal(run(x, index, prob), experts_op.run(x, index, prob, packed, LIMIT, ALPHA))
    assert at.nbytes() == sum(part.nbytes for part in parts(packed))
    leaves = [t.double().requires_grad_() for t in (x, prob)]
    slopes = torch.autograd.grad(run(leaves[0], index, leaves[1]).sum(), leaves)
    want = torch.autograd.grad(experts_torch(leaves[0], index, leaves[1], packed, LIMIT, ALPHA).sum(), leaves)
    for got, wanted in zip(slopes, want, strict=True):
        torch.testing.assert_close(got, wanted)
    with pytest.raises(ValueError, match="do not fit"):
        experts_op.experts(x, index, prob, *parts(packed), LIMIT, ALPHA, 2 if bits[0] != 2 else 3)


@needs_compiler
@each_isa
@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("group", [32, 64])
def test_full_size_rows_below_four_bits(isa, group, bits):
    packed = random_experts(4, 2880, 2880, group, bits=(bits, bits))
    check(*random_tokens(2, 2880, 4, 2), packed, isa, torch.bfloat16)


@needs_compiler
@each_isa
@pytest.mark.parametrize("group", [32, 64])
def test_full_size_rows(isa, group):
    packed = random_experts(2, 2880, 2880, group)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2880, generator=g)
    index = torch.tensor([[0, 1], [1, 0], [0, 1]])
    check(x, index, torch.softmax(torch.randn(3, 2, generator=g), -1), packed, isa, torch.bfloat16)


@needs_compiler
@each_isa
@pytest.mark.parametrize("experts", [32, 128])
def test_many_experts(isa, experts):
    packed = random_experts(experts, 64, 96, 32)
    check(*random_tokens(40, 64, experts), packed, isa, torch.bfloat16)


@needs_compiler
def test_thousands_of_tokens_in_pieces():
    packed = random_experts(8, 64, 64, 32)
    x, index, prob = random_tokens(4096, 64)
    check(x, index, prob, packed, "", torch.bfloat16)
    # a token does not depend on its neighbours, nor on the piece that it is in
    whole = experts_op.experts_native(x, index, prob, packed, LIMIT, ALPHA)
    some = slice(1000, 1050)
    assert torch.equal(experts_op.experts_native(x[some], index[some], prob[some], packed, LIMIT, ALPHA), whole[some])


@needs_compiler
@each_isa
@pytest.mark.parametrize("tokens", [1, 9])
def test_the_same_for_any_number_of_threads_and_every_time(isa, tokens):
    packed = random_experts()
    given = random_tokens(tokens)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 1, 3):
            torch.set_num_threads(count)
            results.append(experts_op.experts_native(*given, packed, LIMIT, ALPHA, isa))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


def test_the_example_binds_every_clamp():
    packed, (x, index, _) = random_experts(), random_tokens(33)
    w13 = int4.dequantize(int4.unpack(packed.w13_packed), packed.w13_scale)
    h = torch.einsum("td,erd->ter", x, w13) + packed.w13_bias.float()
    gate, up = h[..., 0::2], h[..., 1::2]
    assert (gate > LIMIT).any() and (up > LIMIT).any() and (up < -LIMIT).any() and (h.abs() < LIMIT).any()
    assert (packed.w13_scale < 0).any() and (packed.w2_scale < 0).any()
    assert not (index == 1).any() and (index == 0).any(1).all()


@needs_compiler
@each_isa
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_token_that_is_not_finite_stays_alone(isa, value):
    packed, (x, index, prob) = random_experts(), random_tokens(6)
    clean = experts_op.experts_native(x, index, prob, packed, LIMIT, ALPHA, isa)
    x[2, 7] = value
    got = experts_op.experts_native(x, index, prob, packed, LIMIT, ALPHA, isa)
    others = [0, 1, 3, 4, 5]
    assert not got[2].isfinite().any()
    assert torch.equal(got[others], clean[others])


@needs_compiler
@each_isa
@pytest.mark.parametrize("size", [0.0, 1e-38, 1e30])
def test_extreme_activations(isa, size):
    packed, (x, index, prob) = random_experts(), random_tokens(3)
    x = (x * size).float()
    want = exact(x, index, prob, packed)
    got = experts_op.experts_native(x, index, prob, packed, LIMIT, ALPHA, isa)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [torch.float32, torch.bfloat16])
def test_mapped_is_stacked(dtype, bias):
    packed = random_experts(bias=bias)
    at = mapped(packed)
    x, index, prob = random_tokens(7)
    x, tail = x.to(dtype), (LIMIT, ALPHA)
    stacked = torch.ops.gptoss_quantize.experts(x, index, prob, *parts(packed), *tail)
    settings = (at.storages, at.place, at.intermediate, at.group, at.bias_dtype)
    assert torch.equal(torch.ops.gptoss_quantize.experts_mapped(x, index, prob, *settings, *tail, 4, 4), stacked)
    for one, other in zip(parts(at.stack()), parts(packed), strict=True):
        assert torch.equal(one, other)
    assert at.nbytes() == sum(part.nbytes for part in parts(packed))


@pytest.mark.parametrize("kind", ["stacked", "mapped"])
def test_gradients_are_those_of_the_definition(kind):
    packed, at = random_experts(), mapped(random_experts())
    x, index, prob = random_tokens(9)
    slope = torch.randn(9, 192, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def gradients(call) -> tuple[torch.Tensor, ...]:
        given = x.double().requires_grad_(), prob.double().requires_grad_()
        return torch.autograd.grad(call(given[0], index, given[1]), given, slope)

    settings = (at.storages, at.place, at.intermediate, at.group, at.bias_dtype)
    ours = {
        "stacked": lambda *r: experts_op.experts(*r, *parts(packed), LIMIT, ALPHA),
        "mapped": lambda *r: experts_op.experts_mapped(*r, *settings, LIMIT, ALPHA, 4, 4),
    }[kind]
    want = gradients(lambda *r: experts_torch(*r, packed, LIMIT, ALPHA))
    for got, exactly in zip(gradients(ours), want, strict=True):
        torch.testing.assert_close(got, exactly, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 2e-6), (torch.bfloat16, 6e-3)])
def test_gradients_are_those_of_stock_transformers(dtype, error):
    packed = random_experts()
    x, index, prob = random_tokens(9)
    x = x.to(dtype)
    config = GptOssConfig(hidden_size=192, intermediate_size=320, num_local_experts=8, num_experts_per_tok=4)
    config._experts_implementation = "eager"
    module = GptOssExperts(config)
    w13, w2 = (
        int4.dequantize(int4.unpack(p), s).transpose(1, 2)
        for p, s in ((packed.w13_packed, packed.w13_scale), (packed.w2_packed, packed.w2_scale))
    )
    names = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
    module.load_state_dict(dict(zip(names, (w13, packed.w13_bias, w2, packed.w2_bias), strict=True)))
    slope = torch.randn(9, 192, generator=torch.Generator().manual_seed(3))
    theirs, ours = (
        (x.float().requires_grad_(), prob.clone().requires_grad_()),
        (x.requires_grad_(), prob.requires_grad_()),
    )
    want = torch.autograd.grad(module(theirs[0], index, theirs[1]), theirs, slope)
    got = torch.autograd.grad(
        experts_op.experts(ours[0], index, ours[1], *parts(packed), LIMIT, ALPHA), ours, slope.to(dtype)
    )
    for one, other in zip(got, want, strict=True):
        assert float((one.float() - other).norm() / other.norm()) < error


@pytest.mark.parametrize("name", ["w13_scale", "w13_bias", "w2_scale", "w2_bias"])
def test_what_is_frozen_refuses_gradients(name):
    packed = random_experts()
    getattr(packed, name).requires_grad_()
    with pytest.raises(ValueError, match=rf"no gradient for {name}: .*frozen.*requires_grad_\(False\)"):
        experts_op.experts(*random_tokens(2), *parts(packed), LIMIT, ALPHA)


def test_a_second_derivative_is_refused():
    x, index, prob = random_tokens(2)
    x.requires_grad_()
    out = experts_op.experts(x, index, prob, *parts(random_experts()), LIMIT, ALPHA)
    (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        first.sum().backward()


def test_the_operators_fit_torch():
    packed = random_experts(4, 64, 64, 32)
    x, index, prob = random_tokens(3, 64, 4, 2)
    given = (x.requires_grad_(), index, prob.requires_grad_(), *parts(packed), LIMIT, ALPHA)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(experts_op.experts, given, test_utils=tests)
    at = mapped(packed)
    settings = (at.storages, at.place, at.intermediate, at.group, at.bias_dtype, LIMIT, ALPHA, 4, 4)
    torch.library.opcheck(experts_op.experts_mapped, (x, index, prob, *settings), test_utils=tests)


@pytest.mark.parametrize("group", [16, 96])
def test_other_groups_run_in_plain_torch(group):
    packed = random_experts(8, 192, 192, group)
    x, index, prob = random_tokens(3)
    got = experts_op.experts(x, index, prob, *parts(packed), LIMIT, ALPHA)
    assert torch.equal(got, experts_torch(x, index, prob, packed, LIMIT, ALPHA))


def test_refused():
    packed, (x, index, prob) = random_experts(), random_tokens(3)
    with pytest.raises(ValueError, match=r"bits = \(5, 5\); 2, 3 and 4"):
        experts_op.experts(x, index, prob, *parts(packed), LIMIT, ALPHA, 5)
    with pytest.raises(ValueError, match=r"do not fit .* \(4, 3\) bits"):
        experts_op.experts(x, index, prob, *parts(packed), LIMIT, ALPHA, 4, 3)
    with pytest.raises(ValueError, match=r"not \(3, 192\), \(2, 4\), \(3, 4\)"):
        experts_op.experts(x, index[:2], prob, *parts(packed), LIMIT, ALPHA)
    with pytest.raises(ValueError, match=r"instruction set 'mmx': this processor and compiler have"):
        experts_op.experts_native(x, index, prob, packed, LIMIT, ALPHA, "mmx")
    wrong = [part[:, :-1].contiguous() if part is packed.w2_packed else part for part in parts(packed)]
    with pytest.raises(ValueError, match=r"shapes .*\(8, 191, 40\).* do not fit"):
        experts_op.experts(x, index, prob, *wrong, LIMIT, ALPHA)
    index[1, 2] = 8
    with pytest.raises(ValueError, match=r"expert numbers 0\.\.8 are not all in 0\.\.7"):
        experts_op.experts_native(x, index, prob, packed, LIMIT, ALPHA)
    assert experts_op.experts(x[:0], index[:0], prob[:0], *parts(packed), LIMIT, ALPHA).shape == (0, 192)


def test_the_report_says_which_kernel_and_why(monkeypatch):
    assert "float64" in experts_op.kernel_report("cpu", torch.float64)
    assert "plain torch" in experts_op.kernel_report("mps")
    if native.available():
        assert native_products.instruction_sets()[-1] in experts_op.kernel_report()
    monkeypatch.setattr(native, "available", lambda: False)
    monkeypatch.setattr(native, "problem", lambda: "no C++ compiler found")
    assert "slower than it could be: no C++ compiler found" in experts_op.kernel_report()
