"""Axes of attention: packing, chunk cuts, decode, cached prefixes, pages, neighbours. The yardstick is each sequence alone.

Legend: B = sequences, L = tokens of one, N = pool slots.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from miles_kernels.verify.backends import Backend, Step
from miles_kernels.verify.op_cases import Draw
from miles_kernels.verify.result import Row, Tally

PAGES = (1, 16, 64, 128)


class AttentionCase:
    """B sequences of queries, keys and values, and their attention when each is alone."""

    def __init__(
        self,
        backend: Backend,
        dtype: torch.dtype,
        *,
        name: str,
        lengths: Sequence[int],
        heads: int,
        kv_heads: int,
        dim: int,
        dim_v: int | None = None,
        window: int | None = None,
        seed: int = 0,
    ) -> None:
        self.backend, self.name, self.lengths, self.window = backend, name, list(lengths), window
        self.scale = dim**-0.5
        self.draw = Draw(backend.device, dtype, seed)
        self.generator = torch.Generator().manual_seed(seed)
        total = sum(self.lengths)
        self.q = self.draw.normal(total, heads, dim)
        self.k = self.draw.normal(total, kv_heads, dim)
        self.v = self.draw.normal(total, kv_heads, dim_v or dim)
        self.starts = [sum(self.lengths[:b]) for b in range(len(self.lengths))]
        self.alone = [
            self._attend(self._step([b]), self.rows([b]), self.k, self.v, packed=True) for b in range(len(self.lengths))
        ]

    def rows(self, order: Sequence[int]) -> Tensor:
        """Flat token indices of whole sequences in this order."""
        index = torch.cat([torch.arange(self.starts[b], self.starts[b] + self.lengths[b]) for b in order])
        return index.to(self.backend.device)

    def _step(self, order: Sequence[int]) -> Step:
        lens = tuple(self.lengths[b] for b in order)
        return Step(lens, lens)

    def _attend(self, step: Step, rows: Tensor, k: Tensor, v: Tensor, *, packed: bool) -> Tensor:
        if packed:
            k, v = k[rows], v[rows]
        return self.backend.attend(self.q[rows], k, v, step, self.scale, self.window)

    def packed(self, order: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(one packed forward, what it should be)."""
        got = self._attend(self._step(order), self.rows(order), self.k, self.v, packed=True)
        return got, torch.cat([self.alone[b] for b in order])

    def pages(self, page_size: int, *, fill: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        """(k pool, v pool, table [B, pages]): all sequences in shuffled pages; unused slots hold `fill`."""
        most = -(-max(self.lengths) // page_size)
        order = torch.randperm(len(self.lengths) * most + 2, generator=self.generator)
        table = order[: len(self.lengths) * most].view(len(self.lengths), most)
        slots = order.numel() * page_size
        pools = []
        for source in (self.k, self.v):
            pool = torch.full((slots, *source.shape[1:]), fill, dtype=source.dtype, device=source.device)
            for b, length in enumerate(self.lengths):
                position = torch.arange(length)
                place = (table[b, position // page_size] * page_size + position % page_size).to(source.device)
                pool[place] = source[self.starts[b] : self.starts[b] + length]
            pools.append(pool)
        return pools[0], pools[1], table

    def paged(
        self, cuts: Sequence[tuple[int, int, int]], page_size: int, pools: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """One step over pages: sequence b's tokens [start, stop) for each (b, start, stop); (result, what it should be)."""
        k, v, table = pools
        rows = torch.cat([torch.arange(self.starts[b] + start, self.starts[b] + stop) for b, start, stop in cuts])
        step = Step(
            tuple(stop - start for _, start, stop in cuts),
            tuple(stop for _, _, stop in cuts),
            table[[b for b, _, _ in cuts]],
            page_size,
        )
        got = self._attend(step, rows.to(self.backend.device), k, v, packed=False)
        return got, torch.cat([self.alone[b][start:stop] for b, start, stop in cuts])


def verify_attention(case: AttentionCase, *, neighbour_lens: Sequence[int] = tuple(range(1, 131))) -> Iterator[Row]:
    """All attention axes of one case."""
    checks: dict[int, Callable[[AttentionCase], Tally]] = {
        3: _neighbours,
        5: _packed,
        6: _chunks,
        7: _decode,
        8: _pages,
        9: lambda case: _neighbour_lengths(case, neighbour_lens),
        15: _backward,
    }
    for axis, check in checks.items():
        start = time.perf_counter()
        tally = check(case)
        yield tally.row(case.name, axis, time.perf_counter() - start)


def _packed(case: AttentionCase) -> Tally:
    tally, count = Tally(), len(case.lengths)
    for trial in range(6):
        order = torch.randperm(count, generator=case.generator).tolist()[: max(1, count - trial % 3)]
        tally.add(f"order {order}", *case.packed(order))
    return tally


def _chunks(case: AttentionCase) -> Tally:
    """Every sequence prefilled in random cuts, several sequences per step."""
    tally = Tally()
    pools = case.pages(16)
    for largest in (7, 64, 200):
        done = [0] * len(case.lengths)
        while any(d < n for d, n in zip(done, case.lengths, strict=True)):
            cuts = []
            for b, length in enumerate(case.lengths):
                if done[b] < length:
                    size = int(torch.randint(1, largest + 1, (), generator=case.generator))
                    stop = min(length, done[b] + (size if largest > 7 else size * 9))
                    cuts.append((b, done[b], stop))
                    done[b] = stop
            tally.add(f"cuts up to {largest}: {cuts}", *case.paged(cuts, 16, pools))
    return tally


def _decode(case: AttentionCase) -> Tally:
    """One query of every sequence, at many positions; and two to eight queries, as verification of drafts does."""
    tally = Tally()
    pools = case.pages(16)
    shortest = min(case.lengths)
    for back in sorted({0, 1, 2, 5, shortest // 2, shortest - 1}):
        cuts = [(b, n - 1 - back, n - back) for b, n in enumerate(case.lengths) if n > back]
        tally.add(f"decode {back} before the end", *case.paged(cuts, 16, pools))
        tally.add(f"decode {back} before the end, alone", *case.paged(cuts[:1], 16, pools))
    for width in range(2, 9):
        cuts = [(b, n - width, n) for b, n in enumerate(case.lengths) if n >= width]
        tally.add(f"{width} queries each", *case.paged(cuts, 16, pools))
    return tally


def _pages(case: AttentionCase) -> Tally:
    """Page sizes, physical page order, and a suffix on top of a cached prefix of every length class."""
    tally = Tally()
    for page_size in PAGES:
        for _ in range(2):
            pools = case.pages(page_size)
            cuts = [(b, n - 1, n) for b, n in enumerate(case.lengths)]
            tally.add(f"pages of {page_size}, decode", *case.paged(cuts, page_size, pools))
            cuts = [(b, n * 2 // 3, n) for b, n in enumerate(case.lengths) if n > 2]
            tally.add(f"pages of {page_size}, suffix", *case.paged(cuts, page_size, pools))
    return tally


def _neighbours(case: AttentionCase) -> Tally:
    """Sequence 0 packed beside sequences of huge values, NaN and infinities, in every tensor."""
    tally = Tally()
    original = case.q, case.k, case.v
    for value in (1e4, float("nan"), float("inf")):
        for source in original:
            changed = [x.clone() if x is source else x for x in original]
            for x in changed:
                if x is not source and any(x is o for o in original):
                    continue
                x[case.lengths[0] :] = value
            case.q, case.k, case.v = changed
            for order in ([0, 1], [1, 0]):
                got, _ = case.packed(order)
                start = 0 if order[0] == 0 else case.lengths[1]
                tally.add(f"neighbour of {value}, order {order}", got[start : start + case.lengths[0]], case.alone[0])
            case.q, case.k, case.v = original
    return tally


def _neighbour_lengths(case: AttentionCase, lens: Sequence[int]) -> Tally:
    """A decode row beside a prefill of 1 to 130 tokens: kernels chosen by the longest query of a batch fail here."""
    tally = Tally()
    pools = case.pages(16)
    longest = max(range(1, len(case.lengths)), key=lambda b: case.lengths[b])
    n = case.lengths[0]
    for length in (x for x in lens if x <= case.lengths[longest]):
        got, want = case.paged([(0, n - 1, n), (longest, case.lengths[longest] - length, case.lengths[longest])], 16, pools)
        tally.add(f"beside {length} queries", got, want)
    return tally


def _backward(case: AttentionCase) -> Tally:
    """Gradients of a packed forward, run five times."""
    tally = Tally()

    def grads(order: Sequence[int]) -> tuple[Tensor, ...]:
        rows = case.rows(order)
        leaves = [x[rows].detach().requires_grad_() for x in (case.q, case.k, case.v)]
        q, k, v = leaves
        out = case.backend.attend(q, k, v, case._step(order), case.scale, case.window)
        cotangent = torch.sin(rows.float())[:, None, None].expand(out.shape).to(out.dtype)
        return torch.autograd.grad(out, leaves, cotangent)

    everything = list(range(len(case.lengths)))
    first = grads(everything)
    for round_ in range(4):
        tally.add(f"backward {round_ + 2}", grads(everything), first)
    return tally
