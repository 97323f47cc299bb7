"""Token embedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def embedding(token_ids: Tensor, weight: Tensor) -> Tensor:
    """Rows `token_ids[T]` of `weight[V, H]` as [T, H]. Backward sums in float32, in token order."""
    if weight.is_cuda:
        from miles_kernels.cuda.embedding import embedding as on_cuda

        return on_cuda(token_ids, weight)
    if torch.is_grad_enabled() and weight.requires_grad:
        return _Embedding.apply(token_ids, weight)
    return weight.index_select(0, token_ids)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token_ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(token_ids)
        ctx.lookup = getattr(weight, "chain_lookup", None)
        ctx.rows, ctx.dtype = weight.shape[0], weight.dtype
        return weight.index_select(0, token_ids)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None]:
        (token_ids,) = ctx.saved_tensors
        if ctx.lookup is not None:
            ctx.lookup.index_add_(0, token_ids, grad.float())
            return None, None
        out = grad.new_zeros((ctx.rows, grad.shape[1]), dtype=torch.float32)
        return None, out.index_add_(0, token_ids, grad.float()).to(ctx.dtype)
