"""How far a draft's distributions are from the policy's, on CUDA, each row of logits read twice.

Legend: m = rows, V = vocabulary; q = softmax(draft's logits / temperature), p = softmax(policy's logits / temperature).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from miles_kernels.cuda.launch import at_home

BLOCK = 2048


class Compared(NamedTuple):
    """Per row, fp32 [m]."""

    ce: Tensor
    """-log q(label)"""
    kl: Tensor
    """sum of p (log p - log q)"""
    accept: Tensor
    """sum of min(p, q)"""
    below: Tensor
    """sum of q where q < p"""
    gradient: Tensor | None
    """[m, V]: of kl by the draft's logits"""


@at_home
def compare_rows(q: Tensor, p: Tensor, labels: Tensor, heat: Tensor, *, gradient: torch.dtype | None) -> Compared:
    """Compare logits `q` and `p` fp32 [m, V] at temperatures `heat` fp32 [m]; a label (int64 [m]) not in 0 .. V - 1 gives NaN.

    Every row is summed by itself in one order. Raises ValueError for shapes or dtypes that do not fit.
    """
    rows, vocab = q.shape
    fits = q.shape == p.shape and labels.shape == heat.shape == (rows,) and q.dtype == p.dtype == heat.dtype == torch.float32
    if not (fits and labels.dtype == torch.int64 and q.is_contiguous() and p.is_contiguous()):
        raise ValueError(
            f"rows to compare are contiguous fp32 [m, V] with labels int64 [m] and temperatures fp32 [m]; got {q.dtype} "
            f"{list(q.shape)}, {p.dtype} {list(p.shape)}, {labels.dtype} {list(labels.shape)}, {heat.dtype} {list(heat.shape)}"
        )
    out = torch.empty((4, rows), device=q.device)
    grad = None if gradient is None else torch.empty((rows, vocab), dtype=gradient, device=q.device)
    if rows:
        from miles_kernels.cuda.draft_loss_kernels import compare_rows as kernel

        block = min(BLOCK, max(16, 1 << (vocab - 1).bit_length()))
        kernel[(rows,)](
            q, p, labels, heat.contiguous(), out, q if grad is None else grad, rows,
            VOCAB=vocab, GRAD=grad is not None, BLOCK=block, num_warps=8 if block > 512 else 4,
        )  # fmt: skip
    ce, kl, accept, below = out.unbind(0)
    return Compared(ce, kl, accept, below, grad)
