"""Experts of a handful of tokens: every (token, slot) pair is a tile of its own, so nothing is sorted. Two launches, of which the
second has its weights on the way before its input exists."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

thread_barrier = getattr(gl, "thread_barrier", None) or gl.barrier  # its name until triton 3.6, and from 3.7 on
DEPTH = gl.constexpr(256)
SLOTS = gl.constexpr(8)


@triton.jit
def one_row(row, left, BK: tl.constexpr):
    """row[0 : BK] (zeros from `left` on) as the first of 16 rows, the others zero."""
    ks = tl.arange(0, BK)
    lanes = tl.arange(0, 16)
    return tl.load(row + ks[None, :] + lanes[:, None] * 0, mask=(ks < left)[None, :] & (lanes == 0)[:, None], other=0.0)


@triton.jit
def few_up(x, w, ids, out, slots, stride_x, N, K, BN: tl.constexpr, BK: tl.constexpr, EARLY: tl.constexpr):
    """out[pair, N] = silu(gate) * up of x[pair // slots]; w described as [2 E, N, K] in blocks [2, BN, BK], gate over up.

    `EARLY`: launched before its predecessor has ended, for which it waits; then it lets its successor start.
    """
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    blocks = tl.cdiv(N, BN)
    pair = tl.program_id(0) // blocks
    col = tl.program_id(0) % blocks * BN
    expert = tl.load(ids + pair).to(tl.int32)
    row = x + (pair // slots).to(tl.int64) * stride_x
    both = tl.zeros((16, 2 * BN), dtype=tl.float32)
    for k in range(0, K, BK):
        b = tl.reshape(w.load([expert * 2, col, k]), (2 * BN, BK))
        both = tl.dot(one_row(row + k, K - k, BK), b.T, both)
    first = tl.sum(tl.where((tl.arange(0, 16) == 0)[:, None], both, 0.0), 0)
    g, u = tl.split(tl.permute(tl.reshape(first, (2, BN)), (1, 0)))
    kind = out.dtype.element_ty
    g = g.to(kind).to(tl.float32)
    u = u.to(kind).to(tl.float32)
    cols = col + tl.arange(0, BN)
    tl.store(out + pair.to(tl.int64) * N + cols, (g / (1.0 + tl.exp(-g)) * u).to(kind), mask=cols < N)


@gluon.jit
def ask_weights(target, w, first, chunk, K, layout: gl.constexpr):
    """Columns `chunk * DEPTH` .. of the weight rows `first` (none where negative) on their way into `target`."""
    ks = chunk * DEPTH + gl.arange(0, DEPTH, gl.SliceLayout(0, layout))
    keep = gl.expand_dims(first >= 0, 1) & gl.expand_dims(ks < K, 0)
    async_copy.async_copy_global_to_shared(target, w + (gl.expand_dims(first, 1) * K + gl.expand_dims(ks, 0)), mask=keep)
    async_copy.commit_group()


@gluon.jit
def copy_input(target, inner, first, chunk, K, layout: gl.constexpr):
    """Columns `chunk * DEPTH` .. of a token's inputs, one row per slot (zeros where `first` is negative), into `target`."""
    ks = chunk * DEPTH + gl.arange(0, DEPTH, gl.SliceLayout(0, layout))
    keep = gl.expand_dims(first >= 0, 1) & gl.expand_dims(ks < K, 0)
    target.store(gl.load(inner + (gl.expand_dims(first, 1) * K + gl.expand_dims(ks, 0)), mask=keep, other=0.0))


@gluon.jit
def few_down(inner, w, ids, weights, out, N, K, COUNT: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, EARLY: gl.constexpr):
    """out[t, N] = sum over slots s of weights[t, s] * y[s], y[s] = inner[t, s] w[ids[t, s]]^T in out's dtype; float32, in slot
    order, one rounding. w [E, N, K], inner [T * COUNT, K], COUNT <= 8, BN divides N.

    One program per token and BN columns: one product whose rows are (slot, column) and whose columns are the inputs of the
    slots, of which each row keeps its own. `EARLY`: launched before `few_up` has ended, whose end it waits for once it has asked
    for its weights; `ids` must be older than `few_up`. It lets its own successor start only when its products are done: programs
    that came earlier would lie unevenly over the multiprocessors.
    """
    warps: gl.constexpr = SLOTS * BN // 16
    rows_in: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [warps, 1], [1, 0])
    held: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[warps, 1], instr_shape=[16, 8])
    line: gl.constexpr = gl.BlockedLayout([1], [32], [warps], [0])
    token = gl.program_id(0) // (N // BN)
    col = gl.program_id(0) % (N // BN) * BN
    row = gl.arange(0, SLOTS * BN, gl.SliceLayout(1, rows_in))
    expert = gl.load(ids + token * COUNT + row // BN, mask=row // BN < COUNT, other=-1).to(gl.int64)
    first = gl.where(expert >= 0, expert * N + col + row % BN, -1)
    ring = gl.allocate_shared_memory(w.dtype.element_ty, [STAGES, SLOTS * BN, DEPTH], held)
    for i in gl.static_range(STAGES):
        ask_weights(ring.index(i), w, first, i, K, rows_in)
    if EARLY:
        gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    slot = gl.arange(0, SLOTS, gl.SliceLayout(1, rows_in))
    source = gl.where(slot < COUNT, token * COUNT + slot, -1).to(gl.int64)
    vectors = gl.allocate_shared_memory(w.dtype.element_ty, [STAGES, SLOTS, DEPTH], held)
    for i in gl.static_range(STAGES):
        copy_input(vectors.index(i), inner, source, i, K, rows_in)
    acc = gl.full([SLOTS * BN, SLOTS], 0.0, gl.float32, mma)
    chunks = (K + DEPTH - 1) // DEPTH
    for chunk in range(chunks):
        at = chunk % STAGES
        async_copy.wait_group(STAGES - 1)
        a = ring.index(at).load(gl.DotOperandLayout(0, mma, 2))
        acc = mma_v2(a, vectors.index(at).permute((1, 0)).load(gl.DotOperandLayout(1, mma, 2)), acc)
        if chunk + STAGES < chunks:
            thread_barrier()
            copy_input(vectors.index(at), inner, source, chunk + STAGES, K, rows_in)
            ask_weights(ring.index(at), w, first, chunk + STAGES, K, rows_in)
        else:
            async_copy.commit_group()
    if EARLY:
        gl.inline_asm_elementwise("griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    rows = gl.arange(0, SLOTS * BN, gl.SliceLayout(1, mma))
    own = gl.expand_dims(rows // BN, 1) == gl.expand_dims(gl.arange(0, SLOTS, gl.SliceLayout(0, mma)), 0)
    y = gl.sum(gl.where(own, acc, 0.0), 1).to(out.dtype.element_ty).to(gl.float32)
    weight = gl.load(weights + token * COUNT + rows // BN, mask=rows // BN < COUNT, other=0.0).to(gl.float32)
    # by way of shared memory, so that no product and sum become one rounding
    parts = gl.allocate_shared_memory(gl.float32, [SLOTS * BN], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    parts.store(y * weight)
    total = parts.slice(0, BN).load(line)
    for s in gl.static_range(1, COUNT):
        total += parts.slice(s * BN, BN).load(line)
    gl.store(out + token.to(gl.int64) * N + col + gl.arange(0, BN, line), total.to(out.dtype.element_ty))
