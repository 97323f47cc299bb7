"""FP8 contract: block-scaled e4m3 linear and grouped linear forward (1 x 128 activations, 128 x 128 weights), bfloat16 backward.

Each row of activations is quantised on its own, products are summed in ascending blocks of 128, so a row's bits do not depend
on its neighbours. Inside a block the bits are those of Hopper's 64-row FP8 instruction, which keeps fewer than float32: tiles of
16 rows (another instruction) round differently and are not used. DeepGEMM serves where it was proven equal.
The backward uses the unquantised bfloat16 operands (straight through).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from miles_kernels.cuda import dispatch, gemm_deep
from miles_kernels.cuda.gemm_triton import Tile, descriptor, num_sms
from miles_kernels.cuda.grouped import Groups, wgrad
from miles_kernels.cuda.grouped import gemm as grouped_gemm

BLOCK = 128
LARGEST = 448.0


class Quantized(NamedTuple):
    """e4m3 values and float32 scales: value * scale is the number."""

    values: Tensor
    scales: Tensor


def quantize_rows(x: Tensor) -> Quantized:
    """`x[T, K]` with scales [T, ceil(K / 128)], one per row and 128 columns: max |x| / 448."""
    rows, size = x.shape
    blocks = -(-size // BLOCK)
    if not x.is_cuda:
        return _quantize_rows_reference(x)
    from miles_kernels.cuda import fp8_kernels

    values = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty((rows, blocks), dtype=torch.float32, device=x.device)
    if rows:
        width = min(2048, 128 << (blocks - 1).bit_length())
        fp8_kernels.quantize_rows[(rows, -(-size // width))](
            x.contiguous(), values, scales, size, blocks, BLOCK=width, num_warps=4
        )
    return Quantized(values, scales)


def _quantize_rows_reference(x: Tensor) -> Quantized:
    rows, size = x.shape
    padded = torch.nn.functional.pad(x.float(), (0, -size % BLOCK)).view(rows, -1, BLOCK)
    top = padded.abs().amax(-1)
    scales = torch.where(top > 0, top / torch.full_like(top, LARGEST), 1.0)
    values = (padded / scales[..., None]).view(rows, -1)[:, :size]
    return Quantized(values.to(torch.float8_e4m3fn), scales)


def quantize_weight(weight: Tensor) -> Quantized:
    """`weight[..., N, K]` with scales [..., ceil(N / 128), ceil(K / 128)], one per 128 x 128 block."""
    *lead, n, k = weight.shape
    wide = torch.nn.functional.pad(weight.float(), (0, -k % BLOCK, 0, -n % BLOCK))
    tiles = wide.view(*lead, -(-n // BLOCK), BLOCK, -(-k // BLOCK), BLOCK)
    top = tiles.abs().amax((-3, -1))
    scales = torch.where(top > 0, top / torch.full_like(top, LARGEST), 1.0)
    values = (tiles / scales[..., :, None, :, None]).view(wide.shape)[..., :n, :k]
    return Quantized(values.to(torch.float8_e4m3fn).contiguous(), scales.contiguous())


def dequantize_weight(weight: Quantized) -> Tensor:
    """float32 values of a quantised weight."""
    n, k = weight.values.shape[-2:]
    scales = weight.scales.repeat_interleave(BLOCK, -2).repeat_interleave(BLOCK, -1)[..., :n, :k]
    return weight.values.float() * scales


def default_tile(m: int) -> Tile:
    """Tiles by M: at least 64 rows, so that every one runs on the same tensor-core instruction (16 rows round otherwise)."""
    return Tile(64, 64, 128, 4, 5) if m <= 64 else Tile(64, 128, 128, 4, 3, per_sm=2)


@functools.cache
def deepgemm_proven(device: int) -> bool:
    """Whether DeepGEMM's block-scaled product has the bits of ours on this device, over several shapes. Once per process."""
    if not gemm_deep.available() or "deepgemm" not in dispatch.allowed():
        return False
    generator = torch.Generator(device=f"cuda:{device}").manual_seed(0)
    for n, k in ((1024, 512), (4096, 4096)):
        x, w = (torch.randn(size, k, device=f"cuda:{device}", generator=generator).bfloat16() for size in (300, n))
        weight = quantize_weight(w)
        expected = gemm(quantize_rows(x), weight, tile=default_tile(300))
        for rows in (1, 16, 64, 129, 300):
            try:
                got = _deep(quantize_rows(x[:rows]), weight)
            except (RuntimeError, OSError):
                return False
            if not torch.equal(got, expected[:rows]):
                return False
    return True


