"""Products whose K is cut into logical shards, in two launches; what `comm` composes of many has the same bits.

All shards of all tiles are one grid, which fills the device for few rows too; then the shards' sums are folded. The first call of
a kind on a device compares with the composed product; if a bit differs, this is not used there.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from miles_kernels.cuda.gemm_triton import Tile, descriptor, strides_fit_tma
from miles_kernels.cuda.launch import cdiv

PARTS_BYTES = 512 << 20
"""Most memory of the shards' sums at once; more rows go in turns."""
_MAX_SHARDS = 8


def serves(a: Tensor, b: Tensor, count: int, dtype: torch.dtype) -> bool:
    """Whether these kernels take `a[M, K] b[N, K]^T` in `count` shards."""
    return (
        a.dtype is b.dtype is torch.bfloat16
        and count <= _MAX_SHARDS
        and a.shape[1] % (16 * count) == 0
        and strides_fit_tma(a)
        and strides_fit_tma(b)
        and disagreement(a.device.index or 0, count, dtype) is None
    )


def product(a: Tensor, b: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """a[M, K] b[N, K]^T [M, N], summed in float32 over each of `count` shards (1, 2, 4, 8), folded, rounded once to `dtype`."""
    out = torch.empty((a.shape[0], b.shape[0]), dtype=dtype, device=a.device)
    most = max(128, PARTS_BYTES // (4 * count * b.shape[0]) // 128 * 128)
    for start in range(0, a.shape[0], most):
        fold(_sums(a[start : start + most], b, count), dtype, out[start : start + most])
    return out


def _sums(a: Tensor, b: Tensor, count: int) -> Tensor:
    """The shards' sums [count, M, N] float32."""
    from miles_kernels.cuda import folded_kernels

    (m, k), n = a.shape, b.shape[0]
    size = k // count
    tile = _tile(m, n * count, min(64, size & -size))
    parts = torch.empty((count, m, n), dtype=torch.float32, device=a.device)
    folded_kernels.shard_products[(cdiv(m, tile.rows) * cdiv(n, tile.cols) * count,)](
        descriptor(a, tile.rows, tile.depth), descriptor(b, tile.cols, tile.depth), parts, m, n, size,
        BM=tile.rows, BN=tile.cols, BK=tile.depth, GROUP_M=8, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return parts


def _tile(m: int, columns: int, depth: int) -> Tile:
    """Narrow while the weights' bandwidth is the bound, large after; `columns` of all shards. No bit depends on it."""
    if m <= 64:
        return Tile(16 if m <= 16 else 32 if m <= 32 else 64, 64 if columns >= 64 * 132 else 32, depth, 4, 5)
    if m <= 512:
        return Tile(128, 128, depth, 8, 4)
    return Tile(128, 256, depth, 8, 3)


def fold(parts: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """parts[S, ...] float32, contiguous, folded over S by a tree over neighbours in one launch, rounded once to `dtype`."""
    from miles_kernels.cuda import folded_kernels

    out = torch.empty(parts.shape[1:], dtype=dtype, device=parts.device) if out is None else out
    if parts.shape[0] == 1:
        return out.copy_(parts[0])
    if out.numel():
        folded_kernels.fold_parts[(cdiv(out.numel(), 1024),)](parts, out, out.numel(), S=parts.shape[0], BLOCK=1024, num_warps=4)
    return out


@functools.cache
def disagreement(device: int, count: int, dtype: torch.dtype) -> str | None:
    """Try on this GPU whether a bit differs from the composed product: what, in words; None if nothing does."""
    from miles_kernels.cuda import comm

    name = f"cuda:{device}"
    generator = torch.Generator(name).manual_seed(0)
    with torch.no_grad():
        for m, n, k in ((33, 256, 192 * count), (700, 640, 128 * count)):
            a, b = (torch.randn((rows, k), generator=generator, device=name).to(torch.bfloat16) for rows in (m, n))
            wanted = comm.composed_sum(a, b, count).to(dtype)
            unequal = int((product(a, b, count, dtype) != wanted).sum())
            if unequal:
                return f"{unequal} of {wanted.numel()} elements, M={m} N={n} K={k} in {count} shards, {dtype}"
    return None
