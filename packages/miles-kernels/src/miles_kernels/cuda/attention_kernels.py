"""Triton kernels of the attention forward: one kernel for prefill, chunks, verification and decode, and the fold of its partials.

Legend: B = sequences, T = packed query tokens, H = query heads, Hkv = key/value heads, G = H / Hkv, D = head size of q and k,
DV = head size of v, BM = packed rows per program, BN = keys per block, C = chunks of `SPLIT` keys.

A program's rows are (token, head of the group) pairs, so a decode step of G heads and a verification step of 2 to 8 tokens fill
one tile. Bits of a row depend on the order of reductions only, and that is fixed: keys in ascending blocks of 64 inside
ascending chunks of 512, row sums by a product with ones (a `tl.sum` follows the warp layout), chunks folded left to right.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

BLOCK_N = tl.constexpr(64)


@triton.jit
def fold(top, total, acc, part_top, part_total, part_acc):
    """Fold the state of the next chunk into the running state. An empty chunk leaves every bit as it was."""
    new_top = tl.maximum(top, part_top)
    safe = tl.where(new_top == float("-inf"), 0.0, new_top)
    keep = tl.exp2(top - safe)
    add = tl.exp2(part_top - safe)
    total = tl.fma(part_total, add, total * keep)
    acc = tl.fma(part_acc, tl.broadcast_to(add[:, None], part_acc.shape), acc * keep[:, None])
    return new_top, total, acc


@triton.jit
def slots(start, lane, limit, table, kv_start, PAGE: tl.constexpr):
    """Pool slots of keys start .. start + BN of one sequence; the last valid one where a lane is beyond `limit`."""
    if PAGE == 0:
        return (kv_start + start + lane).to(tl.int64)
    elif PAGE >= 64:
        page = tl.load(table + start // PAGE).to(tl.int64)
        return page * PAGE + start % PAGE + lane
    else:
        key = tl.minimum(start + lane, limit - 1)
        page = tl.load(table + key // PAGE).to(tl.int64)
        return page * PAGE + key % PAGE


@triton.jit
def start_early(EARLY: tl.constexpr):
    """With EARLY: let the next kernel be launched, and wait until what the one before it wrote can be seen."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def attend(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, part_ptr, part_top_ptr, part_total_ptr,
    table_ptr, cu_q_ptr, kv_len_ptr, kv_start_ptr, scale_log2, heads, chunks,
    stride_qt, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh, stride_ot, stride_oh, stride_table,
    G: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr, BM: tl.constexpr,
    SPLIT: tl.constexpr, WINDOW: tl.constexpr, PAGE: tl.constexpr, PARTIAL: tl.constexpr, STAGES: tl.constexpr,
    EARLY: tl.constexpr = False,
):  # fmt: skip
    """Rows of one tile of one (sequence, key/value head) against all their keys, or against one chunk when PARTIAL."""
    start_early(EARLY)
    if PARTIAL:
        tile, only = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    else:
        tile = tl.num_programs(0) - 1 - tl.program_id(0)
        only = 0
    kv_head, seq = tl.program_id(1), tl.program_id(2)
    q_start = tl.load(cu_q_ptr + seq)
    q_len = tl.load(cu_q_ptr + seq + 1) - q_start
    kv_len = tl.load(kv_len_ptr + seq)
    if tile * BM >= q_len * G:
        return
    kv_start = tl.load(kv_start_ptr + seq) if PAGE == 0 else 0
    table = table_ptr + seq.to(tl.int64) * stride_table
    row = tile * BM + tl.arange(0, BM)
    valid = row < q_len * G
    token = row // G
    head = kv_head * G + row % G
    k_head = k_ptr + kv_head.to(tl.int64) * stride_kh  # heads of a large pool lie further apart than an int32 counts
    v_head = v_ptr + kv_head.to(tl.int64) * stride_vh
    position = kv_len - q_len + token
    dim = tl.arange(0, D_PAD)
    dim_v = tl.arange(0, DV_PAD)
    lane = tl.arange(0, BLOCK_N)
    q_offset = (q_start + token).to(tl.int64) * stride_qt + head * stride_qh
    q_mask = valid[:, None]
    if D != D_PAD:
        q_mask = q_mask & (dim < D)[None, :]
    q = tl.load(q_ptr + q_offset[:, None] + dim[None, :], mask=q_mask, other=0.0)
    ones = tl.full((BLOCK_N, 16), 1.0, q.dtype)

    last_token = tl.minimum((tile * BM + BM - 1) // G, q_len - 1)
    stop = kv_len - q_len + last_token + 1
    first = 0
    if WINDOW > 0:
        first = tl.maximum(0, kv_len - q_len + (tile * BM) // G - WINDOW + 1) // BLOCK_N * BLOCK_N
    first_chunk = first // SPLIT
    last_chunk = tl.cdiv(stop, SPLIT)
    if PARTIAL:
        first_chunk = tl.maximum(first_chunk, only)
        last_chunk = tl.minimum(last_chunk, only + 1)

    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    out = tl.zeros((BM, DV_PAD), tl.float32)
    for chunk in range(first_chunk, last_chunk):
        c_top = tl.full((BM,), float("-inf"), tl.float32)
        c_total = tl.zeros((BM, 16), tl.float32)
        c_out = tl.zeros((BM, DV_PAD), tl.float32)
        begin = tl.maximum(chunk * SPLIT, first)
        end = tl.minimum(chunk * SPLIT + SPLIT, stop)
        for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
            slot = slots(start, lane, kv_len, table, kv_start, PAGE)
            key = start + lane
            inside = key < kv_len
            k_mask = inside[:, None]
            if D != D_PAD:
                k_mask = k_mask & (dim < D)[None, :]
            k = tl.load(k_head + slot[:, None] * stride_kn + dim[None, :], mask=k_mask, other=0.0)
            v_mask = inside[:, None]
            if DV != DV_PAD:
                v_mask = v_mask & (dim_v < DV)[None, :]
            v = tl.load(v_head + slot[:, None] * stride_vn + dim_v[None, :], mask=v_mask, other=0.0)
            s = tl.dot(q, tl.trans(k), input_precision="ieee")
            seen = key[None, :] <= position[:, None]
            if WINDOW > 0:
                seen = seen & (key[None, :] > position[:, None] - WINDOW)
            s = tl.where(seen, s, float("-inf"))
            new_top = tl.maximum(c_top, tl.max(s, 1) * scale_log2)
            safe = tl.where(new_top == float("-inf"), 0.0, new_top)
            p = tl.exp2(tl.fma(s, tl.full(s.shape, 1.0, tl.float32) * scale_log2, tl.broadcast_to(-safe[:, None], s.shape)))
            keep = tl.exp2(c_top - safe)
            p = p.to(q.dtype)
            c_total = tl.dot(p, ones, c_total * keep[:, None], input_precision="ieee")
            c_out = tl.dot(p, v, c_out * keep[:, None], input_precision="ieee")
            c_top = new_top
        top, total, out = fold(top, total, out, c_top, tl.max(c_total, 1), c_out)

    if PARTIAL:
        place = ((q_start + token).to(tl.int64) * heads + head) * chunks + only
        tl.store(part_top_ptr + place, top, mask=valid)
        tl.store(part_total_ptr + place, total, mask=valid)
        o_mask = valid[:, None] & (dim_v < DV)[None, :]
        tl.store(part_ptr + place[:, None] * DV + dim_v[None, :], out, mask=o_mask)
    else:
        lse = top + tl.log2(total)
        result = out * (1.0 / total)[:, None]
        o_offset = (q_start + token).to(tl.int64) * stride_ot + head * stride_oh
        o_mask = valid[:, None] & (dim_v < DV)[None, :]
        tl.store(o_ptr + o_offset[:, None] + dim_v[None, :], result.to(o_ptr.dtype.element_ty), mask=o_mask)
        tl.store(lse_ptr + (q_start + token) * heads + head, lse, mask=valid)


@triton.jit
def fold_partials(
    part_ptr, part_top_ptr, part_total_ptr, o_ptr, lse_ptr, cu_q_ptr, kv_len_ptr, heads, chunks, stride_ot, stride_oh,
    DV: tl.constexpr, DV_PAD: tl.constexpr, SPLIT: tl.constexpr, WINDOW: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One (query token, group of ROWS heads): its chunks folded left to right, as `attend` does in registers."""
    seq = tl.program_id(2)
    q_start = tl.load(cu_q_ptr + seq)
    q_len = tl.load(cu_q_ptr + seq + 1) - q_start
    token = tl.program_id(0)
    if token >= q_len:
        return
    position = tl.load(kv_len_ptr + seq) - q_len + token
    first = 0
    if WINDOW > 0:
        first = tl.maximum(0, position - WINDOW + 1) // SPLIT
    last = position // SPLIT + 1
    head = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    valid = head < heads
    dim_v = tl.arange(0, DV_PAD)
    mask = valid[:, None] & (dim_v < DV)[None, :]
    place = ((q_start + token).to(tl.int64) * heads + head) * chunks
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    out = tl.zeros((ROWS, DV_PAD), tl.float32)
    for chunk in tl.range(first, last, num_stages=4):
        part_top = tl.load(part_top_ptr + place + chunk, mask=valid, other=float("-inf"))
        part_total = tl.load(part_total_ptr + place + chunk, mask=valid, other=0.0)
        part = tl.load(part_ptr + (place + chunk)[:, None] * DV + dim_v[None, :], mask=mask, other=0.0)
        top, total, out = fold(top, total, out, part_top, part_total, part)
    lse = top + tl.log2(total)
    result = out * (1.0 / total)[:, None]
    offset = (q_start + token).to(tl.int64) * stride_ot + head * stride_oh
    tl.store(o_ptr + offset[:, None] + dim_v[None, :], result.to(o_ptr.dtype.element_ty), mask=mask)
    tl.store(lse_ptr + (q_start + token) * heads + head, lse, mask=valid)
