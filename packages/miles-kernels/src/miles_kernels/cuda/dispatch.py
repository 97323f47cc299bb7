"""Which backend serves a product, and the proof that it may: every backend is compared bit for bit with Triton first.

`product` is the one entry for dense products on CUDA. Backends: `triton` (defines the bits), `cublaslt` (called directly, no
split-K), `deepgemm` (optional). A backend that fails its start-up probe is not used again in the process.
"""

from __future__ import annotations

import functools
import os
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from miles_kernels.cuda import gemm_deep, gemm_lt, gemm_triton
from miles_kernels.cuda.gemm_table import TABLE
from miles_kernels.cuda.gemm_triton import Tile
from miles_kernels.cuda.launch import aligned, at_home

BACKENDS = ("triton", "cublaslt", "deepgemm")
VARIABLE = "MILES_KERNELS_GEMM"
"""Environment variable: comma-separated backends that may be used, to narrow the choice."""
PROBE_SHAPES = ((3072, 1024), (1024, 3072), (2560, 9728), (5120, 2048))
"""(N, K): two that default cuBLAS splits along K for few rows, two that it does not."""
PROBE_ROWS = (1, 2, 15, 16, 17, 64, 100, 129, 256, 300)
PROBE_TOTAL = 384


@dataclass(frozen=True)
class ProbeReport:
    """What the probe of one backend saw: unequal elements by case; `ok` when there is none and nothing was raised."""

    backend: str
    num_elements: int
    failures: tuple[str, ...]
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether the backend may serve."""
        return not self.failures


def allowed() -> tuple[str, ...]:
    """Backends that the environment permits, in order of `BACKENDS`. Raises ValueError for unknown names."""
    text = os.environ.get(VARIABLE, "")
    if not text:
        return BACKENDS
    names = [name.strip() for name in text.split(",")]
    unknown = sorted(set(names) - set(BACKENDS))
    if unknown:
        raise ValueError(f"{VARIABLE} names {', '.join(unknown)}; known: {', '.join(BACKENDS)}")
    return tuple(name for name in BACKENDS if name in names or name == "triton")


def run(backend: str, a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out = a[M, K] b[N, K]^T by one named backend, no questions asked."""
    calls: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "triton": gemm_triton.gemm,
        "cublaslt": gemm_lt.gemm,
        "deepgemm": gemm_deep.gemm,
    }
    return calls[backend](a, b, out)


@functools.cache
def proven(backend: str, device: int) -> ProbeReport:
    """Compare a backend with Triton: several shapes and numbers of rows, rows alone and in a batch. Once per process."""
    began = time.perf_counter()
    generator = torch.Generator(device=f"cuda:{device}").manual_seed(0)
    failures, elements = [], 0
    with torch.no_grad(), torch.cuda.device(device):
        for n, k in PROBE_SHAPES:
            x, w = (torch.randn(size, k, device=f"cuda:{device}", generator=generator).bfloat16() for size in (PROBE_TOTAL, n))
            expected = gemm_triton.gemm(x, w, torch.empty(PROBE_TOTAL, n, device=x.device, dtype=x.dtype))
            for rows in PROBE_ROWS:
                start = (PROBE_TOTAL - rows) // 2
                out = torch.full((rows, n), float("nan"), device=x.device, dtype=x.dtype)
                try:
                    run(backend, x[start : start + rows], w, out)
                except Exception as error:  # whatever a library or its compiler raises: it may not serve
                    failures.append(f"N={n} K={k} M={rows}: {type(error).__name__}: {error}")
                    return ProbeReport(backend, elements, tuple(failures), time.perf_counter() - began)
                elements += out.numel()
                unequal = int((out != expected[start : start + rows]).sum())
                if unequal:
                    failures.append(f"N={n} K={k} M={rows}: {unequal} of {out.numel()} elements differ")
    return ProbeReport(backend, elements, tuple(failures), time.perf_counter() - began)


@functools.cache
def _usable(device: int) -> frozenset[str]:
    names = [name for name in allowed() if name != "deepgemm" or gemm_deep.available()]
    return frozenset(name for name in names if name == "triton" or proven(name, device).ok)


@functools.cache
def _device_name(device: int) -> str:
    return torch.cuda.get_device_name(device)


def nearest(rows: int, measured: Iterable[int]) -> int:
    """The measured number of rows closest to `rows` by ratio; of two equally close ones the smaller."""
    return min(measured, key=lambda m: (max(m, rows) / max(1, min(m, rows)), m))


def parse_tile(text: str) -> Tile:
    """Inverse of `format_tile`. Raises ValueError for anything else."""
    found = re.fullmatch(r"(tma|pointer|swap) (\d+)x(\d+)x(\d+) w(\d+) s(\d+) p(\d+)", text)
    if found is None:
        raise ValueError(f"not a tile: {text!r}")
    kind, *numbers = found.groups()
    rows, cols, depth, warps, stages, per_sm = map(int, numbers)
    return Tile(rows, cols, depth, warps, stages, kind, per_sm)


def format_tile(tile: Tile) -> str:
    """`tma 128x256x64 w8 s3 p1`."""
    return f"{tile.name} p{tile.per_sm}"


