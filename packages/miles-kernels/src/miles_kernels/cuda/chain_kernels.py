"""Triton kernels of `chain`: additions one after the other, starting from what is there."""

from __future__ import annotations

import triton
import triton.language as tl

from miles_kernels.cuda.gemm_kernels import tile_of


@triton.jit
def chain_parts(part_ptr, total_ptr, blocks, heads, H, COLS: tl.constexpr):
    """total[H] += part[head, block, H], blocks ascending, heads within a block ascending; one program per COLS columns."""
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    mask = col < H
    total = tl.load(total_ptr + col, mask=mask, other=0.0)
    for block in range(blocks):
        for head in range(heads):
            at = part_ptr + (head * blocks + block).to(tl.int64) * H + col
            total += tl.load(at, mask=mask, other=0.0)
    tl.store(total_ptr + col, total, mask=mask)


@triton.jit
def chain_lookup(sorted_ptr, order_ptr, grad_ptr, total_ptr, tokens, width, BLOCK: tl.constexpr):
    """Row sorted[i] of total += its tokens' gradients in token order; the program of a run's first token sums the run."""
    first = tl.program_id(0)
    token_id = tl.load(sorted_ptr + first)
    before = tl.load(sorted_ptr + first - 1, mask=first > 0, other=-1)
    if token_id == before:
        return
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = col < width
    at = total_ptr + token_id.to(tl.int64) * width + col
    total = tl.load(at, mask=mask, other=0.0)
    place = first
    alive = True
    while alive:
        source = tl.load(order_ptr + place).to(tl.int64)
        total += tl.load(grad_ptr + source * width + col, mask=mask, other=0.0).to(tl.float32)
        place += 1
        alive = tl.load(sorted_ptr + place, mask=place < tokens, other=-1) == token_id
    tl.store(at, total, mask=mask)


@triton.jit
def chain_product(
    a, b, total, M, N, K, stride_t, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr
):  # fmt: skip
    """total[M, N] float32 goes on with a[K, M]^T b[K, N]: the accumulators start from it. A persistent grid.

    `a`, `b` are tensor descriptors with blocks [BK, BM] and [BK, BN]; rows past K are filled with zeros, which change nothing.
    """
    num_m = tl.cdiv(M, BM)
    num_n = tl.cdiv(N, BN)
    for tile in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0)):
        pid_m, pid_n = tile_of(tile, num_m, num_n, GROUP_M)
        rows = pid_m * BM + tl.arange(0, BM)
        cols = pid_n * BN + tl.arange(0, BN)
        keep = (rows < M)[:, None] & (cols < N)[None, :]
        at = total + rows.to(tl.int64)[:, None] * stride_t + cols[None, :]
        acc = tl.load(at, mask=keep, other=0.0)
        for k in range(tl.cdiv(K, BK)):
            acc = tl.dot(a.load([k * BK, pid_m * BM]).T, b.load([k * BK, pid_n * BN]), acc)
        tl.store(at, acc, mask=keep)


@triton.jit
def chain_grouped(grad, x, total, starts, sizes, E, N, K, BN: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr):
    """total[e, N, K] float32 goes on with grad[rows of e, N]^T x[rows of e, K]: rows starts[e] .. starts[e] + sizes[e] - 1.

    What fills a step past the last row is zero and changes nothing. A persistent grid.
    """
    num_n = tl.cdiv(N, BN)
    num_k = tl.cdiv(K, BK)
    per_expert = num_n * num_k
    for tile in tl.range(tl.program_id(0), E * per_expert, tl.num_programs(0)):
        expert = tile // per_expert
        inside = tile % per_expert
        start = tl.load(starts + expert)
        end = start + tl.load(sizes + expert)
        ns = inside // num_k * BN + tl.arange(0, BN)
        ks = inside % num_k * BK + tl.arange(0, BK)
        keep = (ns < N)[:, None] & (ks < K)[None, :]
        at = total + expert.to(tl.int64) * N * K + ns.to(tl.int64)[:, None] * K + ks[None, :]
        acc = tl.load(at, mask=keep, other=0.0)
        for t in range(start, end, BT):
            ts = t + tl.arange(0, BT)
            live = ts < end
            g = tl.load(grad + ts.to(tl.int64)[None, :] * N + ns[:, None], mask=live[None, :] & (ns < N)[:, None], other=0.0)
            v = tl.load(x + ts.to(tl.int64)[:, None] * K + ks[None, :], mask=live[:, None] & (ks < K)[None, :], other=0.0)
            acc = tl.dot(g, v, acc)
        tl.store(at, acc, mask=keep)
