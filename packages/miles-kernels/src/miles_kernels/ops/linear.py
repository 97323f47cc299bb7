"""Linear layer, y = x W^T + b."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from miles_kernels.ops.chain import add_product, main_of
from miles_kernels.ops.matmul import Mode, mm, mm_dgrad, mm_wgrad


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, mode: Mode | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """`x[T, K] @ weight[N, K]^T + bias[N]` as [T, N] in `out_dtype` (default: the dtype of x).

    The product and the bias are summed in float32 and rounded once. Backward: dgrad, wgrad and the bias gradient in
    float32, each rounded once to its input's dtype. Raises ValueError for shapes that do not fit.
    """
    if x.is_cuda:
        from miles_kernels.cuda.linear import linear as on_cuda

        return on_cuda(x, weight, bias, out_dtype=out_dtype)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)):
        return _Linear.apply(x, weight, bias, mode, out_dtype)
    return _forward(x, weight, bias, mode, out_dtype)


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, mode: Mode | None, out_dtype: torch.dtype | None) -> Tensor:
    out = mm(x, weight, mode)
    if bias is not None:
        if bias.shape != out.shape[1:]:
            raise ValueError(f"linear: bias {tuple(bias.shape)} for weight {tuple(weight.shape)}; need [N] and [N, K]")
        out += bias
    dtype = out_dtype or x.dtype
    return out if dtype is torch.float32 else out.to(dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, mode: Mode | None, out_dtype: torch.dtype | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.mode = mode
        return _forward(x, weight, bias, mode, out_dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        grad = grad.float()
        main = main_of(weight)
        if main is not None:  # a row of dx must not depend on the other rows either
            add_product(main, grad, x)
            dx = mm(grad, weight.float().t().contiguous(), ctx.mode).to(x.dtype) if ctx.needs_input_grad[0] else None
            return dx, None, None, None, None
        dx = mm_dgrad(grad, weight).to(x.dtype) if ctx.needs_input_grad[0] else None
        dw = mm_wgrad(grad, x).to(weight.dtype) if ctx.needs_input_grad[1] else None
        db = grad.sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        return dx, dw, db, None, None
