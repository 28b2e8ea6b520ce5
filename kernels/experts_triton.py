"""The gpt-oss expert block from packed int4, int3 or int2 weights on a GPU, in two or three Triton kernels.

The definition is `experts.experts_torch`.

Deterministic: every sum has one order, nothing is added atomically, and the tiles follow from the sizes alone
(`choose`), never from a timing. No shape depends on data and nothing waits for the device, so that a call can be
captured in a CUDA graph. Sums are float32. With TRITON_INTERPRET=1 the kernels run on the CPU, for tests.

Paths, by number of tokens (see triton_kernels.py):
  pairs   gate_up_pairs, down_pairs: no other operation; weights hit by two tokens are read for each
  direct  gate_up_blocks, down_blocks, sum_choices; the program of an expert looks at all tokens (at most one tile)
  sorted  the same kernels after `block_table`, which sorts the pairs by expert with torch operations

The module imports without triton; `problem()` then says why it cannot run.
"""

from dataclasses import dataclass
from typing import Any

import torch

from gptoss_quantize.kernels import planes

_import_error = ""
try:
    import triton

    from gptoss_quantize.kernels import triton_kernels
except ImportError as error:
    _import_error = f"triton cannot be imported ({error}); pip install 'triton>=3.6,<4' (Linux only)"

FP_FUSION = True  # multiply-adds are fused; set, because triton's default depends on its version
MAX_TOKENS = 8192  # longer inputs run in parts of this size: scratch memory is bounded
SUM_COLUMNS = 1024
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True)
class Tile:
    """The launch of one kernel: rows of the weight per program, warps, pipeline stages."""

    rows: int
    warps: int
    stages: int = 1


@dataclass(frozen=True, slots=True)
class Config:
    """How one situation is computed. See the module's text for the paths."""

    path: str  # "pairs", "direct" or "sorted"
    gate_up: Tile
    down: Tile
    block_m: int = 0  # tokens per program (direct, sorted)
    words: int = 0  # 8-code words per step (pairs)
    wide: bool = False  # codes of 3 and 2 bits from words of 32 columns: measured faster for few tokens on an H200
    scale_first: bool = False  # multiply rounded weights, as plain bfloat16 does, not exact codes


# The fixed tables, see `choose`. All of them are compiled ahead of time for seven architectures by `make aot`.
CONFIGS = {
    "pairs": Config("pairs", Tile(2, 4), Tile(2, 4), words=128),
    "direct-16": Config("direct", Tile(64, 4, 3), Tile(64, 4, 3), block_m=16, wide=True),
    "sorted-16": Config("sorted", Tile(128, 8, 3), Tile(64, 4, 3), block_m=16, wide=True),
    "sorted-64": Config("sorted", Tile(32, 4, 3), Tile(64, 4, 3), block_m=64),
    "sorted-128": Config("sorted", Tile(32, 8, 3), Tile(64, 8, 3), block_m=128),
    "float32-direct": Config("direct", Tile(16, 4, 2), Tile(16, 4, 2), block_m=16),
    "float32-sorted": Config("sorted", Tile(16, 4, 2), Tile(16, 4, 2), block_m=16),
}
# AMD: a second stage would be held in registers, which spill
CONFIGS_AMD = {
    "pairs": Config("pairs", Tile(2, 4), Tile(2, 4), words=128),
    "direct-16": Config("direct", Tile(32, 2), Tile(32, 2), block_m=16),
    "sorted-16": Config("sorted", Tile(32, 2), Tile(32, 2), block_m=16),
    "sorted-64": Config("sorted", Tile(32, 4), Tile(32, 4), block_m=64),
    "sorted-128": Config("sorted", Tile(32, 8), Tile(32, 8), block_m=128),
    "float32-direct": Config("direct", Tile(16, 4), Tile(16, 4), block_m=16),
    "float32-sorted": Config("sorted", Tile(16, 4), Tile(16, 4), block_m=16),
}


