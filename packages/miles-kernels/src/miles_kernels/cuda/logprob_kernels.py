"""Log-probability and entropy over a vocabulary without [tokens, vocab] in memory; sums that do not depend on any order.

For a row with logits z (float32) and c = log2(e) / temperature, each block of `BLOCK` vocabulary columns (at most 256) gives
    r = ceil(c max z)                an integer, so that scaling by 2^-r is exact
    p = 2^(c z - r) in (0, 1]
    sum p and sum p log2(p), of terms rounded to the grid 2^-23: integers, equal in any order, layout or tile
and the blocks are combined in 64-bit integers. A fused product and a pass over stored logits then agree bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from miles_kernels.cuda.gemm_kernels import tile_of

GRID = tl.constexpr(8388608.0)  # 2^23
LOWEST = tl.constexpr(-1.0e30)
MAX_SHIFT = tl.constexpr(60)


@triton.jit
def on_grid(x):
    """round(x 2^23) as int32 for 0 <= x <= 1: adding 2^23 leaves the integer in the mantissa."""
    return tl.fma(x, GRID, GRID).to(tl.int32, bitcast=True) - 0x4B000000


@triton.jit
def exponent_of(top, c):
    """r of a block whose largest logit is `top`, an integer as float32."""
    return tl.ceil(tl.maximum(top, LOWEST) * c)


@triton.jit
def block_stats(z, c, ENTROPY: tl.constexpr):
    """(r, sum p, -sum p log2 p) of z[rows, BLOCK]: float32 integer-valued, then uint32 in int32."""
    r = exponent_of(tl.max(z, 1), c)
    t = tl.fma(z, tl.broadcast_to(c[:, None], z.shape), tl.broadcast_to(-r[:, None], z.shape))
    p = tl.exp2(t)
    total = tl.sum(on_grid(p), 1)
    if ENTROPY:
        weighted = tl.sum(on_grid(p * -tl.maximum(t, -200.0)), 1)
    else:
        weighted = total
    return r, total, weighted


@triton.jit
def store_stats(r_out, total_out, weighted_out, r, total, weighted, rows, block, M, num_blocks, ENTROPY: tl.constexpr):
    where = block.to(tl.int64) * M + rows
    keep = (rows < M) & (block < num_blocks)
    tl.store(r_out + where, r.to(tl.int32), mask=keep)
    tl.store(total_out + where, total, mask=keep)
    if ENTROPY:
        tl.store(weighted_out + where, weighted, mask=keep)


@triton.jit(do_not_specialize=["M"])
def stats_from_product(
    a,
    b,
    bias,
    inverse_temperature,
    r_out,
    total_out,
    weighted_out,
    M,
    V,
    K,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BLOCK: tl.constexpr,
    PAIR: tl.constexpr,
    GROUP_M: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RAGGED: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    """Block statistics of a[M, K] b[V, K]^T (descriptors), one vocabulary block per tile (two if `PAIR`); persistent grid.

    `RAGGED`: the tile's columns do not divide V. No branch may read the accumulator here: ptxas would serialise the products.
    """
    COLS: tl.constexpr = 2 * BLOCK if PAIR else BLOCK
    num_m = tl.cdiv(M, BM)
    num_n = tl.cdiv(V, COLS)
    steps = tl.cdiv(K, BK)
    num_blocks = tl.cdiv(V, BLOCK)
    for tile in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0), flatten=True):
        pid_m, pid_n = tile_of(tile, num_m, num_n, GROUP_M)
        row = pid_m * BM
        col = pid_n * COLS
        acc = tl.zeros((BM, COLS), dtype=tl.float32)
        for k in range(steps):
            x = a.load([row, k * BK])
            w = b.load([col, k * BK]).T
            acc = tl.dot(x, w, acc)
        rows = row + tl.arange(0, BM)
        cols = col + tl.arange(0, COLS)
        c = tl.load(inverse_temperature + rows, mask=rows < M, other=1.0) * 1.4426950408889634
        if HAS_BIAS:
            acc += tl.load(bias + cols, mask=cols < V, other=0.0).to(tl.float32)[None, :]
        if RAGGED:
            acc = tl.where((cols < V)[None, :], acc, float("-inf"))
        if PAIR:
            left, right = tl.split(tl.permute(tl.reshape(acc, (BM, 2, BLOCK)), (0, 2, 1)))
            r, total, weighted = block_stats(left, c, ENTROPY)
            store_stats(r_out, total_out, weighted_out, r, total, weighted, rows, pid_n * 2, M, num_blocks, ENTROPY)
            r, total, weighted = block_stats(right, c, ENTROPY)
            store_stats(r_out, total_out, weighted_out, r, total, weighted, rows, pid_n * 2 + 1, M, num_blocks, ENTROPY)
        else:
            r, total, weighted = block_stats(acc, c, ENTROPY)
            store_stats(r_out, total_out, weighted_out, r, total, weighted, rows, pid_n, M, num_blocks, ENTROPY)


@triton.jit(do_not_specialize=["M"])
def target_logits(
    hidden,
    weight,
    bias,
    targets,
    out,
    M,
    V,
    K,
    stride_h,
    stride_w,
    BK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """out[m] = hidden[m] . weight[targets[m]] (+ bias), with the bits of the full product: the diagonal of a 16 x 16 one.

    NaN where the target is none of the V rows: what lies there belongs to somebody else.
    """
    rows = tl.program_id(0) * 16 + tl.arange(0, 16)
    keep = rows < M
    target = tl.load(targets + rows, mask=keep, other=0).to(tl.int64)
    known = (target >= 0) & (target < V)
    target = tl.where(known, target, 0)
    ks = tl.arange(0, BK)
    acc = tl.zeros((16, 16), dtype=tl.float32)
    for k in range(0, K, BK):
        mask = (k + ks) < K
        x = tl.load(
            hidden + rows.to(tl.int64)[:, None] * stride_h + (k + ks)[None, :], mask=keep[:, None] & mask[None, :], other=0.0
        )
        w = tl.load(weight + target[None, :] * stride_w + (k + ks)[:, None], mask=mask[:, None], other=0.0)
        acc = tl.dot(x, w, acc)
    diagonal = tl.arange(0, 16)[:, None] == tl.arange(0, 16)[None, :]
    z = tl.sum(tl.where(diagonal, acc, 0.0), 1)
    if HAS_BIAS:
        z += tl.load(bias + target).to(tl.float32)
    tl.store(out + rows, tl.where(known, z, float("nan")), mask=keep)


@triton.jit(do_not_specialize=["M"])
def stats_from_logits(
    logits,
    inverse_temperature,
    targets,
    target_out,
    r_out,
    total_out,
    weighted_out,
    M,
    V,
    stride,
    BM: tl.constexpr,
    BLOCK: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    """The same statistics of stored float32 logits[M, V]; one program per (rows, block)."""
    block = tl.program_id(0)
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    cols = block * BLOCK + tl.arange(0, BLOCK)
    keep = (rows < M)[:, None] & (cols < V)[None, :]
    z = tl.load(logits + rows.to(tl.int64)[:, None] * stride + cols[None, :], mask=keep, other=float("-inf"))
    c = tl.load(inverse_temperature + rows, mask=rows < M, other=1.0) * 1.4426950408889634
    if block == 0:
        target = tl.load(targets + rows, mask=rows < M, other=0).to(tl.int64)
        known = (rows < M) & (target >= 0) & (target < V)
        own = tl.load(logits + rows.to(tl.int64) * stride + target, mask=known, other=float("nan"))
        tl.store(target_out + rows, own, mask=rows < M)
    r, total, weighted = block_stats(z, c, ENTROPY)
    store_stats(r_out, total_out, weighted_out, r, total, weighted, rows, block, M, tl.cdiv(V, BLOCK), ENTROPY)


@triton.jit
def shift_to(top, r):
    """By how many bits a block's sums move right when added to those of the block with the row's largest r; int64."""
    return tl.minimum(top.to(tl.int64) - r.to(tl.int64), MAX_SHIFT)


@triton.jit
def logprob_of(z, c, top, log_mass):
    """Natural log-probability, float32, of a token with logit z in a row whose sum of 2^(c z - top) has this logarithm."""
    return ((z.to(tl.float64) * c.to(tl.float64) - top.to(tl.float64)) * 0.6931471805599453 - log_mass).to(tl.float32)


@triton.jit(do_not_specialize=["M"])
def finish(
    inverse_temperature,
    target_logit,
    r_in,
    total_in,
    weighted_in,
    logprob_out,
    entropy_out,
    normaliser_out,
    M,
    num_blocks,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    """Combine block statistics [num_blocks, M]; natural logarithms out. `normaliser` = log2 of sum 2^(c z)."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    keep = rows < M
    blocks = tl.arange(0, CHUNK)
    top = tl.full((ROWS,), -2147483647, tl.int32)
    for start in range(0, num_blocks, CHUNK):
        mask = ((start + blocks) < num_blocks)[:, None] & keep[None, :]
        where = (start + blocks).to(tl.int64)[:, None] * M + rows[None, :]
        top = tl.maximum(top, tl.max(tl.load(r_in + where, mask=mask, other=-2147483647), 0))
    total = tl.zeros((ROWS,), tl.int64)
    weighted = tl.zeros((ROWS,), tl.int64)
    for start in range(0, num_blocks, CHUNK):
        mask = ((start + blocks) < num_blocks)[:, None] & keep[None, :]
        where = (start + blocks).to(tl.int64)[:, None] * M + rows[None, :]
        r = tl.load(r_in + where, mask=mask, other=-2147483647)
        down = shift_to(top[None, :], r)
        part = tl.load(total_in + where, mask=mask, other=0).to(tl.uint32, bitcast=True).to(tl.int64)
        total += tl.sum((part << 20) >> down, 0)
        if ENTROPY:
            other = tl.load(weighted_in + where, mask=mask, other=0).to(tl.uint32, bitcast=True).to(tl.int64)
            weighted += tl.sum(((other + part * down) << 20) >> down, 0)
    scale = 1.0 / 8796093022208.0  # 2^-43
    mass = total.to(tl.float64) * scale
    log_mass = tl.log(mass)
    ln2 = 0.6931471805599453
    c = tl.load(inverse_temperature + rows, mask=keep, other=1.0) * 1.4426950408889634
    z = tl.load(target_logit + rows, mask=keep, other=0.0)
    tl.store(logprob_out + rows, logprob_of(z, c, top, log_mass), mask=keep)
    tl.store(normaliser_out + rows, (top.to(tl.float64) + log_mass / ln2).to(tl.float32), mask=keep)
    if ENTROPY:
        spread = weighted.to(tl.float64) * scale
        tl.store(entropy_out + rows, (log_mass + ln2 * spread / mass).to(tl.float32), mask=keep)


