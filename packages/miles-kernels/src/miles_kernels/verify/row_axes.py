"""Axes of ops whose rows are independent: batch size, position, neighbours, padding, threads, restart, grad mode, backward.

An op here is a function of row tensors (one row per token, first dimension equal) that returns one or several row tensors.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from miles_kernels.probe import threads
from miles_kernels.verify.result import Row, Tally

SIZES = (*range(1, 131), 160, 192, 250, 256, 384, 512, 1000, 1024, 2048, 4096, 8192)
FEW_SIZES = (1, 2, 3, 4, 5, 7, 8, 11, 15, 16, 17, 23, 31, 32, 33, 48, 63, 64, 65, 100, 127, 128, 129, 130, 192, 256)
ROUNDS = 5
"""Backward passes compared with the first."""


@dataclass(frozen=True)
class RowOp:
    """One op with fixed weights and a pool of rows to draw from."""

    name: str
    fn: Callable[..., Tensor | Sequence[Tensor]]
    rows: tuple[Tensor, ...]
    """inputs [R, ...]; all that `fn` is called with"""
    params: tuple[Tensor, ...] = ()
    """tensors whose gradients the backward axes compare, beside those of floating `rows`"""
    poison: bool = True
    """whether rows may be replaced by NaN and infinities (ids may not)"""
    width: int = 1
    """elements reduced into each result, where a row gives one number"""


def outputs(result: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """An op's results as a list."""
    return [result] if isinstance(result, Tensor) else list(result)


def verify_rows(op: RowOp, *, sizes: Sequence[int], seed: int = 0) -> Iterator[Row]:
    """All axes of one op, one row each."""
    generator = torch.Generator().manual_seed(seed)
    cpu = op.rows[0].device.type == "cpu"
    with torch.no_grad(), threads(1):
        whole = outputs(op.fn(*op.rows))
    checks: list[tuple[int, Callable[[], Tally]]] = [
        (1, lambda: _batch_sizes(op, whole, sizes, generator)),
        (2, lambda: _order(op, whole, generator)),
        (10, lambda: _threads(op, whole) if cpu else _streams(op, whole)),
        (4, lambda: _padding(op, whole)),
    ]
    if op.poison:
        checks.append((3, lambda: _neighbours(op, whole, generator)))
    if any(x.is_floating_point() for x in (*op.rows, *op.params)) and op.params:
        checks += [(14, lambda: _grad_modes(op)), (15, lambda: _backward(op))]
    for axis, check in sorted(checks, key=lambda item: item[0]):
        start = time.perf_counter()
        tally = check()
        yield tally.row(op.name, axis, time.perf_counter() - start, op.width)


def _compare(tally: Tally, op: RowOp, case: str, rows: Tensor, whole: list[Tensor]) -> None:
    with torch.no_grad():
        part = outputs(op.fn(*(x[rows] for x in op.rows)))
    tally.add(case, part, [x[rows] for x in whole])


def _index(op: RowOp, values: Tensor) -> Tensor:
    return values.to(op.rows[0].device)


def _batch_sizes(op: RowOp, whole: list[Tensor], sizes: Sequence[int], generator: torch.Generator) -> Tally:
    tally, total = Tally(), op.rows[0].shape[0]
    for size in (size for size in sizes if size <= total):
        start = int(torch.randint(0, total - size + 1, (), generator=generator))
        _compare(tally, op, f"{size} rows from {start}", _index(op, torch.arange(start, start + size)), whole)
    return tally


def _order(op: RowOp, whole: list[Tensor], generator: torch.Generator) -> Tally:
    tally, total = Tally(), op.rows[0].shape[0]
    for size in (total, min(total, 33), min(total, 7)):
        for _ in range(3):
            _compare(tally, op, f"{size} shuffled", _index(op, torch.randperm(total, generator=generator)[:size]), whole)
    return tally