def choose(tokens: int, choices: int, experts: int, dtype: torch.dtype) -> str:
    """Return the name of the configuration for T tokens with K of E experts each, in the dtype of x.

    | tokens               | pairs per expert, T K / E | configuration             |
    |----------------------|---------------------------|---------------------------|
    | at most 4            | any                       | pairs                     |
    | 5 to 16              | any                       | direct-16, float32-direct |
    | more than 16         | at most 16                | sorted-16                 |
    | more than 16         | 16 to 96                  | sorted-64                 |
    | more than 16         | more than 96              | sorted-128                |
    | more than 16, float32 | any                      | float32-sorted            |
    """
    if tokens <= 4:
        return "pairs"
    if tokens <= 16:
        return "float32-direct" if dtype == torch.float32 else "direct-16"
    if dtype == torch.float32:
        return "float32-sorted"
    share = tokens * choices / experts
    return "sorted-16" if share <= 16 else "sorted-64" if share <= 96 else "sorted-128"


def table() -> dict[str, Config]:
    """Return the configurations of this machine's kind of card."""
    return CONFIGS_AMD if torch.version.hip else CONFIGS


def problem() -> str:
    """Return why the kernels cannot run on this machine, or "" if they can."""
    if _import_error:
        return _import_error
    if not torch.cuda.is_available() and not interpreted():
        return "no GPU that torch can use (and TRITON_INTERPRET is not set)"
    return ""


def interpreted() -> bool:
    """Return whether the kernels were made for triton's interpreter (TRITON_INTERPRET=1 at import)."""
    return not _import_error and not isinstance(triton_kernels.sum_choices, triton.runtime.JITFunction)


