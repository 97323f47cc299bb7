"""Sums across ranks in a fixed order, and tensor-parallel linears whose bits do not depend on the number of ranks.

The reduction is cut into S logical shards, S a power of two and a multiple of the ranks. Shard sums (float32) are folded by a
binary tree over shard numbers: ((0 + 1) + (2 + 3)) + ... A rank folds its own subtree, the ranks exchange subtree sums by
all-gather and everyone folds the rest. One rank does the same alone, so TP 1, 2, .., S give the same bits. Any process group
works (gloo, NCCL): nothing is summed in transit. A call waits no longer than the group's own timeout.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from miles_kernels.cuda.launch import at_home
from miles_kernels.ops.chain import add_product, main_of

SHARDS = 8
"""Logical shards: part of the numeric contract. Tensor parallelism of 1, 2, 4 and 8 agree bit for bit."""

Group = Any
"""A torch.distributed process group, or None for a single rank."""

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the name before torch 2.13


def fold(parts: Tensor) -> Tensor:
    """Sum `parts[S, ...]` over S, a power of two, by a binary tree over neighbours. Raises ValueError for other S."""
    count = parts.shape[0]
    if count < 1 or count & (count - 1):
        raise ValueError(f"fold: the number of parts must be a power of two, got {count}")
    while parts.shape[0] > 1:
        parts = parts[0::2] + parts[1::2]
    return parts[0]


def world(group: Group) -> int:
    """Ranks of a group; 1 for None."""
    return 1 if group is None else dist.get_world_size(group)


def all_gather(x: Tensor, group: Group) -> Tensor:
    """`x` of every rank, stacked in rank order as [ranks, ...]."""
    if world(group) == 1:
        return x.unsqueeze(0)
    parts = x.new_empty(world(group) * x.numel())
    _all_gather(parts, x.contiguous().view(-1), group=group)
    return parts.view(world(group), *x.shape)


def all_reduce(x: Tensor, group: Group) -> Tensor:
    """Sum of `x` over the ranks in fixed order, in float32, rounded once to x's dtype. The number of ranks is a power of two."""
    return fold(all_gather(x.float(), group)).to(x.dtype)


@at_home
def row_parallel_linear(x: Tensor, weight: Tensor, group: Group = None, *, shards: int = SHARDS) -> Tensor:
    """`x[T, K] weight[N, K]^T` where each rank holds a contiguous part of K (`x[T, K / ranks]`, `weight[N, K / ranks]`).

    The result [T, N] in x's dtype is the same on every rank and for every number of ranks. Backward: local dgrad and wgrad.
    Raises ValueError unless ranks divide `shards` and shards divide K.
    """
    return _RowParallel.apply(x, weight, group, _local_shards(x.shape[1], group, shards, "K"))


@at_home
def column_parallel_linear(x: Tensor, weight: Tensor, group: Group = None, *, shards: int = SHARDS) -> Tensor:
    """`x[T, K] weight[N, K]^T` where each rank holds rows `weight[N / ranks, K]`; returns this rank's columns [T, N / ranks].

    Backward: the gradient of x, summed over the columns of all ranks in shards, is the same for every number of ranks.
    """
    return _ColumnParallel.apply(x, weight, group, _local_shards(weight.shape[0], group, shards, "N"))


def _local_shards(size: int, group: Group, shards: int, name: str) -> int:
    ranks = world(group)
    if shards < 1 or shards & (shards - 1) or shards % ranks:
        raise ValueError(f"{shards} logical shards: must be a power of two and a multiple of the {ranks} ranks")
    local = shards // ranks
    if size % local:
        raise ValueError(f"{name} = {size} per rank cannot be cut into {local} shards of equal size")
    return local


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """`a[M, K] b[N, K]^T` in float32 on any device, a row's bits its own."""
    if a.is_cuda:
        from miles_kernels.cuda.dispatch import product

        return product(a, b, torch.empty((a.shape[0], b.shape[0]), dtype=torch.float32, device=a.device))
    from miles_kernels.ops.matmul import mm

    return mm(a, b)


def partial_sum(a: Tensor, b: Tensor, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """a[M, K] b[N, K]^T over this rank's K: `count` logical shards, folded; in float32 it is what the ranks exchange."""
    if a.is_cuda:
        from miles_kernels.cuda import folded

        a = a if a.stride(-1) == 1 else a.contiguous()
        if folded.serves(a, b, count, dtype):
            return folded.product(a, b, count, dtype)
    return composed_sum(a, b, count).to(dtype)


def composed_sum(a: Tensor, b: Tensor, count: int) -> Tensor:
    """The same in float32 from one product for each shard: what `partial_sum` is compared with."""
    return fold(torch.stack([_mm(x, y) for x, y in zip(a.chunk(count, 1), b.chunk(count, 1), strict=True)]))


def _sum_of_shards(a: Tensor, b: Tensor, count: int, group: Group) -> Tensor:
    """a[M, K] b[N, K]^T over all ranks' K, in a's dtype."""
    if world(group) == 1:
        return partial_sum(a, b, count, a.dtype)
    parts = all_gather(partial_sum(a, b, count), group)
    if parts.is_cuda:
        from miles_kernels.cuda import folded

        return folded.fold(parts, a.dtype)
    return fold(parts).to(a.dtype)


class _RowParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, group: Group, count: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _sum_of_shards(x, weight, count, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        dx = _dgrad(grad, weight, x) if ctx.needs_input_grad[0] else None
        main = main_of(weight)
        if main is not None:
            add_product(main, grad.contiguous(), x)
            return dx, None, None, None
        return dx, _wgrad(grad, x, weight) if ctx.needs_input_grad[1] else None, None, None


class _ColumnParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, group: Group, count: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.group, ctx.count = group, count
        return _mm(x, weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        dx = None
        if ctx.needs_input_grad[0]:
            dx = _sum_of_shards(grad.to(x.dtype), weight.t().contiguous(), ctx.count, ctx.group)
        return dx, _wgrad(grad, x, weight) if ctx.needs_input_grad[1] else None, None, None


def _dgrad(grad: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    """grad weight, the gradient of a part of the columns of x."""
    if grad.is_cuda:
        from miles_kernels.cuda.dispatch import product

        return product(grad.contiguous(), weight, torch.empty_like(x), b_t=True)
    return _mm(grad, weight.t().contiguous()).to(x.dtype)


def _wgrad(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """grad^T x: a column of the whole weight's gradient never leaves its rank, so its bits are those of one rank."""
    if grad.is_cuda:
        from miles_kernels.cuda.dispatch import product

        return product(grad.contiguous(), x, torch.empty_like(weight), a_t=True, b_t=True)
    return _mm(grad.t().contiguous(), x.t().contiguous()).to(weight.dtype)
