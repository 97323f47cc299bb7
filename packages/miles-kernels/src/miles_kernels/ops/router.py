"""Expert router: float32 logits, softmax over all experts, top-k with ties to the lower expert id."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from miles_kernels.ops.linear import linear
from miles_kernels.ops.matmul import Mode


class RouterOutput(NamedTuple):
    """ids[T, k] int64 and weights[T, k] float32, by falling probability: slot 0 is the likeliest expert."""

    ids: Tensor
    weights: Tensor


def router(
    x: Tensor, weight: Tensor, top_k: int, *, normalize: bool = True, ids: Tensor | None = None, mode: Mode | None = None
) -> RouterOutput:
    """Route `x[T, H]` by `weight[E, H]`; the logits stay float32 whatever the dtype of x."""
    logits = linear(x, weight, mode=mode, out_dtype=torch.float32)
    return route(logits, top_k, normalize=normalize, ids=ids)


def route(logits: Tensor, top_k: int, *, normalize: bool = True, ids: Tensor | None = None) -> RouterOutput:
    """Experts and weights for float32 `logits[T, E]`.

    `normalize` makes the k weights sum to 1 (`norm_topk_prob`). `ids[T, k]` replays recorded experts instead of choosing.
    Gradients reach the logits through the weights. Raises ValueError for k out of range.
    """
    if not 1 <= top_k <= logits.shape[1]:
        raise ValueError(f"top_k must lie in 1 .. {logits.shape[1]} (the number of experts), got {top_k}")
    if logits.is_cuda and ids is None:
        from miles_kernels.cuda.router import route as on_cuda

        return on_cuda(logits, top_k, normalize=normalize)
    if torch.is_grad_enabled() and logits.requires_grad:
        return RouterOutput(*_Route.apply(logits, top_k, normalize, ids))
    return RouterOutput(*_forward(logits, top_k, normalize, ids)[:2])


def _forward(logits: Tensor, top_k: int, normalize: bool, ids: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    probabilities = torch.softmax(logits, -1)
    if ids is None:
        ids = torch.sort(probabilities, dim=-1, descending=True, stable=True).indices[:, :top_k].contiguous()
    weights = probabilities.gather(1, ids)
    if normalize:
        weights = weights / _slot_sum(weights)
    return ids, weights, probabilities


def _slot_sum(x: Tensor) -> Tensor:
    """Sum over k as [T, 1], in slot order: the order of `sum(-1)` over so few elements is torch's business."""
    total = x[:, :1].clone()
    for slot in range(1, x.shape[1]):
        total += x[:, slot : slot + 1]
    return total


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, top_k: int, normalize: bool, ids: Tensor | None) -> tuple[Tensor, Tensor]:
        ids, weights, probabilities = _forward(logits, top_k, normalize, ids)
        ctx.save_for_backward(ids, weights, probabilities)
        ctx.normalize = normalize
        ctx.mark_non_differentiable(ids)
        return ids, weights

    @staticmethod
    def backward(ctx: Any, _: None, grad: Tensor) -> tuple[Tensor, None, None, None]:
        ids, weights, probabilities = ctx.saved_tensors
        grad = grad.float()
        if ctx.normalize:
            total = _slot_sum(probabilities.gather(1, ids))
            grad = (grad - _slot_sum(grad * weights)) / total
        spread = torch.zeros_like(probabilities).scatter_(1, ids, grad)
        inner = (spread * probabilities).sum(-1, keepdim=True)
        return (spread - inner).mul_(probabilities), None, None, None
