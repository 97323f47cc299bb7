"""Does the C product give the bits of this process' BLAS? Found out by trial, never assumed.

A BLAS sums K in blocks of a depth of its own. With the right depth our product is bit for bit `torch.mm`, so a decode step of a
few rows can read the weights in place while the trainer's large products stay with the BLAS.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import Tensor

from miles_kernels.native import library
from miles_kernels.probe import fixed_values, threads

_MAGNITUDES = (192, 384, 256, 320, 336, 240, 288, 352, 400, 448, 512, 128, 640, 768, 1024)
DEPTHS = tuple(depth for magnitude in _MAGNITUDES for depth in (-magnitude, magnitude))
"""Depths known of BLAS kernels, likely ones first; a negative one halves K where two blocks would do."""


@functools.cache
def gemm_depth() -> int | None:
    """The depth at which the C product equals `torch.mm` of this process; None where no known depth does.

    Tried on K that is many, and once and two thirds of, a block.
    """
    kernels = library()
    if kernels is None:
        return None

    def agrees(depth: int, k: int) -> bool:
        x, w = fixed_values(16, k, salt=21), fixed_values(72, k, salt=22)
        return torch.equal(kernels.linear(x, w, depth), torch.mm(x, w.t()))

    with threads(1):  # many threads cut narrow products into slivers, which other kernels compute
        return next((depth for depth in DEPTHS if agrees(depth, 2600) and agrees(depth, abs(depth) * 5 // 3)), None)


def disagreement(weights: Iterable[Tensor]) -> str | None:
    """Try the C product on weights [N, K] of a model, one of each shape: the first that differs, in words; None if none does."""
    kernels, depth = library(), gemm_depth()
    if kernels is None or depth is None:
        return "this process has no C product that equals its BLAS"
    seen: set[torch.Size] = set()
    for weight in weights:
        if weight.shape in seen:
            continue
        seen.add(weight.shape)
        x = fixed_values(16, weight.shape[1], salt=23)
        with threads(1):
            wanted = torch.mm(x, weight.t())
        for rows in (16, 5, 1):
            if not torch.equal(kernels.linear(x[:rows], weight, depth), wanted[:rows]):
                return f"the product with a weight of shape {list(weight.shape)} differs from the BLAS at {rows} rows"
    return None
