"""What a verification run records: one row per (subject, axis), and the bitwise comparison all of them use."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from miles_kernels.testing import count_unequal

AXES: dict[int, str] = {
    1: "batch size",
    2: "row position and order",
    3: "neighbour content",
    4: "padding",
    5: "packed order",
    6: "chunk cuts",
    7: "decode against full",
    8: "cached prefix, page size, page order",
    9: "a neighbour's query length",
    10: "threads, streams, graph",
    11: "process restart, empty kernel cache",
    12: "tensor-parallel shards",
    13: "router ties, expert load",
    14: "grad mode, recompute, compile",
    15: "backward run to run",
}
MIN_ELEMENTS = 1_000_000
"""Least elements per subject, compared or (for one number per row) reduced: rounding to bfloat16 hides 99.98 % of differences."""


@dataclass(frozen=True)
class Row:
    """One axis of one subject. `unequal` counts elements whose bits differ; there is no tolerance."""

    subject: str
    axis: int
    elements: int
    unequal: int
    seconds: float
    worst: str = ""
    """the first case that differed, with its counts"""
    width: int = 1
    """elements that were reduced into each compared one, for ops whose result is one number per row"""

    @property
    def equal(self) -> bool:
        """Whether every compared element agreed."""
        return self.unequal == 0


@dataclass(frozen=True)
class Control:
    """A stock implementation put through the same axes; `unequal` must not be 0, or the check could not fail."""

    subject: str
    elements: int
    unequal: int

    @property
    def caught(self) -> bool:
        """Whether the verifier saw the stock implementation differ."""
        return self.unequal > 0


class Tally:
    """Adds up comparisons of one (subject, axis)."""

    def __init__(self) -> None:
        self.elements = self.unequal = 0
        self.worst = ""

    def add(self, case: str, got: Tensor | Iterable[Tensor], want: Tensor | Iterable[Tensor]) -> None:
        """Compare tensors, or several in order, element by element."""
        got = [got] if isinstance(got, Tensor) else list(got)
        want = [want] if isinstance(want, Tensor) else list(want)
        for a, b in zip(got, want, strict=True):
            differ = count_unequal(a, b)
            self.elements += a.numel()
            self.unequal += differ
            if differ and not self.worst:
                self.worst = f"{case}: {differ} of {a.numel()}"

    def row(self, subject: str, axis: int, seconds: float, width: int = 1) -> Row:
        """The finished row."""
        return Row(subject, axis, self.elements, self.unequal, seconds, self.worst, width)
