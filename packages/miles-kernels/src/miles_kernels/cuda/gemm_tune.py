"""Which cuBLASLt algorithm is fastest for a product nobody has measured: timed once per kind of shape, on the operands at hand.

Only algorithms with the first one's bits on these operands take part, so the choice never changes a result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from miles_kernels.cuda import gemm_lt
from miles_kernels.cuda.gemm_lt import Problem

LEAST_ROWS = 512
"""Smaller products are bound by memory or launches; the heuristic's first choice is good there."""
LARGEST_BYTES = 2**30
"""Larger results are not computed twice for a measurement."""
GAIN = 0.98
"""An algorithm replaces the first choice when it takes at most this share of its time."""

_winners: dict[tuple[object, ...], str] = {}


def forget() -> None:
    """Drop what was measured."""
    _winners.clear()


def fastest(problem: Problem, a: Tensor, b: Tensor, bias: Tensor | None) -> str:
    """Name of the algorithm for a problem, as `gemm_lt.Plan.select` takes it; "" for the heuristic's first choice.

    Rows (and, in a weight gradient, the depth) count by their power of two, so that packed batches of many lengths share one
    measurement. Nothing is measured while a CUDA graph is captured.
    """
    tokens = problem.k if problem.a_t else problem.m
    if tokens < LEAST_ROWS or problem.m * problem.n * problem.out_dtype.itemsize > LARGEST_BYTES:
        return ""
    shape = (problem.m, problem.n) if problem.a_t else (problem.n, problem.k)
    key = (
        tokens.bit_length(), shape, problem.a_t, problem.b_t, problem.dtype, problem.out_dtype, problem.bias, problem.accumulate,
        problem.device,
    )  # fmt: skip
    found = _winners.get(key)
    if found is None:
        if torch.cuda.is_current_stream_capturing():
            return ""
        found = _winners[key] = _measure(problem, a, b, bias)
    return found


def _measure(problem: Problem, a: Tensor, b: Tensor, bias: Tensor | None) -> str:
    first = torch.empty((problem.m, problem.n), dtype=problem.out_dtype, device=a.device)
    other = torch.empty_like(first)
    if not gemm_lt.fits(first):
        return ""
    plan = gemm_lt.Plan(problem._replace(accumulate=False, ldo=problem.n))
    plan.run(a, b, first, bias, index=0)
    best, limit = 0, _seconds(plan, 0, a, b, first, bias) * GAIN
    for index in range(1, len(plan.algorithms)):
        plan.run(a, b, other, bias, index=index)
        if not torch.equal(first, other):
            continue
        taken = _seconds(plan, index, a, b, other, bias)
        if taken < limit:
            best, limit = index, taken
    return plan.name(best) if best else ""


def _seconds(plan: gemm_lt.Plan, index: int, a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None) -> float:
    times = []
    for _ in range(3):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        plan.run(a, b, out, bias, index=index)
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return min(times)
