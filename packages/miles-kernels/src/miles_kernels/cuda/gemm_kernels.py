"""Triton matrix products whose bits depend on the order of the K reduction alone.

Shapes: `M` rows, `N` columns, `K` reduction. One program owns an output tile and walks K in ascending steps into one float32
accumulator: no split-K, no stream-K, no atomics. On Hopper in bfloat16 the result then does not depend on the tile, on the
number of warps or on the MMA instruction, so callers may choose tiles by M (docs/measured/kernels.md).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def tile_of(tile, num_m, num_n, GROUP_M: tl.constexpr):
    """Tile coordinates with `GROUP_M` row tiles walked together, so that a wave shares columns in L2."""
    per_group = GROUP_M * num_n
    group = tile // per_group
    first = group * GROUP_M
    size = tl.minimum(num_m - first, GROUP_M)
    inside = tile % per_group
    return first + inside % size, inside // size


@triton.jit(do_not_specialize=["M"])
def gemm_pointer(
    a,
    b,
    out,
    bias,
    M,
    N,
    K,
    stride_am,
    stride_ak,
    stride_bn,
    stride_bk,
    stride_om,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP_M: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    SWAP: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr = False,
):
    """out[M, N] = a[M, K] b[N, K]^T + bias through plain pointers: any strides, any sizes, little launch overhead.

    `SWAP` computes the transposed tile (weights on the side of the MMA that has 64 rows), for few rows of a.
    """
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    num_m = tl.cdiv(M, BM)
    num_n = tl.cdiv(N, BN)
    pid_m, pid_n = tile_of(tl.program_id(0), num_m, num_n, GROUP_M)
    rows = pid_m * BM + tl.arange(0, BM)
    cols = pid_n * BN + tl.arange(0, BN)
    ks = tl.arange(0, BK)
    safe_rows = tl.where(rows < M, rows, 0)
    safe_cols = tl.where(cols < N, cols, 0)
    if SWAP:
        a_ptrs = a + safe_rows.to(tl.int64)[None, :] * stride_am + ks[:, None] * stride_ak
        b_ptrs = b + safe_cols.to(tl.int64)[:, None] * stride_bn + ks[None, :] * stride_bk
        acc = tl.zeros((BN, BM), dtype=tl.float32)
    else:
        a_ptrs = a + safe_rows.to(tl.int64)[:, None] * stride_am + ks[None, :] * stride_ak
        b_ptrs = b + safe_cols.to(tl.int64)[None, :] * stride_bn + ks[:, None] * stride_bk
        acc = tl.zeros((BM, BN), dtype=tl.float32)
    for k in range(tl.cdiv(K, BK)):
        if EVEN_K:
            x = tl.load(a_ptrs)
            w = tl.load(b_ptrs)
        else:
            left = K - k * BK
            if SWAP:
                x = tl.load(a_ptrs, mask=ks[:, None] < left, other=0.0)
                w = tl.load(b_ptrs, mask=ks[None, :] < left, other=0.0)
            else:
                x = tl.load(a_ptrs, mask=ks[None, :] < left, other=0.0)
                w = tl.load(b_ptrs, mask=ks[:, None] < left, other=0.0)
        if SWAP:
            acc = tl.dot(w, x, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
        a_ptrs += BK * stride_ak
        b_ptrs += BK * stride_bk
    if HAS_BIAS:
        shift = tl.load(bias + safe_cols).to(tl.float32)
        if SWAP:
            acc += shift[:, None]
        else:
            acc += shift[None, :]
    keep_m = rows < M
    keep_n = cols < N
    if SWAP:
        where = out + rows.to(tl.int64)[None, :] * stride_om + cols[:, None]
        tl.store(where, acc.to(out.dtype.element_ty), mask=keep_m[None, :] & keep_n[:, None])
    else:
        where = out + rows.to(tl.int64)[:, None] * stride_om + cols[None, :]
        tl.store(where, acc.to(out.dtype.element_ty), mask=keep_m[:, None] & keep_n[None, :])


@triton.jit(do_not_specialize=["M"])
def gemm_tma(
    a,
    b,
    out,
    bias,
    addend,
    M,
    N,
    K,
    stride_om,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP_M: tl.constexpr,
    A_T: tl.constexpr,
    B_T: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ADDEND: tl.constexpr,
):
    """out[M, N] = a b + bias (+ addend[M, N], float32) by bulk tensor copies; a persistent grid.

    `a`, `b` are tensor descriptors with blocks [BM, BK] of a[M, K] (or [BK, BM] of a[K, M] when `A_T`) and
    [BN, BK] of b[N, K] (or [BK, BN] of b[K, N] when `B_T`). Sizes off the tile are filled with zeros by the hardware.
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
            if A_T:
                x = a.load([k * BK, row]).T
            else:
                x = a.load([row, k * BK])
            if B_T:
                w = b.load([k * BK, col])
            else:
                w = b.load([col, k * BK]).T
            acc = tl.dot(x, w, acc)
        rows = row + tl.arange(0, BM)
        cols = col + tl.arange(0, BN)
        keep = (rows < M)[:, None] & (cols < N)[None, :]
        where = rows.to(tl.int64)[:, None] * stride_om + cols[None, :]
        if HAS_BIAS:
            acc += tl.load(bias + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
        if HAS_ADDEND:
            acc += tl.load(addend + where, mask=keep, other=0.0)
        tl.store(out + where, acc.to(out.dtype.element_ty), mask=keep)


@triton.jit
def gemm_fixed_tile(
    a,
    b,
    out,
    M,
    N,
    K,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP_M: tl.constexpr,
    NUM_PROGRAMS: tl.constexpr,
):
    """For comparison only: the approach of batch_invariant_ops, one 128 x 128 x 64 tile for every M, plain pointers."""
    num_m = tl.cdiv(M, BM)
    num_n = tl.cdiv(N, BN)
    steps = tl.cdiv(K, BK)
    ks = tl.arange(0, BK)
    for tile in tl.range(tl.program_id(0), num_m * num_n, NUM_PROGRAMS, flatten=True):
        pid_m, pid_n = tile_of(tile, num_m, num_n, GROUP_M)
        rows = pid_m * BM + tl.arange(0, BM)
        cols = pid_n * BN + tl.arange(0, BN)
        safe_rows = tl.max_contiguous(tl.multiple_of(tl.where(rows < M, rows, 0), BM), BM)
        safe_cols = tl.max_contiguous(tl.multiple_of(tl.where(cols < N, cols, 0), BN), BN)
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        for k in range(steps):
            at = k * BK + ks
            x = tl.load(a + (safe_rows[:, None] * K + at[None, :]), mask=ks[None, :] < K - k * BK, other=0.0)
            w = tl.load(b + (at[:, None] + safe_cols[None, :] * K), mask=ks[:, None] < K - k * BK, other=0.0)
            acc = tl.dot(x, w, acc)
        keep = (rows < M)[:, None] & (cols < N)[None, :]
        tl.store(out + (rows[:, None] * N + cols[None, :]), acc.to(out.dtype.element_ty), mask=keep)