def _deep(x: Quantized, weight: Quantized) -> Tensor:
    out = torch.empty((x.values.shape[0], weight.values.shape[0]), dtype=torch.bfloat16, device=x.values.device)
    gemm_deep.module().fp8_gemm_nt((x.values, x.scales), (weight.values, weight.scales), out)
    return out


def _deep_serves(m: int, n: int, k: int, device: int) -> bool:
    """DeepGEMM is faster except for middling row counts of narrow weights (docs/measured/kernels.md)."""
    return n % 64 == 0 and k % 128 == 0 and (m <= 512 or m >= 4096 or n > 8192) and deepgemm_proven(device)


def gemm(x: Quantized, weight: Quantized, out_dtype: torch.dtype = torch.bfloat16, tile: Tile | None = None) -> Tensor:
    """`x[M, K]` times `weight[N, K]^T` as [M, N]; K a multiple of 16."""
    from miles_kernels.cuda import fp8_kernels

    (m, k), n = x.values.shape, weight.values.shape[0]
    out = torch.empty((m, n), dtype=out_dtype, device=x.values.device)
    if not m:
        return out
    if tile is None and out_dtype is torch.bfloat16 and _deep_serves(m, n, k, out.device.index or 0):
        return _deep(x, weight)
    tile = tile or default_tile(m)
    tiles = -(-m // tile.rows) * -(-n // tile.cols)
    fp8_kernels.fp8_gemm[(min(num_sms(out.device.index or 0) * tile.per_sm, tiles),)](
        descriptor(x.values, tile.rows, BLOCK),
        descriptor(weight.values, tile.cols, BLOCK),
        x.scales,
        weight.scales,
        out,
        m,
        n,
        k,
        out.stride(0),
        BM=tile.rows,
        BN=tile.cols,
        GROUP_M=8,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out


def grouped(x: Quantized, weight: Quantized, groups: Groups, tile: Tile | None = None) -> Tensor:
    """Rows sorted by expert times `weight[E, N, K]^T`, N a multiple of 128, as bfloat16 [R, N]."""
    from miles_kernels.cuda import fp8_kernels

    experts, n, k = weight.values.shape
    if n % BLOCK:
        raise ValueError(f"fp8 grouped linear: N must be a multiple of {BLOCK}, got {n}")
    out = torch.empty((x.values.shape[0], n), dtype=torch.bfloat16, device=x.values.device)
    if not x.values.shape[0]:
        return out
    tile = tile or default_tile(groups.num_rows // experts)
    plan = groups.plan(tile.rows)
    most = plan.expert.shape[0] * -(-n // tile.cols)
    fp8_kernels.fp8_grouped_gemm[(min(num_sms(out.device.index or 0) * tile.per_sm, most),)](
        descriptor(x.values, tile.rows, BLOCK),
        descriptor(weight.values.view(experts * n, k), tile.cols, BLOCK),
        x.scales,
        weight.scales,
        out,
        groups.offsets,
        plan.expert,
        plan.row,
        plan.count,
        n,
        k,
        BM=tile.rows,
        BN=tile.cols,
        GROUP_M=4,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out


def linear(x: Tensor, weight: Tensor, quantized: Quantized | None = None) -> Tensor:
    """`x[T, K]` times `weight[N, K]^T` in FP8; `quantized` is `quantize_weight(weight)`, made here when not given.

    Differentiable for x and weight: bfloat16 products of the unquantised operands.
    """
    quantized = quantized or quantize_weight(weight.detach())
    return _Linear.apply(x, weight, *quantized)


def grouped_linear(x: Tensor, weight: Tensor, groups: Groups, quantized: Quantized | None = None) -> Tensor:
    """`x[R, K]`, rows sorted by expert, times `weight[E, N, K]^T` in FP8; backward in bfloat16."""
    quantized = quantized or quantize_weight(weight.detach())
    return _GroupedLinear.apply(x, weight, groups, *quantized)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, values: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return gemm(quantize_rows(x), Quantized(values, scales), x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        dx = dispatch.product(grad, weight, torch.empty_like(x), b_t=True) if ctx.needs_input_grad[0] else None
        dw = None
        if ctx.needs_input_grad[1]:
            dw = dispatch.product(grad, x, torch.empty_like(weight), a_t=True, b_t=True)
        return dx, dw, None, None


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, groups: Groups, values: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.groups = groups
        return grouped(quantize_rows(x), Quantized(values, scales), groups)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        dx = grouped_gemm(grad, weight, ctx.groups, transposed=True) if ctx.needs_input_grad[0] else None
        dw = wgrad(grad, x, ctx.groups, weight.shape, weight.dtype) if ctx.needs_input_grad[1] else None
        return dx, dw, None, None, None
