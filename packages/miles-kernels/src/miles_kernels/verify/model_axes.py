"""Axes of a whole decoder: every schedule of an engine against each sequence alone in a training forward; and the bisection.

Legend: S = sequences, T = tokens of a step, L = tokens of one sequence.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from miles_kernels.verify.backends import Backend, Step
from miles_kernels.verify.blocks import Blocks, Record, Shape
from miles_kernels.verify.result import Row, Tally

Cut = tuple[int, int, int]
"""(sequence, first token, one past the last)"""


@dataclass(frozen=True)
class Schedule:
    """How the sequences are computed: engine steps over pages, or packed training forwards (no pages)."""

    name: str
    axis: int
    steps: tuple[tuple[Cut, ...], ...]
    page_size: int = 0


@dataclass(frozen=True)
class Difference:
    """The first op, in execution order, at which a schedule's value differs from the sequence alone."""

    schedule: str
    op: str
    sequence: int
    position: int
    unequal: int
    elements: int

    def __str__(self) -> str:
        return (
            f"{self.schedule}: first difference at {self.op}, sequence {self.sequence}, position {self.position} "
            f"({self.unequal} of {self.elements} elements)"
        )


class Model(Protocol):
    """What a case runs: `Blocks`, or the decoder itself."""

    @property
    def head(self) -> Tensor: ...
    def pools(self, slots: int) -> list[tuple[Tensor, Tensor]]: ...
    def forward(
        self, ops: Backend, tokens: Tensor, step: Step, pools: list[tuple[Tensor, Tensor]] | None, record: Record | None = None
    ) -> Tensor: ...


