"""The attention forward for long query tiles on Hopper: one warp loads, two groups of four warps compute 64 rows each.

Legend and order of every sum as in `attention_kernels`: keys in ascending blocks of 64 inside chunks of 512, row sums by a
product with ones, chunks folded left to right; the bits are equal. Here keys and values arrive by bulk copies, pages (a multiple
of 64 slots) are looked up by the loading warp, and one group's softmax runs while the other group multiplies.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

thread_barrier = getattr(gl, "thread_barrier", None) or gl.barrier  # its name until triton 3.6, and from 3.7 on
BN = gl.constexpr(64)
ROWS = gl.constexpr(64)


@gluon.jit
def load_keys(
    k_desc, v_desc, k_smem, v_smem, k_full, k_empty, v_full, v_empty, table, kv_head, kv_start, first, stop,
    head_rows, head_cols_k, head_cols_v, PAGE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The loading warp: key and value blocks into a ring of STAGES buffers each."""
    count = 0
    for start in range(first, stop, BN):
        index = count % STAGES
        phase = (count // STAGES) & 1
        if PAGE == 0:
            slot = kv_start + start
        else:
            slot = gl.load(table + start // PAGE) * PAGE + start % PAGE
        slot += kv_head * head_rows
        mbarrier.wait(k_empty.index(index), phase ^ 1)
        mbarrier.expect(k_full.index(index), k_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(k_desc, [slot, kv_head * head_cols_k], k_full.index(index), k_smem.index(index))
        mbarrier.wait(v_empty.index(index), phase ^ 1)
        mbarrier.expect(v_full.index(index), v_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(v_desc, [slot, kv_head * head_cols_v], v_full.index(index), v_smem.index(index))
        count += 1


@gluon.jit
def softmax_block(s, c_top, start, position, limit, scale_log2, s_layout: gl.constexpr, WINDOW: gl.constexpr):
    """(p, new running maximum, rescale of the old state) of one block of scores."""
    if start + BN > limit:
        key = start + gl.arange(0, BN, gl.SliceLayout(0, s_layout))
        seen = key[None, :] <= position[:, None]
        if WINDOW > 0:
            seen = seen & (key[None, :] > position[:, None] - WINDOW)
        s = gl.where(seen, s, float("-inf"))
    elif WINDOW > 0:
        key = start + gl.arange(0, BN, gl.SliceLayout(0, s_layout))
        s = gl.where(key[None, :] > position[:, None] - WINDOW, s, float("-inf"))
    new_top = gl.maximum(c_top, gl.max(s, 1) * scale_log2)
    safe = gl.where(new_top == float("-inf"), 0.0, new_top)
    p = gl.exp2(
        gl.fma(s, gl.full([ROWS, BN], 1.0, gl.float32, s_layout) * scale_log2, gl.expand_dims(-safe, 1).broadcast_to([ROWS, BN]))
    )
    keep = gl.exp2(c_top - safe)
    return p, new_top, keep


@gluon.jit
def compute(
    GROUP: gl.constexpr, q_ptr, o_ptr, lse_ptr, q_smem, k_smem, v_smem, ones_smem, k_full, k_empty, v_full, v_empty,
    tile, q_start, q_len, kv_len, kv_head, first, stop, scale_log2, heads, stride_qt, stride_qh, stride_ot, stride_oh,
    G: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, SPLIT: gl.constexpr, WINDOW: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One group of four warps: 64 packed rows against all key blocks."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DV, 16])
    l_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 8, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=o_layout, k_width=2)
    pl_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=l_layout, k_width=2)
    load_layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    l_rows: gl.constexpr = gl.SliceLayout(1, l_layout)
    base = tile * (2 * ROWS) + GROUP * ROWS
    offset = kv_len - q_len
    # queries of this group into shared memory
    row = base + gl.arange(0, ROWS, gl.SliceLayout(1, load_layout))
    dim = gl.arange(0, D, gl.SliceLayout(0, load_layout))
    at = (q_start + row // G).to(gl.int64) * stride_qt + (kv_head * G + row % G) * stride_qh
    q = gl.load(q_ptr + gl.expand_dims(at, 1) + gl.expand_dims(dim, 0), mask=gl.expand_dims(row < q_len * G, 1), other=0.0)
    q_tile = q_smem.index(GROUP)
    q_tile.store(q)
    fence_async_shared()
    thread_barrier()
    position = offset + (base + gl.arange(0, ROWS, s_rows)) // G
    # keys up to `limit` are seen by every row of this group
    limit = offset + base // G + 1
    top = gl.full([ROWS], float("-inf"), gl.float32, s_rows)
    total = gl.full([ROWS], 0.0, gl.float32, l_rows)
    out = gl.full([ROWS, DV], 0.0, gl.float32, o_layout)
    c_total = gl.full([ROWS, 8], 0.0, gl.float32, l_layout)
    c_out = gl.full([ROWS, DV], 0.0, gl.float32, o_layout)
    zero_s = gl.full([ROWS, BN], 0.0, gl.float32, s_layout)
    # the first block's scores and softmax
    mbarrier.wait(k_full.index(0), 0)
    s = warpgroup_mma(q_tile, k_smem.index(0).permute((1, 0)), zero_s, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    thread_barrier()
    mbarrier.arrive(k_empty.index(0), count=1)
    c_top = gl.full([ROWS], float("-inf"), gl.float32, s_rows)
    p, c_top, keep = softmax_block(s, c_top, first, position, limit, scale_log2, s_layout, WINDOW)
    p16 = p.to(q_ptr.dtype.element_ty)
    count = 1
    for start in range(first + BN, stop, BN):
        index = count % STAGES
        phase = (count // STAGES) & 1
        old = (count - 1) % STAGES
        mbarrier.wait(k_full.index(index), phase)
        s = warpgroup_mma(q_tile, k_smem.index(index).permute((1, 0)), zero_s, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(old), ((count - 1) // STAGES) & 1)
        c_out = warpgroup_mma(gl.convert_layout(p16, p_layout), v_smem.index(old), c_out, is_async=True)
        c_total = warpgroup_mma(gl.convert_layout(p16, pl_layout), ones_smem, c_total, is_async=True)
        s = warpgroup_mma_wait(2, deps=[s])
        thread_barrier()
        mbarrier.arrive(k_empty.index(index), count=1)
        boundary = start % SPLIT == 0
        old_top = c_top
        if boundary:
            c_top = gl.full([ROWS], float("-inf"), gl.float32, s_rows)
        p, c_top, keep = softmax_block(s, c_top, start, position, limit, scale_log2, s_layout, WINDOW)
        # meant to keep the softmax before the wait; ptxas of CUDA 13.0 moves it behind all the same
        c_out, c_total, p = warpgroup_mma_wait(0, deps=[c_out, c_total, p])
        thread_barrier()
        mbarrier.arrive(v_empty.index(old), count=1)
        p16 = p.to(q_ptr.dtype.element_ty)
        if boundary:
            top, total, out = fold(top, total, out, old_top, c_total, c_out, s_rows, o_rows, l_rows)
            c_out = gl.full([ROWS, DV], 0.0, gl.float32, o_layout)
            c_total = gl.full([ROWS, 8], 0.0, gl.float32, l_layout)
        else:
            c_out = c_out * gl.expand_dims(gl.convert_layout(keep, o_rows), 1)
            c_total = c_total * gl.expand_dims(gl.convert_layout(keep, l_rows), 1)
        count += 1
    # the last block's values; keys beyond the sequence belong to a neighbour and must not leak, not even as 0 * inf
    old = (count - 1) % STAGES
    mbarrier.wait(v_full.index(old), ((count - 1) // STAGES) & 1)
    last = first + (count - 1) * BN
    if last + BN > kv_len:
        key = last + gl.arange(0, BN, gl.SliceLayout(1, load_layout))
        value = v_smem.index(old).load(load_layout)
        value = gl.where(gl.expand_dims(key < kv_len, 1), value, gl.full([BN, DV], 0.0, value.dtype, load_layout))
        v_smem.index(old).store(value)
        fence_async_shared()
        thread_barrier()
    c_out = warpgroup_mma(gl.convert_layout(p16, p_layout), v_smem.index(old), c_out, is_async=True)
    c_total = warpgroup_mma(gl.convert_layout(p16, pl_layout), ones_smem, c_total, is_async=True)
    c_out, c_total = warpgroup_mma_wait(0, deps=[c_out, c_total])
    top, total, out = fold(top, total, out, c_top, c_total, c_out, s_rows, o_rows, l_rows)
    lse = gl.convert_layout(top, l_rows) + gl.log2(total)
    out = out * gl.expand_dims(gl.convert_layout(1.0 / total, o_rows), 1)
    row_o = base + gl.arange(0, ROWS, o_rows)
    at_o = (q_start + row_o // G).to(gl.int64) * stride_ot + (kv_head * G + row_o % G) * stride_oh
    dim_o = gl.arange(0, DV, gl.SliceLayout(0, o_layout))
    place = o_ptr + gl.expand_dims(at_o, 1) + gl.expand_dims(dim_o, 0)
    gl.store(place, out.to(o_ptr.dtype.element_ty), mask=gl.expand_dims(row_o < q_len * G, 1))
    row_l = base + gl.arange(0, ROWS, l_rows)
    gl.store(lse_ptr + (q_start + row_l // G) * heads + kv_head * G + row_l % G, lse, mask=row_l < q_len * G)


@gluon.jit
def fold(top, total, out, part_top, part_total, part_out, s_rows: gl.constexpr, o_rows: gl.constexpr, l_rows: gl.constexpr):
    """As `attention_kernels.fold`."""
    new_top = gl.maximum(top, part_top)
    safe = gl.where(new_top == float("-inf"), 0.0, new_top)
    keep = gl.exp2(top - safe)
    add = gl.exp2(part_top - safe)
    row_total = gl.max(part_total, 1)
    total = gl.fma(row_total, gl.convert_layout(add, l_rows), total * gl.convert_layout(keep, l_rows))
    keep_o = gl.expand_dims(gl.convert_layout(keep, o_rows), 1)
    add_o = gl.expand_dims(gl.convert_layout(add, o_rows), 1)
    out = gl.fma(part_out, add_o.broadcast_to(part_out.shape), out * keep_o)
    return new_top, total, out


@gluon.jit
def attend_ws(
    q_ptr, k_desc, v_desc, o_ptr, lse_ptr, table_ptr, cu_q_ptr, kv_len_ptr, kv_start_ptr,
    scale_log2, heads, stride_qt, stride_qh, stride_ot, stride_oh, stride_table, head_rows, head_cols_k, head_cols_v,
    G: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, SPLIT: gl.constexpr, WINDOW: gl.constexpr, PAGE: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """128 packed rows of one (sequence, key/value head)."""
    tile = gl.num_programs(0) - 1 - gl.program_id(0)
    kv_head = gl.program_id(1)
    seq = gl.program_id(2)
    q_start = gl.load(cu_q_ptr + seq)
    q_len = gl.load(cu_q_ptr + seq + 1) - q_start
    kv_len = gl.load(kv_len_ptr + seq)
    kv_start = 0
    if PAGE == 0:
        kv_start = gl.load(kv_start_ptr + seq)
    table = table_ptr + seq * stride_table
    first = 0
    if WINDOW > 0:
        first = gl.maximum(0, kv_len - q_len + (tile * 128) // G - WINDOW + 1) // BN * BN
    last_token = gl.minimum((tile * 128 + 127) // G, q_len - 1)
    stop = kv_len - q_len + last_token + 1

    dtype: gl.constexpr = q_ptr.dtype.element_ty
    q_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D], dtype)
    ones_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([8, BN], dtype)
    q_smem = gl.allocate_shared_memory(dtype, [2, ROWS, D], q_shared)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, BN, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, BN, DV], v_desc.layout)
    ones_smem = gl.allocate_shared_memory(dtype, [8, BN], ones_shared)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_empty.index(i), count=2)
    ones_layout: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])
    ones_smem.store(gl.full([8, BN], 1.0, dtype, ones_layout))
    fence_async_shared()
    thread_barrier()
    ones = ones_smem.permute((1, 0))
    # a tile beyond the sequence has no rows: no keys are loaded and nothing is stored
    if tile * 128 < q_len * G:
        gl.warp_specialize(
            [
                (
                    compute,
                    (
                        0, q_ptr, o_ptr, lse_ptr, q_smem, k_smem, v_smem, ones, k_full, k_empty, v_full, v_empty,
                        tile, q_start, q_len, kv_len, kv_head, first, stop, scale_log2, heads,
                        stride_qt, stride_qh, stride_ot, stride_oh, G, D, DV, SPLIT, WINDOW, STAGES,
                    ),
                ),
                (
                    compute,
                    (
                        1, q_ptr, o_ptr, lse_ptr, q_smem, k_smem, v_smem, ones, k_full, k_empty, v_full, v_empty,
                        tile, q_start, q_len, kv_len, kv_head, first, stop, scale_log2, heads,
                        stride_qt, stride_qh, stride_ot, stride_oh, G, D, DV, SPLIT, WINDOW, STAGES,
                    ),
                ),
                (
                    load_keys,
                    (
                        k_desc, v_desc, k_smem, v_smem, k_full, k_empty, v_full, v_empty, table, kv_head, kv_start, first, stop,
                        head_rows, head_cols_k, head_cols_v, PAGE, STAGES,
                    ),
                ),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip
