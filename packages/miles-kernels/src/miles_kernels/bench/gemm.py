"""Dense products: `dispatch.product` against default cuBLAS and the fixed 128 x 128 x 64 tile, on 18 shapes of Qwen3."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from miles_kernels.bench.report import Row
from miles_kernels.bench.timing import compare, rotating
from miles_kernels.cuda import dispatch, gemm_deep, gemm_lt, gemm_triton
from miles_kernels.cuda.gemm_table import TABLE
from miles_kernels.cuda.gemm_triton import Tile

SHAPES = {
    "0.6B gate_up": (6144, 1024), "0.6B down": (1024, 3072), "0.6B qkv": (4096, 1024), "0.6B o": (1024, 2048),
    "4B gate_up": (19456, 2560), "4B down": (2560, 9728), "4B qkv": (6144, 2560), "4B o": (2560, 4096),
    "8B gate_up": (24576, 4096), "8B down": (4096, 12288), "8B qkv": (6144, 4096), "8B o": (4096, 4096),
    "30B qkv": (5120, 2048), "30B o": (2048, 4096), "30B expert up": (1536, 2048), "30B expert down": (2048, 768),
    "lm_head 0.6B": (151936, 1024), "lm_head 8B": (151936, 4096),
}  # fmt: skip
"""name: (N, K)"""
ROWS = (1, 16, 64, 256, 1024, 8192)
TILES = {
    16: (
        Tile(16, 16, 256, 4, 4, "pointer"), Tile(16, 32, 128, 4, 5, "pointer"), Tile(16, 64, 128, 4, 4, "pointer"),
        Tile(16, 64, 128, 4, 5), Tile(16, 32, 256, 4, 4), Tile(16, 128, 128, 4, 4), Tile(16, 64, 128, 4, 4, "swap"),
        Tile(8, 16, 256, 2, 5, "pointer"), Tile(64, 64, 128, 4, 4),
    ),
    64: (Tile(64, 64, 128, 4, 4), Tile(64, 128, 64, 4, 5), Tile(64, 32, 128, 4, 5), Tile(64, 16, 128, 4, 5)),
    256: (Tile(64, 128, 128, 4, 4), Tile(128, 64, 64, 4, 5), Tile(128, 128, 64, 8, 4), Tile(64, 64, 128, 4, 4)),
    1 << 30: (Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 4, 3, "tma", 2), Tile(256, 128, 64, 8, 3)),
}  # fmt: skip
"""Triton tiles to try, by the largest M they are for"""
WORTH = 0.995
"""A candidate replaces the heuristic's first algorithm only when it is faster than this."""


def _random(rows: int, cols: int) -> Tensor:
    return torch.randn(rows, cols, device="cuda", dtype=torch.bfloat16)


def _calls(rows: int, n: int, k: int, num_weights: int) -> int:
    if rows <= 256:
        return max(8, num_weights)
    return 4 if rows * n * k < 4e11 else 2


def rows(names: list[str] | None = None, ms: tuple[int, ...] = ROWS) -> Iterator[Row]:
    """Time every shape at every M under CUDA graphs; weights rotate so that none is read from L2."""
    for name, (n, k) in SHAPES.items():
        if names and name not in names:
            continue
        weights = rotating(partial(_random, n, k), most=24)
        whole = _random(max(ms), k)
        for m in ms:
            x, out = whole[:m], torch.empty(m, n, device="cuda", dtype=torch.bfloat16)
            used = [weights[i % len(weights)] for i in range(_calls(m, n, k, len(weights)))]
            found = compare(
                {
                    "default": [partial(torch.mm, x, w.t(), out=out) for w in used],
                    "aligned": [partial(dispatch.product, x, w, out) for w in used],
                    "fixed tile": [partial(gemm_triton.gemm_fixed, x, w, out) for w in used],
                },
                rounds=9 if m <= 1024 else 5,
            )
            notes: dict[str, float | str] = {"backend": _chosen(m, n, k), **_unequal(x, weights[0])}
            seconds = {key: timing.seconds for key, timing in found.items()}
            yield Row("GEMM", f"{name} {n}x{k} M={m}", seconds, 2.0 * m * n * k, 2.0 * (m * k + n * k + m * n), notes=notes)


def _chosen(m: int, n: int, k: int) -> str:
    text = dispatch.choose(torch.cuda.get_device_name(), dispatch._usable(torch.cuda.current_device()), m, n, k)
    return text.split(":")[0]


def _unequal(x: Tensor, w: Tensor) -> dict[str, float | str]:
    """Elements whose bits change when the rows are the last of a batch of M + 300: ours must be 0, the default's need not."""
    if x.shape[0] > 1024 or w.shape[0] > 30000:
        return {}
    more = torch.cat((_random(300, x.shape[1]), x))
    ours = [dispatch.product(part, w, torch.empty(part.shape[0], w.shape[0], device="cuda", dtype=x.dtype)) for part in (x, more)]
    theirs = [torch.mm(part, w.t()) for part in (x, more)]
    return {
        "unequal ours": float((ours[0] != ours[1][300:]).sum()),
        "unequal default": float((theirs[0] != theirs[1][300:]).sum()),
    }


def tune(ms: tuple[int, ...] = ROWS, shapes: dict[str, tuple[int, int]] | None = None) -> dict[str, dict[int, str]]:
    """Time every candidate that is bit-equal to Triton's default tile; returns and installs the winners for this device."""
    device = torch.cuda.current_device()
    usable = dispatch._usable(device)
    found: dict[str, dict[int, str]] = {}
    for n, k in dict.fromkeys((shapes or SHAPES).values()):
        weights = rotating(partial(_random, n, k), most=24)
        entry = found[f"{n},{k}"] = {}
        for m in ms:
            entry[m] = _fastest(_random(m, k), weights, usable)
    TABLE.setdefault(torch.cuda.get_device_name(), {}).update(found)
    dispatch.choose.cache_clear()
    dispatch.forget()
    return found


def _run_plan(plan: gemm_lt.Plan, index: int, x: Tensor, w: Tensor, out: Tensor) -> Tensor:
    return plan.run(x, w, out, index=index)


def _fastest(x: Tensor, weights: list[Tensor], usable: frozenset[str]) -> str:
    (m, k), n = x.shape, weights[0].shape[0]
    out = torch.empty(m, n, device="cuda", dtype=torch.bfloat16)
    used = [weights[i % len(weights)] for i in range(_calls(m, n, k, len(weights)))]
    expected = gemm_triton.gemm(x, weights[0], torch.empty_like(out))
    candidates: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {}
    if "cublaslt" in usable:
        plan = gemm_lt.Plan(gemm_lt.problem_of(x, weights[0], out))
        for i in range(len(plan.algorithms)):
            candidates[f"lt:{plan.name(i)}"] = partial(_run_plan, plan, i)
    if "deepgemm" in usable:
        candidates["deepgemm"] = gemm_deep.gemm
    for tile in next(tiles for most, tiles in TILES.items() if m <= most):
        candidates[dispatch.format_tile(tile)] = partial(gemm_triton.gemm, tile=tile)
    equal = {}
    for name, call in candidates.items():
        out.fill_(float("nan"))
        try:
            call(x, weights[0], out)
        except (RuntimeError, ValueError):
            continue  # this tile or algorithm does not fit the shape
        if torch.equal(out, expected):
            equal[name] = [partial(call, x, w, out) for w in used]
    times = {name: timing.seconds for name, timing in compare(equal, rounds=5 if m <= 1024 else 3).items()}
    first = next(iter(times))
    best = min(times, key=times.__getitem__)
    return best if times[best] < WORTH * times[first] else first
