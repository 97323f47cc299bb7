"""Context parallelism: the rows of one packed stream dealt to several processes, keys and values gathered for all of them.

Legend: T = rows of the whole stream, R = rows of this process, M = trained tokens of the stream, ranks = processes that share it.

A segment long enough is cut into 2 x ranks pieces, of which rank r takes the r-th and the r-th from the end: with causal
attention both together cost everyone the same. Shorter segments go whole to the least loaded rank. Attention over the gathered
keys, in the order of the stream, is the attention of one process: a row's bits depend on its own query and keys only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from miles_core.trainer.collectives import Group, all_to_all, gather_padded, ordered_sum, size_of
from miles_kernels.ops.attention import AttentionPlan, Segment, plan_attention


class Run(NamedTuple):
    """Tokens `start .. stop` of segment `segment` of the stream."""

    segment: int
    start: int
    stop: int


def deal(lengths: Sequence[int], ranks: int) -> list[list[Run]]:
    """The runs of every rank, ascending; every token belongs to exactly one of them."""
    runs: list[list[Run]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for segment, length in enumerate(lengths):
        if length < 2 * ranks:
            rank = load.index(min(load))
            runs[rank].append(Run(segment, 0, length))
            load[rank] += length
            continue
        bounds = [length * i // (2 * ranks) for i in range(2 * ranks + 1)]
        for rank in range(ranks):
            for piece in (rank, 2 * ranks - 1 - rank):
                runs[rank].append(Run(segment, bounds[piece], bounds[piece + 1]))
                load[rank] += bounds[piece + 1] - bounds[piece]
    return runs


@dataclass(frozen=True, eq=False, kw_only=True)
class ContextPart:
    """What one process knows of the cut. A rank without rows computes row 0 once more, which nobody reads: kernels need a row."""

    runs: tuple[Run, ...]
    rows: Tensor
    """[R] int64 rows of the stream this process computes, in the order of its runs."""
    most_rows: int
    """Rows of the rank that has most; what the others send is padded to it."""
    place: Tensor
    """[T] int64: where each row of the stream lies among the gathered [ranks * most_rows]."""
    source: Tensor
    """[own trained tokens] int64 in 0..R-1: the row that predicts each; row 0 when there is none."""
    own: Tensor
    """[own trained tokens] int64: which of the M they are; empty when there is none."""
    most_tokens: int
    token_place: Tensor
    """[M] int64: where each trained token's value lies among the gathered [ranks * most_tokens]."""
    starts: tuple[int, ...]
    """First row of every segment in the stream."""
    pool: Tensor | None = None
    """CUDA: row of the stream of every slot of the key pool; a row may come twice. None: the pool is the stream."""
    home: tuple[Tensor, Tensor] | None = None
    """CUDA: the up to two slots that hold each gathered place, one past the end for none."""

    @classmethod
    def of(cls, lengths: Sequence[int], parents: Sequence[int], source_index: Tensor, rank: int, ranks: int) -> ContextPart:
        """The part of `rank` in a stream of segments; `source_index` [M] are the rows that predict its trained tokens."""
        starts = [0, *accumulate(lengths)][:-1]
        dealt = deal(lengths, ranks)
        rows = [_rows(runs, starts) for runs in dealt]
        owner, index = torch.empty(sum(lengths), dtype=torch.int64), torch.empty(sum(lengths), dtype=torch.int64)
        for number, own_rows in enumerate(rows):
            owner[own_rows], index[own_rows] = number, torch.arange(len(own_rows))
        most_rows = max(1, *(len(own_rows) for own_rows in rows))
        token_owner = owner[source_index]
        counts = torch.bincount(token_owner, minlength=ranks)
        most_tokens = max(1, int(counts.max()))
        token_place = torch.empty(len(source_index), dtype=torch.int64)
        for number in range(ranks):
            mine = (token_owner == number).nonzero().flatten()
            token_place[mine] = number * most_tokens + torch.arange(len(mine))
        own = (token_owner == rank).nonzero().flatten()
        source = index[source_index[own]] if len(own) else torch.zeros(1, dtype=torch.int64)
        return cls(
            runs=tuple(dealt[rank]) or (Run(0, 0, 1),),
            rows=rows[rank] if len(rows[rank]) else torch.zeros(1, dtype=torch.int64),
            most_rows=most_rows,
            place=owner * most_rows + index,
            source=source,
            own=own,
            most_tokens=most_tokens,
            token_place=token_place,
            starts=tuple(starts),
        )

    def plan(self, lengths: Sequence[int], parents: Sequence[int]) -> AttentionPlan:
        """The reference plan of this process's queries over the whole stream's keys."""
        segments, at = [], 0
        for run in self.runs:
            before = _ancestors(run.segment, lengths, parents, self.starts)
            own = torch.arange(self.starts[run.segment], self.starts[run.segment] + run.stop)
            slots = torch.cat([*before, own])
            segments.append(Segment(at, run.stop - run.start, len(slots) - (run.stop - run.start), slots))
            at += run.stop - run.start
        return plan_attention(segments, num_tokens=at)

    def cuda_plan(self, device: torch.device | None) -> Any:
        """The plan of the CUDA kernels: every run is a sequence with keys of its own, rows of the stream copied as needed."""
        from miles_kernels.cuda.attention import KVBatch

        def on_device(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        counts, keys = [run.stop - run.start for run in self.runs], [run.stop for run in self.runs]
        cu_q, starts = on_device([0, *accumulate(counts)]), on_device([0, *accumulate(keys)][:-1])
        return KVBatch(cu_q, on_device(keys), starts, None, 0, max(counts), max(keys))

    def to(self, device: torch.device | None) -> ContextPart:
        """The part as CUDA uses it, with the pool of `cuda_plan`."""
        pool = torch.cat([torch.arange(self.starts[run.segment], self.starts[run.segment] + run.stop) for run in self.runs])
        return replace(
            self,
            pool=self.place[pool].to(device),
            home=tuple(slots.to(device) for slots in _homes(self.place[pool], int(self.place.max()) + 1)),
            token_place=self.token_place.to(device),
            own=self.own.to(device),
        )


def _rows(runs: Sequence[Run], starts: Sequence[int]) -> Tensor:
    parts = [torch.arange(starts[run.segment] + run.start, starts[run.segment] + run.stop) for run in runs]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)


