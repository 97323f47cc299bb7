"""Expert parallelism: tokens travel to the processes that hold their experts, and home again to be combined in slot order.

Legend: T = tokens of this process, k = experts per token, E = experts of the model, Eo = experts of this process, I = inner size.

An expert's output for a token depends on that token alone (the products are batch-invariant), and the combination happens where
the token lives, in the order of its slots, as without expert parallelism: the forward has the same bits. Gradients of an expert
are summed over tokens ordered by source rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from miles_core.trainer.collectives import Group, Routes, all_to_all, carry_rows, permuted, rank_of, size_of
from miles_kernels.ops import moe
from miles_kernels.ops.act import swiglu
from miles_kernels.ops.grouped import grouped_linear
from miles_kernels.ops.matmul import Mode


class Experts(nn.Module):
    """This process's experts of one layer: `gate_up` [Eo, 2 I, H], `down` [Eo, H, I]. A unit of FSDP of its own."""

    def __init__(self, gate_up: Tensor, down: Tensor, group: Group, mode: Mode | None) -> None:
        super().__init__()
        ranks, rank = size_of(group), rank_of(group)
        own = slice(gate_up.shape[0] // ranks * rank, gate_up.shape[0] // ranks * (rank + 1))
        self.gate_up = nn.Parameter(gate_up.detach()[own].clone(), requires_grad=gate_up.requires_grad)
        self.down = nn.Parameter(down.detach()[own].clone(), requires_grad=down.requires_grad)
        self.group, self.mode = group, mode

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """`moe_mlp` of x [T, H] with expert ids [T, k] of the whole model and weights [T, k], as [T, H]."""
        return spread_moe(x, self.gate_up, self.down, ids, weights, self.group, self.mode)


def spread_moe(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor, group: Group, mode: Mode | None) -> Tensor:
    """`moe_mlp` where `gate_up` [Eo, 2 I, H] and `down` [Eo, H, I] are this process's experts and `ids` count those of all."""
    num_experts = gate_up.shape[0] * size_of(group)
    if x.is_cuda:
        return _on_cuda(x, gate_up, down, ids, weights, num_experts, group)
    dispatch = moe.plan_dispatch(ids, num_experts)
    routes, counts, order = _agree(torch.tensor(dispatch.counts, device=x.device), group)
    rows = permuted(carry_rows(moe.permute(x, dispatch), routes), order)
    inner = swiglu(grouped_linear(rows, gate_up, counts, mode=mode))
    out = grouped_linear(inner, down, counts, mode=mode)
    home = carry_rows(permuted(out, torch.argsort(order)), routes.back())
    return moe.combine(home, weights, dispatch)


def _on_cuda(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor, num_experts: int, group: Group) -> Tensor:
    from miles_kernels.cuda import grouped
    from miles_kernels.cuda import moe as cuda

    dispatch = cuda.plan_dispatch(ids, num_experts)
    routes, counts, order = _agree(dispatch.groups.offsets.diff().to(torch.int64), group)
    rows = permuted(carry_rows(cuda.permute(x, dispatch), routes), order)
    groups = grouped.Groups.from_counts(counts, len(rows), x.device)
    inner = cuda.gated_linear(rows, gate_up, groups)
    out = grouped.grouped_linear(inner, down, groups)
    home = carry_rows(permuted(out, torch.argsort(order)), routes.back())
    return cuda.combine(home, weights, dispatch)


def _agree(counts_E: Tensor, group: Group) -> tuple[Routes, list[int], Tensor]:
    """Routes of the rows, rows per own expert, and the order that sorts what arrives by (expert, source, token)."""
    ranks = size_of(group)
    arriving = torch.empty_like(counts_E)  # [ranks, Eo]: each source's rows per own expert
    all_to_all(arriving, counts_E.contiguous(), group)
    both = torch.stack((counts_E, arriving)).cpu().view(2, ranks, -1)
    send, receive = both.sum(-1).tolist()
    expert = torch.arange(both.shape[-1]).repeat(ranks).repeat_interleave(both[1].flatten())
    order = torch.sort(expert, stable=True).indices.to(counts_E.device)
    return Routes(send, receive, group), both[1].sum(0).tolist(), order
