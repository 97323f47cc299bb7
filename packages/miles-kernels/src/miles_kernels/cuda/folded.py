"""Products whose K is cut into logical shards, in one or two launches; what `comm` composes of many has the same bits.

Few rows: a program for every tile and shard, then the fold. Many: one program walks the shards of its tile and folds in
registers. The first call of a kind on a device compares both with the composed product; if a bit differs, they are not used
there.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from miles_kernels.cuda.gemm_triton import descriptor, num_sms, strides_fit_tma
from miles_kernels.cuda.launch import cdiv

FEW_ROWS = 256
"""Up to this many rows shards are programs of their own, because tiles alone would leave multiprocessors idle."""
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
    from miles_kernels.cuda import folded_kernels

    (m, k), n = a.shape, b.shape[0]
    out = torch.empty((m, n), dtype=dtype, device=a.device)
    if not m:
        return out
    size = k // count
    depth = min(64, size & -size)
    if m > FEW_ROWS:
        rows, cols = (64 if count == _MAX_SHARDS else 128), 128
        programs = min(num_sms(a.device.index or 0), cdiv(m, rows) * cdiv(n, cols))
        folded_kernels.folded_product[(programs,)](
            descriptor(a, rows, depth), descriptor(b, cols, depth), out, m, n, size,
            S=count, BM=rows, BN=cols, BK=depth, GROUP_M=8, num_warps=8, num_stages=4,
        )  # fmt: skip
        return out
    rows, cols = (16 if m <= 16 else 32 if m <= 32 else 64), (64 if n * count >= 64 * 132 else 32)
    parts = out if count == 1 and dtype is torch.float32 else torch.empty((count, m, n), dtype=torch.float32, device=a.device)
    folded_kernels.shard_products[(cdiv(m, rows) * cdiv(n, cols) * count,)](
        descriptor(a, rows, depth), descriptor(b, cols, depth), parts, m, n, size,
        S=count, BM=rows, BN=cols, BK=depth, num_warps=4, num_stages=5,
    )  # fmt: skip
    return parts if parts is out else fold(parts, dtype)


def fold(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """parts[S, ...] float32, contiguous, folded over S by a tree over neighbours in one launch, rounded once to `dtype`."""
    from miles_kernels.cuda import folded_kernels

    out = torch.empty(parts.shape[1:], dtype=dtype, device=parts.device)
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
