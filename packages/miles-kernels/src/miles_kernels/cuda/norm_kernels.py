"""Triton kernels of RMSNorm, residual add, head norms, rotation and their gradients.

Legend: R = rows, H = row length, W = rows of the weight (1, or one per head: row r uses weight row r % W).

One row's sum runs over one row in one layout that depends on H only, so no other row can change its bits.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def rms_forward(
    x_ptr, residual_ptr, weight_ptr, out_ptr, sum_ptr, rows, heads, eps, stride_xt, stride_xh, stride_rt, stride_ot, stride_oh,
    H: tl.constexpr, H_PAD: tl.constexpr, ROWS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, EARLY: tl.constexpr = False,
):  # fmt: skip
    """out = round(x / rms(x)) * weight; with a residual, x is round(x + residual) and is stored too."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = (row // heads).to(tl.int64)
    head = row % heads
    col = tl.arange(0, H_PAD)
    mask = (row < rows)[:, None] & (col < H)[None, :]
    x = tl.load(x_ptr + (token * stride_xt + head * stride_xh)[:, None] + col[None, :], mask=mask, other=0.0)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + (token * stride_rt)[:, None] + col[None, :], mask=mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        tl.store(sum_ptr + row.to(tl.int64)[:, None] * H + col[None, :], x, mask=mask)
    weight = tl.load(weight_ptr + head[:, None] * H + col[None, :], mask=mask, other=0.0)
    wide = x.to(tl.float32)
    scale = 1.0 / tl.sqrt_rn(tl.sum(wide * wide, 1) / H + eps)
    normed = (wide * scale[:, None]).to(x.dtype)
    out = normed.to(tl.float32) * weight.to(tl.float32)
    tl.store(
        out_ptr + (token * stride_ot + head * stride_oh)[:, None] + col[None, :], out.to(out_ptr.dtype.element_ty), mask=mask
    )


@triton.jit
def rms_backward(
    x_ptr, weight_ptr, grad_ptr, extra_ptr, dx_ptr, part_ptr, tokens, heads, eps, stride_xt, stride_xh, stride_gt, stride_gh,
    H: tl.constexpr, H_PAD: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, HAS_EXTRA: tl.constexpr,
):  # fmt: skip
    """dx of ROWS * STEPS consecutive tokens of one head and their share of dw, part[heads, blocks, H].

    `extra` is the gradient that reached x past the norm (the residual stream); it is added before the rounding.
    """
    head = tl.program_id(1)
    col = tl.arange(0, H_PAD)
    inside = (col < H)[None, :]
    weight = tl.load(weight_ptr + head * H + col, mask=col < H, other=0.0).to(tl.float32)[None, :]
    dw = tl.zeros((ROWS, H_PAD), tl.float32)
    for step in range(STEPS):
        token = ((tl.program_id(0) * STEPS + step) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        mask = (token < tokens)[:, None] & inside
        x = tl.load(x_ptr + (token * stride_xt + head * stride_xh)[:, None] + col[None, :], mask=mask, other=0.0)
        grad = tl.load(grad_ptr + (token * stride_gt + head * stride_gh)[:, None] + col[None, :], mask=mask, other=0.0)
        wide = x.to(tl.float32)
        grad = grad.to(tl.float32)
        scale = 1.0 / tl.sqrt_rn(tl.sum(wide * wide, 1) / H + eps)
        normed = wide * scale[:, None]
        dw += grad * normed.to(x.dtype).to(tl.float32)
        inner = grad * weight
        projection = tl.sum(inner * normed, 1) / H
        dx = (inner - normed * projection[:, None]) * scale[:, None]
        place = ((token * heads + head) * H)[:, None] + col[None, :]
        if HAS_EXTRA:
            dx += tl.load(extra_ptr + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + place, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    at = part_ptr + (head * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * H + col
    tl.store(at, tl.sum(dw, 0), mask=col < H)


@triton.jit
def sum_parts(part_ptr, out_ptr, blocks, H, ROWS: tl.constexpr, COLS: tl.constexpr):
    """out[heads, H] = sum over blocks of part[heads, blocks, H]: ROWS lanes ascending, then the lanes."""
    head = tl.program_id(1)
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    total = tl.zeros((ROWS, COLS), tl.float32)
    for start in tl.range(0, blocks, ROWS, num_stages=3):
        row = start + tl.arange(0, ROWS)
        at = part_ptr + (head * blocks + row).to(tl.int64)[:, None] * H + col[None, :]
        total += tl.load(at, mask=(row < blocks)[:, None] & (col < H)[None, :], other=0.0)
    tl.store(out_ptr + head * H + col, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=col < H)


@triton.jit
def rotate(
    x_ptr, cos_ptr, sin_ptr, out_ptr, rows, heads, stride_xt, stride_xh, stride_ot, stride_oh, stride_ct,
    D: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """Rotate-half of x[T, heads, D] by cos, sin [T, D] (sin signed)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = (row // heads).to(tl.int64)
    head = row % heads
    col = tl.arange(0, HALF)
    mask = (row < rows)[:, None] & (col < D // 2)[None, :]
    x_at = x_ptr + (token * stride_xt + head * stride_xh)[:, None] + col[None, :]
    low = tl.load(x_at, mask=mask, other=0.0)
    high = tl.load(x_at + D // 2, mask=mask, other=0.0)
    low = low.to(tl.float32)
    high = high.to(tl.float32)
    cos = tl.load(cos_ptr + (token * stride_ct)[:, None] + col[None, :], mask=mask, other=0.0)
    sin = tl.load(sin_ptr + (token * stride_ct)[:, None] + (col + D // 2)[None, :], mask=mask, other=0.0)
    if INVERSE:
        sin = -sin
    new_low = tl.fma(low, cos, -(high * sin))
    new_high = tl.fma(high, cos, low * sin)
    out_at = out_ptr + (token * stride_ot + head * stride_oh)[:, None] + col[None, :]
    tl.store(out_at, new_low.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out_at + D // 2, new_high.to(out_ptr.dtype.element_ty), mask=mask)