def _neighbours(op: RowOp, whole: list[Tensor], generator: torch.Generator) -> Tally:
    """Half the rows replaced by huge values, NaN, infinities or other random rows: the other half must not notice."""
    tally, total = Tally(), op.rows[0].shape[0]
    for name in ("random", "huge", "nan", "inf"):
        loud = _index(op, torch.randperm(total, generator=generator)[: total // 2])
        quiet = torch.ones(total, dtype=torch.bool, device=loud.device).index_fill(0, loud, False)
        changed = []
        for x in op.rows:
            x = x.clone()
            if x.is_floating_point():
                value = {"huge": 1e30, "nan": float("nan"), "inf": float("inf")}.get(name)
                x[loud] = torch.randn_like(x[loud]) if value is None else torch.full_like(x[loud], value)
            changed.append(x)
        with torch.no_grad():
            result = outputs(op.fn(*changed))
        tally.add(f"{name} neighbours", [x[quiet] for x in result], [x[quiet] for x in whole])
    return tally


def _padding(op: RowOp, whole: list[Tensor]) -> Tally:
    tally = Tally()
    count = min(37, op.rows[0].shape[0])
    for left, right in ((0, 27), (27, 0), (5, 22), (0, 64 - count), (0, 128 - count)):
        padded = [torch.cat((x.new_zeros(left, *x.shape[1:]), x[:count], x.new_zeros(right, *x.shape[1:]))) for x in op.rows]
        with torch.no_grad():
            result = outputs(op.fn(*padded))
        tally.add(f"{left} left, {right} right", [x[left : left + count] for x in result], [x[:count] for x in whole])
    return tally


def _threads(op: RowOp, whole: list[Tensor]) -> Tally:
    tally, total = Tally(), op.rows[0].shape[0]
    for count in (1, 2):
        with threads(count):
            for size in (1, 17, total):
                _compare(tally, op, f"{size} rows, {count} threads", torch.arange(min(size, total)), whole)
    return tally


def _streams(op: RowOp, whole: list[Tensor]) -> Tally:
    """A side stream, and a captured graph replayed on other inputs first, against eager."""
    tally, total = Tally(), op.rows[0].shape[0]
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            result = outputs(op.fn(*op.rows))
        torch.cuda.synchronize()
        tally.add("side stream", result, whole)
        for size in (1, 16, min(total, 130)):
            static = [x[:size].clone() for x in op.rows]
            op.fn(*static)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = outputs(op.fn(*static))
            for start in (total - size, 0):
                for buffer, x in zip(static, op.rows, strict=True):
                    buffer.copy_(x[start : start + size])
                graph.replay()
                torch.cuda.synchronize()
                tally.add(f"graph of {size} rows", captured, [x[start : start + size] for x in whole])
    return tally


def _leaves(op: RowOp) -> tuple[list[Tensor], list[Tensor]]:
    """(row inputs, leaves whose gradients count); parameters are the op's own and switched on for the caller."""
    rows = [x.detach().clone().requires_grad_() if x.is_floating_point() else x for x in op.rows]
    return rows, [*(x for x in rows if x.requires_grad), *op.params]


def _gradients(op: RowOp) -> tuple[list[Tensor], list[Tensor]]:
    """(outputs, gradients of rows and parameters) under a fixed random cotangent."""
    for p in op.params:
        p.requires_grad_(True)
    try:
        rows, leaves = _leaves(op)
        result = outputs(op.fn(*rows))
        result = [x for x in result if x.is_floating_point() and x.requires_grad]
        cotangents = [torch.sin(torch.arange(x.numel(), device=x.device)).view(x.shape).to(x.dtype) for x in result]
        grads = torch.autograd.grad(result, leaves, cotangents, allow_unused=True)
        return [x.detach() for x in result], [g for g in grads if g is not None]
    finally:
        for p in op.params:
            p.requires_grad_(False)


def _grad_modes(op: RowOp) -> Tally:
    tally = Tally()
    with torch.no_grad():
        plain = [x for x in outputs(op.fn(*op.rows)) if x.is_floating_point()]
    result, grads = _gradients(op)
    tally.add("forward with grad against no_grad", result, plain[: len(result)])
    again, regrads = _gradients(op)  # what activation recompute does: a forward without grad, then this one
    tally.add("recomputed forward", again, result)
    tally.add("gradients after recompute", regrads, grads)
    with torch.inference_mode():
        tally.add("inference_mode", [x for x in outputs(op.fn(*op.rows)) if x.is_floating_point()], plain)
    return tally


def _backward(op: RowOp) -> Tally:
    tally = Tally()
    _, first = _gradients(op)
    for round_ in range(1, ROUNDS):
        tally.add(f"backward {round_ + 1}", _gradients(op)[1], first)
    return tally
