"""Triton kernels between the fused projection and attention: head norms, rotation, the write to the cache, and their gradient.

Legend: T = tokens, H, Hkv = query and key/value heads, D = head size. A row of qkv[T, H + 2 Hkv, D] is q, k, v heads in order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def inverse_rms(low, high, eps, D: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr):
    """1 / rms of rows given as two halves."""
    both = tl.reshape(tl.permute(tl.join(low, high), (0, 2, 1)), (ROWS, 2 * HALF))
    return 1.0 / tl.sqrt_rn(tl.sum(both * both, 1) / D + eps)


@triton.jit(do_not_specialize=["rows", "heads", "kv_heads", "moved", "stored", "q_heads", "kn", "kh", "vn", "vh"])
def turn_forward(
    qkv_ptr, cos_ptr, sin_ptr, weight_ptr, q_ptr, k_ptr, v_ptr, slot_ptr, rows, heads, kv_heads, moved, stored, q_heads,
    kn, kh, vn, vh, eps,
    D: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr, EARLY: tl.constexpr = False,
):  # fmt: skip
    """Head norm (weight[2, D]: queries, keys) and rotation of the first `moved` heads of each token.

    Queries go to row token * q_heads + head of q, keys to k[place * kn + head * kh] and values, as they are, to v, strides in
    rows of D; the place of a token is slot[token] when `stored`, else the token. The order of a row's sum follows from the layout
    that the compiler chose: training and engine must run one binary, so nothing that tells them apart is a constant here.
    """
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    token = (row // moved).to(tl.int64)
    head = row % moved
    col = tl.arange(0, HALF)
    inside = (col < D // 2)[None, :]
    mask = valid[:, None] & inside
    at = qkv_ptr + ((token * (heads + 2 * kv_heads) + head) * D)[:, None] + col[None, :]
    raw_low = tl.load(at, mask=mask, other=0.0)
    raw_high = tl.load(at + D // 2, mask=mask, other=0.0)
    dtype = raw_low.dtype
    low = raw_low
    high = raw_high
    if NORM:
        w_at = weight_ptr + tl.where(head < heads, 0, D)[:, None] + col[None, :]
        w_low = tl.load(w_at, mask=mask, other=0.0).to(tl.float32)
        w_high = tl.load(w_at + D // 2, mask=mask, other=0.0).to(tl.float32)
        low_wide = low.to(tl.float32)
        high_wide = high.to(tl.float32)
        scale = inverse_rms(low_wide, high_wide, eps, D, ROWS, HALF)
        low = ((low_wide * scale[:, None]).to(dtype).to(tl.float32) * w_low).to(dtype)
        high = ((high_wide * scale[:, None]).to(dtype).to(tl.float32) * w_high).to(dtype)
    low = low.to(tl.float32)
    high = high.to(tl.float32)
    cos = tl.load(cos_ptr + (token * D)[:, None] + col[None, :], mask=mask, other=0.0)
    sin = tl.load(sin_ptr + (token * D)[:, None] + (col + D // 2)[None, :], mask=mask, other=0.0)
    new_low = tl.fma(low, cos, -(high * sin)).to(dtype)
    new_high = tl.fma(high, cos, low * sin).to(dtype)
    is_q = valid & (head < heads)
    is_k = valid & (head >= heads) & (head < heads + kv_heads)
    is_v = valid & (head >= heads + kv_heads)
    q_at = q_ptr + ((token * q_heads + head) * D)[:, None] + col[None, :]
    tl.store(q_at, new_low, mask=is_q[:, None] & inside)
    tl.store(q_at + D // 2, new_high, mask=is_q[:, None] & inside)
    place = tl.where(stored != 0, tl.load(slot_ptr + token, mask=valid & (stored != 0), other=0), token)
    k_at = k_ptr + ((place * kn + (head - heads) * kh) * D)[:, None] + col[None, :]
    tl.store(k_at, new_low, mask=is_k[:, None] & inside)
    tl.store(k_at + D // 2, new_high, mask=is_k[:, None] & inside)
    v_at = v_ptr + ((place * vn + (head - heads - kv_heads) * vh) * D)[:, None] + col[None, :]
    tl.store(v_at, raw_low, mask=is_v[:, None] & inside)
    tl.store(v_at + D // 2, raw_high, mask=is_v[:, None] & inside)


@triton.jit
def turn_backward(
    grad_ptr, qkv_ptr, cos_ptr, sin_ptr, weight_ptr, part_ptr, tokens, heads, eps, stride_t, stride_ct,
    D: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """In place on grad[T, H + 2 Hkv, D]: gradients of turned queries and keys become those of qkv.

    One program takes ROWS * STEPS tokens of one head; part[head, block, D] is its share of the weight gradient.
    """
    head = tl.program_id(1)
    col = tl.arange(0, HALF)
    inside = (col < D // 2)[None, :]
    if NORM:
        w_at = weight_ptr + tl.where(head < heads, 0, D) + col
        w_low = tl.load(w_at, mask=col < D // 2, other=0.0).to(tl.float32)[None, :]
        w_high = tl.load(w_at + D // 2, mask=col < D // 2, other=0.0).to(tl.float32)[None, :]
    sum_low = tl.zeros((ROWS, HALF), tl.float32)
    sum_high = tl.zeros((ROWS, HALF), tl.float32)
    for step in range(STEPS):
        token = ((tl.program_id(0) * STEPS + step) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        mask = (token < tokens)[:, None] & inside
        place = (token * stride_t + head * D)[:, None] + col[None, :]
        g_low = tl.load(grad_ptr + place, mask=mask, other=0.0)
        g_high = tl.load(grad_ptr + place + D // 2, mask=mask, other=0.0)
        dtype = g_low.dtype
        cos = tl.load(cos_ptr + (token * stride_ct)[:, None] + col[None, :], mask=mask, other=0.0)
        sin = tl.load(sin_ptr + (token * stride_ct)[:, None] + (col + D // 2)[None, :], mask=mask, other=0.0)
        g_low = g_low.to(tl.float32)
        g_high = g_high.to(tl.float32)
        d_low = tl.fma(g_low, cos, g_high * sin).to(dtype)
        d_high = tl.fma(g_high, cos, -(g_low * sin)).to(dtype)
        if NORM:
            x_low = tl.load(qkv_ptr + place, mask=mask, other=0.0).to(tl.float32)
            x_high = tl.load(qkv_ptr + place + D // 2, mask=mask, other=0.0).to(tl.float32)
            scale = inverse_rms(x_low, x_high, eps, D, ROWS, HALF)[:, None]
            n_low = x_low * scale
            n_high = x_high * scale
            r_low = d_low.to(tl.float32)
            r_high = d_high.to(tl.float32)
            sum_low += r_low * n_low.to(dtype).to(tl.float32)
            sum_high += r_high * n_high.to(dtype).to(tl.float32)
            r_low *= w_low
            r_high *= w_high
            inner = (tl.sum(r_low * n_low, 1) + tl.sum(r_high * n_high, 1)) / D
            d_low = ((r_low - n_low * inner[:, None]) * scale).to(dtype)
            d_high = ((r_high - n_high * inner[:, None]) * scale).to(dtype)
        tl.store(grad_ptr + place, d_low, mask=mask)
        tl.store(grad_ptr + place + D // 2, d_high, mask=mask)
    if NORM:
        base = (head * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * D
        tl.store(part_ptr + base + col, tl.sum(sum_low, 0), mask=col < D // 2)
        tl.store(part_ptr + base + D // 2 + col, tl.sum(sum_high, 0), mask=col < D // 2)


@triton.jit
def sum_kinds(part_ptr, out_ptr, blocks, heads, kv_heads, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """out[2, D]: the shares of all query heads, then those of all key heads, each summed in one fixed order."""
    kind = tl.program_id(1)
    first = tl.where(kind == 0, 0, heads) * blocks
    count = tl.where(kind == 0, heads, kv_heads) * blocks
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    total = tl.zeros((ROWS, COLS), tl.float32)
    for start in tl.range(0, count, ROWS, num_stages=3):
        row = start + tl.arange(0, ROWS)
        at = part_ptr + (first + row).to(tl.int64)[:, None] * D + col[None, :]
        total += tl.load(at, mask=(row < count)[:, None] & (col < D)[None, :], other=0.0)
    tl.store(out_ptr + kind * D + col, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=col < D)
