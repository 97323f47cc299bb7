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
