"""Does the native GEMM path of this process keep a row's bits whatever surrounds the row? Measured, not assumed.

BLAS libraries promise run-to-run reproducibility at best, never batch invariance; so every process checks the shapes
that betray a bad one before it relies on it. Costs well under 100 ms, once.
"""

from __future__ import annotations

import functools
import hashlib
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from miles_kernels.ops.matmul import (
    ATTENTION_ROWS,
    GEMM_ROWS,
    MIN_ROWS,
    NARROW_COLUMNS,
    Mode,
    bmm_nt,
    bmm_pv,
    mm,
    mm_native,
    mm_tiles,
    softmax_rows,
)

ROW_COUNTS = {1: (1, 3, 8, 16, 17, 31, 64), 2: (1, 17)}
"""Row counts to try, by thread count. Two threads on a busy machine wait for each other, so they try fewer. A process set to more
threads than two tries those as well."""
SMALL_ROW_COUNTS = (2, 5, 7, 11, 13)
"""Tried as well where fewer than 16 rows are to be trusted."""
MAX_ROWS = 80
GEMM_SHAPES = ((64, 192), (128, 100), (1088, 272), (47, 20), (50, 1))
"""(K, N): an ordinary, a ragged, a long-K and two narrow layers."""


@dataclass(frozen=True)
class ProbeReport:
    """What the probe saw. `mode` is what `Contract.reference` and the ops' default use."""

    mode: Mode
    fingerprint: str
    """12 hex digits over the bits of fixed inputs through the ops in `mode`: equal processes compute equal bits"""
    gemm_rows: int
    """fewest rows of a GEMM that keep a row's bits, where it has columns enough"""
    attention_rows: int
    """fewest query rows per matrix of a batched product that keep a row's bits"""
    num_cases: int
    failures: tuple[str, ...]
    """native cases whose bits differed"""
    seconds: float


@functools.cache
def probe() -> ProbeReport:
    """Run the probe once per process and remember its answer."""
    began = time.perf_counter()
    with torch.no_grad():
        for least in GEMM_ROWS:
            products = list(_product_cases(least))
            if all(ok for _, ok in products):
                break
        others = list(_other_cases())
        for rows in ATTENTION_ROWS:
            attention = list(_attention_cases("native", rows))
            if all(ok for _, ok in attention):
                break
        cases = products + others + attention
        failures = tuple(name for name, ok in cases if not ok)
        mode = _mode(products, others + attention)
        with threads(1):
            fingerprint = _fingerprint(mode)
    return ProbeReport(mode, fingerprint, least, rows, len(cases), failures, time.perf_counter() - began)


def _mode(products: list[tuple[str, bool]], others: list[tuple[str, bool]]) -> Mode:
    """The first tier that holds: the BLAS as it is, in tiles of 16 rows, or exact sums."""
    if not all(ok for _, ok in others):
        return "exact"
    if all(ok for _, ok in products):
        return "native"
    return "tile" if all(ok for _, ok in _tile_cases()) else "exact"


def fixed_values(*shape: int, salt: int = 0) -> Tensor:
    """Reproducible float32 values in (-1, 1), from integer arithmetic alone: the same on every machine."""
    count = torch.Size(shape).numel()
    bits = (torch.arange(count) + 1 + salt * 7919) * 2654435761 % 4294967296
    bits = (bits ^ (bits >> 15)) * 2246822519 % 4294967296
    return ((bits ^ (bits >> 13)) % 65521).float().div_(32760.5).sub_(1.0).view(shape)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Set torch's intra-op thread count for a block, then restore it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _product_cases(least: int) -> Iterator[tuple[str, bool]]:
    """GEMMs padded to `least` rows."""

    def product(x: Tensor, w: Tensor) -> Callable[[slice], Tensor]:
        return lambda rows: mm_native(x[rows], w, least)

    for salt, (k, n) in enumerate(GEMM_SHAPES):
        x, w = fixed_values(MAX_ROWS, k, salt=salt), fixed_values(n, k, salt=salt + 100)
        small = dict.fromkeys(_thread_counts(), SMALL_ROW_COUNTS) if n >= NARROW_COLUMNS and least < MIN_ROWS else {}
        yield from _compare(f"mm K={k} N={n}", product(x, w), MAX_ROWS)
        yield from _compare(f"mm K={k} N={n}", product(x, w), MAX_ROWS, small)
    x, w = fixed_values(40, 96), fixed_values(320, 96, salt=1)
    yield "mm columns", torch.equal(mm_native(x, w, least)[:, 64:192], mm_native(x, w[64:192], least))


