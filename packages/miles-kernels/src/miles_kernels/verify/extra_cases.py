"""Cases beyond the plain row ops: float8 products, row-parallel shards, and code compiled by torch.compile."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from miles_kernels.verify.op_cases import Draw
from miles_kernels.verify.result import Row, Tally
from miles_kernels.verify.row_axes import RowOp

FP8_NAMES = ("fp8_linear", "fp8_moe")


def fp8_ops(device: str, dtype: torch.dtype, *, large: bool, seed: int = 0, names: tuple[str, ...] = FP8_NAMES) -> list[RowOp]:
    """The row ops of the FP8 contract, as `op_cases.row_ops`."""
    makers = {"fp8_linear": _fp8_linear, "fp8_moe": _fp8_moe}
    return [makers[name](Draw(device, dtype, seed + 50 + i), large) for i, name in enumerate(names)]


def _fp8_linear(draw: Draw, large: bool) -> RowOp:
    """Rounded output and the float32 accumulator."""
    from miles_kernels.ops import fp8

    n, k, rows = (2560, 9728, 2048) if large else (512, 272, 256)
    weight, x = draw.normal(n, k, scale=k**-0.5), draw.normal(rows, k)
    quantized = fp8.quantize_weight(weight)

    def fn(x: Tensor) -> tuple[Tensor, Tensor]:
        return fp8.linear(x, weight, None, quantized), fp8.linear(x.detach().float(), weight.detach(), None, quantized).detach()

    return RowOp("fp8_linear", fn, (x,), (weight,))


def _fp8_moe(draw: Draw, large: bool) -> RowOp:
    from miles_kernels.ops import fp8

    experts, k, width, inner, rows = (32, 4, 2048, 768, 1024) if large else (8, 2, 128, 64, 512)
    gate_up = draw.normal(experts, 2 * inner, width, scale=width**-0.5)
    down = draw.normal(experts, width, inner, scale=inner**-0.5)
    x = draw.normal(rows, width)
    weights, ids = draw.normal(rows, experts, dtype=torch.float32).softmax(-1).topk(k)
    quantized = (fp8.quantize_weight(gate_up), fp8.quantize_weight(down))

    def fn(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return fp8.moe_mlp(x, gate_up, down, ids, weights, quantized)

    return RowOp("fp8_moe", fn, (x, ids, weights), (gate_up, down), poison=False)


def row_shards(device: str, dtype: torch.dtype, *, large: bool, seed: int = 13) -> Row:
    """Axis 12: a row-parallel layer on 2, 4 or 8 ranks, each with its part of K, gives the bits of one rank.

    Ranks are played one after the other; what they would exchange is folded as `cuda.comm` folds it.
    """
    from miles_kernels.cuda import comm

    start = time.perf_counter()
    tally = Tally()
    draw = Draw(device, dtype, seed)
    n, k = (2560, 9728) if large else (2048, 128)
    weight, x = draw.normal(n, k, scale=k**-0.5), draw.normal(130, k)
    for rows in (1, 16, 33, 130):
        whole = comm.row_parallel_linear(x[:rows], weight)
        for ranks in (2, 4, 8):
            parts = zip(x[:rows].chunk(ranks, 1), weight.chunk(ranks, 1), strict=True)
            sums = [comm.partial_sum(a, b, comm.SHARDS // ranks) for a, b in parts]
            tally.add(f"{ranks} ranks, {rows} rows", comm.fold(torch.stack(sums)).to(dtype), whole)
    return tally.row("row_parallel_linear", 12, time.perf_counter() - start)


def compiled(device: str, dtype: torch.dtype, *, seed: int = 17) -> Row:
    """Axis 14: norm, product, SwiGLU and pointwise code compiled whole against eager, forward and gradients, several sizes.

    Roundings between pointwise ops are kept as `mode.compile_aligned` asks for; with Inductor's own they are not eager's.
    """
    start = time.perf_counter()
    tally = Tally()
    draw = Draw(device, dtype, seed)
    gain, weight = draw.normal(1024), draw.normal(2048, 1024, scale=1 / 32)
    fn = _block(gain.requires_grad_(), weight.requires_grad_())
    fast = torch.compile(fn, options={"emulate_precision_casts": True})
    for rows in (1, 16, 130, 700):
        x = draw.normal(rows, 1024).requires_grad_()
        grad = draw.normal(rows, 1024)
        with torch.no_grad():
            tally.add(f"{rows} rows, no gradient", fast(x), fn(x))
        outs = fast(x), fn(x)
        tally.add(f"{rows} rows", outs[0].detach(), outs[1].detach())
        grads = [torch.autograd.grad(out, (x, gain, weight), grad) for out in outs]
        tally.add(f"{rows} rows, gradients", *grads)
    return tally.row("compiled", 14, time.perf_counter() - start)


def _block(gain: Tensor, weight: Tensor) -> Callable[[Tensor], Tensor]:
    from miles_kernels.cuda import dispatch_ops  # noqa: F401  registers the product
    from miles_kernels.cuda.act import swiglu
    from miles_kernels.cuda.norm import rms_norm

    def block(x: Tensor) -> Tensor:
        h = rms_norm(x * 1.25 + 0.5, gain, 1e-6)
        return x + swiglu(torch.ops.miles_cuda.linear(h, weight, None, False)) * 0.75

    return block
