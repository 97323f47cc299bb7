"""Triton kernels of the attention backward: no atomics, every gradient element is summed by one program in one order.

Legend as in `attention_kernels`. Keys and values lie in one stream (training). Two passes over the scores: one program per key
block sums dk and dv over the (token, head of the group) rows that see it, ascending; one program per query tile sums dq over
key blocks, ascending. Tiles are anchored at the start of their sequence, so the split into micro-batches changes no bit.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_delta(o_ptr, do_ptr, delta_ptr, rows, stride_ot, stride_oh, stride_dt, stride_dh, heads,
              DV: tl.constexpr, DV_PAD: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """delta[T, H] = sum over DV of o * do, fp32."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    token = (row // heads).to(tl.int64)
    head = row % heads
    dim = tl.arange(0, DV_PAD)
    mask = valid[:, None] & (dim < DV)[None, :]
    o = tl.load(o_ptr + (token * stride_ot + head * stride_oh)[:, None] + dim[None, :], mask=mask, other=0.0)
    do = tl.load(do_ptr + (token * stride_dt + head * stride_dh)[:, None] + dim[None, :], mask=mask, other=0.0)
    tl.store(delta_ptr + row, tl.sum(o.to(tl.float32) * do.to(tl.float32), 1), mask=valid)


@triton.jit
def grad_kv(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, cu_q_ptr, kv_len_ptr, kv_start_ptr,
    scale, scale_log2, heads,
    stride_qt, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh, stride_dt, stride_dh,
    stride_gkn, stride_gkh, stride_gvn, stride_gvh,
    G: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, WINDOW: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of BK keys of one (sequence, key/value head)."""
    kv_head = tl.program_id(1)
    seq = tl.program_id(2)
    kv_len = tl.load(kv_len_ptr + seq)
    start = tl.program_id(0) * BK
    if start >= kv_len:
        return
    q_start = tl.load(cu_q_ptr + seq)
    q_len = tl.load(cu_q_ptr + seq + 1) - q_start
    kv_start = tl.load(kv_start_ptr + seq).to(tl.int64)
    key = start + tl.arange(0, BK)
    inside = key < kv_len
    dim = tl.arange(0, D_PAD)
    dim_v = tl.arange(0, DV_PAD)
    k_mask = inside[:, None] & (dim < D)[None, :]
    v_mask = inside[:, None] & (dim_v < DV)[None, :]
    slot = kv_start + key
    k = tl.load(k_ptr + kv_head * stride_kh + slot[:, None] * stride_kn + dim[None, :], mask=k_mask, other=0.0)
    v = tl.load(v_ptr + kv_head * stride_vh + slot[:, None] * stride_vn + dim_v[None, :], mask=v_mask, other=0.0)
    dk = tl.zeros((BK, D_PAD), tl.float32)
    dv = tl.zeros((BK, DV_PAD), tl.float32)
    offset = kv_len - q_len
    first_row = tl.maximum(0, start - offset) * G // BM * BM
    last_row = q_len * G
    if WINDOW > 0:
        last_row = tl.minimum(last_row, tl.maximum(0, start + BK - 1 + WINDOW - offset) * G)
    for begin in tl.range(first_row, last_row, BM, num_stages=STAGES):
        row = begin + tl.arange(0, BM)
        valid = row < q_len * G
        token = row // G
        head = kv_head * G + row % G
        at = (q_start + token).to(tl.int64)
        q = tl.load(
            q_ptr + (at * stride_qt + head * stride_qh)[:, None] + dim[None, :],
            mask=valid[:, None] & (dim < D)[None, :],
            other=0.0,
        )
        do = tl.load(
            do_ptr + (at * stride_dt + head * stride_dh)[:, None] + dim_v[None, :],
            mask=valid[:, None] & (dim_v < DV)[None, :],
            other=0.0,
        )
        lse = tl.load(lse_ptr + at * heads + head, mask=valid, other=float("inf"))
        delta = tl.load(delta_ptr + at * heads + head, mask=valid, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision="ieee")
        position = offset + token
        seen = (key[:, None] <= position[None, :]) & valid[None, :]
        if WINDOW > 0:
            seen = seen & (key[:, None] > position[None, :] - WINDOW)
        p = tl.where(seen, tl.exp2(tl.fma(s, scale_log2, -lse[None, :])), 0.0)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        dp = tl.dot(v, tl.trans(do), input_precision="ieee")
        ds = (p * (dp - delta[None, :])).to(q.dtype)
        dk = tl.dot(ds, q, dk, input_precision="ieee")
    dk *= scale
    tl.store(
        dk_ptr + kv_head * stride_gkh + slot[:, None] * stride_gkn + dim[None, :], dk.to(dk_ptr.dtype.element_ty), mask=k_mask
    )
    tl.store(
        dv_ptr + kv_head * stride_gvh + slot[:, None] * stride_gvn + dim_v[None, :], dv.to(dv_ptr.dtype.element_ty), mask=v_mask
    )


@triton.jit
def grad_q(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, cu_q_ptr, kv_len_ptr, kv_start_ptr,
    scale, scale_log2, heads,
    stride_qt, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh, stride_dt, stride_dh, stride_gt, stride_gh,
    G: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, WINDOW: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dq of one tile of BM (token, head) rows of one (sequence, key/value head)."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    seq = tl.program_id(2)
    q_start = tl.load(cu_q_ptr + seq)
    q_len = tl.load(cu_q_ptr + seq + 1) - q_start
    kv_len = tl.load(kv_len_ptr + seq)
    if tile * BM >= q_len * G:
        return
    kv_start = tl.load(kv_start_ptr + seq).to(tl.int64)
    offset = kv_len - q_len
    row = tile * BM + tl.arange(0, BM)
    valid = row < q_len * G
    token = row // G
    head = kv_head * G + row % G
    position = offset + token
    at = (q_start + token).to(tl.int64)
    dim = tl.arange(0, D_PAD)
    dim_v = tl.arange(0, DV_PAD)
    q_mask = valid[:, None] & (dim < D)[None, :]
    q = tl.load(q_ptr + (at * stride_qt + head * stride_qh)[:, None] + dim[None, :], mask=q_mask, other=0.0)
    do = tl.load(
        do_ptr + (at * stride_dt + head * stride_dh)[:, None] + dim_v[None, :],
        mask=valid[:, None] & (dim_v < DV)[None, :],
        other=0.0,
    )
    lse = tl.load(lse_ptr + at * heads + head, mask=valid, other=float("inf"))
    delta = tl.load(delta_ptr + at * heads + head, mask=valid, other=0.0)
    stop = offset + tl.minimum((tile * BM + BM - 1) // G, q_len - 1) + 1
    first = 0
    if WINDOW > 0:
        first = tl.maximum(0, offset + (tile * BM) // G - WINDOW + 1) // BK * BK
    dq = tl.zeros((BM, D_PAD), tl.float32)
    for start in tl.range(first, stop, BK, num_stages=STAGES):
        key = start + tl.arange(0, BK)
        inside = key < kv_len
        slot = kv_start + key
        k = tl.load(
            k_ptr + kv_head * stride_kh + slot[:, None] * stride_kn + dim[None, :],
            mask=inside[:, None] & (dim < D)[None, :],
            other=0.0,
        )
        v = tl.load(
            v_ptr + kv_head * stride_vh + slot[:, None] * stride_vn + dim_v[None, :],
            mask=inside[:, None] & (dim_v < DV)[None, :],
            other=0.0,
        )
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        seen = key[None, :] <= position[:, None]
        if WINDOW > 0:
            seen = seen & (key[None, :] > position[:, None] - WINDOW)
        p = tl.where(seen, tl.exp2(tl.fma(s, scale_log2, -lse[:, None])), 0.0)
        ds = (p * (dp - delta[:, None])).to(k.dtype)
        dq = tl.dot(ds, k, dq, input_precision="ieee")
    dq *= scale
    tl.store(dq_ptr + (at * stride_gt + head * stride_gh)[:, None] + dim[None, :], dq.to(dq_ptr.dtype.element_ty), mask=q_mask)
