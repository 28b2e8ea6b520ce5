"""The Triton kernels of `experts_triton`: products of packed codes with float32 sums. Importing this needs triton.

Two ways to multiply:
  pairs   one program per (token, choice) and tile of output rows, on the plain cores in float32: for a few tokens;
  blocks  one program per (tile of tokens of one expert, tile of output rows), on the matrix cores (`tl.dot`).
A step along the inner dimension is one quantization group, so that the codes, exact in every dtype, are
multiplied as they are and the group's scale is applied to its float32 sum. Sizes are multiples of the group: no mask
is needed along the inner dimension. Rows beyond the end are clamped to the last one and not stored. Offsets inside
an expert, x or scratch are 32-bit: `experts_triton` sees to it that they fit.

COMPUTE is the dtype of the operands of `tl.dot`. It must be float32 in the interpreter, whose bfloat16 dot
multiplies raw bits.

BITS of a code are 4, 3 or 2. Eight columns are a step: of 4 bits a word of the file, of planes (`kernels.planes`) a
byte of each plane, put into one word as `_words` says.

Shapes: T tokens, K choices per token, N = T K pairs, D hidden, F intermediate, E experts, W = 8-code words of a row.
"""

# ruff: noqa: PLR0913  a kernel has an argument for each tensor and size

import torch
import triton
import triton.language as tl

TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def _words(at, word, COLUMNS: tl.constexpr, BITS: tl.constexpr, mask=None):
    """Return int32 words [..., W] with the codes of columns 8w..8w+7, for the starts of rows at [..., 1] and w [W].

    4 bits: as stored. Planes: bits 0-7 from plane 0, 8-15 from plane 1, 16-23 from plane 2.
    """
    other = None if mask is None else 0
    if BITS == 4:
        return tl.load(at + word, mask=mask, other=other)
    at += word // 4
    shift = word % 4 * 8
    found = (tl.load(at, mask=mask, other=other) >> shift) & 255
    found |= ((tl.load(at + COLUMNS // 32, mask=mask, other=other) >> shift) & 255) << 8
    if BITS == 3:
        found |= ((tl.load(at + COLUMNS // 16, mask=mask, other=other) >> shift) & 255) << 16
    return found


@triton.jit
def _code(word, column, BITS: tl.constexpr):
    """Return the float32 codes of columns 0..7 of int32 words of `_words`; `word` and `column` broadcast."""
    if BITS == 4:
        code = (word >> (column * 4)) & 15
    else:
        # within a plane's byte columns 0, 1, 4 and 5 (plane 1: 2, 3, 6 and 7) have two bits each
        code = (word >> (column % 2 * 2 + column // 4 * 4 + column // 2 % 2 * 8)) & 3
        if BITS == 3:
            code |= ((word >> (column + 16)) & 1) << 2
    return _signed(code, BITS)


@triton.jit
def _signed(code, BITS: tl.constexpr):
    """Return the float32 of stored codes, without a sign: ORed into the mantissa of 2^23, they are 2^23 + code."""
    offset: tl.constexpr = 8388608.0 + (1 << (BITS - 1))
    return (code | 0x4B000000).to(tl.float32, bitcast=True) - offset


@triton.jit
def _group_codes(
    at, group, COLUMNS: tl.constexpr, R: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, WIDE: tl.constexpr
):
    """Return the float32 codes [R, GROUP] of one group of columns, for the starts of rows at [R, 1].

    Codes of planes are taken from words of 32 columns (WIDE), which loads less, or by `_words`, which computes less.
    """
    if BITS == 4 or not WIDE:
        words = _words(at, (group * (GROUP // 8) + tl.arange(0, GROUP // 8))[None, :], COLUMNS, BITS)
        code = _code(words[:, :, None], tl.arange(0, 8)[None, None, :], BITS)
    else:
        at += (group * (GROUP // 32) + tl.arange(0, GROUP // 32))[None, :]
        column = tl.arange(0, 32)[None, None, :]
        low, high = tl.load(at)[:, :, None], tl.load(at + COLUMNS // 32)[:, :, None]
        stored = (tl.where(column // 2 % 2 == 0, low, high) >> (column // 4 * 4 + column % 2 * 2)) & 3
        if BITS == 3:
            stored |= ((tl.load(at + COLUMNS // 16)[:, :, None] >> column) & 1) << 2
        code = _signed(stored, BITS)
    return tl.reshape(code, (R, GROUP))


@triton.jit
def _activate(gate, up, limit, alpha):
    """Return the clamped SwiGLU of pre-activations; NaN stays NaN."""
    gate = tl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
    up = tl.clamp(up, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
    return (up + 1.0) * gate / (1.0 + tl.exp(-alpha * gate))


@triton.jit
def _by_column(x):
    """Return the 8 tensors [A, W] of columns 0..7 of words, for values [A, 8 W]."""
    x = tl.reshape(x, (x.shape[0], x.shape[1] // 8, 2, 2, 2))
    even, odd = tl.split(x)
    even_low, even_high = tl.split(even)
    odd_low, odd_high = tl.split(odd)
    x0, x4 = tl.split(even_low)
    x2, x6 = tl.split(even_high)
    x1, x5 = tl.split(odd_low)
    x3, x7 = tl.split(odd_high)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def _gemv(acc, at, scale_at, x, word, inside, W: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr):
    """Return acc [R, A, BLOCK_W] plus the products of rows at [R, A, 1] with x (`_by_column`) at the words given."""
    packed = _words(at, word, W * 8, BITS, inside)
    scale = tl.load(scale_at + word // (GROUP // 8), mask=inside, other=0.0).to(tl.float32)
    part = _code(packed, 0, BITS) * x[0][None, :, :]
    for column in tl.static_range(1, 8):
        part += _code(packed, column, BITS) * x[column][None, :, :]
    return acc + part * scale


@triton.jit
def gate_up_pairs(
    x_ptr,  # [T, D]
    index_ptr,  # [T, K]
    word_ptr,  # int32 [E, 2F, D BITS/32]
    scale_ptr,  # [E, 2F, D/GROUP]
    bias_ptr,  # [E, 2F]
    act_ptr,  # out: float32 [N, F]
    limit,
    alpha,
    D: tl.constexpr,
    F: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Write the activations of one pair and ROWS features; grid (N, cdiv(F, ROWS))."""
    pair = tl.program_id(0).to(tl.int64)
    expert = tl.load(index_ptr + pair).to(tl.int64)
    if (expert < 0) | (expert >= E):
        return
    feature = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row = 2 * tl.minimum(feature, F - 1)
    at = word_ptr + expert * (2 * F * D * BITS // 32) + (row * (D * BITS // 32))[:, None, None]
    scale_at = scale_ptr + expert * (2 * F * D // GROUP) + (row * (D // GROUP))[:, None, None]
    bias_ptr += expert * (2 * F)
    gate = tl.zeros((ROWS, 1, BLOCK_W), dtype=tl.float32)
    up = tl.zeros((ROWS, 1, BLOCK_W), dtype=tl.float32)
    W: tl.constexpr = D // 8
    for start in tl.static_range(0, W, BLOCK_W):
        word = (start + tl.arange(0, BLOCK_W))[None, None, :]
        column = (start * 8 + tl.arange(0, BLOCK_W * 8))[None, :]
        x = _by_column(tl.load(x_ptr + pair // K * D + column, mask=column < D, other=0.0).to(tl.float32))
        gate = _gemv(gate, at, scale_at, x, word, word < W, W, GROUP, BITS)
        up = _gemv(up, at + D * BITS // 32, scale_at + D // GROUP, x, word, word < W, W, GROUP, BITS)
    bias_at = (bias_ptr + row)[:, None]
    gate_R1 = tl.sum(gate, axis=2) + tl.load(bias_at).to(tl.float32)
    up_R1 = tl.sum(up, axis=2) + tl.load(bias_at + 1).to(tl.float32)
    out_at = (act_ptr + pair * F + feature)[:, None]
    tl.store(out_at, _activate(gate_R1, up_R1, limit, alpha), mask=(feature < F)[:, None])


@triton.jit
def down_pairs(
    act_ptr,  # float32 [N, F]
    index_ptr,  # [T, K]
    prob_ptr,  # [T, K]
    word_ptr,  # int32 [E, D, F BITS/32]
    scale_ptr,  # [E, D, F/GROUP]
    bias_ptr,  # [E, D]
    out_ptr,  # out: [T, D]
    D: tl.constexpr,
    F: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write ROWS columns of one token, all its choices at once; grid (T, cdiv(D, ROWS)). BLOCK_K: K or more."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(column, D - 1)
    choice = tl.arange(0, BLOCK_K)
    pair = token * K + choice
    expert = tl.load(index_ptr + pair, mask=choice < K, other=-1).to(tl.int64)
    valid = (expert >= 0) & (expert < E)
    expert = tl.where(valid, expert, 0)
    at = word_ptr + (expert * (D * F * BITS // 32))[None, :, None] + (row * (F * BITS // 32))[:, None, None]
    scale_at = scale_ptr + (expert * (D * F // GROUP))[None, :, None] + (row * (F // GROUP))[:, None, None]
    acc = tl.zeros((ROWS, BLOCK_K, BLOCK_W), dtype=tl.float32)
    W: tl.constexpr = F // 8
    for start in range(0, W, BLOCK_W):
        word = (start + tl.arange(0, BLOCK_W))[None, None, :]
        feature = (start * 8 + tl.arange(0, BLOCK_W * 8))[None, :]
        inside = valid[:, None] & (feature < F)
        act = _by_column(tl.load(act_ptr + (pair * F)[:, None] + feature, mask=inside, other=0.0))
        acc = _gemv(acc, at, scale_at, act, word, valid[None, :, None] & (word < W), W, GROUP, BITS)
    bias = tl.load(bias_ptr + (expert * D)[None, :] + row[:, None]).to(tl.float32)
    prob = tl.load(prob_ptr + pair, mask=valid, other=0.0).to(tl.float32)
    # a choice that is none adds nothing, whatever its bias and weight are
    part = tl.where(valid[None, :], (tl.sum(acc, axis=2) + bias) * prob[None, :], 0.0)
    tl.store(out_ptr + token * D + column, tl.sum(part, axis=1).to(out_ptr.dtype.element_ty), mask=column < D)


@triton.jit
def _multiply(
    acc,
    x,
    word_ptr,
    row,
    group,
    scale_ptr,
    COLUMNS: tl.constexpr,
    R: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    COMPUTE: tl.constexpr,
    SCALE_FIRST: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Return acc [M, R] plus x [M, GROUP] times one group of R rows."""
    at = word_ptr + (row * (COLUMNS * BITS // 32))[:, None]
    codes = _group_codes(at, group, COLUMNS, R, GROUP, BITS, WIDE)
    scale = tl.load(scale_ptr).to(tl.float32)
    if SCALE_FIRST:
        weight = (codes * scale[:, None]).to(COMPUTE)
        return tl.dot(x, tl.trans(weight), acc, input_precision="ieee")
    return acc + tl.dot(x, tl.trans(codes.to(COMPUTE)), input_precision="ieee") * scale[None, :]


@triton.jit
def _rows(index_ptr, order_ptr, block_ptr, tokens, BLOCK_M: tl.constexpr, K: tl.constexpr, SORTED: tl.constexpr):
    """Return (expert, pair [BLOCK_M], whether it is one of the expert's [BLOCK_M]) of this program.

    Sorted: from the table of `block_table`. Else the program of expert e looks at all (at most BLOCK_M) tokens.
    """
    block = tl.program_id(0)
    lane = tl.arange(0, BLOCK_M)
    if SORTED:
        expert = tl.load(block_ptr + block * 3).to(tl.int64)
        first = tl.load(block_ptr + block * 3 + 1)
        last = tl.load(block_ptr + block * 3 + 2)
        mine = first + lane < last
        pair = tl.load(order_ptr + first + lane, mask=mine, other=0)
        return expert, pair, mine
    expert = block.to(tl.int64)
    pair = tl.minimum(lane, tokens - 1) * K
    mine = lane < 0
    slot = tl.zeros((BLOCK_M,), dtype=tl.int32)
    for choice in tl.static_range(K):
        hit = (tl.load(index_ptr + pair + choice).to(tl.int64) == expert) & (lane < tokens)
        slot = tl.where(hit & (mine == 0), choice, slot)
        mine = mine | hit
    return expert, pair + slot, mine


@triton.jit
def _store(
    ptr, value, pair, mine, column, WIDTH: tl.constexpr, index_ptr, expert, K: tl.constexpr, SORTED: tl.constexpr
):
    """Store value [BLOCK_M, R] in the rows of its pairs: without sorting, of every choice of this expert."""
    value = value.to(ptr.dtype.element_ty)
    inside = (column < WIDTH)[None, :]
    if SORTED:
        tl.store(ptr + pair[:, None] * WIDTH + column[None, :], value, mask=mine[:, None] & inside)
    else:
        for choice in tl.static_range(K):
            other = pair // K * K + choice
            hit = mine & (tl.load(index_ptr + other).to(tl.int64) == expert)
            tl.store(ptr + other[:, None] * WIDTH + column[None, :], value, mask=hit[:, None] & inside)


@triton.jit(do_not_specialize=["tokens"])
def gate_up_blocks(
    x_ptr,  # [T, D]
    index_ptr,  # [T, K]
    order_ptr,  # int32 [N]: pairs by expert (sorted only)
    block_ptr,  # int32 [blocks, 3]: expert, first and last + 1 in order (sorted only)
    tokens,
    word_ptr,  # int32 [E, 2F, D BITS/32]
    scale_ptr,  # [E, 2F, D/GROUP]
    bias_ptr,  # [E, 2F]
    act_ptr,  # out: [N, F]
    limit,
    alpha,
    D: tl.constexpr,
    F: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    COMPUTE: tl.constexpr,
    SORTED: tl.constexpr,
    SCALE_FIRST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Write the activations of one expert's BLOCK_M pairs and ROWS features; grid (blocks or E, cdiv(F, ROWS))."""
    expert, pair, mine = _rows(index_ptr, order_ptr, block_ptr, tokens, BLOCK_M, K, SORTED)
    if tl.sum(mine.to(tl.int32), axis=0) == 0:
        return
    feature = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row = 2 * tl.minimum(feature, F - 1)
    x_at = (pair // K * D)[:, None] + tl.arange(0, GROUP)[None, :]
    scale_at = row * (D // GROUP)
    word_ptr += expert * (2 * F * D * BITS // 32)
    scale_ptr += expert * (2 * F * D // GROUP)
    bias_ptr += expert * (2 * F)
    gate = tl.zeros((BLOCK_M, ROWS), dtype=tl.float32)
    up = tl.zeros((BLOCK_M, ROWS), dtype=tl.float32)
    for group in range(D // GROUP):
        x = tl.load(x_ptr + group * GROUP + x_at).to(COMPUTE)
        scale = scale_ptr + group + scale_at
        gate = _multiply(gate, x, word_ptr, row, group, scale, D, ROWS, GROUP, BITS, COMPUTE, SCALE_FIRST, WIDE)
        scale += D // GROUP
        up = _multiply(up, x, word_ptr, row + 1, group, scale, D, ROWS, GROUP, BITS, COMPUTE, SCALE_FIRST, WIDE)
    gate += tl.load(bias_ptr + row).to(tl.float32)[None, :]
    up += tl.load(bias_ptr + row + 1).to(tl.float32)[None, :]
    _store(act_ptr, _activate(gate, up, limit, alpha), pair, mine, feature, F, index_ptr, expert, K, SORTED)


@triton.jit(do_not_specialize=["tokens"])
def down_blocks(
    act_ptr,  # [N, F]
    index_ptr,  # [T, K]
    order_ptr,  # int32 [N] (sorted only)
    block_ptr,  # int32 [blocks, 3] (sorted only)
    tokens,
    word_ptr,  # int32 [E, D, F BITS/32]
    scale_ptr,  # [E, D, F/GROUP]
    bias_ptr,  # [E, D]
    y_ptr,  # out: float32 [N, D]
    D: tl.constexpr,
    F: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    COMPUTE: tl.constexpr,
    SORTED: tl.constexpr,
    SCALE_FIRST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Write what one expert gives to BLOCK_M pairs, ROWS columns; grid (blocks or E, cdiv(D, ROWS))."""
    expert, pair, mine = _rows(index_ptr, order_ptr, block_ptr, tokens, BLOCK_M, K, SORTED)
    if tl.sum(mine.to(tl.int32), axis=0) == 0:
        return
    column = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(column, D - 1)
    act_at = (pair * F)[:, None] + tl.arange(0, GROUP)[None, :]
    scale_at = row * (F // GROUP)
    word_ptr += expert * (D * F * BITS // 32)
    scale_ptr += expert * (D * F // GROUP)
    bias_ptr += expert * D
    acc = tl.zeros((BLOCK_M, ROWS), dtype=tl.float32)
    for group in range(F // GROUP):
        act = tl.load(act_ptr + group * GROUP + act_at).to(COMPUTE)
        scale = scale_ptr + group + scale_at
        acc = _multiply(acc, act, word_ptr, row, group, scale, F, ROWS, GROUP, BITS, COMPUTE, SCALE_FIRST, WIDE)
    acc += tl.load(bias_ptr + row).to(tl.float32)[None, :]
    _store(y_ptr, acc, pair, mine, column, D, index_ptr, expert, K, SORTED)


@triton.jit
def sum_choices(
    y_ptr,  # float32 [N, D]
    index_ptr,  # [T, K]
    prob_ptr,  # [T, K]
    out_ptr,  # out: [T, D]
    D: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write COLUMNS columns of one token: its choices, weighted, added in their order; grid (T, cdiv(D, COLUMNS))."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for choice in tl.static_range(K):
        pair = token * K + choice
        expert = tl.load(index_ptr + pair).to(tl.int64)
        if (expert >= 0) & (expert < E):
            y = tl.load(y_ptr + pair * D + column, mask=column < D, other=0.0)
            total += y * tl.load(prob_ptr + pair).to(tl.float32)
    tl.store(out_ptr + token * D + column, total.to(out_ptr.dtype.element_ty), mask=column < D)
