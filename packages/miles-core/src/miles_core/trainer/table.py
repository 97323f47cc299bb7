"""Embedding and output projection cut by rows of the vocabulary, used without ever being whole on a process.

Legend: V = vocabulary, H = hidden, T = tokens of this process, ranks = processes the rows are cut over.

Looking up: a process asks the owners for the rows of its own tokens. Scoring: the projection passes by in slices of `step` rows,
each sent by its owners when its turn comes; `streamed` does the arithmetic. A tied table is one parameter for both uses.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from miles_core.trainer.collectives import Group, Routes, broadcast, carry_rows, ordered_sum, permuted, rank_of, size_of
from miles_core.trainer.streamed import Slices, Span, streamed_logprob
from miles_kernels.ops.embedding import embedding
from miles_kernels.ops.logprob import LogprobOutput
from miles_kernels.ops.matmul import Mode


def bounds_of(rows: int, ranks: int) -> list[int]:
    """[ranks + 1] first row of every rank; the rows are dealt as torch.chunk does, so the last ranks may have fewer or none."""
    per = -(-rows // ranks)
    return [min(rank * per, rows) for rank in range(ranks + 1)]


class VocabTable(nn.Module):
    """Rows `bounds[rank] .. bounds[rank + 1]` of a [V, H] table.

    `dtype` is that of the computation; `weight` is kept in `keep` (float32 for masters). `mode`: see `ops.matmul`.
    """

    def __init__(self, whole: Tensor, dtype: torch.dtype, keep: torch.dtype, group: Group, mode: Mode | None) -> None:
        super().__init__()
        self.group, self.dtype, self.mode = group, dtype, mode
        self.rank = rank_of(group)
        self.bounds = bounds_of(whole.shape[0], size_of(group))
        self.shape = whole.shape
        own = whole.detach()[self.bounds[self.rank] : self.bounds[self.rank + 1]]
        self.weight = nn.Parameter(own.to(keep, copy=True))

    def rows(self, token_ids: Tensor) -> Tensor:
        """Rows of `token_ids` int64 [T] as [T, H] in the computing dtype. Backward: summed at the owner, in token order."""
        narrow = self.weight.to(self.dtype)
        if size_of(self.group) == 1:
            return embedding(token_ids, narrow)
        starts = torch.tensor(self.bounds[1:-1], device=token_ids.device)
        owner = torch.bucketize(token_ids, starts, right=True)
        order = torch.sort(owner, stable=True).indices
        routes = Routes.agree(torch.bincount(owner, minlength=size_of(self.group)), self.group)
        asked = routes.carry(token_ids[order]) - self.bounds[self.rank]
        found = carry_rows(embedding(asked, narrow), routes.back())
        return permuted(found, torch.argsort(order))

    def logprob(self, hidden: Tensor, targets: Tensor, temperature: float | Tensor, *, entropy: bool = True) -> LogprobOutput:
        """`Decoder.logprob` with this table as projection: the same bits, never more of the table than a slice."""
        return streamed_logprob(hidden, self.weight, _TableSlices(self), targets, temperature, entropy=entropy)


class _TableSlices(Slices):
    """A table's rows passing by."""

    def __init__(self, table: VocabTable) -> None:
        self.table, self.num_rows = table, int(table.shape[0])
        self.mode = table.mode
        self.narrow = table.weight.detach().to(table.dtype)
        self._ahead: dict[Span, tuple[Tensor, list[Any]]] = {}
        """The slice that travels while the one before is at work."""

    def _overlaps(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        bounds = self.table.bounds
        cuts = [(rank, max(start, bounds[rank]), min(stop, bounds[rank + 1])) for rank in range(len(bounds) - 1)]
        return [(rank, a, b) for rank, a, b in cuts if a < b]

    def read(self, start: int, stop: int, after: Span | None = None) -> Tensor:
        if size_of(self.table.group) == 1:
            return self.narrow[start:stop]
        span = start, stop
        out, under_way = self._ahead.pop(span) if span in self._ahead else self._send(start, stop)
        assert not self._ahead, f"rows {start} .. {stop} are read, not those that were announced: {list(self._ahead)}"
        if after is not None:
            self._ahead[after] = self._send(*after)
        for work in under_way:
            work.wait()
        return out

    def _send(self, start: int, stop: int) -> tuple[Tensor, list[Any]]:
        """Rows start .. stop from whoever has them, and what to wait for."""
        table, first = self.table, self.table.bounds[self.table.rank]
        out, under_way = self.narrow.new_empty((stop - start, self.narrow.shape[1])), []
        for rank, a, b in self._overlaps(start, stop):
            part = out[a - start : b - start]
            if rank == table.rank:
                part.copy_(self.narrow[a - first : b - first])
            under_way.append(broadcast(part, rank, table.group, async_op=True))
        return out, under_way

    def new_gradient(self) -> Tensor:
        return torch.zeros_like(self.table.weight, dtype=torch.float32)

    def add(self, gradient: Tensor, start: int, stop: int, part: Tensor) -> None:
        table, first = self.table, self.table.bounds[self.table.rank]
        if size_of(table.group) == 1:
            gradient[start:stop] = part
            return
        overlaps = {rank: (a, b) for rank, a, b in self._overlaps(start, stop)}
        ranks = range(size_of(table.group))
        send = [b - a for a, b in (overlaps.get(rank, (0, 0)) for rank in ranks)]
        a, b = overlaps.get(table.rank, (0, 0))
        received = Routes(send, [b - a] * len(send), table.group).carry(part)
        if b > a:
            gradient[a - first : b - first] = ordered_sum(received.chunk(len(send)))
