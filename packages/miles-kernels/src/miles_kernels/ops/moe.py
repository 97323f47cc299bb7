"""Mixture of experts without atomics: sort slots by expert, grouped GEMMs, combine per token in slot order."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from miles_kernels.ops.act import swiglu
from miles_kernels.ops.grouped import grouped_linear
from miles_kernels.ops.matmul import Mode


class Dispatch(NamedTuple):
    """How the T * k (token, slot) pairs are sorted by expert; within an expert they keep token order."""

    token: Tensor
    """[T * k] token of each sorted row"""
    order: Tensor
    """[T * k] flat (token, slot) pair of each sorted row"""
    place: Tensor
    """[T, k] sorted row of each pair"""
    counts: list[int]
    """rows per expert"""


def plan_dispatch(ids: Tensor, num_experts: int) -> Dispatch:
    """Sort the expert choices `ids[T, k]` (int64)."""
    tokens, slots = ids.shape
    flat = ids.reshape(-1)
    order = torch.sort(flat, stable=True).indices
    place = torch.empty_like(order)
    place[order] = torch.arange(flat.numel())
    counts = torch.bincount(flat, minlength=num_experts).tolist()
    if len(counts) > num_experts:
        raise ValueError(f"expert id {len(counts) - 1} is out of range for {num_experts} experts")
    return Dispatch(order // slots, order, place.view(tokens, slots), counts)


def permute(x: Tensor, dispatch: Dispatch) -> Tensor:
    """Rows of `x[T, H]` in expert order, [T * k, H]. Backward sums a token's slots in slot order, float32."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _Permute.apply(x, dispatch)
    return x.index_select(0, dispatch.token)


def combine(y: Tensor, weights: Tensor, dispatch: Dispatch) -> Tensor:
    """`sum over slots of weights[T, k] * (its row of y[T * k, H])` as [T, H], float32 in slot order, one rounding."""
    if torch.is_grad_enabled() and (y.requires_grad or weights.requires_grad):
        return _Combine.apply(y, weights, dispatch)
    return _combine(y, weights, dispatch)


def moe_mlp(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor, *, mode: Mode | None = None) -> Tensor:
    """SwiGLU experts `gate_up[E, 2 I, H]`, `down[E, H, I]` applied to `x[T, H]` along the routing, as [T, H]."""
    if x.is_cuda:
        from miles_kernels.cuda.moe import moe_mlp as on_cuda

        return on_cuda(x, gate_up, down, ids, weights)
    dispatch = plan_dispatch(ids, gate_up.shape[0])
    inner = swiglu(grouped_linear(permute(x, dispatch), gate_up, dispatch.counts, mode=mode))
    return combine(grouped_linear(inner, down, dispatch.counts, mode=mode), weights, dispatch)


def _combine(y: Tensor, weights: Tensor, dispatch: Dispatch) -> Tensor:
    out: Tensor | None = None
    for slot in range(weights.shape[1]):
        part = y.index_select(0, dispatch.place[:, slot]).float() * weights[:, slot : slot + 1]
        out = part if out is None else out.add_(part)
    assert out is not None, "top_k is at least 1"
    return out.to(y.dtype)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dispatch: Dispatch) -> Tensor:
        ctx.dispatch = dispatch
        return x.index_select(0, dispatch.token)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        place = ctx.dispatch.place
        out = grad.index_select(0, place[:, 0]).float()
        for slot in range(1, place.shape[1]):
            out += grad.index_select(0, place[:, slot])
        return out.to(grad.dtype), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, weights: Tensor, dispatch: Dispatch) -> Tensor:
        ctx.save_for_backward(y, weights)
        ctx.dispatch = dispatch
        return _combine(y, weights, dispatch)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        y, weights = ctx.saved_tensors
        dispatch: Dispatch = ctx.dispatch
        rows = grad.float().index_select(0, dispatch.token)
        dy = dw = None
        if ctx.needs_input_grad[1]:
            dots = (rows * y.float()).sum(-1)
            dw = dots.index_select(0, dispatch.place.reshape(-1)).view(weights.shape).to(weights.dtype)
        if ctx.needs_input_grad[0]:
            dy = (rows * weights.reshape(-1).index_select(0, dispatch.order)[:, None]).to(y.dtype)
        return dy, dw, None
