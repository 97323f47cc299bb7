"""Grouped products for mixtures of experts: rows sorted by expert, one program per (expert tile, columns), no atomics."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from miles_kernels.cuda.gemm_kernels import tile_of


@triton.jit
def begin(EARLY: tl.constexpr):
    """Of a kernel that is launched while its predecessor ends (`EARLY`): wait for it, then let the successor be launched."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def write_tiles(start, counts, experts, tile_expert, tile_row, num_tiles, BM: tl.constexpr, HALVES: tl.constexpr = False):
    """Tiles of `BM` rows per expert: tile_expert[t], tile_row[t] (first row); num_tiles[0] = how many.

    `HALVES`: an expert's last rows where half a tile holds them are a half tile; those follow, num_tiles[1] of them.
    """
    tiles = (counts + BM - 1) // BM
    if HALVES:
        rest = counts % BM
        half = ((rest > 0) & (rest <= BM // 2)).to(tl.int32)
        tiles -= half
        place = tl.sum(tiles, 0) + tl.cumsum(half, 0) - half
        tl.store(tile_expert + place, experts, mask=half > 0)
        tl.store(tile_row + place, start + tiles * BM, mask=half > 0)
        tl.store(num_tiles + 1, tl.sum(half, 0))
    first = tl.cumsum(tiles, 0) - tiles
    for i in range(tl.max(tiles, 0)):
        tl.store(tile_expert + first + i, experts, mask=i < tiles)
        tl.store(tile_row + first + i, start + i * BM, mask=i < tiles)
    tl.store(num_tiles, tl.sum(tiles, 0))


@triton.jit
def plan_tiles(
    offsets, tile_expert, tile_row, num_tiles, E, BM: tl.constexpr, EXPERTS: tl.constexpr, HALVES: tl.constexpr = False
):
    """Row tiles from `offsets[E + 1]`, the first rows of the experts. One program."""
    experts = tl.arange(0, EXPERTS)
    start = tl.load(offsets + experts, mask=experts < E, other=0)
    stop = tl.load(offsets + experts + 1, mask=experts < E, other=0)
    write_tiles(start, stop - start, experts, tile_expert, tile_row, num_tiles, BM, HALVES)


@triton.jit
def plan_offsets(
    totals,
    offsets,
    tile_expert,
    tile_row,
    num_tiles,
    E,
    BM: tl.constexpr,
    EXPERTS: tl.constexpr,
    EARLY: tl.constexpr = False,
    HALVES: tl.constexpr = False,
):
    """offsets[E + 1] and row tiles from rows per expert. One program."""
    begin(EARLY)
    experts = tl.arange(0, EXPERTS)
    counts = tl.load(totals + experts, mask=experts < E, other=0)
    stop = tl.cumsum(counts, 0)
    tl.store(offsets + experts + 1, stop, mask=experts < E)
    tl.store(offsets, 0)
    write_tiles(stop - counts, counts, experts, tile_expert, tile_row, num_tiles, BM, HALVES)


@triton.jit
def plan_few(
    ids,
    order,
    place,
    offsets,
    tile_expert,
    tile_row,
    num_tiles,
    total,
    E,
    BM: tl.constexpr,
    BLOCK: tl.constexpr,
    EXPERTS: tl.constexpr,
    EARLY: tl.constexpr = False,
):
    """Sort, offsets and row tiles of at most `BLOCK` pairs in one program."""
    begin(EARLY)
    pairs = tl.arange(0, BLOCK)
    keep = pairs < total
    expert = tl.load(ids + pairs, mask=keep, other=EXPERTS).to(tl.int32)
    experts = tl.arange(0, EXPERTS)
    counts = tl.sum((expert[:, None] == experts[None, :]).to(tl.int32), 0)
    stop = tl.cumsum(counts, 0)
    tl.store(offsets + experts + 1, stop, mask=experts < E)
    tl.store(offsets, 0)
    write_tiles(stop - counts, counts, experts, tile_expert, tile_row, num_tiles, BM)
    earlier = (expert[None, :] < expert[:, None]) | ((expert[None, :] == expert[:, None]) & (pairs[None, :] < pairs[:, None]))
    row = tl.sum(earlier.to(tl.int32), 1)
    tl.store(order + row, pairs, mask=keep)
    tl.store(place + pairs, row, mask=keep)


@triton.jit
def scan_counts(counts, before, totals, num_blocks, E, BLOCKS: tl.constexpr, WIDTH: tl.constexpr, EARLY: tl.constexpr = False):
    """before[block, e] = sum of counts of earlier blocks; totals[e]. One program per `WIDTH` experts."""
    begin(EARLY)
    blocks = tl.arange(0, BLOCKS)
    experts = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    keep = (blocks < num_blocks)[:, None] & (experts < E)[None, :]
    where = blocks[:, None] * E + experts[None, :]
    own = tl.load(counts + where, mask=keep, other=0)
    tl.store(before + where, tl.cumsum(own, 0) - own, mask=keep)
    tl.store(totals + experts, tl.sum(own, 0), mask=experts < E)


@triton.jit
def multiply_tiles(
    x,
    w,
    out,
    offsets,
    tile_expert,
    tile_row,
    num_m,
    index,
    slots,
    stride_x,
    N,
    K,
    stride_out,
    program,
    programs,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP_M: tl.constexpr,
    B_T: tl.constexpr,
    GATED: tl.constexpr,
    GATHER: tl.constexpr,
):
    """Tiles `program`, `program + programs`, .. of the `num_m` row tiles of `grouped_gemm` by all columns."""
    num_n = tl.cdiv(N, BN)
    steps = tl.cdiv(K, BK)
    for tile in tl.range(program, num_m * num_n, programs, flatten=True):
        pid_m, pid_n = tile_of(tile, num_m, num_n, GROUP_M)
        expert = tl.load(tile_expert + pid_m)
        row = tl.load(tile_row + pid_m)
        end = tl.load(offsets + expert + 1)
        col = pid_n * BN
        if GATED:
            both = tl.zeros((BM, 2 * BN), dtype=tl.float32)
            if GATHER:
                sorted_rows = row + tl.arange(0, BM)
                pair = tl.load(index + sorted_rows, mask=sorted_rows < end, other=0)
                source = x + (pair // slots).to(tl.int64)[:, None] * stride_x + tl.arange(0, BK)[None, :]
            for k in range(steps):
                b = tl.reshape(w.load([expert * 2, col, k * BK]), (2 * BN, BK))
                if GATHER:
                    a = tl.load(source + k * BK)
                else:
                    a = x.load([row, k * BK])
                both = tl.dot(a, b.T, both)
            acc, up = tl.split(tl.permute(tl.reshape(both, (BM, 2, BN)), (0, 2, 1)))
        else:
            acc = tl.zeros((BM, BN), dtype=tl.float32)
            for k in range(steps):
                a = x.load([row, k * BK])
                if B_T:
                    b = w.load([expert * K + k * BK, col])
                else:
                    b = w.load([expert * N + col, k * BK]).T
                acc = tl.dot(a, b, acc)
        rows = row + tl.arange(0, BM)
        cols = col + tl.arange(0, BN)
        keep = (rows < end)[:, None] & (cols < N)[None, :]
        where = rows.to(tl.int64)[:, None] * stride_out + cols[None, :]
        if GATED:
            kind = out.dtype.element_ty
            g = acc.to(kind).to(tl.float32)
            u = up.to(kind).to(tl.float32)
            acc = g / (1.0 + tl.exp(-g)) * u
        tl.store(out + where, acc.to(out.dtype.element_ty), mask=keep)


@triton.jit
def grouped_gemm(
    x,
    x_half,
    w,
    out,
    offsets,
    tile_expert,
    tile_row,
    num_tiles,
    index,
    slots,
    stride_x,
    N,
    K,
    stride_out,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP_M: tl.constexpr,
    B_T: tl.constexpr,
    GATED: tl.constexpr,
    GATHER: tl.constexpr,
    EARLY: tl.constexpr = False,
    HALF_COST: tl.constexpr = 0,
):
    """out[rows of e, N] = x[rows of e, K] w[e]^T, w described as [E * N, K] (or [E * K, N] when `B_T`, then x w[e]).

    `GATED`: w is described as [2 E, N, K] with blocks [2, BN, BK] (gate over up), one product for both; out = silu(gate) * up,
    each rounded to out's dtype first, as the unfused ops do. `GATHER` (with `GATED`): x is a pointer to the unsorted rows and
    sorted row r is x[index[r] // slots]; BK must divide K. `HALF_COST`: the plan has half tiles, read through `x_half`, which
    cost this many 16ths of a whole one each: their share of the programs (there must be two) multiplies nothing else, so that no
    loop has two kinds.
    """
    begin(EARLY)
    num_m = tl.load(num_tiles)
    program, programs = tl.program_id(0), tl.num_programs(0)
    if HALF_COST:
        halves = tl.load(num_tiles + 1)
        own = tl.cdiv(programs * (halves * HALF_COST), num_m * 16 + halves * HALF_COST)
        own = tl.where(num_m == 0, programs, tl.minimum(own, programs - 1))
        multiply_tiles(
            x_half, w, out, offsets, tile_expert + num_m, tile_row + num_m, tl.where(program < own, halves, 0), index, slots,
            stride_x, N, K, stride_out, program, tl.maximum(own, 1), BM // 2, BN, BK, GROUP_M, B_T, GATED, GATHER,
        )  # fmt: skip
        num_m = tl.where(program < own, 0, num_m)
        program = tl.maximum(program - own, 0)
        programs = tl.maximum(programs - own, 1)
    multiply_tiles(
        x, w, out, offsets, tile_expert, tile_row, num_m, index, slots, stride_x, N, K, stride_out, program, programs,
        BM, BN, BK, GROUP_M, B_T, GATED, GATHER,
    )  # fmt: skip


@triton.jit
def grouped_wgrad(
    grad,
    x,
    out,
    offsets,
    E,
    N,
    K,
    stride_grad,
    stride_x,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BT: tl.constexpr,
):
    """out[e, N, K] = grad[rows of e, N]^T x[rows of e, K], tokens in sorted order; experts without rows get zeros."""
    num_n = tl.cdiv(N, BN)
    num_k = tl.cdiv(K, BK)
    per_expert = num_n * num_k
    for tile in tl.range(tl.program_id(0), E * per_expert, tl.num_programs(0)):
        expert = tile // per_expert
        inside = tile % per_expert
        start = tl.load(offsets + expert)
        end = tl.load(offsets + expert + 1)
        ns = inside // num_k * BN + tl.arange(0, BN)
        ks = inside % num_k * BK + tl.arange(0, BK)
        acc = tl.zeros((BN, BK), dtype=tl.float32)
        for t in range(start, end, BT):
            ts = t + tl.arange(0, BT)
            g = tl.load(
                grad + ts.to(tl.int64)[None, :] * stride_grad + ns[:, None],
                mask=(ts < end)[None, :] & (ns < N)[:, None],
                other=0.0,
            )
            v = tl.load(
                x + ts.to(tl.int64)[:, None] * stride_x + ks[None, :], mask=(ts < end)[:, None] & (ks < K)[None, :], other=0.0
            )
            acc = tl.dot(g, v, acc)
        where = out + expert.to(tl.int64) * N * K + ns.to(tl.int64)[:, None] * K + ks[None, :]
        tl.store(where, acc.to(out.dtype.element_ty), mask=(ns < N)[:, None] & (ks < K)[None, :])


@triton.jit
def sort_slots(ids, before, offsets, order, place, total, E, BLOCK: tl.constexpr, EARLY: tl.constexpr = False):
    """Stable counting sort of flat expert ids, `BLOCK` pairs per program.

    `before[block, e]` = pairs of expert e in earlier blocks. Writes order (sorted row -> pair) and place (pair -> sorted row).
    """
    begin(EARLY)
    block = tl.program_id(0)
    pairs = block * BLOCK + tl.arange(0, BLOCK)
    keep = pairs < total
    expert = tl.load(ids + pairs, mask=keep, other=-1).to(tl.int32)
    same = (expert[:, None] == expert[None, :]) & (tl.arange(0, BLOCK)[None, :] < tl.arange(0, BLOCK)[:, None])
    rank = tl.sum(same.to(tl.int32), 1)
    base = tl.load(before + block * E + expert, mask=keep, other=0) + tl.load(offsets + expert, mask=keep, other=0)
    row = base + rank
    tl.store(order + row, pairs, mask=keep)
    tl.store(place + pairs, row, mask=keep)


@triton.jit
def count_slots(ids, counts, total, E, BLOCK: tl.constexpr, EXPERTS: tl.constexpr, EARLY: tl.constexpr = False):
    """counts[block, e] = pairs of expert e among ids[block * BLOCK : +BLOCK]."""
    begin(EARLY)
    block = tl.program_id(0)
    pairs = block * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(ids + pairs, mask=pairs < total, other=-1).to(tl.int32)
    experts = tl.arange(0, EXPERTS)
    hits = tl.sum((expert[:, None] == experts[None, :]).to(tl.int32), 0)
    tl.store(counts + block * E + experts, hits, mask=experts < E)


@triton.jit
def spread_rows(x, place, out, H, K_SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    """out[place[t, s]] = x[t] for every slot s: a row is read once and written `K_SLOTS` times."""
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(x + token * H + cols, mask=cols < H, other=0.0)
    for slot in tl.static_range(K_SLOTS):
        target = tl.load(place + token * K_SLOTS + slot).to(tl.int64)
        tl.store(out + target * H + cols, row, mask=cols < H)


@triton.jit
def combine_rows(
    y,
    weights,
    place,
    out,
    H,
    K_SLOTS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr = False,
):
    """out[t] = sum over slots s = 0, 1, .. of weights[t, s] * y[place[t, s]], float32 in slot order, one rounding.

    Product and sum round separately (no fused multiply-add), as the plain torch ops do.
    """
    begin(EARLY)
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    keep = cols < H
    acc = tl.zeros((BLOCK,), tl.float32)
    for slot in tl.static_range(K_SLOTS):
        row = tl.load(place + token * K_SLOTS + slot).to(tl.int64)
        part = tl.load(y + row * H + cols, mask=keep, other=0.0).to(tl.float32)
        if WEIGHTED:
            part = rounded_product(part, tl.load(weights + token * K_SLOTS + slot).to(tl.float32))
        acc = part if slot == 0 else acc + part
    tl.store(out + token * H + cols, acc.to(out.dtype.element_ty), mask=keep)


@triton.jit
def rounded_product(x, y):
    """x * y rounded on its own: inline, so that no compiler contracts it into a fused multiply-add."""
    return tl.inline_asm_elementwise(
        "mul.rn.f32 $0, $1, $2;", "=f,f,f", [x, tl.broadcast_to(y, x.shape)], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def combine_backward(
    grad, y, weights, order, d_y, d_weights, H, K_SLOTS: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr
):
    """For sorted row r of pair (t, s): d_y[r] = w[t, s] grad[t]; d_weights[t, s] = grad[t] . y[r], one program per row."""
    row = tl.program_id(0).to(tl.int64)
    pair = tl.load(order + row).to(tl.int64)
    token = pair // K_SLOTS
    weight = tl.load(weights + pair).to(tl.float32)
    dot = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(CHUNKS):
        cols = i * BLOCK + tl.arange(0, BLOCK)
        g = tl.load(grad + token * H + cols, mask=cols < H, other=0.0).to(tl.float32)
        v = tl.load(y + row * H + cols, mask=cols < H, other=0.0).to(tl.float32)
        dot += g * v
        tl.store(d_y + row * H + cols, (g * weight).to(d_y.dtype.element_ty), mask=cols < H)
    tl.store(d_weights + pair, tl.sum(dot, 0).to(d_weights.dtype.element_ty))