@functools.cache
def table_of(device_name: str) -> dict[str, dict[int, str]]:
    """The measurements of a device; an H100, the same chip with another memory, has those of the H200 until it has its own."""
    same_chip = "NVIDIA H200" if re.search(r"\bH100\b", device_name) else ""
    return TABLE.get(device_name) or TABLE.get(same_chip, {})


@functools.lru_cache(maxsize=8192)
def choose(device_name: str, usable: frozenset[str], m: int, n: int, k: int) -> str:
    """The measured winner for a product, or "lt:" / "triton" where nothing was measured or the winner may not serve."""
    entry = table_of(device_name).get(f"{n},{k}")
    for choice in entry[nearest(m, entry)].split(";") if entry else ("lt:",):
        if {"lt": "cublaslt", "de": "deepgemm"}.get(choice[:2], "triton") in usable:
            return choice
    return "lt:" if "cublaslt" in usable else "triton"


_quick: dict[tuple[Any, ...], gemm_lt.Plan] = {}
"""Plans of products seen before, by everything that chose them: a launch then costs one look-up."""


def forget() -> None:
    """Drop the plans made so far, so that a new table takes effect."""
    _quick.clear()
    gemm_lt.forget()


@at_home
def product(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    bias: Tensor | None = None,
    *,
    a_t: bool = False,
    b_t: bool = False,
    accumulate: bool = False,
) -> Tensor:
    """out[M, N] = a[M, K] b[N, K]^T + bias (+ out when `accumulate`), float32 sums, one rounding to out's dtype.

    `a_t`: a is stored [K, M]; `b_t`: b is stored [K, N]. The bits of a row depend on that row and on b only. float32 operands
    go through Triton in full precision. Raises ValueError for shapes or dtypes that do not fit.
    """
    key = (
        a.shape,
        b.shape,
        a.stride(),
        b.stride(),
        out.stride(0),
        a.dtype,
        b.dtype,
        out.dtype,
        a_t,
        b_t,
        accumulate,
        None if bias is None else (bias.dtype, bias.shape, bias.stride()),
        a.device,
    )
    plan = _quick.get(key)
    where = a.data_ptr() | b.data_ptr() | out.data_ptr() | (0 if bias is None else bias.data_ptr())
    if plan is not None and not where & 15:
        return plan.run(a, b, out, bias)
    m, n, k = _sizes(a, b, out, bias, a_t, b_t)
    if bias is not None:
        bias = aligned(bias.contiguous())
    if m == 0 or n == 0:
        return out
    if k == 0:
        return _empty_sum(out, bias, accumulate)
    device = a.device.index or 0
    usable = _usable(device)
    plain = not (a_t or b_t or accumulate)
    half = a.dtype in (torch.bfloat16, torch.float16) and b.dtype is a.dtype and k > 0
    lt_serves = half and "cublaslt" in usable and gemm_lt.fits(a, b, out) and (bias is None or bias.dtype is out.dtype)
    choice = choose(_device_name(device), usable, m, n, k) if half and plain else "lt:" if lt_serves else "triton"
    if choice == "deepgemm":
        if (
            bias is None
            and out.dtype is torch.bfloat16
            and all(x.is_contiguous() for x in (a, b, out))
            and gemm_lt.fits(a, b, out)
        ):
            return gemm_deep.gemm(a, b, out)
        choice = "lt:"
    if choice[:3] == "lt:" and lt_serves:
        problem = gemm_lt.problem_of(a, b, out, a_t=a_t, b_t=b_t, bias=bias is not None, accumulate=accumulate)
        if len(_quick) >= gemm_lt.MOST_PLANS:
            _quick.clear()
        plan = gemm_lt.plan_of(problem, choice[3:])
        if plan is not None:
            _quick[key] = plan
            return plan.run(a, b, out, bias)
    tile = parse_tile(choice) if " " in choice and not accumulate else None
    addend = (out if out.dtype is torch.float32 else out.float()) if accumulate else None
    return gemm_triton.gemm(a, b, out, bias, a_t=a_t, b_t=b_t, addend=addend, tile=tile)


def _sizes(a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None, a_t: bool, b_t: bool) -> tuple[int, int, int]:
    """(M, N, K) of a product; a kernel would read on behind the end of what is too short."""
    m, k = (a.shape[1], a.shape[0]) if a_t else (a.shape[0], a.shape[1])
    n, depth = (b.shape[1], b.shape[0]) if b_t else (b.shape[0], b.shape[1])
    if depth != k or out.shape != (m, n) or a.dtype is not b.dtype or (bias is not None and bias.shape != (n,)):
        raise ValueError(
            f"product: operands {a.dtype} {'[K, M]' if a_t else '[M, K]'} {tuple(a.shape)} and {b.dtype} "
            f"{'[K, N]' if b_t else '[N, K]'} {tuple(b.shape)}, result {tuple(out.shape)}, "
            f"bias {None if bias is None else tuple(bias.shape)} do not fit together"
        )
    return m, n, k


def _empty_sum(out: Tensor, bias: Tensor | None, accumulate: bool) -> Tensor:
    """A product without anything to sum, as the weight gradient of no rows."""
    if not accumulate:
        out.zero_()
    return out if bias is None else out.add_(bias)
