"""Triton kernels of `folded`: products whose K is cut into shards, and the tree that folds the shards' sums.

Legend: M rows, N columns, S shards of KS each; `a`, `b` are tensor descriptors with blocks [BM, BK] and [BN, BK], BK divides KS.
"""

from __future__ import annotations

import triton
import triton.language as tl

from miles_kernels.cuda.gemm_kernels import tile_of


@triton.jit
def _sum(a, b, row, col, shard, KS, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """float32 [BM, BN]: the products of one shard, K ascending."""
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for k in range(shard * KS, shard * KS + KS, BK):
        acc = tl.dot(a.load([row, k]), b.load([col, k]).T, acc)
    return acc


@triton.jit
def _two(a, b, row, col, shard, KS, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    first = _sum(a, b, row, col, shard, KS, BM, BN, BK)
    return first + _sum(a, b, row, col, shard + 1, KS, BM, BN, BK)


@triton.jit
def _four(a, b, row, col, shard, KS, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    first = _two(a, b, row, col, shard, KS, BM, BN, BK)
    return first + _two(a, b, row, col, shard + 2, KS, BM, BN, BK)


@triton.jit(do_not_specialize=["M"])
def folded_product(
    a, b, out, M, N, KS, S: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr
):  # fmt: skip
    """out[M, N] = the sums of S shards (1, 2, 4, 8), folded by a tree in registers and rounded once. A persistent grid."""
    num_m = tl.cdiv(M, BM)
    num_n = tl.cdiv(N, BN)
    for tile in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0)):
        pid_m, pid_n = tile_of(tile, num_m, num_n, GROUP_M)
        row = pid_m * BM
        col = pid_n * BN
        if S == 1:
            acc = _sum(a, b, row, col, 0, KS, BM, BN, BK)
        elif S == 2:
            acc = _two(a, b, row, col, 0, KS, BM, BN, BK)
        elif S == 4:
            acc = _four(a, b, row, col, 0, KS, BM, BN, BK)
        else:
            acc = _four(a, b, row, col, 0, KS, BM, BN, BK) + _four(a, b, row, col, 4, KS, BM, BN, BK)
        rows = row + tl.arange(0, BM)
        cols = col + tl.arange(0, BN)
        at = out + rows.to(tl.int64)[:, None] * N + cols[None, :]
        tl.store(at, acc.to(out.dtype.element_ty), mask=(rows < M)[:, None] & (cols < N)[None, :])


@triton.jit(do_not_specialize=["M"])
def shard_products(a, b, parts, M, N, KS, S: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """parts[S, M, N] float32: the sum of each shard, for few rows; a program per tile and shard."""
    shard = tl.program_id(0) % S
    tile = tl.program_id(0) // S
    num_n = tl.cdiv(N, BN)
    row = tile // num_n * BM
    col = tile % num_n * BN
    acc = _sum(a, b, row, col, shard, KS, BM, BN, BK)
    rows = row + tl.arange(0, BM)
    cols = col + tl.arange(0, BN)
    at = parts + (shard * M + rows).to(tl.int64)[:, None] * N + cols[None, :]
    tl.store(at, acc, mask=(rows < M)[:, None] & (cols < N)[None, :])


@triton.jit
def _pair(parts, at, size, index, mask):
    first = tl.load(parts + at + index * size, mask=mask)
    return first + tl.load(parts + at + (index + 1) * size, mask=mask)


@triton.jit(do_not_specialize=["size"])
def fold_parts(parts, out, size, S: tl.constexpr, BLOCK: tl.constexpr):
    """out[size] = parts[S, size] float32 (S = 2, 4, 8) folded by a tree over neighbours, rounded once."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    size = size.to(tl.int64)
    total = _pair(parts, at, size, 0, mask)
    if S >= 4:
        total += _pair(parts, at, size, 2, mask)
    if S == 8:
        second = _pair(parts, at, size, 4, mask)
        total += second + _pair(parts, at, size, 6, mask)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)
