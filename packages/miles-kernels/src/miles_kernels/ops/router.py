"""Expert router: float32 logits, scores, top-k with ties to the lower expert id. Two rules: softmax, and corrected sigmoid.

The sigmoid is written out as 1 / (1 + exp(-x)) and sums in slot order, so that a row's result depends on that row alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from miles_kernels.ops.linear import linear
from miles_kernels.ops.matmul import Mode
from miles_kernels.routing import SigmoidRule


class RouterOutput(NamedTuple):
    """ids[T, k] int64 and weights[T, k] float32, the first choice in slot 0: the likeliest, or of the best corrected score."""

    ids: Tensor
    weights: Tensor


def router(
    x: Tensor,
    weight: Tensor,
    top_k: int,
    *,
    normalize: bool = True,
    ids: Tensor | None = None,
    mode: Mode | None = None,
    rule: SigmoidRule | None = None,
    correction: Tensor | None = None,
) -> RouterOutput:
    """Route `x[T, H]` by `weight[E, H]`; the logits stay float32 whatever the dtype of x.

    With `rule` the scores are sigmoids and `correction` [E] float32 is added for the choice (`route_sigmoid`), else a softmax.
    """
    logits = linear(x, weight, mode=mode, out_dtype=torch.float32)
    if rule is None:
        return route(logits, top_k, normalize=normalize, ids=ids)
    if correction is None:
        raise ValueError("a sigmoid router needs the experts' correction [E]; a tensor of zeros changes no choice")
    return route_sigmoid(logits, top_k, rule, correction, normalize=normalize, ids=ids)


def route(logits: Tensor, top_k: int, *, normalize: bool = True, ids: Tensor | None = None) -> RouterOutput:
    """Experts and weights for float32 `logits[T, E]`.

    `normalize` makes the k weights sum to 1 (`norm_topk_prob`). `ids[T, k]` replays recorded experts instead of choosing.
    Gradients reach the logits through the weights. Raises ValueError for k out of range.
    """
    _check_top_k(logits, top_k)
    if logits.is_cuda and ids is None:
        from miles_kernels.cuda.router import route as on_cuda

        return on_cuda(logits, top_k, normalize=normalize)
    if torch.is_grad_enabled() and logits.requires_grad:
        return RouterOutput(*_Route.apply(logits, top_k, normalize, ids))
    return RouterOutput(*_forward(logits, top_k, normalize, ids)[:2])


def route_sigmoid(
    logits: Tensor, top_k: int, rule: SigmoidRule, correction: Tensor, *, normalize: bool = True, ids: Tensor | None = None
) -> RouterOutput:
    """Experts and weights for float32 `logits[T, E]` by `rule`, on any device; `correction` [E] float32 gets no gradient.

    `normalize` divides the k scores by their sum (plus 1e-20) before `rule.scale`. `ids[T, k]` replays recorded experts.
    Raises ValueError for k out of range and shapes or dtypes that do not fit.
    """
    _check_top_k(logits, top_k)
    wrong = rule.wrong(logits.shape[1], top_k)
    if correction.shape != logits.shape[1:] or correction.dtype is not torch.float32 or logits.dtype is not torch.float32:
        wrong.append(f"logits {logits.dtype} and correction {correction.dtype} {list(correction.shape)} must be float32, [E]")
    if wrong:
        raise ValueError("sigmoid router: " + "; ".join(wrong))
    if torch.is_grad_enabled() and logits.requires_grad:
        return RouterOutput(*_RouteSigmoid.apply(logits, top_k, rule, correction, normalize, ids))
    return RouterOutput(*_forward_sigmoid(logits, top_k, rule, correction, normalize, ids)[:2])


def _check_top_k(logits: Tensor, top_k: int) -> None:
    if not 1 <= top_k <= logits.shape[1]:
        raise ValueError(f"top_k must lie in 1 .. {logits.shape[1]} (the number of experts), got {top_k}")


def _forward(logits: Tensor, top_k: int, normalize: bool, ids: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    probabilities = torch.softmax(logits, -1)
    if ids is None:
        ids = _best(probabilities, top_k)
    weights = probabilities.gather(1, ids)
    if normalize:
        weights = weights / _slot_sum(weights)
    return ids, weights, probabilities


def _forward_sigmoid(
    logits: Tensor, top_k: int, rule: SigmoidRule, correction: Tensor, normalize: bool, ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    scores = torch.neg(logits).exp_().add_(1.0).reciprocal_()
    if ids is None:
        ids = _best(_in_kept_groups(scores + correction, rule), top_k)
    weights = scores.gather(1, ids)
    if normalize:
        weights = weights / (_slot_sum(weights) + _NEVER_ZERO)
    return ids, weights * rule.scale, scores


_NEVER_ZERO = 1e-20


def _in_kept_groups(corrected: Tensor, rule: SigmoidRule) -> Tensor:
    """Scores [T, E], -inf for experts whose group is not among the best."""
    if rule.kept_groups == rule.num_groups:
        return corrected
    grouped = corrected.view(len(corrected), rule.num_groups, -1)
    two = torch.sort(grouped, dim=-1, descending=True, stable=True).values[..., :2]
    kept = _best(two[..., 0] + two[..., 1], rule.kept_groups)
    closed = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter_(1, kept, False)
    return grouped.masked_fill(closed[..., None], -torch.inf).reshape(corrected.shape)


def _best(scores: Tensor, count: int) -> Tensor:
    """Places [T, count] of the largest scores of each row, falling; of equal ones the lower place first."""
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, :count].contiguous()


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


class _RouteSigmoid(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, top_k: int, rule: SigmoidRule, correction: Tensor, normalize: bool, ids: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ids, weights, scores = _forward_sigmoid(logits, top_k, rule, correction, normalize, ids)
        ctx.save_for_backward(ids, scores)
        ctx.normalize, ctx.scale = normalize, rule.scale
        ctx.mark_non_differentiable(ids)
        return ids, weights

    @staticmethod
    def backward(ctx: Any, _: None, grad: Tensor) -> tuple[Tensor | None, ...]:
        ids, scores = ctx.saved_tensors
        grad = grad.float() * ctx.scale
        if ctx.normalize:
            chosen = scores.gather(1, ids)
            total = _slot_sum(chosen) + _NEVER_ZERO
            grad = (grad - _slot_sum(grad * (chosen / total))) / total
        spread = torch.zeros_like(scores).scatter_(1, ids, grad)  # ids of a row are distinct: no two writes meet
        return spread * scores * (1.0 - scores), None, None, None, None, None
