"""Expert choice on CUDA: softmax over all experts in float32, top-k by (-probability, expert id), weights in slot order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from miles_kernels.cuda.launch import at_home, next_power_of_2
from miles_kernels.ops.router import RouterOutput


@at_home
def route(logits: Tensor, top_k: int, *, normalize: bool = True) -> RouterOutput:
    """ids[T, k] int64 and weights[T, k] of float32 logits[T, E]; gradients reach the logits through the weights."""
    if logits.dtype is not torch.float32 or not 1 <= top_k <= logits.shape[1]:
        raise ValueError(f"route needs float32 logits and 1 <= top_k <= {logits.shape[1]}, got {logits.dtype} and {top_k}")
    if torch.is_grad_enabled() and logits.requires_grad:
        return RouterOutput(*_Route.apply(logits, top_k, normalize))
    return RouterOutput(*torch.ops.miles_cuda.route(logits, top_k, normalize)[:2])


@torch.library.custom_op(
    "miles_cuda::route",
    mutates_args=(),
    device_types="cuda",
    schema="(Tensor logits, int top_k, bool normalize) -> (Tensor, Tensor, Tensor)",
)
def _route(logits: Tensor, top_k: int, normalize: bool) -> tuple[Tensor, Tensor, Tensor]:
    from miles_kernels.cuda.act_kernels import route as kernel

    tokens, experts = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    ids = torch.empty((tokens, top_k), dtype=torch.int64, device=logits.device)
    weights = torch.empty((tokens, top_k), dtype=torch.float32, device=logits.device)
    probabilities = torch.empty((tokens, experts), dtype=torch.float32, device=logits.device)
    if tokens:
        kernel[(tokens,)](
            logits, ids, weights, probabilities, tokens, experts, logits.stride(0),
            E_PAD=next_power_of_2(experts), K=top_k, NORMALIZE=normalize, num_warps=1,
        )  # fmt: skip
    return ids, weights, probabilities


@torch.library.register_fake("miles_cuda::route")
def _(logits: Tensor, top_k: int, normalize: bool) -> tuple[Tensor, Tensor, Tensor]:
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=torch.int64), logits.new_empty(shape), logits.new_empty(logits.shape)


class _Route(torch.autograd.Function):
    """The registered op has no gradient of its own: one of its outputs is ids, which tracing would try to differentiate."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, top_k: int, normalize: bool) -> tuple[Tensor, Tensor]:
        ids, weights, probabilities = torch.ops.miles_cuda.route(logits, top_k, normalize)
        ctx.save_for_backward(ids, weights, probabilities)
        ctx.normalize = normalize
        ctx.mark_non_differentiable(ids)
        return ids, weights

    @staticmethod
    def backward(ctx: Any, _ids: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ids, weights, probabilities = ctx.saved_tensors
        if ctx.normalize:
            total = _slot_sum(probabilities.gather(1, ids))
            grad = (grad - _slot_sum(grad * weights)) / total
        spread = torch.zeros_like(probabilities).scatter(1, ids, grad)  # ids of a row are distinct: no two writes meet
        chosen = _slot_sum(grad * probabilities.gather(1, ids))
        return (spread - chosen) * probabilities, None, None


def _slot_sum(x: Tensor) -> Tensor:
    total = x[:, :1].clone()
    for slot in range(1, x.shape[1]):
        total = total + x[:, slot : slot + 1]
    return total
