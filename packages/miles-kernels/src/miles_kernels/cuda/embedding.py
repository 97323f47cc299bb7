"""Token embedding on CUDA with a gradient that is summed in token order, without atomics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from miles_kernels.cuda.launch import at_home, cdiv, direct, eager

BLOCK = 1024


@at_home
def embedding(token_ids: Tensor, weight: Tensor) -> Tensor:
    """Rows token_ids[T] of weight[V, H] as [T, H]. Backward sums in float32, in token order."""
    if direct(token_ids, weight):
        return weight.index_select(0, token_ids)
    if eager(token_ids, weight):
        return _Embedding.apply(token_ids, weight)
    return torch.ops.miles_cuda.embedding(token_ids, weight)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token_ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(token_ids)
        ctx.rows = weight.shape[0]
        ctx.lookup = getattr(weight, "chain_lookup", None)
        return weight.index_select(0, token_ids)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None]:
        if ctx.lookup is not None:
            from miles_kernels.cuda.chain import add_lookup

            add_lookup(ctx.lookup, ctx.saved_tensors[0], grad)
            return None, None
        return None, _backward(ctx.saved_tensors[0], grad, ctx.rows)


@torch.library.custom_op(
    "miles_cuda::embedding", mutates_args=(), device_types="cuda", schema="(Tensor token_ids, Tensor weight) -> Tensor"
)
def _embedding(token_ids: Tensor, weight: Tensor) -> Tensor:
    return weight.index_select(0, token_ids)


@torch.library.custom_op(
    "miles_cuda::embedding_backward",
    mutates_args=(),
    device_types="cuda",
    schema="(Tensor token_ids, Tensor grad, SymInt rows) -> Tensor",
)
def _embedding_backward(token_ids: Tensor, grad: Tensor, rows: int) -> Tensor:
    return _backward(token_ids, grad, rows)


def _backward(token_ids: Tensor, grad: Tensor, rows: int) -> Tensor:
    from miles_kernels.cuda.act_kernels import embedding_backward

    tokens, width = grad.shape
    grad = grad if grad.stride(1) == 1 else grad.contiguous()
    out = grad.new_zeros((rows, width))
    if tokens:
        ids, order = torch.sort(token_ids, stable=True)
        grid = (tokens, cdiv(width, BLOCK))
        embedding_backward[grid](ids, order, grad, out, tokens, width, grad.stride(0), BLOCK=BLOCK, num_warps=4)
    return out


@torch.library.register_fake("miles_cuda::embedding")
def _(token_ids: Tensor, weight: Tensor) -> Tensor:
    return weight.new_empty((token_ids.shape[0], weight.shape[1]))


@torch.library.register_fake("miles_cuda::embedding_backward")
def _(token_ids: Tensor, grad: Tensor, rows: int) -> Tensor:
    return grad.new_empty((rows, grad.shape[1]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.rows = inputs[1].shape[0]


def _grad(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
    return None, torch.ops.miles_cuda.embedding_backward(ctx.saved_tensors[0], grad, ctx.rows)


_embedding.register_autograd(_grad, setup_context=_save)
