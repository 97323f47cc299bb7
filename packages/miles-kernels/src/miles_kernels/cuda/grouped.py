"""Grouped linear on CUDA: one weight matrix per expert, rows sorted by expert; forward, dgrad and wgrad.

Row counts stay on the device (no synchronisation, fit for CUDA graphs). A row's bits are those of `linear(row, weight[e])`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from miles_kernels.cuda.gemm_triton import Tile, descriptor, descriptor3, num_sms
from miles_kernels.cuda.launch import aligned, at_home
from miles_kernels.ops.chain import main_of

HALVES = "halves"
"""Kind of tile with the bits of "tma": an expert's last rows are half a tile where they fit into it, in programs of their own.

Not timed on a GPU, so no default names it.
"""
HALF_COST = 9
"""Half a tile takes this many 16ths of the time of a whole one, by estimate; it only sets how many programs have half tiles."""


class TilePlan(NamedTuple):
    """Which expert and which rows each row tile has, made on the device for one tile height; half tiles follow whole ones."""

    expert: Tensor
    row: Tensor
    count: Tensor
    """[1] whole tiles, [2] with the half ones where there may be any"""
    height: int
    halves: bool = False


class Groups:
    """Rows sorted by expert. `offsets[E + 1]` int32 on the device; tile plans are made once per tile height."""

    def __init__(self, offsets: Tensor, num_rows: int) -> None:
        self.offsets, self.num_rows = offsets, num_rows
        self.num_experts = offsets.shape[0] - 1
        self._plans: dict[tuple[int, bool], TilePlan] = {}

    def empty_plan(self, height: int, halves: bool = False) -> TilePlan:
        """Room for the tiles of `height` rows, to be filled by a kernel."""
        most = max(1, min(self.num_rows, -(-self.num_rows // height) + self.num_experts))
        expert, row = (torch.empty(most, dtype=torch.int32, device=self.offsets.device) for _ in range(2))
        count = torch.empty(1 + halves, dtype=torch.int32, device=self.offsets.device)
        plan = self._plans[height, halves] = TilePlan(expert, row, count, height, halves)
        return plan

    @classmethod
    def from_counts(cls, counts: Sequence[int] | Tensor, num_rows: int, device: torch.device) -> Groups:
        """From rows per expert; a list is checked against `num_rows`, a device tensor is trusted."""
        if not isinstance(counts, Tensor):
            if sum(counts) != num_rows:
                raise ValueError(f"grouped_linear: counts sum to {sum(counts)} for {num_rows} rows")
            counts = torch.tensor(list(counts), dtype=torch.int32, device=device)
        offsets = torch.zeros(counts.numel() + 1, dtype=torch.int32, device=device)
        torch.cumsum(counts, 0, out=offsets[1:])
        return cls(offsets, num_rows)

    def plan(self, height: int, halves: bool = False) -> TilePlan:
        """Row tiles of `height` rows."""
        plan = self._plans.get((height, halves))
        if plan is None:
            from miles_kernels.cuda import grouped_kernels

            plan = self.empty_plan(height, halves)
            grouped_kernels.plan_tiles[(1,)](
                self.offsets,
                plan.expert,
                plan.row,
                plan.count,
                self.num_experts,
                BM=height,
                EXPERTS=expert_width(self.num_experts),
                HALVES=halves,
                num_warps=4,
            )
        return plan


def expert_width(num_experts: int) -> int:
    """Power of two that holds every expert."""
    return max(2, 1 << (num_experts - 1).bit_length())


def default_tile(rows_per_expert: float, gated: bool) -> Tile:
    """Tiles by the expected rows per expert; bits do not depend on them."""
    if rows_per_expert <= 6:
        return Tile(16, 64 if gated else 128, 128, 4, 4, per_sm=2)
    if rows_per_expert <= 24:
        return Tile(32, 64 if gated else 128, 128, 4, 4, per_sm=2 if gated else 1)
    return Tile(128, 64 if gated else 128, 64, 4, 3, per_sm=2)  # one program stores while the other multiplies


def gemm(
    x: Tensor,
    weight: Tensor,
    groups: Groups,
    *,
    gated: bool = False,
    transposed: bool = False,
    gather: tuple[Tensor, int] | None = None,
    tile: Tile | None = None,
    early: bool = False,
) -> Tensor:
    """`x[R, K]` times `weight[E, N, K]^T` per expert as [R, N] (`weight[E, K, N]` when `transposed`).

    `gated`: `weight[E, 2 I, K]` is gate over up and the result is silu(gate) * up, [R, I].
    `gather` (with `gated`) = (order[R], slots): x holds the unsorted rows, sorted row r is `x[order[r] // slots]`.
    `early`: launched while its predecessor ends.
    """
    experts, first, second = weight.shape
    k = x.shape[1]
    n = second if transposed else first // 2 if gated else first
    _check(x, weight, transposed)
    weight = aligned(weight.contiguous())
    x = x if gather else aligned(x.contiguous())
    out = x.new_empty((groups.num_rows, n))
    if not groups.num_rows:
        return out
    from miles_kernels.cuda import grouped_kernels

    tile = tile or default_tile(groups.num_rows / groups.num_experts, gated)
    halved = tile.kind == HALVES and not gather
    plan = groups.plan(tile.rows, halved)
    if gated:
        w = descriptor3(weight.view(2 * experts, n, k), 2, tile.cols, tile.depth)
    else:
        flat = weight.view(experts * first, second)
        w = descriptor(flat, *((tile.depth, tile.cols) if transposed else (tile.cols, tile.depth)))
    most = plan.expert.shape[0] * -(-n // tile.cols)
    programs = max(min(num_sms(x.device.index or 0) * tile.per_sm, most), 1 + halved)
    grouped_kernels.grouped_gemm[(programs,)](
        x if gather else descriptor(x, tile.rows, tile.depth),
        descriptor(x, tile.rows // 2, tile.depth) if halved else None,
        w,
        out,
        groups.offsets,
        plan.expert,
        plan.row,
        plan.count,
        gather[0] if gather else plan.row,
        gather[1] if gather else 1,
        x.stride(0),
        n,
        k,
        out.stride(0),
        BM=tile.rows,
        BN=tile.cols,
        BK=tile.depth,
        GROUP_M=8 if tile.rows >= 128 else 4,
        B_T=transposed,
        GATED=gated,
        GATHER=gather is not None,
        EARLY=early,
        HALF_COST=HALF_COST if halved else 0,
        launch_pdl=early,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out


def _check(x: Tensor, weight: Tensor, transposed: bool) -> None:
    pitches = (x.shape[1] * x.element_size(), weight.shape[2] * weight.element_size())
    if x.shape[1] != weight.shape[1 if transposed else 2] or any(pitch % 16 for pitch in pitches):
        raise ValueError(
            f"grouped_linear: rows {tuple(x.shape)} and weights {tuple(weight.shape)} do not fit, or are no multiples of 16 bytes"
        )


def wgrad(grad: Tensor, x: Tensor, groups: Groups, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """`grad[rows of e, N]^T @ x[rows of e, K]` as [E, N, K], tokens in sorted order."""
    from miles_kernels.cuda import grouped_kernels

    experts, n, k = shape
    out = torch.empty(shape, dtype=dtype, device=x.device)
    tiles = experts * -(-n // 128) * -(-k // 128)
    programs = min(num_sms(x.device.index or 0) * 2, tiles)
    grouped_kernels.grouped_wgrad[(programs,)](
        grad,
        x,
        out,
        groups.offsets,
        experts,
        n,
        k,
        grad.stride(0),
        x.stride(0),
        BN=128,
        BK=128,
        BT=64,
        num_warps=8,
        num_stages=3,
    )
    return out


def weight_gradient(grad: Tensor, x: Tensor, groups: Groups, weight: Tensor) -> Tensor | None:
    """`wgrad` for a weight; None when it goes where the weight sums its gradients (`ops.chain`)."""
    if main_of(weight) is None:
        return wgrad(grad, x, groups, weight.shape, weight.dtype)
    from miles_kernels.cuda.chain import add_grouped

    add_grouped(weight, grad, x, groups.offsets)
    return None


@at_home
def grouped_linear(x: Tensor, weight: Tensor, groups: Groups) -> Tensor:
    """`x[R, K]` times `weight[E, N, K]^T` as [R, N], differentiable; see `Groups` for the rows of each expert."""
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _GroupedLinear.apply(x, weight, groups)
    return gemm(x, weight, groups)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, groups: Groups) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.groups = groups
        return gemm(x, weight, groups)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        dx = gemm(grad, weight, ctx.groups, transposed=True) if ctx.needs_input_grad[0] else None
        dw = weight_gradient(grad, x, ctx.groups, weight) if ctx.needs_input_grad[1] else None
        return dx, dw, None
