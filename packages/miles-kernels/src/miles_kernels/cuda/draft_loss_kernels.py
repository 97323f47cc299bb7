"""Triton kernel that compares the distributions of two rows of logits; see `draft_loss.py` for the names. One program a row."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def compare_rows(
    q_ptr, p_ptr, labels_ptr, heat_ptr, out_ptr, grad_ptr, rows,
    VOCAB: tl.constexpr, GRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Normalisers in one pass over both rows, sums and the gradient in a second."""
    row = tl.program_id(0)
    q_row = q_ptr + row.to(tl.int64) * VOCAB
    p_row = p_ptr + row.to(tl.int64) * VOCAB
    cool = 1.0 / tl.load(heat_ptr + row)
    q_most = tl.full((BLOCK,), -float("inf"), tl.float32)
    p_most = tl.full((BLOCK,), -float("inf"), tl.float32)
    q_sum = tl.zeros((BLOCK,), tl.float32)
    p_sum = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, VOCAB, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < VOCAB
        # what lies behind the end counts as nothing: exp(-1e30 - x) is 0, and no lane is left without a number. Chosen behind the
        # product: joined with the difference below into one operation, -1e30 * cool would be off by more than exp can take
        q = tl.where(inside, tl.load(q_row + at, mask=inside, other=0.0) * cool, -1e30)
        p = tl.where(inside, tl.load(p_row + at, mask=inside, other=0.0) * cool, -1e30)
        q_new = tl.maximum(q_most, q)
        p_new = tl.maximum(p_most, p)
        q_sum = q_sum * tl.exp(q_most - q_new) + tl.exp(q - q_new)
        p_sum = p_sum * tl.exp(p_most - p_new) + tl.exp(p - p_new)
        q_most = q_new
        p_most = p_new
    q_max = tl.max(q_most, 0)
    p_max = tl.max(p_most, 0)
    q_lse = q_max + tl.log(tl.sum(q_sum * tl.exp(q_most - q_max), 0))
    p_lse = p_max + tl.log(tl.sum(p_sum * tl.exp(p_most - p_max), 0))
    accept = tl.zeros((BLOCK,), tl.float32)
    below = tl.zeros((BLOCK,), tl.float32)
    kl = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, VOCAB, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < VOCAB
        log_q = tl.load(q_row + at, mask=inside, other=-1e30) * cool - q_lse
        log_p = tl.load(p_row + at, mask=inside, other=-1e30) * cool - p_lse
        q = tl.exp(log_q)
        p = tl.exp(log_p)
        accept += tl.minimum(p, q)
        below += tl.where(q < p, q, 0.0)
        kl += tl.where(inside, p * (log_p - log_q), 0.0)
        if GRAD:
            place = grad_ptr + row.to(tl.int64) * VOCAB + at
            tl.store(place, ((q - p) * cool).to(grad_ptr.dtype.element_ty), mask=inside)
    label = tl.load(labels_ptr + row)
    known = (label >= 0) & (label < VOCAB)
    tl.store(out_ptr + row, q_lse - tl.load(q_row + label, mask=known, other=float("nan")) * cool)
    tl.store(out_ptr + rows + row, tl.sum(kl, 0))
    tl.store(out_ptr + 2 * rows + row, tl.sum(accept, 0))
    tl.store(out_ptr + 3 * rows + row, tl.sum(below, 0))
