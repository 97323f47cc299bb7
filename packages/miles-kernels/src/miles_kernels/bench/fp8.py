"""FP8 block-scaled linear against bfloat16 cuBLAS; quantisation of the activations included."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from miles_kernels.bench.report import Row
from miles_kernels.bench.timing import compare
from miles_kernels.cuda import fp8

SHAPES = {"8B o": (4096, 4096), "8B gate_up": (24576, 4096), "8B down": (4096, 12288)}
ROWS = (1, 16, 64, 256, 1024, 8192)


def rows() -> Iterator[Row]:
    """`aligned` quantises the rows and multiplies; `product alone` has them quantised; `unequal` compares with M = 8192."""
    for name, (n, k) in SHAPES.items():
        w = torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * k**-0.5
        weight = fp8.quantize_weight(w)
        whole = torch.randn(max(ROWS), k, device="cuda", dtype=torch.bfloat16)
        expected = fp8.gemm(fp8.quantize_rows(whole), weight)
        for m in ROWS:
            x, out = whole[:m], torch.empty(m, n, device="cuda", dtype=torch.bfloat16)
            q = fp8.quantize_rows(x)
            tile = fp8.default_tile(m)
            found = compare(
                {
                    "default": [partial(torch.mm, x, w.t(), out=out)] * 4,
                    "aligned": [partial(_quantise_and_multiply, x, weight)] * 4,
                    "product alone": [partial(fp8.gemm, q, weight)] * 4,
                    "Triton alone": [partial(fp8.gemm, q, weight, tile=tile)] * 4,
                }
            )
            unequal = float((fp8.gemm(q, weight) != expected[:m]).sum())
            yield Row(
                "FP8 linear, ratio to bfloat16", f"{name} {n}x{k} M={m}", {key: t.seconds for key, t in found.items()},
                notes={"unequal": unequal},
            )  # fmt: skip


def _quantise_and_multiply(x: torch.Tensor, weight: fp8.Quantized) -> torch.Tensor:
    return fp8.gemm(fp8.quantize_rows(x), weight)
