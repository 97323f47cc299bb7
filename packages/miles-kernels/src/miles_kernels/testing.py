"""Bitwise checks anyone can run against any op, ours or a third party's.

Example:
    sweep_rows(lambda x: linear(x, weight), torch.randn(64, 128), name="linear")
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from miles_kernels.probe import threads

__all__ = ["SWEEP_SIZES", "SweepReport", "across_threads", "assert_bitwise_equal", "count_unequal", "sweep_rows", "threads"]

SWEEP_SIZES = (*range(1, 18), 23, 31, 32, 33, 48, 63, 64)


def count_unequal(a: Tensor, b: Tensor) -> int:
    """Number of elements whose bit patterns differ; +0 and -0 count as equal, and so do two NaNs.

    Raises ValueError when shapes or dtypes differ.
    """
    return int(_unequal(a, b).sum())


def _unequal(a: Tensor, b: Tensor) -> Tensor:
    if a.shape != b.shape or a.dtype != b.dtype:
        raise ValueError(f"cannot compare {a.dtype} {tuple(a.shape)} with {b.dtype} {tuple(b.shape)}")
    differ = a != b
    return differ & ~(a.isnan() & b.isnan()) if a.is_floating_point() else differ


def assert_bitwise_equal(a: Tensor, b: Tensor, name: str = "tensor") -> None:
    """Raise AssertionError with count, largest difference and first index unless `a` and `b` agree in every element."""
    unequal = _unequal(a, b)
    count = int(unequal.sum())
    if not count:
        return
    first = tuple(int(i) for i in unequal.nonzero()[0])
    largest = (a.double() - b.double()).abs()[unequal].max().item()
    raise AssertionError(
        f"{name}: {count} of {a.numel()} elements differ, largest difference {largest:.3e}, "
        f"first at {first}: {a[first].item()!r} and {b[first].item()!r}"
    )


@dataclass(frozen=True)
class SweepReport:
    """What a sweep compared. `failures` name the cases that differed, with their counts."""

    name: str
    num_cases: int
    num_elements: int
    num_unequal: int
    failures: tuple[str, ...]

    def check(self) -> SweepReport:
        """Raise AssertionError unless every compared element was equal; returns itself."""
        if self.num_unequal:
            shown = "; ".join(self.failures[:5])
            raise AssertionError(
                f"{self.name}: {self.num_unequal} of {self.num_elements} elements differ in {len(self.failures)} of "
                f"{self.num_cases} cases: {shown}"
            )
        return self


def sweep_rows(
    fn: Callable[..., Tensor],
    *inputs: Tensor,
    name: str = "op",
    sizes: Iterable[int] = SWEEP_SIZES,
    thread_counts: Sequence[int] = (1, 2),
    seed: int = 0,
) -> SweepReport:
    """Compare `fn(*rows)` with the same rows of `fn(*inputs)`: batch sizes, offsets, permutations, thread counts.

    All inputs and the result share their first dimension. Does not raise; call `.check()` on the report, or look at
    `num_unequal` for a negative control.
    """
    total = inputs[0].shape[0]
    with threads(1):
        whole = fn(*inputs)
    generator = torch.Generator().manual_seed(seed)
    cases = elements = unequal = 0
    failures = []
    for label, rows, count in _row_cases(total, sizes, thread_counts, generator):
        with threads(count):
            part = fn(*(x[rows] for x in inputs))
        bad = count_unequal(part, whole[rows])
        cases, elements, unequal = cases + 1, elements + part.numel(), unequal + bad
        if bad:
            failures.append(f"{label} threads={count}: {bad} of {part.numel()}")
    return SweepReport(name, cases, elements, unequal, tuple(failures))


def _row_cases(
    total: int, sizes: Iterable[int], thread_counts: Sequence[int], generator: torch.Generator
) -> Iterator[tuple[str, Tensor, int]]:
    for size in (size for size in sizes if size <= total):
        offset = int(torch.randint(0, total - size + 1, (), generator=generator))
        chosen = torch.randperm(total, generator=generator)[:size]
        for count in thread_counts:
            yield f"first {size}", torch.arange(size), count
            yield f"rows {offset}..{offset + size}", torch.arange(offset, offset + size), count
            yield f"{size} shuffled", chosen, count


def across_threads(fn: Callable[[], Tensor], thread_counts: Sequence[int] = (1, 2), name: str = "op") -> Tensor:
    """Result of `fn()`, after asserting that it is bitwise the same for every thread count."""
    results = []
    for count in thread_counts:
        with threads(count):
            results.append(fn())
    for count, result in zip(thread_counts[1:], results[1:], strict=True):
        assert_bitwise_equal(result, results[0], f"{name} on {count} and {thread_counts[0]} threads")
    return results[0]