def _tile_cases() -> Iterator[tuple[str, bool]]:
    """Products in tiles of 16 rows, any number of rows from any place."""

    def product(x: Tensor, w: Tensor) -> Callable[[slice], Tensor]:
        return lambda rows: mm_tiles(x[rows], w)

    for salt, (k, n) in enumerate(GEMM_SHAPES):
        x, w = fixed_values(MAX_ROWS, k, salt=salt), fixed_values(n, k, salt=salt + 100)
        for counts in (None, dict.fromkeys(_thread_counts(), SMALL_ROW_COUNTS)):
            yield from _compare(f"mm in tiles K={k} N={n}", product(x, w), MAX_ROWS, counts)
    x, w = fixed_values(40, 96), fixed_values(320, 96, salt=1)
    yield "mm columns in tiles", torch.equal(mm_tiles(x, w)[:, 64:192], mm_tiles(x, w[64:192]))


def _other_cases() -> Iterator[tuple[str, bool]]:
    values = fixed_values(33, 1000, salt=5) * 6
    positive = values.abs() + 1e-3
    yield from _compare("exp", lambda rows: torch.exp(values[rows, 3:]), 33)
    yield from _compare("log", lambda rows: torch.log(positive[rows, 3:]), 33)
    yield from _compare("rsqrt", lambda rows: torch.rsqrt(positive[rows, 3:]), 33)
    yield from _compare("row sum", lambda rows: values[rows].sum(-1), 33)


def _thread_counts() -> tuple[int, ...]:
    """1, 2, and what this process uses if it is more."""
    now = torch.get_num_threads()
    return (1, 2, now) if now > 2 else (1, 2)


def _compare(
    name: str, fn: Callable[[slice], Tensor], size: int, counts: Mapping[int, tuple[int, ...]] | None = None
) -> Iterator[tuple[str, bool]]:
    """fn(slice) against the same rows of fn(all), on one thread, on two, and on as many as the process uses."""
    if counts is None:
        counts = {count: ROW_COUNTS[min(count, 2)] for count in _thread_counts()}
    with threads(1):
        whole = fn(slice(0, size))
    for count, row_counts in counts.items():
        with threads(count):
            for rows in (r for r in row_counts if r <= size):
                start = min(5, size - rows)
                same = torch.equal(fn(slice(start, start + rows)), whole[start : start + rows])
                yield f"{name} rows={rows} threads={count}", same


def _attention_cases(mode: Mode, least: int) -> Iterator[tuple[str, bool]]:
    """Attention over matrices of at least `least` query rows against one of 48 rows over more keys."""
    shapes = ((1, least, 80), (3, least + 2, 96), (2, 48, 128), (1, 33, 208))
    for dim in (16, 64, 128):
        q, k, v = (fixed_values(3, n, dim, salt=i + dim) for i, n in enumerate((48, 288, 288)))

        def attend(batch: int, rows: int, keys: int, q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            scores = bmm_nt(q[:batch, :rows].contiguous() * 4, k[:batch, :keys].contiguous(), mode)
            scores[:, :, 80:] = -torch.inf
            return bmm_pv(softmax_rows(scores, mode), v[:batch, :keys].contiguous(), mode)

        with threads(1):
            whole = attend(3, 48, 288)
        for count in _thread_counts():
            with threads(count):
                for batch, rows, keys in shapes[: 4 // min(count, 2)]:
                    same = torch.equal(attend(batch, rows, keys), whole[:batch, :rows])
                    yield f"attention D={dim} batch={batch} rows={rows} keys={keys} threads={count}", same


def _fingerprint(mode: Mode) -> str:
    x, w = fixed_values(24, 640, salt=3), fixed_values(96, 640, salt=4)
    product = mm(x, w, mode)
    p = softmax_rows(bmm_nt(x[None, :, :64].contiguous(), w[None, :, :64].contiguous(), mode), mode)
    positive = x.abs() + 1e-3
    outs = [product, p, bmm_pv(p, w[None], mode), product.exp(), x.sum(-1), positive.log(), positive.rsqrt()]
    digest = hashlib.sha256()
    for out in outs:
        digest.update(struct.pack(f"{out.numel()}i", *out.contiguous().view(torch.int32).flatten().tolist()))
    return digest.hexdigest()[:12]
