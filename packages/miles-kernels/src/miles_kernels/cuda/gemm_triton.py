"""Launching the Triton products of `gemm_kernels`: tile tables and checks. The backend `triton`, which defines the bits."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from miles_kernels.cuda.launch import early_for


class Tile(NamedTuple):
    """How one product is cut. Never changes bits in bfloat16 on Hopper, only time."""

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int
    kind: str = "tma"
    """"tma" (bulk copies, persistent grid), "pointer" (any strides) or "swap" (pointer, transposed tile, few rows)"""
    per_sm: int = 1
    """programs per multiprocessor of the persistent grid"""

    @property
    def name(self) -> str:
        """Short form for tables, as in `tma 128x256x64 w8 s3`."""
        return f"{self.kind} {self.rows}x{self.cols}x{self.depth} w{self.warps} s{self.stages}"


@functools.cache
def num_sms(device: int) -> int:
    """Multiprocessors of a device."""
    return torch.cuda.get_device_properties(device).multi_processor_count


WIDE_RESULT = Tile(128, 128, 64, 8, 3)
"""For float32 results: a larger tile of them would not fit into shared memory beside the operands."""


def default_tile(m: int, n: int, k: int) -> Tile:
    """A sound tile without measurements: narrow tiles while the weights' bandwidth is the bound, large ones after."""
    if m <= 32:
        cols = 64 if n >= 64 * 132 else 32 if n >= 32 * 132 else 16
        return Tile(16 if m <= 16 else 32, cols, 128, 4, 5, "pointer")
    if m <= 128:
        return Tile(64, 128 if n >= 128 * 132 else 64, 64, 4, 5)
    if m <= 512:
        return Tile(128, 128, 64, 8, 4)
    return Tile(128, 256, 64, 8, 3)


def strides_fit_tma(x: Tensor) -> bool:
    """Bulk copies need rows that start at multiples of 16 bytes, are contiguous and do not overlap."""
    pitch = x.stride(0)
    return x.stride(1) == 1 and pitch * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0 and pitch >= x.shape[1] > 0


def descriptor(x: Tensor, rows: int, cols: int) -> Any:
    """Bulk-copy descriptor of a row-major matrix with blocks [rows, cols]."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, list(x.shape), [x.stride(0), 1], [rows, cols])


def descriptor3(x: Tensor, planes: int, rows: int, cols: int) -> Any:
    """Bulk-copy descriptor of a contiguous [P, R, C] with blocks [planes, rows, cols]."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, list(x.shape), list(x.stride()), [planes, rows, cols])


def gemm(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    bias: Tensor | None = None,
    *,
    a_t: bool = False,
    b_t: bool = False,
    addend: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """out[M, N] = a[M, K] b[N, K]^T + bias (+ addend, float32 [M, N]); `a_t`: a is [K, M]; `b_t`: b is [K, N].

    bfloat16 or float16 operands, float32 accumulation, one rounding to out's dtype; float32 operands multiply in full
    float32 (no TF32).
    """
    from miles_kernels.cuda import gemm_kernels

    m, k = (a.shape[1], a.shape[0]) if a_t else (a.shape[0], a.shape[1])
    n = b.shape[1] if b_t else b.shape[0]
    tile = tile or default_tile(m, n, k)
    if out.dtype is torch.float32 and tile.rows * tile.cols > WIDE_RESULT.rows * WIDE_RESULT.cols:
        tile = WIDE_RESULT
    if m == 0 or n == 0:
        return out
    assert addend is None or addend.stride() == out.stride(), "the addend is read where the result is written"
    half = a.dtype in (torch.bfloat16, torch.float16)
    tma = half and tile.kind == "tma" and strides_fit_tma(a) and strides_fit_tma(b)
    if tma:
        tiles = -(-m // tile.rows) * -(-n // tile.cols)
        programs = min(num_sms(a.device.index or 0) * tile.per_sm, tiles)
        gemm_kernels.gemm_tma[(programs,)](
            descriptor(a, *((tile.depth, tile.rows) if a_t else (tile.rows, tile.depth))),
            descriptor(b, *((tile.depth, tile.cols) if b_t else (tile.cols, tile.depth))),
            out,
            bias if bias is not None else out,
            addend if addend is not None else out,
            m,
            n,
            k,
            out.stride(0),
            BM=tile.rows,
            BN=tile.cols,
            BK=tile.depth,
            GROUP_M=8,
            A_T=a_t,
            B_T=b_t,
            HAS_BIAS=bias is not None,
            HAS_ADDEND=addend is not None,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        return out
    if addend is not None:
        raise ValueError("gemm: an addend needs rows that start at multiples of 16 bytes")
    if tile.kind == "tma":
        tile = Tile(64, 64, 32 if half else 16, 4, 3, "pointer")
    if not half:
        tile = Tile(min(tile.rows, 64), min(tile.cols, 64), 32, 4, 3, "pointer")
    grid = (-(-m // tile.rows) * -(-n // tile.cols),)
    early = early_for(m, a)
    gemm_kernels.gemm_pointer[grid](
        a,
        b,
        out,
        bias if bias is not None else out,
        m,
        n,
        k,
        *(reversed(a.stride()) if a_t else a.stride()),
        *(reversed(b.stride()) if b_t else b.stride()),
        out.stride(0),
        BM=tile.rows,
        BN=tile.cols,
        BK=tile.depth,
        GROUP_M=8,
        HAS_BIAS=bias is not None,
        EVEN_K=k % tile.depth == 0,
        SWAP=tile.kind == "swap",
        PRECISION="ieee",
        EARLY=early,
        num_warps=tile.warps,
        num_stages=tile.stages,
        launch_pdl=early,
    )
    return out


def gemm_fixed(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """The fixed 128 x 128 x 64 tile of batch_invariant_ops (4 stages of depth 3, 8 warps), for comparison tables."""
    from miles_kernels.cuda import gemm_kernels

    (m, k), n = a.shape, b.shape[0]
    tiles = -(-m // 128) * -(-n // 128)
    programs = min(num_sms(a.device.index or 0), tiles)
    gemm_kernels.gemm_fixed_tile[(programs,)](
        a, b, out, m, n, k, BM=128, BN=128, BK=64, GROUP_M=8, NUM_PROGRAMS=programs, num_warps=8, num_stages=3
    )
    return out