def _ancestors(segment: int, lengths: Sequence[int], parents: Sequence[int], starts: Sequence[int]) -> list[Tensor]:
    """Rows of the segments this one continues, first to last."""
    found: list[Tensor] = []
    above = parents[segment]
    while above >= 0:
        found.insert(0, torch.arange(starts[above], starts[above] + lengths[above]))
        above = parents[above]
    return found


def _homes(pool: Tensor, places: int) -> tuple[Tensor, Tensor]:
    """For every gathered place the first and the second slot of `pool` that copies it, len(pool) where there is none."""
    slots = torch.arange(len(pool))
    first = torch.full((places,), len(pool)).scatter_reduce_(0, pool, slots, "amin")
    second = torch.full((places,), len(pool))
    again = slots != first[pool]
    second[pool[again]] = slots[again]
    return first, second


class ContextKV:
    """A `KVStore` whose pools are the gathered keys and values of the whole stream, differentiable."""

    def __init__(self, plan: Any, part: ContextPart, group: Group) -> None:
        self.plan, self.part, self.group = plan, part, group

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [R, Hkv, D] of this process -> pools [Hkv, N, D] of all."""
        both = _GatherRows.apply(torch.cat((k, v), -1), self.part, self.group)
        keys, values = both.split((k.shape[-1], v.shape[-1]), -1)
        return keys.transpose(0, 1), values.transpose(0, 1)

    def target(self, layer: int) -> None:
        """The pools are made here."""
        return None


class _GatherRows(torch.autograd.Function):
    """Rows of this process -> rows of the pool. Backward: each process's gradient of a row, added in the order of ranks."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, part: ContextPart, group: Group) -> Tensor:
        ctx.part, ctx.group, ctx.num_rows = part, group, rows.shape[0]
        gathered = gather_padded(rows, part.most_rows, group).flatten(0, 1)
        return gathered.index_select(0, part.place if part.pool is None else part.pool)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        part, ranks = ctx.part, size_of(ctx.group)
        send = grad.new_zeros((ranks * part.most_rows, *grad.shape[1:]), dtype=torch.float32)
        if part.home is None:
            send[part.place] = grad.float()
        else:
            padded = torch.cat((grad, grad.new_zeros((1, *grad.shape[1:])))).float()
            first, second = part.home
            send[: len(first)] = padded[first] + padded[second]
        received = torch.empty_like(send)
        all_to_all(received, send, ctx.group)
        total = ordered_sum(received.view(ranks, part.most_rows, *grad.shape[1:]))
        return total[: ctx.num_rows].to(grad.dtype), None, None


def gather_tokens(values: Tensor, part: ContextPart, group: Group) -> Tensor:
    """Values of the own trained tokens (or of row 0 for none) -> [M] of all. Each process keeps the gradient of its own."""
    return _GatherTokens.apply(values, part, group)


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, part: ContextPart, group: Group) -> Tensor:
        ctx.part, ctx.shape = part, values.shape
        return gather_padded(values, part.most_tokens, group).flatten().index_select(0, part.token_place)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        own = grad.index_select(0, ctx.part.own)
        return own if len(own) else grad.new_zeros(ctx.shape), None, None