class ModelCase:
    """One random decoder, its sequences, and the values of each sequence alone."""

    def __init__(
        self,
        backend: Backend,
        size: Shape,
        dtype: torch.dtype,
        lengths: Sequence[int],
        seed: int = 0,
        *,
        model: Model | None = None,
        subject: str = "",
    ) -> None:
        self.backend, self.lengths = backend, list(lengths)
        self.blocks: Model = Blocks(size, dtype, backend.device, seed) if model is None else model
        self.subject = subject or f"model {size.family}"
        generator = torch.Generator().manual_seed(seed + 1)
        self.tokens = [torch.randint(size.vocab, (n,), generator=generator).to(backend.device) for n in lengths]
        self.targets = [torch.randint(size.vocab, (n,), generator=generator).to(backend.device) for n in lengths]
        self.generator = generator
        self.alone = [self._outputs(self._forward([(s, 0, n)], None, 0), [(s, 0, n)]) for s, n in enumerate(lengths)]

    def _forward(
        self,
        cuts: Sequence[Cut],
        pools: list[tuple[Tensor, Tensor]] | None,
        page_size: int,
        table: Tensor | None = None,
        record: Record | None = None,
    ) -> Tensor:
        tokens = torch.cat([self.tokens[s][start:stop] for s, start, stop in cuts])
        rows = None if table is None else table[[s for s, _, _ in cuts]]
        step = Step(tuple(b - a for _, a, b in cuts), tuple(b for _, _, b in cuts), rows, page_size)
        with torch.no_grad():
            return self.blocks.forward(self.backend, tokens, step, pools, record)

    def _outputs(self, hidden: Tensor, cuts: Sequence[Cut]) -> tuple[Tensor, Tensor]:
        """(hidden, log-probability of the targets at temperature 0.8) of the step's tokens."""
        targets = torch.cat([self.targets[s][start:stop] for s, start, stop in cuts])
        temperature = torch.full(targets.shape, 0.8, device=hidden.device)
        with torch.no_grad():
            return hidden, self.backend.logprob(hidden, self.blocks.head, targets, temperature)[0]

    def layout(self, page_size: int) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """Pools and a shuffled page table [S, pages]."""
        most = -(-max(self.lengths) // page_size)
        pages = torch.randperm(len(self.lengths) * most, generator=self.generator)
        return self.blocks.pools(pages.numel() * page_size), pages.view(len(self.lengths), most)

    def run(self, schedule: Schedule) -> Tally:
        """Compare one schedule."""
        tally = Tally()
        pools, table = self.layout(schedule.page_size) if schedule.page_size else (None, None)
        for cuts in schedule.steps:
            got = self._outputs(self._forward(cuts, pools, schedule.page_size, table), cuts)
            for kind in (0, 1):
                want = torch.cat([self.alone[s][kind][start:stop] for s, start, stop in cuts])
                tally.add(f"{schedule.name}, {('hidden', 'logprob')[kind]}", got[kind], want)
        return tally

    def bisect(self, schedule: Schedule) -> Difference | None:
        """Run the schedule with every op recorded; the first op whose value differs, None when all agree."""
        wanted: list[dict[str, Tensor]] = []
        for s, n in enumerate(self.lengths):
            values: dict[str, Tensor] = {}
            self._forward([(s, 0, n)], None, 0, None, values.__setitem__)
            wanted.append(values)
        pools, table = self.layout(schedule.page_size) if schedule.page_size else (None, None)
        for cuts in schedule.steps:
            found: dict[str, Tensor] = {}
            self._forward(cuts, pools, schedule.page_size, table, found.__setitem__)
            for op, value in found.items():
                place = 0
                for s, start, stop in cuts:
                    part, want = value[place : place + stop - start], wanted[s][op][start:stop]
                    place += stop - start
                    differ = (part != want) & ~(part.isnan() & want.isnan())
                    if bool(differ.any()):
                        position = start + int(differ.flatten(1).any(1).nonzero()[0])
                        return Difference(schedule.name, op, s, position, int(differ.sum()), differ.numel())
        return None


def schedules(lengths: Sequence[int], seed: int = 0) -> list[Schedule]:
    """Packed, chunked, decoded, cached and mixed; every sequence's tokens exactly once per schedule."""
    generator = torch.Generator().manual_seed(seed)
    count = len(lengths)
    whole = tuple((s, 0, n) for s, n in enumerate(lengths))
    shuffled = tuple(whole[s] for s in torch.randperm(count, generator=generator).tolist())

    def chunks(sizes: Callable[[], int]) -> tuple[tuple[Cut, ...], ...]:
        done, steps = [0] * count, []
        while any(d < n for d, n in zip(done, lengths, strict=True)):
            cuts = []
            for s, n in enumerate(lengths):
                if done[s] < n:
                    stop = min(n, done[s] + sizes())
                    cuts.append((s, done[s], stop))
                    done[s] = stop
            steps.append(tuple(cuts))
        return tuple(steps)

    def after(prompt: Callable[[int], int], width: int) -> tuple[tuple[Cut, ...], ...]:
        """Prompts together, then `width` tokens per step."""
        first = tuple((s, 0, prompt(n)) for s, n in enumerate(lengths))
        steps, done = [first], [stop for _, _, stop in first]
        while any(d < n for d, n in zip(done, lengths, strict=True)):
            cuts = tuple((s, done[s], min(n, done[s] + width)) for s, n in enumerate(lengths) if done[s] < n)
            for s, _, stop in cuts:
                done[s] = stop
            steps.append(cuts)
        return tuple(steps)

    def number(high: int) -> int:
        return int(torch.randint(1, high + 1, (), generator=generator))

    decode = after(lambda n: max(1, n - 6), 1)
    return [
        Schedule("packed", 5, (whole,)),
        Schedule("packed, shuffled", 5, (shuffled,)),
        Schedule("packed in two forwards", 1, (whole[: count // 2], whole[count // 2 :])),
        Schedule("chunks of 1 to 90", 6, chunks(lambda: number(90)), 16),
        Schedule("chunks of 64", 6, chunks(lambda: 64), 64),
        Schedule("decode", 7, decode, 16),
        Schedule("decode one sequence per step", 1, tuple((cut,) for cuts in decode for cut in cuts), 16),
        Schedule("verification of 4", 7, after(lambda n: max(1, n - 9), 4), 16),
        Schedule("cached prefix, pages of 1", 8, after(lambda n: max(1, n * 2 // 3), 10_000), 1),
        Schedule("cached prefix, pages of 64", 8, after(lambda n: max(1, n // 2), 10_000), 64),
        Schedule("cached prefix, pages of 128", 8, after(lambda n: max(1, n - 2), 10_000), 128),
        Schedule("decode beside prefill", 9, _mixed(lengths), 16),
    ]


def _mixed(lengths: Sequence[int]) -> tuple[tuple[Cut, ...], ...]:
    """Sequence 0 decodes its last tokens while the others are prefilled one after the other."""
    tail = len(lengths) - 1
    start = max(1, lengths[0] - tail)
    steps: list[tuple[Cut, ...]] = [((0, 0, start),)]
    for s in range(1, len(lengths)):
        token = start + s - 1
        steps.append(((0, token, token + 1), (s, 0, lengths[s])) if token < lengths[0] else ((s, 0, lengths[s]),))
    return tuple(steps)


def verify_model(case: ModelCase) -> Iterator[Row]:
    """One row per axis; the schedules of an axis add up."""
    by_axis: dict[int, list[Schedule]] = {}
    for schedule in schedules(case.lengths):
        by_axis.setdefault(schedule.axis, []).append(schedule)
    for axis, group in sorted(by_axis.items()):
        start = time.perf_counter()
        total = Tally()
        for schedule in group:
            part = case.run(schedule)
            total.elements += part.elements
            total.unequal += part.unequal
            total.worst = total.worst or part.worst
        yield total.row(case.subject, axis, time.perf_counter() - start)


def first_difference(case: ModelCase) -> Difference | None:
    """The first differing op over all schedules, in their order."""
    for schedule in schedules(case.lengths):
        found = case.bisect(schedule)
        if found is not None:
            return found
    return None
