"""FP8 contract: block-scaled e4m3 products in the forward, unquantised operands in the backward.

Activations have a scale per row and 128 columns, weights one per 128 x 128 block (DeepSeek-V3, arXiv 2412.19437, section 3.3).
A row is quantised on its own and blocks of 128 are summed in ascending order in float32, so a row's bits depend on that row and
the weight only. On the CPU the same arithmetic is emulated with float32 products of the quantised values.

Legend: T, R = rows, K = columns summed over, N = output columns, E = experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from miles_kernels.ops.matmul import Mode, mm, mm_dgrad, mm_wgrad

BLOCK = 128
LARGEST = 448.0
"""The largest e4m3 number."""
DEPTH_MULTIPLE = 16
"""What K must be a multiple of: rows of bytes start at multiples of 16."""


class Quantized(NamedTuple):
    """e4m3 values and float32 scales: value * scale is the number."""

    values: Tensor
    scales: Tensor


def quantize_rows(x: Tensor) -> Quantized:
    """`x[T, K]` with scales [T, ceil(K / 128)], one per row and 128 columns: max |x| / 448, 1 for zeros."""
    if x.is_cuda:
        from miles_kernels.cuda.fp8 import quantize_rows as on_cuda

        return on_cuda(x)
    return quantize_rows_reference(x)


def quantize_rows_reference(x: Tensor) -> Quantized:
    """`quantize_rows` by torch ops, on any device."""
    rows, size = x.shape
    blocks = -(-size // BLOCK)
    padded = torch.nn.functional.pad(x.float(), (0, -size % BLOCK)).view(rows, blocks, BLOCK)
    scales = _scales(padded.abs().amax(-1))
    values = (padded / scales[..., None]).view(rows, blocks * BLOCK)[:, :size]
    return Quantized(values.to(torch.float8_e4m3fn), scales)


def quantize_weight(weight: Tensor) -> Quantized:
    """`weight[..., N, K]` with scales [..., ceil(N / 128), ceil(K / 128)], one per 128 x 128 block."""
    if weight.is_cuda:
        from miles_kernels.cuda.fp8 import quantize_weight as on_cuda

        return on_cuda(weight)
    return quantize_weight_reference(weight)


def quantize_weight_reference(weight: Tensor) -> Quantized:
    """`quantize_weight` by torch ops, on any device."""
    *lead, n, k = weight.shape
    wide = torch.nn.functional.pad(weight.float(), (0, -k % BLOCK, 0, -n % BLOCK))
    tiles = wide.view(*lead, -(-n // BLOCK), BLOCK, -(-k // BLOCK), BLOCK)
    scales = _scales(tiles.abs().amax((-3, -1)))
    values = (tiles / scales[..., :, None, :, None]).view(wide.shape)[..., :n, :k]
    return Quantized(values.to(torch.float8_e4m3fn).contiguous(), scales.contiguous())


def _scales(top: Tensor) -> Tensor:
    return torch.where(top > 0, top / torch.full_like(top, LARGEST), 1.0)


def dequantize_weight(weight: Quantized) -> Tensor:
    """float32 values of a quantised weight."""
    n, k = weight.values.shape[-2:]
    scales = weight.scales.repeat_interleave(BLOCK, -2).repeat_interleave(BLOCK, -1)[..., :n, :k]
    return weight.values.float() * scales


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, quantized: Quantized | None = None, *, mode: Mode | None = None
) -> Tensor:
    """`x[T, K] @ weight[N, K]^T + bias[N]` in x's dtype: float8 operands, float32 sums, one rounding.

    `quantized` is `quantize_weight(weight)`, made here when not given. Backward: products of x and weight as they are (straight
    through), so the weight must be given too.
    """
    quantized = quantized or quantize_weight(weight.detach())
    if x.is_cuda:
        from miles_kernels.cuda.fp8 import linear as on_cuda

        return on_cuda(x, weight, bias, quantized)
    return _Linear.apply(x, weight, bias, *quantized, mode)


def grouped_linear(
    x: Tensor, weight: Tensor, counts: Sequence[int], quantized: Quantized | None = None, *, mode: Mode | None = None
) -> Tensor:
    """`x[R, K]`, sorted by expert with `counts[E]` rows each, times `weight[E, N, K]^T`: a row's bits are those of `linear`."""
    quantized = quantized or quantize_weight(weight.detach())
    parts = zip(x.split(list(counts)), weight.unbind(), *(part.unbind() for part in quantized), strict=True)
    return torch.cat([_Linear.apply(rows, w, None, values, scales, mode) for rows, w, values, scales in parts if len(rows)])