@triton.jit(do_not_specialize=["M"])
def logit_gradient(
    a,
    b,
    bias,
    inverse_temperature,
    targets,
    normaliser,
    entropy,
    g_logprob,
    g_entropy,
    out,
    M,
    V,
    K,
    first,
    stride_out,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP_M: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    """d loss / d logits of the vocabulary rows in `b` (which begin at `first` and number V), recomputed, as out[M, V].

    With log p = ln2 (c z - normaliser):  dz = (g_lp (1[target] - p) - g_H p (log p + H)) / temperature,
    written as p times a straight line in log2 p: the epilogue is what a short product waits for.
    """
    num_m = tl.cdiv(M, BM)
    num_n = tl.cdiv(V, BN)
    steps = tl.cdiv(K, BK)
    for tile in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0), flatten=True):
        pid_m, pid_n = tile_of(tile, num_m, num_n, GROUP_M)
        row = pid_m * BM
        col = pid_n * BN
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        for k in range(steps):
            x = a.load([row, k * BK])
            w = b.load([col, k * BK]).T
            acc = tl.dot(x, w, acc)
        rows = row + tl.arange(0, BM)
        cols = col + tl.arange(0, BN)
        keep = rows < M
        inverse = tl.load(inverse_temperature + rows, mask=keep, other=1.0)
        norm = tl.load(normaliser + rows, mask=keep, other=0.0)
        glp = tl.load(g_logprob + rows, mask=keep, other=0.0)
        target = (tl.load(targets + rows, mask=keep, other=-1) - first).to(tl.int32)
        if HAS_BIAS:
            acc += tl.load(bias + cols, mask=cols < V, other=0.0).to(tl.float32)[None, :]
        log2p = acc * (inverse * 1.4426950408889634)[:, None] - norm[:, None]
        push = inverse * glp
        line = tl.broadcast_to(-push[:, None], log2p.shape)
        if ENTROPY:
            pull = inverse * tl.load(g_entropy + rows, mask=keep, other=0.0)
            flat = -push - pull * tl.load(entropy + rows, mask=keep, other=0.0)
            line = flat[:, None] - (pull * 0.6931471805599453)[:, None] * tl.maximum(log2p, -288.0)
        dz = tl.exp2(log2p) * line + tl.where(target[:, None] == cols[None, :], push[:, None], 0.0)
        where = rows[:, None] * stride_out + cols[None, :]
        tl.store(out + where, dz.to(out.dtype.element_ty), mask=keep[:, None] & (cols < V)[None, :])


