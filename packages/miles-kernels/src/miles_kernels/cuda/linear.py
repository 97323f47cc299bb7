"""Aligned linear on CUDA: forward, dgrad and wgrad through `dispatch.product`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from miles_kernels.cuda.dispatch import product
from miles_kernels.cuda.launch import at_home
from miles_kernels.ops.chain import add_product, main_of


@at_home
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out_dtype: torch.dtype | None = None) -> Tensor:
    """`x[T, K] @ weight[N, K]^T + bias[N]` as [T, N] in `out_dtype` (default: the dtype of x).

    Product and bias are summed in float32 and rounded once; a row's bits do not depend on the other rows. Backward: dgrad
    (a row's bits again its own), wgrad (tokens in order) and the bias gradient, float32 sums, one rounding each.
    """
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)):
        return _Linear.apply(x, weight, bias, out_dtype)
    return forward(x, weight, bias, out_dtype)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None = None, out_dtype: torch.dtype | None = None) -> Tensor:
    """`linear` without autograd."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    out = torch.empty((x.shape[0], weight.shape[0]), dtype=out_dtype or x.dtype, device=x.device)
    if bias is not None and bias.dtype is not out.dtype:
        bias = bias.to(out.dtype) if out.dtype is torch.float32 else bias
    return product(x, weight, out, bias)


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, bool, bool], bias_dtype: torch.dtype | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dgrad, wgrad, bias gradient) of `linear`; None where not needed."""
    grad = grad.contiguous()
    narrow = grad if grad.dtype is x.dtype else grad.to(x.dtype)
    dx = product(narrow, weight, torch.empty_like(x), b_t=True) if needs[0] else None
    main = main_of(weight)
    if main is not None:
        add_product(main, narrow, x.contiguous())
        return dx, None, None
    dw = product(narrow, x, torch.empty_like(weight), a_t=True, b_t=True) if needs[1] else None
    db = grad.float().sum(0).to(bias_dtype) if needs[2] and bias_dtype is not None else None
    return dx, dw, db


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return forward(x, weight, bias, out_dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        return (*backward(grad, x, weight, ctx.needs_input_grad[:3], ctx.bias_dtype), None)
