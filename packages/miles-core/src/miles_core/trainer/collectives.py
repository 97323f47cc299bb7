"""Collectives that add in the order of ranks, and the differentiable exchanges of rows between processes.

No sum is left to the transport: parts travel, and whoever needs a sum adds them in float32, rank 0 first. A sum then has the same
bits in every run, on every backend (gloo, NCCL) and for every way the network is built. All calls are collective; a call
waits no longer than the timeout of its process group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from miles_core.memory.peers import Peers

Group = Any
"""A process group: torch's, or `Peers`; None is a process alone."""


def live(group: Group) -> Any:
    """The group of torch's; collective where communicators have to be made first."""
    return group.live if isinstance(group, Peers) else group


def size_of(group: Group) -> int:
    """Processes in the group."""
    return 1 if group is None else group.size if isinstance(group, Peers) else int(dist.get_world_size(group))


def rank_of(group: Group) -> int:
    """This process in the group."""
    return 0 if group is None else group.rank if isinstance(group, Peers) else int(dist.get_rank(group))


def broadcast(tensor: Tensor, rank: int, group: Group, *, async_op: bool = False) -> Any:
    """Every process gets the tensor of the group's `rank`; what to wait for, when `async_op`."""
    options = dist.distributed_c10d.BroadcastOptions()
    options.rootRank, options.rootTensor, options.asyncOp = rank, 0, async_op
    work = live(group).broadcast([tensor], options)
    return work if async_op else _end(work)


def all_to_all(
    output: Tensor, rows: Tensor, group: Group, receive: Sequence[int] = (), send: Sequence[int] = (), *, async_op: bool = False
) -> Any:
    """Rows of dim 0 to and from everybody, equally many unless said; what to wait for, when `async_op`."""
    options = dist.distributed_c10d.AllToAllOptions()
    options.asyncOp = async_op
    work = live(group).alltoall_base(output, rows, list(receive), list(send), options)
    return work if async_op else _end(work)


def all_gather(output: Tensor, own: Tensor, group: Group, *, async_op: bool = False) -> Any:
    """`output` [ranks * n, ...] becomes everybody's `own` [n, ...], in the order of ranks; what to wait for, when `async_op`."""
    options = dist.distributed_c10d.AllgatherOptions()
    options.asyncOp = async_op
    work = live(group)._allgather_base(output, own, options)
    return work if async_op else _end(work)


def _end(work: Any) -> None:
    """Wait; on CUDA the stream does. Groups of ours are in none of torch's tables, so their own methods are called."""
    if work is not None:
        work.wait()


def ordered_sum(parts: Sequence[Tensor]) -> Tensor:
    """((part 0 + part 1) + part 2) + ... in float32."""
    total = parts[0].float().clone() if parts[0].dtype is torch.float32 else parts[0].float()
    for part in parts[1:]:
        total += part
    return total


def reduce_scatter(output: Tensor, flat: Tensor, group: Group) -> None:
    """`output` [n] becomes this rank's part of the sum of everybody's `flat` [ranks * n], float32, ranks in order."""
    if size_of(group) == 1:
        output.copy_(flat)
        return
    parts = torch.empty_like(flat)
    all_to_all(parts, flat, group)
    rows = parts.view(size_of(group), -1)
    output.copy_(rows[0])
    for row in rows[1:]:
        output.add_(row)


def all_reduce_(flat: Tensor, group: Group) -> None:
    """Replace `flat` [n] float32 by its sum over the ranks, in order; every rank gets the same bits."""
    ranks = size_of(group)
    if ranks == 1:
        return
    part = -(-flat.numel() // ranks)
    padded = flat.new_zeros(part * ranks)
    padded[: flat.numel()] = flat.reshape(-1)
    own = flat.new_empty(part)
    reduce_scatter(own, padded, group)
    all_gather(padded, own, group)
    flat.copy_(padded[: flat.numel()].view_as(flat))


class _OfUnit:
    """What FSDP2 calls for a unit's processes, instead of the group of its mesh."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Room for an input or output."""
        return torch.empty(*size, dtype=dtype, device=device)


class UnitGather(_OfUnit):
    """The gather FSDP2 is told to use (`FSDPModule.set_custom_all_gather`)."""

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Group, async_op: bool = False) -> Any:
        """Everybody's part, in the order of ranks."""
        if size_of(self.group) == 1:
            output_tensor.copy_(input_tensor)
            return None
        return all_gather(output_tensor, input_tensor, self.group, async_op=async_op)


class OrderedReduceScatter(_OfUnit):
    """The reduce-scatter FSDP2 is told to use (`FSDPModule.set_custom_reduce_scatter`)."""

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Group, op: Any, async_op: bool = False) -> None:
        """Sum, whatever `op` says: averaging is off in our use."""
        assert not async_op, "FSDP2 waits for its reduce-scatter by stream order"
        reduce_scatter(output_tensor, input_tensor, self.group)


@dataclass(frozen=True)
class Routes:
    """How many rows (of dim 0) go to and come from each rank of a group."""

    send: list[int]
    receive: list[int]
    group: Group

    @classmethod
    def agree(cls, send: Tensor, group: Group) -> Routes:
        """From what this rank sends, int64 [ranks]; the others say what it will receive."""
        receive = torch.empty_like(send)
        all_to_all(receive, send, group)
        return cls(send.tolist(), receive.tolist(), group)

    def back(self) -> Routes:
        """The way home."""
        return Routes(self.receive, self.send, self.group)

    def carry(self, rows: Tensor) -> Tensor:
        """Rows sorted by destination -> rows received, by source. No gradient."""
        received = rows.new_empty((sum(self.receive), *rows.shape[1:]))
        all_to_all(received, rows.contiguous(), self.group, self.receive, self.send)
        return received


def carry_rows(rows: Tensor, routes: Routes) -> Tensor:
    """`routes.carry` with a gradient, which travels back."""
    return _Carry.apply(rows, routes)


class _Carry(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, routes: Routes) -> Tensor:
        ctx.routes = routes
        return routes.carry(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.routes.back().carry(grad), None


def gather_padded(rows: Tensor, most: int, group: Group) -> Tensor:
    """Everybody's rows [T_r, ...] as [ranks, most, ...]; what lies beyond a rank's own rows is zero."""
    padded = rows if rows.shape[0] == most else torch.cat((rows, rows.new_zeros((most - rows.shape[0], *rows.shape[1:]))))
    out = rows.new_empty((size_of(group) * most, *rows.shape[1:]))
    all_gather(out, padded.contiguous(), group)
    return out.view(size_of(group), most, *rows.shape[1:])


def permuted(rows: Tensor, order: Tensor) -> Tensor:
    """`rows[order]` for a permutation of dim 0; its gradient is the inverse one, so nothing is summed."""
    return _Permute.apply(rows, order)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor) -> Tensor:
        ctx.order = order
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        out = torch.empty_like(grad)
        out[ctx.order] = grad
        return out, None