@triton.jit(do_not_specialize=["M"])
def add_product(
    a,
    b,
    high,
    low,
    M,
    N,
    K,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP_M: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
):
    """Running sum += a[M, K] b[K, N] (descriptors), kept in 24 bits: the float32's upper half in `high` (int16), the next
    8 bits in `low` (uint8), both [M, N]. `FIRST` starts at zero; `LAST` leaves the sum rounded to bfloat16 in `high`.
    """
    num_m = tl.cdiv(M, BM)
    num_n = tl.cdiv(N, BN)
    steps = tl.cdiv(K, BK)
    for tile in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0), flatten=True):
        pid_m, pid_n = tile_of(tile, num_m, num_n, GROUP_M)
        row = pid_m * BM
        col = pid_n * BN
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        for k in range(steps):
            acc = tl.dot(a.load([row, k * BK]), b.load([k * BK, col]), acc)
        rows = row + tl.arange(0, BM)
        cols = col + tl.arange(0, BN // 2)
        left, right = tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))  # halves: fewer registers at once
        add_to_sum(left, high, low, rows, cols, M, N, FIRST, LAST)
        add_to_sum(right, high, low, rows, cols + BN // 2, M, N, FIRST, LAST)


@triton.jit
def add_to_sum(part, high, low, rows, cols, M, N, FIRST: tl.constexpr, LAST: tl.constexpr):
    """One half of a tile of `add_product`."""
    keep = (rows < M)[:, None] & (cols < N)[None, :]
    where = rows[:, None] * N + cols[None, :]
    if not FIRST:
        upper = tl.load(high + where, mask=keep, other=0).to(tl.int32) << 16
        part += (upper | (tl.load(low + where, mask=keep, other=0).to(tl.int32) << 8)).to(tl.float32, bitcast=True)
    if LAST:
        tl.store(high + where, part.to(tl.bfloat16).to(tl.int16, bitcast=True), mask=keep)
    else:
        bits = part.to(tl.int32, bitcast=True) + 128
        tl.store(high + where, (bits >> 16).to(tl.int16), mask=keep)
        tl.store(low + where, (bits >> 8).to(tl.uint8), mask=keep)
