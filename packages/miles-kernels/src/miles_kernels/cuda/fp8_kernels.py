"""Block-scaled float8 (e4m3) products: activations scaled per row and 128 columns, weights per 128 x 128 block."""

from __future__ import annotations

import triton
import triton.language as tl

from miles_kernels.cuda.gemm_kernels import tile_of


@triton.jit
def quantize_rows(x, out, scales, H, stride_scale, BLOCK: tl.constexpr):
    """out = x / s in e4m3, s = max |x| / 448 over each 128 columns of a row (1 for a block of zeros)."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + row * H + cols, mask=cols < H, other=0.0).to(tl.float32)
    v2 = tl.reshape(v, (BLOCK // 128, 128))
    top = tl.max(tl.abs(v2), 1)
    scale = tl.where(top > 0.0, tl.div_rn(top, tl.full(top.shape, 448.0, tl.float32)), 1.0)
    q = tl.div_rn(v2, tl.broadcast_to(scale[:, None], v2.shape))
    tl.store(out + row * H + cols, tl.reshape(q, (BLOCK,)).to(tl.float8e4nv), mask=cols < H)
    blocks = tl.program_id(1) * (BLOCK // 128) + tl.arange(0, BLOCK // 128)
    tl.store(scales + row * stride_scale + blocks, scale, mask=blocks * 128 < H)


@triton.jit
def quantize_blocks(x, out, scales, N, K, stride_e, stride_n):
    """out[E, N, K] = x / s in e4m3, s[E, N / 128, K / 128] (rounded up) = max |x| / 448 of each 128 x 128 block."""
    expert = tl.program_id(2).to(tl.int64)
    rows = (tl.program_id(1) * 128 + tl.arange(0, 128)).to(tl.int64)
    cols = tl.program_id(0) * 128 + tl.arange(0, 128)
    inside = (rows < N)[:, None] & (cols < K)[None, :]
    v = tl.load(x + expert * stride_e + rows[:, None] * stride_n + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    top = tl.max(tl.max(tl.abs(v), 1), 0)
    scale = tl.where(top > 0.0, tl.div_rn(top, 448.0), 1.0)
    q = tl.div_rn(v, tl.full((128, 128), 1.0, tl.float32) * scale)
    tl.store(out + (expert * N + rows[:, None]) * K + cols[None, :], q.to(tl.float8e4nv), mask=inside)
    tl.store(scales + (expert * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0), scale)


@triton.jit(do_not_specialize=["M"])
def fp8_gemm(
    a,
    b,
    a_scale,
    b_scale,
    out,
    M,
    N,
    K,
    stride_out,
    BM: tl.constexpr,
    BN: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """out[M, N] = sum over blocks of 128 of a_scale[m, kb] b_scale[nb, kb] (a[m, kb] . b[n, kb]), ascending, float32.

    `a`, `b` describe e4m3 [M, K], [N, K] with blocks of 128 columns; BN divides 128, so a tile has one weight scale.
    """
    num_m = tl.cdiv(M, BM)
    num_n = tl.cdiv(N, BN)
    steps = tl.cdiv(K, 128)
    for tile in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0), flatten=True):
        pid_m, pid_n = tile_of(tile, num_m, num_n, GROUP_M)
        row = pid_m * BM
        col = pid_n * BN
        rows = row + tl.arange(0, BM)
        left = a_scale + rows.to(tl.int64) * steps
        right = b_scale + (col // 128) * steps
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        for k in range(steps):
            part = tl.dot(a.load([row, k * 128]), b.load([col, k * 128]).T)
            scale = tl.load(left + k, mask=rows < M, other=0.0) * tl.load(right + k)
            acc = tl.fma(part, tl.broadcast_to(scale[:, None], part.shape), acc)
        cols = col + tl.arange(0, BN)
        keep = (rows < M)[:, None] & (cols < N)[None, :]
        tl.store(out + rows.to(tl.int64)[:, None] * stride_out + cols[None, :], acc.to(out.dtype.element_ty), mask=keep)


@triton.jit
def fp8_grouped_gemm(
    x,
    w,
    x_scale,
    w_scale,
    out,
    offsets,
    tile_expert,
    tile_row,
    num_tiles,
    N,
    K,
    BM: tl.constexpr,
    BN: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """The same per expert: rows sorted by expert, w[E * N, K], w_scale[E, N / 128, K / 128] (rounded up)."""
    num_m = tl.load(num_tiles)
    num_n = tl.cdiv(N, BN)
    steps = tl.cdiv(K, 128)
    blocks = tl.cdiv(N, 128)
    for tile in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0), flatten=True):
        pid_m, pid_n = tile_of(tile, num_m, num_n, GROUP_M)
        expert = tl.load(tile_expert + pid_m)
        row = tl.load(tile_row + pid_m)
        end = tl.load(offsets + expert + 1)
        col = pid_n * BN
        rows = row + tl.arange(0, BM)
        left = x_scale + rows.to(tl.int64) * steps
        right = w_scale + (expert * blocks + col // 128) * steps
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        for k in range(steps):
            part = tl.dot(x.load([row, k * 128]), w.load([expert * N + col, k * 128]).T)
            scale = tl.load(left + k, mask=rows < end, other=0.0) * tl.load(right + k)
            acc = tl.fma(part, tl.broadcast_to(scale[:, None], part.shape), acc)
        cols = col + tl.arange(0, BN)
        keep = (rows < end)[:, None] & (cols < N)[None, :]
        tl.store(out + rows.to(tl.int64)[:, None] * N + cols[None, :], acc.to(out.dtype.element_ty), mask=keep)
