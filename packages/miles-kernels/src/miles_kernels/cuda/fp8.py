"""FP8 contract (`ops.fp8`) on Hopper: block-scaled e4m3 linear and grouped linear forward, bfloat16 backward.

Each row of activations is quantised on its own, products are summed in ascending blocks of 128, so a row's bits do not depend
on its neighbours. Inside a block the bits are those of Hopper's 64-row FP8 instruction, which keeps fewer than float32: tiles of
16 rows (another instruction) round differently and are not used. DeepGEMM serves where it was proven equal.
The backward uses the unquantised bfloat16 operands (straight through).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from miles_kernels.cuda import dispatch, gemm_deep
from miles_kernels.cuda.gemm_triton import Tile, descriptor, num_sms
from miles_kernels.cuda.grouped import Groups, wgrad
from miles_kernels.cuda.grouped import gemm as grouped_gemm
from miles_kernels.cuda.launch import at_home
from miles_kernels.cuda.linear import backward as linear_backward
from miles_kernels.ops.fp8 import BLOCK, Quantized


@at_home
def quantize_rows(x: Tensor) -> Quantized:
    """`ops.fp8.quantize_rows` in one kernel."""
    from miles_kernels.cuda import fp8_kernels

    rows, size = x.shape
    blocks = -(-size // BLOCK)
    values = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty((rows, blocks), dtype=torch.float32, device=x.device)
    if rows:
        width = min(2048, 128 << (blocks - 1).bit_length())
        fp8_kernels.quantize_rows[(rows, -(-size // width))](
            x.contiguous(), values, scales, size, blocks, BLOCK=width, num_warps=4
        )
    return Quantized(values, scales)


@at_home
def quantize_weight(weight: Tensor) -> Quantized:
    """`ops.fp8.quantize_weight` in one kernel: a program per block."""
    from miles_kernels.cuda import fp8_kernels

    *lead, n, k = weight.shape
    flat = weight.reshape(-1, n, k)
    if flat.stride(2) != 1:
        flat = flat.contiguous()
    down, across = -(-n // BLOCK), -(-k // BLOCK)
    values = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    scales = torch.empty((*lead, down, across), dtype=torch.float32, device=weight.device)
    if weight.numel():
        fp8_kernels.quantize_blocks[(across, down, flat.shape[0])](
            flat, values, scales, n, k, flat.stride(0), flat.stride(1), num_warps=8
        )
    return Quantized(values, scales)


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
            except Exception:  # whatever the library or its compiler raises: our kernel serves
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
    (m, k), n = x.values.shape, weight.values.shape[0]
    if weight.values.shape[1] != k or k % 16 or not k:
        raise ValueError(
            f"fp8 linear: x [M, K] and weight [N, K] with K a multiple of 16, got {(m, k)}, {tuple(weight.values.shape)}"
        )
    out = torch.empty((m, n), dtype=out_dtype, device=x.values.device)
    if not m:
        return out
    if tile is None and out_dtype is torch.bfloat16 and _deep_serves(m, n, k, out.device.index or 0):
        return _deep(x, weight)
    from miles_kernels.cuda import fp8_kernels

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
    if n % BLOCK or k % 16 or x.values.shape[1] != k:
        raise ValueError(
            f"fp8 grouped linear: x [R, K] and weight [E, N, K], N a multiple of {BLOCK} and K of 16, got "
            f"{tuple(x.values.shape)}, {(experts, n, k)}"
        )
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


@at_home
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, quantized: Quantized | None = None) -> Tensor:
    """`x[T, K]` times `weight[N, K]^T` plus bias in FP8; `quantized` is `quantize_weight(weight)`, made here when not given.

    Differentiable for x, weight and bias: bfloat16 products of the unquantised operands.
    """
    quantized = quantized or quantize_weight(weight.detach())
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)):
        return _Linear.apply(x, weight, bias, *quantized)
    return _forward(x, bias, quantized)


def _forward(x: Tensor, bias: Tensor | None, quantized: Quantized) -> Tensor:
    if bias is None:
        return gemm(quantize_rows(x), quantized, x.dtype)
    return (gemm(quantize_rows(x), quantized, torch.float32) + bias.float()).to(x.dtype)


@at_home
def grouped_linear(x: Tensor, weight: Tensor, groups: Groups, quantized: Quantized | None = None) -> Tensor:
    """`x[R, K]`, rows sorted by expert, times `weight[E, N, K]^T` in FP8; backward in bfloat16."""
    quantized = quantized or quantize_weight(weight.detach())
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _GroupedLinear.apply(x, weight, groups, *quantized)
    return grouped(quantize_rows(x), quantized, groups)


@at_home
def moe_mlp(
    x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor, quantized: tuple[Quantized, Quantized]
) -> Tensor:
    """`cuda.moe.moe_mlp` with both products in FP8."""
    from miles_kernels.cuda.act import swiglu
    from miles_kernels.cuda.moe import combine, permute, plan_dispatch

    plan = plan_dispatch(ids, gate_up.shape[0])
    inner = swiglu(grouped_linear(permute(x, plan), gate_up, plan.groups, quantized[0]))
    return combine(grouped_linear(inner, down, plan.groups, quantized[1]), weights, plan)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _forward(x, bias, Quantized(values, scales))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return (*linear_backward(grad, x, weight, ctx.needs_input_grad[:3], ctx.bias_dtype), None, None)


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