def moe_mlp(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    ids: Tensor,
    weights: Tensor,
    quantized: tuple[Quantized, Quantized] | None = None,
    *,
    mode: Mode | None = None,
) -> Tensor:
    """`ops.moe.moe_mlp` with both products in float8; the same arguments."""
    first, second = quantized or (quantize_weight(gate_up.detach()), quantize_weight(down.detach()))
    if x.is_cuda:
        from miles_kernels.cuda.fp8 import moe_mlp as on_cuda

        return on_cuda(x, gate_up, down, ids, weights, (first, second))
    from miles_kernels.ops.act import swiglu
    from miles_kernels.ops.moe import combine, permute, plan_dispatch

    dispatch = plan_dispatch(ids, gate_up.shape[0])
    inner = swiglu(grouped_linear(permute(x, dispatch), gate_up, dispatch.counts, first, mode=mode))
    return combine(grouped_linear(inner, down, dispatch.counts, second, mode=mode), weights, dispatch)


def product(x: Quantized, weight: Quantized, mode: Mode | None = None) -> Tensor:
    """float32 [T, N] of quantised operands on the CPU, blocks of 128 columns ascending."""
    n, k = weight.values.shape
    total = torch.zeros((x.values.shape[0], n))
    columns = weight.scales.repeat_interleave(BLOCK, 0)[:n].t()
    for block, start in enumerate(range(0, k, BLOCK)):
        stop = min(start + BLOCK, k)
        part = mm(x.values[:, start:stop].float(), weight.values[:, start:stop].float(), mode)
        total += part * (x.scales[:, block, None] * columns[block])
    return total


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, scales: Tensor, mode: Mode | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        out = product(quantize_rows(x), Quantized(values, scales), mode)
        return (out if bias is None else out + bias.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grad.float()
        dx = mm_dgrad(grad, weight).to(x.dtype) if ctx.needs_input_grad[0] else None
        dw = mm_wgrad(grad, x).to(weight.dtype) if ctx.needs_input_grad[1] else None
        db = grad.sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        return dx, dw, db, None, None, None


class Store:
    """Quantised copies of a module's weights, by name.

    A training forward quantises afresh: nothing tells reliably that a sharded or shared weight has changed. An engine calls
    `freeze` after each change of its weights; forwards without gradient then read these copies, which stay where they are in
    memory, so that captured CUDA graphs see the new values. A weight seen to have changed since is quantised again.
    """

    def __init__(self) -> None:
        self._kept: dict[str, tuple[tuple[int, int], Quantized]] | None = None

    def of(self, name: str, weight: Tensor) -> Quantized:
        """The quantised weight."""
        if self._kept is None or (torch.is_grad_enabled() and weight.requires_grad):
            return quantize_weight(weight.detach())
        stamp = (weight.data_ptr(), weight._version)
        found = self._kept.get(name)
        if found is not None and found[0] == stamp:
            return found[1]
        return self._keep(name, weight, stamp)

    def freeze(self, weights: dict[str, Tensor]) -> None:
        """Quantise all of them now, into the memory of the copies held before."""
        self._kept = self._kept or {}
        for name, weight in weights.items():
            self._keep(name, weight, (weight.data_ptr(), weight._version))

    def thaw(self) -> None:
        """Drop the copies."""
        self._kept = None

    def _keep(self, name: str, weight: Tensor, stamp: tuple[int, int]) -> Quantized:
        assert self._kept is not None
        with torch.inference_mode(False), torch.no_grad():  # ordinary tensors, whoever asks: they are written again later
            new, old = quantize_weight(weight.detach()), self._kept.get(name)
            if old is not None:
                for target, source in zip(old[1], new, strict=True):
                    target.copy_(source)
                new = old[1]
        self._kept[name] = (stamp, new)
        return new
