"""Grouped linear: one weight matrix per expert, rows sorted by expert."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from miles_kernels.ops.chain import add_grouped, main_of
from miles_kernels.ops.matmul import Mode, default_mode, mm, mm_dgrad, mm_wgrad


def grouped_linear(x: Tensor, weight: Tensor, counts: Sequence[int], *, mode: Mode | None = None) -> Tensor:
    """`x[T, K]` times `weight[E, N, K]^T` as [T, N] in x's dtype; the first `counts[0]` rows use expert 0, and so on.

    A row's bits are those of `linear(row, weight[expert])`. Raises ValueError when counts do not match T and E.
    """
    if len(counts) != weight.shape[0] or sum(counts) != x.shape[0] or min(counts, default=0) < 0:
        raise ValueError(
            f"grouped_linear: {len(counts)} counts summing to {sum(counts)} for {x.shape[0]} rows and {weight.shape[0]} experts"
            + (f", one of them {min(counts)}" if min(counts, default=0) < 0 else "")
        )
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _GroupedLinear.apply(x, weight, counts, mode)
    return _forward(x, weight, counts, mode)


def _spans(counts: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) for experts that have any."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(start, start + count)
        start += count


def _forward(x: Tensor, weight: Tensor, counts: Sequence[int], mode: Mode | None) -> Tensor:
    mode = mode or default_mode()
    wide = x.float()
    out = x.new_empty((x.shape[0], weight.shape[1]))
    for expert, rows in _spans(counts):
        out[rows] = mm(wide[rows], weight[expert], mode)
    return out


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: Sequence[int], mode: Mode | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.counts, ctx.mode = tuple(counts), mode
        return _forward(x, weight, counts, mode)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        grad, wide = grad.float(), x.float()
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        chained = main_of(weight) is not None
        if chained:
            add_grouped(weight, grad, wide, ctx.counts)
        dw = torch.zeros_like(weight) if ctx.needs_input_grad[1] and not chained else None
        for expert, rows in _spans(ctx.counts):
            if dx is not None:
                own = weight[expert]  # in a chain a row of dx must not depend on the other rows either
                dx[rows] = mm(grad[rows], own.float().t().contiguous(), ctx.mode) if chained else mm_dgrad(grad[rows], own)
            if dw is not None:
                dw[expert] = mm_wgrad(grad[rows], wide[rows])
        return dx, dw, None, None