def block_table(index_TK: torch.Tensor, experts: int, block_m: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (order int32 [N], blocks int32 [B, 3]): pairs sorted by expert, stably, and tiles of them.

    A row of blocks is an expert, its first position in `order` and the one after its last; at most block_m apart,
    and equal in the blocks that are not needed. B is what the worst routing needs: no shape depends on the data.
    Pairs whose index is not in 0..E-1 are in no block.
    """
    flat_N = index_TK.reshape(-1).to(torch.int32)
    pairs = flat_N.numel()
    sorted_N, order_N = torch.sort(flat_N, stable=True)
    edges = torch.arange(experts + 1, device=flat_N.device, dtype=torch.int32)
    starts = torch.searchsorted(sorted_N, edges, out_int32=True)
    blocks_E = (starts.diff() + (block_m - 1)) // block_m
    ends_E = blocks_E.cumsum(0, dtype=torch.int32)
    most = (pairs + min(pairs, experts) * (block_m - 1)) // block_m
    block = torch.arange(most, device=flat_N.device, dtype=torch.int32)
    expert = torch.searchsorted(ends_E, block, right=True, out_int32=True).clamp_(max=experts - 1)
    first = starts[expert] + (block - (ends_E - blocks_E)[expert]) * block_m
    stop = starts[1:][expert]
    first = torch.minimum(first, stop)
    return order_N.to(torch.int32), torch.stack((expert, first, torch.minimum(first + block_m, stop)), dim=1)


def experts_triton(  # noqa: PLR0913  the operator's signature: every tensor is an argument
    x_TD: torch.Tensor,
    index_TK: torch.Tensor,
    prob_TK: torch.Tensor,
    w13_packed: torch.Tensor,
    w13_scale: torch.Tensor,
    w13_bias: torch.Tensor,
    w2_packed: torch.Tensor,
    w2_scale: torch.Tensor,
    w2_bias: torch.Tensor,
    limit: float,
    alpha: float,
    bits13: int = 4,
    bits2: int = 4,
) -> torch.Tensor:
    """Return the block output [T, D] in the dtype of x, equal to `experts.experts_torch` but for rounding.

    x [T, D] bfloat16, float16 or float32; index [T, K] integers (an index outside 0..E-1 adds nothing); prob [T, K]
    floats; weights as in `experts.PackedExperts`, contiguous, with codes of 4, 3 or 2 bits. Raises RuntimeError where
    triton cannot run, ValueError for shapes and dtypes.
    """
    if why := problem():
        raise RuntimeError(f"experts_triton: {why}")
    weights = (w13_packed, w13_scale, w13_bias, w2_packed, w2_scale, w2_bias)
    _check(x_TD, index_TK, prob_TK, weights, bits := (bits13, bits2))
    if index_TK.shape[1] * MAX_TOKENS * max(w13_scale.shape[1] // 2, x_TD.shape[1]) >= 2**31:
        raise ValueError(f"experts_triton: {MAX_TOKENS} tokens of this size need more than 2^31 scratch values")
    config = table()[choose(min(x_TD.shape[0], MAX_TOKENS), index_TK.shape[1], w13_packed.shape[0], x_TD.dtype)]
    if x_TD.shape[0] <= MAX_TOKENS:
        return run(config, x_TD, index_TK, prob_TK, weights, (limit, alpha), bits)
    parts = zip(x_TD.split(MAX_TOKENS), index_TK.split(MAX_TOKENS), prob_TK.split(MAX_TOKENS), strict=True)
    return torch.cat([run(config, *part, weights, (limit, alpha), bits) for part in parts])


def run(
    config: Config,
    x_TD: torch.Tensor,
    index_TK: torch.Tensor,
    prob_TK: torch.Tensor,
    weights: tuple[torch.Tensor, ...],
    clamp: tuple[float, float],
    bits: tuple[int, int] = (4, 4),
) -> torch.Tensor:
    """Return the block output by one configuration: arguments that `_check` lets through, clamp (limit, alpha).

    `bits` are those of the codes of gate_up and down.
    """
    x_TD, index_TK, prob_TK = x_TD.contiguous(), index_TK.contiguous(), prob_TK.contiguous()
    out_TD = torch.empty_like(x_TD)
    if x_TD.shape[0] == 0:
        return out_TD
    with torch.cuda.device_of(x_TD):
        steps = _pairs if config.path == "pairs" else _blocks
        steps(config, x_TD, index_TK, prob_TK, weights, clamp, out_TD, bits)
    return out_TD


def _sizes(x_TD: torch.Tensor, weights: tuple[torch.Tensor, ...]) -> dict[str, int]:
    experts, rows, groups = weights[1].shape
    return {"E": experts, "D": x_TD.shape[1], "F": rows // 2, "GROUP": x_TD.shape[1] // groups}


def _options(tile: Tile) -> dict[str, Any]:
    return {"ROWS": tile.rows, "num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": FP_FUSION}


def _pairs(
    config: Config,
    x_TD: torch.Tensor,
    index_TK: torch.Tensor,
    prob_TK: torch.Tensor,
    weights: tuple[torch.Tensor, ...],
    clamp: tuple[float, float],
    out_TD: torch.Tensor,
    bits: tuple[int, int],
) -> None:
    """Fill out [T, D] by one program per pair and tile of rows."""
    sizes, (tokens, choices) = _sizes(x_TD, weights), index_TK.shape
    shared = {**sizes, "K": choices, "BLOCK_W": config.words}
    act_NF = x_TD.new_empty(tokens * choices, sizes["F"], dtype=torch.float32)
    grid = (tokens * choices, triton.cdiv(sizes["F"], config.gate_up.rows))
    triton_kernels.gate_up_pairs[grid](
        x_TD, index_TK, *weights[:3], act_NF, *clamp, **shared, BITS=bits[0], **_options(config.gate_up)
    )
    grid = (tokens, triton.cdiv(sizes["D"], config.down.rows))
    triton_kernels.down_pairs[grid](
        act_NF, index_TK, prob_TK, *weights[3:], out_TD, **shared, BITS=bits[1], **_options(config.down),
        BLOCK_K=triton.next_power_of_2(choices),
    )  # fmt: skip


def _blocks(
    config: Config,
    x_TD: torch.Tensor,
    index_TK: torch.Tensor,
    prob_TK: torch.Tensor,
    weights: tuple[torch.Tensor, ...],
    clamp: tuple[float, float],
    out_TD: torch.Tensor,
    bits: tuple[int, int],
) -> None:
    """Fill out [T, D] by one program per tile of an expert's pairs and tile of rows."""
    sizes, (tokens, choices) = _sizes(x_TD, weights), index_TK.shape
    experts = sizes.pop("E")
    if config.path == "sorted":
        order, blocks = block_table(index_TK, experts, config.block_m)
        programs = blocks.shape[0]
    else:
        if tokens > config.block_m:
            raise ValueError(f"a direct tile holds {config.block_m} tokens, not {tokens}")
        order = blocks = index_TK  # not read
        programs = experts
    compute = triton_kernels.TYPES[torch.float32 if interpreted() else x_TD.dtype]
    shared = {
        **sizes,
        "K": choices,
        "COMPUTE": compute,
        "SORTED": config.path == "sorted",
        # float16 has no room for the largest scales
        "SCALE_FIRST": config.scale_first and x_TD.dtype == torch.bfloat16,
        "WIDE": config.wide,
        "BLOCK_M": config.block_m,
    }
    routed = (index_TK, order, blocks, tokens)
    act_NF = x_TD.new_empty(tokens * choices, sizes["F"])
    y_ND = x_TD.new_empty(tokens * choices, sizes["D"], dtype=torch.float32)
    grid = (programs, triton.cdiv(sizes["F"], config.gate_up.rows))
    triton_kernels.gate_up_blocks[grid](
        x_TD, *routed, *weights[:3], act_NF, *clamp, **shared, BITS=bits[0], **_options(config.gate_up)
    )
    grid = (programs, triton.cdiv(sizes["D"], config.down.rows))
    triton_kernels.down_blocks[grid](
        act_NF, *routed, *weights[3:], y_ND, **shared, BITS=bits[1], **_options(config.down)
    )
    size = {"D": sizes["D"], "E": experts, "K": choices, "COLUMNS": SUM_COLUMNS}
    triton_kernels.sum_choices[(tokens, triton.cdiv(sizes["D"], SUM_COLUMNS))](
        y_ND, index_TK, prob_TK, out_TD, **size, num_warps=4, enable_fp_fusion=FP_FUSION
    )


def _check(
    x_TD: torch.Tensor,
    index_TK: torch.Tensor,
    prob_TK: torch.Tensor,
    weights: tuple[torch.Tensor, ...],
    bits: tuple[int, int],
) -> None:
    """Raise ValueError with what was expected where a shape, dtype, device or memory order is not as documented."""
    if x_TD.dtype not in FLOATS:
        raise ValueError(f"experts_triton: x is {x_TD.dtype}, expected bfloat16, float16 or float32")
    tokens, hidden = x_TD.shape
    if index_TK.shape != prob_TK.shape or index_TK.dim() != 2 or index_TK.shape[0] != tokens:
        raise ValueError(
            f"experts_triton: index is {tuple(index_TK.shape)}, prob {tuple(prob_TK.shape)}, not [{tokens}, K]"
        )
    if index_TK.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"experts_triton: index is {index_TK.dtype}, expected int32 or int64")
    if not set(bits) <= set(planes.BITS):
        raise ValueError(f"experts_triton: bits {bits}, expected 4, 3 or 2 for both projections")
    w13_packed, w13_scale = weights[:2]
    experts, rows = w13_packed.shape[:2]
    group = hidden // w13_scale.shape[-1]
    if group not in (32, 64) or hidden % group or rows % 2 or rows // 2 % group:
        raise ValueError(
            f"experts_triton: hidden {hidden}, {w13_scale.shape[-1]} scales a row, {rows} gate and up rows: expected "
            "groups of 32 or 64 that divide both sizes; other groups run by experts_torch"
        )
    inner = rows // 2
    names = ("w13_packed", "w13_scale", "w13_bias", "w2_packed", "w2_scale", "w2_bias")
    shapes: tuple[tuple[int, ...], ...] = ((rows, planes.words(hidden, bits[0])), (rows, hidden // group), (rows,))
    shapes += ((hidden, planes.words(inner, bits[1])), (hidden, inner // group), (hidden,))
    for name, tensor, shape in zip(names, weights, shapes, strict=True):
        if tensor.shape != (experts, *shape) or not tensor.is_contiguous() or tensor.device != x_TD.device:
            raise ValueError(
                f"experts_triton: {name} is {tuple(tensor.shape)} on {tensor.device} with strides {tensor.stride()}, "
                f"expected contiguous {(experts, *shape)} on {x_TD.device}"
            )
        if (tensor.dtype == torch.int32) != name.endswith("packed") or tensor.dtype == torch.float64:
            raise ValueError(
                f"experts_triton: {name} is {tensor.dtype}, expected int32 words or 16- or 32-bit floats"
            )
