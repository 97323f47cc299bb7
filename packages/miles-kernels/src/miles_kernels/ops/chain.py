"""Weight gradients that no cut into micro-batches can change: each sum goes on where the last micro-batch left it.

A weight with a `chain_sum` (float32, its shape) takes its gradient there instead of through autograd: the ops' backward adds
to it in units of `UNIT` rows, in the order of the rows. When every sequence of a packed stream begins at a multiple of `UNIT`,
the sum over one long stream and that over any cut of it between sequences are the same chain of additions. A table that is
looked up, too, keeps those rows' gradients in `chain_lookup`, because a tied head would otherwise come in between.

An expert's rows come in no whole units. What is left over of each expert waits, gradient and input, in the weight's
`chain_tail`, and goes before the rows of the next micro-batch; `take` sums the last ones. So the units of an expert are those
of all its rows.

On CUDA the tensor core's accumulator starts from the main gradient; it takes 16 rows at a time whatever the tile. On the CPU a
unit is a product of its own. Rows that fill a unit must have gradients of zero. (megatron-core gives weights a `main_grad`.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

UNIT = 16
"""Rows that are summed at once: the depth of a tensor core's product."""


def main_of(weight: Tensor) -> Tensor | None:
    """Where the gradient of `weight` is summed; None: autograd takes it as usual."""
    main: Tensor | None = getattr(weight, "chain_sum", None)
    return main


def begin(weight: Tensor, *, looked_up: bool = False) -> None:
    """Give a weight a main gradient of zeros; experts' weights [E, N, K] keep what fills no unit yet, too."""
    weight.chain_sum = torch.zeros_like(weight, dtype=torch.float32)  # type: ignore[attr-defined]
    if weight.ndim == 3:
        weight.chain_tail = None  # type: ignore[attr-defined]
    if looked_up:
        weight.chain_lookup = torch.zeros_like(weight, dtype=torch.float32)  # type: ignore[attr-defined]


def take(weight: Tensor) -> Tensor:
    """The finished sum; the weight has no main gradient any more."""
    total: Tensor = weight.chain_sum  # type: ignore[attr-defined]
    del weight.chain_sum  # type: ignore[attr-defined]
    if hasattr(weight, "chain_tail"):
        _end_tail(total, weight.chain_tail)
        del weight.chain_tail
    if hasattr(weight, "chain_lookup"):
        total += weight.chain_lookup
        del weight.chain_lookup
    return total


def part_of(part: Tensor, weight: Tensor, main: Tensor | None) -> Tensor:
    """`part`, a view of a weight, made to sum where `main`, the same view of its main gradient, is."""
    if main is not None:
        part.chain_sum = main  # type: ignore[attr-defined]
    return part


def add_product(total: Tensor, grad: Tensor, x: Tensor) -> None:
    """total[N, K] float32 goes on with grad[T, N]^T x[T, K]. Raises ValueError unless T is a multiple of `UNIT`."""
    rows = grad.shape[0]
    if rows % UNIT:
        raise ValueError(f"chained gradients: {rows} rows are no multiple of {UNIT}; pack with sequences filled up to that")
    if grad.is_cuda:
        from miles_kernels.cuda.chain import add_product as on_cuda

        return on_cuda(total, grad, x)
    grad, x = grad.float(), x.float()
    for start in range(0, rows, UNIT):
        total.addmm_(grad[start : start + UNIT].t(), x[start : start + UNIT])


def add_grouped(weight: Tensor, grad: Tensor, x: Tensor, counts: Sequence[int]) -> None:
    """The main gradient [E, N, K] of `weight` goes on with grad[rows of e, N]^T x[rows of e, K], on the CPU.

    Rows are sorted by expert, within one in the order of tokens. What fills no unit waits for the rows that follow.
    """
    total, tail = main_of(weight), weight.chain_tail or {}  # type: ignore[attr-defined]
    assert total is not None
    grads, inputs = grad.float().split(list(counts)), x.float().split(list(counts))
    for expert, rows in enumerate(zip(grads, inputs, strict=True)):
        if expert in tail:
            rows = (torch.cat((tail[expert][0], rows[0])), torch.cat((tail[expert][1], rows[1])))
        whole = len(rows[0]) // UNIT * UNIT
        add_product(total[expert], rows[0][:whole], rows[1][:whole])
        tail[expert] = (rows[0][whole:].clone(), rows[1][whole:].clone())
    weight.chain_tail = tail  # type: ignore[attr-defined]


def _end_tail(total: Tensor, tail: Any) -> None:
    """Sum the rows that still wait, filled up with zeros."""
    if total.is_cuda:
        from miles_kernels.cuda.chain import end_tail

        return end_tail(total, tail)
    for expert, rows in (tail or {}).items():
        add_product(total[expert], *(torch.nn.functional.pad(part, (0, 0, 0, -len(part) % UNIT)) for part in rows))


def add_rows(total: Tensor, values: Tensor) -> None:
    """total[...] float32 goes on with values[T, ...] summed over T, units of rows first. Raises ValueError as `add_product`."""
    if values.shape[0] % UNIT:
        raise ValueError(f"chained gradients: {values.shape[0]} rows are no multiple of {UNIT}")
    for part in values.reshape(-1, UNIT, *values.shape[1:]).sum(1):
        total += part
