"""How fast packed int4 experts run on this CPU, beside other kernels and beside the memory's own speed.

Usage: decode.py [--threads N] [--rounds N] [--experts E] [--prefill TOKENS] [--busy] [--ort]

One gpt-oss-20b layer: hidden and intermediate size 2880, 4 of 32 experts for every token, groups of 64. Rows are
timed in turn, round after round, in one process; the best of all rounds counts. The read bandwidth is that of a sum
over 512 MiB with the same threads in the same rounds; a kernel's limit is the bytes of its weights that a token needs
over that. Different tokens choose different experts, so that no weights come from a cache. Errors are of the block's
output against float64, relative, in the norm.

--busy counts the time of the calling thread alone, for one thread on a machine that others use: ratios only.
--ort adds ONNX Runtime's QMoE (packages onnxruntime and onnx; a private virtual environment will do).
"""

import argparse
import itertools
import time
from collections.abc import Callable

import torch
from torch.nn import functional

from gptoss_quantize.kernels import experts_op, int4, int8, linear_op, native_products
from gptoss_quantize.kernels.experts import PackedExperts, activated, by_halves, experts_torch

HIDDEN = WIDTH = 2880
CHOICES, GROUP, LIMIT, ALPHA = 4, 64, 7.0, 1.702
Block = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def make(experts: int) -> PackedExperts:
    """Return random experts of the layer's shape."""
    generator = torch.Generator().manual_seed(0)

    def words(*shape: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, generator=generator)

    def normal(size: float, *shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * size).bfloat16()

    return PackedExperts(
        words(experts, 2 * WIDTH, HIDDEN // 8),
        normal(0.01, experts, 2 * WIDTH, HIDDEN // GROUP),
        normal(1.0, experts, 2 * WIDTH),
        words(experts, HIDDEN, WIDTH // 8),
        normal(0.005, experts, HIDDEN, WIDTH // GROUP),
        normal(1.0, experts, HIDDEN),
    )


def tokens(count: int, experts: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return x [T, D] bfloat16, index [T, K], prob [T, K]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, HIDDEN, generator=generator).bfloat16()
    index = torch.stack([torch.randperm(experts, generator=generator)[:CHOICES] for _ in range(count)])
    return x, index, torch.softmax(torch.randn(count, CHOICES, generator=generator), -1)


def dense_block(linear13: Callable, linear2: Callable) -> Block:
    """Return the block from two products of (tokens, expert), as torch programs write it."""

    def block(x: torch.Tensor, index: torch.Tensor, prob: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        for expert in torch.unique(index).tolist():
            token, slot = torch.where(index == expert)
            y = linear2(activated(linear13(x[token], expert), LIMIT, ALPHA), expert)
            out.index_add_(0, token, (y * prob[token, slot, None]).to(x.dtype))
        return out

    return block


def bf16_block(packed: PackedExperts, experts: int) -> Block:
    """Return the block of torch's bfloat16 `linear` on weights that were unpacked before (1.6 GB for 32 experts)."""
    of = [packed.of(e) for e in range(experts)]
    w13 = [by_halves(int4.weights(o.w13_packed, o.w13_scale, torch.bfloat16)) for o in of]
    w2 = [int4.weights(o.w2_packed, o.w2_scale, torch.bfloat16) for o in of]
    return dense_block(
        lambda x, e: functional.linear(x, w13[e], by_halves(of[e].w13_bias)),
        lambda a, e: functional.linear(a, w2[e], of[e].w2_bias),
    )


def int4pack_block(packed: PackedExperts, experts: int) -> Block:
    """Return the block of torch's `_weight_int4pack_mm_for_cpu`: weights packed for it, biases added after."""

    def pack(words: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codes = (int4.unpack(words).to(torch.int32) + 8).contiguous()
        # [groups, rows, 2]: scale, and what code 8 stands for
        both = torch.stack((scale.T, torch.zeros_like(scale.T)), -1).contiguous()
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1), both

    of = [packed.of(e) for e in range(experts)]
    w13 = [pack(by_halves(o.w13_packed), by_halves(o.w13_scale)) for o in of]
    w2 = [pack(o.w2_packed, o.w2_scale) for o in of]
    product = torch.ops.aten._weight_int4pack_mm_for_cpu
    return dense_block(
        lambda x, e: product(x, w13[e][0], GROUP, w13[e][1]) + by_halves(of[e].w13_bias),
        lambda a, e: product(a, w2[e][0], GROUP, w2[e][1]) + of[e].w2_bias,
    )


def qmoe_block(packed: PackedExperts, experts: int, threads: int) -> Block:
    """Return the block of ONNX Runtime's QMoE with float32 activations. Its routing is its own: from the logits."""
    import numpy as np  # noqa: PLC0415
    import onnxruntime  # noqa: PLC0415
    from onnx import TensorProto, helper, numpy_helper  # noqa: PLC0415

    weights = {
        "w13": packed.w13_packed.view(torch.uint8).numpy(),
        "s13": packed.w13_scale.float().numpy(),
        "b13": packed.w13_bias.float().numpy(),
        "w2": packed.w2_packed.view(torch.uint8).numpy(),
        "s2": packed.w2_scale.float().numpy(),
        "b2": packed.w2_bias.float().numpy(),
    }
    inputs = ["x", "logits", *weights]
    settings = {"k": CHOICES, "expert_weight_bits": 4, "block_size": GROUP, "normalize_routing_weights": 1}
    swiglu = {"activation_type": "swiglu", "activation_alpha": ALPHA, "activation_beta": 1.0}
    more = {"swiglu_fusion": 1, "swiglu_limit": LIMIT}
    node = helper.make_node("QMoE", inputs, ["y"], domain="com.microsoft", **settings, **swiglu, **more)
    shapes = [("x", [None, HIDDEN]), ("logits", [None, experts])]
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, HIDDEN])],
        [numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in weights.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def block(x: torch.Tensor, index: torch.Tensor, prob: torch.Tensor) -> torch.Tensor:
        logits = torch.full((len(x), experts), -1e9).scatter_(1, index, prob.log())
        (y,) = session.run(None, {"x": x.float().numpy(), "logits": logits.numpy()})
        return torch.from_numpy(y)

    return block


def blocks(packed: PackedExperts, options: argparse.Namespace) -> dict[str, tuple[Block, float]]:
    """Return name -> (block, bits per weight that it reads)."""
    stored = 4 + 16 / GROUP
    ours = {
        f"ours, {isa}": ((lambda *r, isa=isa: experts_op.experts_native(*r, packed, LIMIT, ALPHA, isa)), stored)
        for isa in native_products.instruction_sets()
    }
    out: dict[str, tuple[Block, float]] = {
        **ours,
        "definition (unpacks an expert)": ((lambda *r: experts_torch(*r, packed, LIMIT, ALPHA)), stored),
        "torch bf16 linear": (bf16_block(packed, options.experts), 16),
        "torch int4pack_mm": (int4pack_block(packed, options.experts), stored + 16 / GROUP),
    }
    if options.ort:
        out["ONNX Runtime QMoE, float32"] = (qmoe_block(packed, options.experts, options.threads), 4 + 32 / GROUP)
    return out


def interleaved(calls: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Return the best seconds of each call, one after the other, round after round."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, call in calls.items():
            start = clock()
            call()
            best[name] = min(best[name], clock() - start)
    return best


def linears(rows: int) -> dict[str, tuple[Callable[[], object], float]]:
    """Return name -> (call, bytes) of a 2880 x 20000 linear layer."""
    weight = torch.randn(20000, HIDDEN).bfloat16()
    codes, scale = int8.quantize(weight)
    x = torch.randn(rows, HIDDEN).bfloat16()
    return {
        f"bf16 linear, torch, {rows} rows": ((lambda: functional.linear(x, weight)), weight.nbytes),
        f"bf16 linear, ours, {rows} rows": ((lambda: linear_op.bf16_linear(x, weight, None)), weight.nbytes),
        f"int8 linear, unpacked, {rows} rows": (
            (lambda: linear_op.int8_torch(x, codes, scale, None)),
            codes.nbytes + scale.nbytes,
        ),
        f"int8 linear, ours, {rows} rows": (
            (lambda: linear_op.int8_linear(x, codes, scale, None)),
            codes.nbytes + scale.nbytes,
        ),
    }


@torch.no_grad()
def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--prefill", type=int, default=256, help="tokens of the prefill row")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--ort", action="store_true", help="with ONNX Runtime")
    parser.add_argument("--busy", action="store_true", help="time of the calling thread, not of the clock")
    options = parser.parse_args()
    if options.busy and options.threads != 1:
        parser.error("--busy needs --threads 1")
    clock = time.thread_time if options.busy else time.perf_counter
    torch.set_num_threads(options.threads)
    print(f"{options.threads} threads; {experts_op.kernel_report()}")
    packed = make(options.experts)
    rows = blocks(packed, options)
    one = itertools.cycle([tokens(1, options.experts, seed) for seed in range(8)])
    many = tokens(options.prefill, options.experts, 9)
    buffer = torch.ones(2**27)

    few = tokens(2, options.experts, 3)
    want = experts_torch(few[0].double(), few[1], few[2].double(), packed, LIMIT, ALPHA)
    errors = {name: float((block(*few).double() - want).norm() / want.norm()) for name, (block, _) in rows.items()}
    decode = {name: (lambda block=block: block(*next(one))) for name, (block, _) in rows.items()}
    dense = linears(1) | linears(8)
    times = interleaved(
        {"sum": buffer.sum} | decode | {name: call for name, (call, _) in dense.items()}, options.rounds, clock
    )
    prefill = interleaved({name: (lambda block=block: block(*many)) for name, (block, _) in rows.items()}, 2, clock)

    bandwidth = buffer.nbytes / times["sum"]
    print(f"read bandwidth {bandwidth / 1e9:.1f} GB/s")
    head = f"prefill {options.prefill}, tokens/s"
    print(f"{'one layer, 4 experts a token':32} {'ms/token':>9} {'of limit':>9} {head:>24} {'error':>9}")
    for name, (_, bits) in rows.items():
        limit = CHOICES * 3 * HIDDEN * WIDTH * bits / 8 / bandwidth
        speed = options.prefill / prefill[name]
        share = f"{limit / times[name]:.0%}"
        print(f"{name:32} {times[name] * 1e3:9.2f} {share:>9} {speed:24.0f} {errors[name]:9.1e}")
    for name, (_, nbytes) in dense.items():
        share = f"{nbytes / bandwidth / times[name]:.0%}"
        print(f"{name:32} {times[name] * 1e3:9.2f} {share:>9}")


if __name__ == "__main__":
    main()
