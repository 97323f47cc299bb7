"""Experts of a handful of tokens: every (token, slot) pair is a tile of its own, so nothing is sorted."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def one_row(row, left, BK: tl.constexpr):
    """row[0 : BK] (zeros from `left` on) as the first of 16 rows, the others zero."""
    ks = tl.arange(0, BK)
    lanes = tl.arange(0, 16)
    return tl.load(row + ks[None, :] + lanes[:, None] * 0, mask=(ks < left)[None, :] & (lanes == 0)[:, None], other=0.0)


@triton.jit
def first_row(acc):
    """The row that `one_row` filled."""
    return tl.sum(tl.where((tl.arange(0, 16) == 0)[:, None], acc, 0.0), 0)


@triton.jit
def few_up(x, w, ids, out, slots, stride_x, N, K, BN: tl.constexpr, BK: tl.constexpr, EARLY: tl.constexpr):
    """out[pair, N] = silu(gate) * up of x[pair // slots]; w described as [2 E, N, K] in blocks [2, BN, BK], gate over up.

    `EARLY`: lets the next kernel start before this one has ended.
    """
    if EARLY:
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
    g, u = tl.split(tl.permute(tl.reshape(first_row(both), (2, BN)), (1, 0)))
    kind = out.dtype.element_ty
    g = g.to(kind).to(tl.float32)
    u = u.to(kind).to(tl.float32)
    cols = col + tl.arange(0, BN)
    tl.store(out + pair.to(tl.int64) * N + cols, (g / (1.0 + tl.exp(-g)) * u).to(kind), mask=cols < N)


@triton.jit
def few_down(inner, w, ids, out, N, K, BN: tl.constexpr, BK: tl.constexpr, EARLY: tl.constexpr):
    """out[pair, N] = inner[pair, K] w[e]^T, w described as [E * N, K]. `EARLY`: see `few_up`, whose end this then waits for."""
    if EARLY:
        gdc_launch_dependents()
    blocks = tl.cdiv(N, BN)
    pair = tl.program_id(0) // blocks
    col = tl.program_id(0) % blocks * BN
    first = tl.load(ids + pair).to(tl.int32) * N + col
    row = inner + pair.to(tl.int64) * K
    if EARLY:
        gdc_wait()
    acc = tl.zeros((16, BN), dtype=tl.float32)
    for k in range(0, K, BK):
        acc = tl.dot(one_row(row + k, K - k, BK), w.load([first, k]).T, acc)
    cols = col + tl.arange(0, BN)
    tl.store(out + pair.to(tl.int64) * N + cols, first_row(acc).to(out.dtype.element_ty), mask=cols < N)
