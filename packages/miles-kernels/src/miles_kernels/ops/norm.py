"""RMSNorm (Zhang & Sennrich 2019) in the cast order of Hugging Face's Llama and Qwen models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from miles_kernels.native import kernels_for
from miles_kernels.ops.chain import add_rows, main_of


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / rms(x)` over the last dimension, rounded to x's dtype, then times `weight[H]`; any leading shape.

    With a weight per head, `weight[heads, D]` for `x[..., heads, D]`, queries and keys can share one call.

    The mean square and the scaling are float32. Backward is float32, deterministic.
    """
    if x.is_cuda:
        from miles_kernels.cuda.norm import rms_norm as on_cuda

        return on_cuda(x, weight, eps)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _RMSNorm.apply(x, weight, eps)
    return _forward(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(s), s) of s = x + residual, rounded to their dtype: the next block's input and the residual stream."""
    if x.is_cuda:
        from miles_kernels.cuda.norm import add_rms_norm as on_cuda

        return on_cuda(x, residual, weight, eps)
    total = residual + x
    return rms_norm(total, weight, eps), total


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt((x * x).mean(-1, keepdim=True).add_(eps))


def _forward(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if x.shape[-weight.ndim :] != weight.shape:
        raise ValueError(f"rms_norm: x {tuple(x.shape)} does not end in the shape of weight {tuple(weight.shape)}")
    kernels = kernels_for(x, weight)
    if kernels is not None:
        return kernels.norm(x, weight, eps)
    if x.dtype is torch.float32:
        return (x * _inverse_rms(x, eps)).mul_(weight)
    wide = x.float()
    return (wide * _inverse_rms(wide, eps)).to(x.dtype).mul_(weight)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return _forward(x, weight, eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        main = main_of(weight)
        kernels = kernels_for(x, weight, grad)
        if main is not None:
            wide = x.float()
            rounded = (wide * _inverse_rms(wide, ctx.eps)).to(x.dtype).float()
            add_rows(main, (grad.float() * rounded).reshape(-1, *weight.shape))
        if kernels is not None:
            dx, dw = kernels.norm_backward(x, weight, grad, ctx.eps)
            return dx, dw if main is None else None, None
        grad, wide = grad.float(), x.float()
        scale = _inverse_rms(wide, ctx.eps)
        normed = wide * scale
        dx = dw = None
        if ctx.needs_input_grad[1] and main is None:
            rounded = normed.to(x.dtype).float()
            dw = (grad * rounded).reshape(-1, *weight.shape).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            inner = grad * weight.float()
            projection = (inner * normed).mean(-1, keepdim=True)
            dx = inner.sub_(normed.mul_(projection)).mul_(scale).to(x.dtype)
        return dx, dw, None
