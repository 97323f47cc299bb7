"""RMSNorm on CUDA: plain, with a residual, per head, or with the rotation behind it. Gradients without atomics.

Legend: R = rows, H = row length, W = rows of the weight (1, or one per head).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from miles_kernels.cuda.launch import aligned, at_home, cdiv, direct, eager, early_for, next_power_of_2
from miles_kernels.ops.chain import UNIT, main_of

TILE = 4096
"""Elements a program of the backward has in flight; short rows go several at a time."""
SHARE = 32768
"""Elements whose weight gradients one program sums, at least 16 rows: fixed, so the fold of the shares never changes."""


@at_home
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`round(x / rms(x)) * weight` over the last dimension of x[..., H]; weight [H], or [heads, H] for x[..., heads, H]."""
    if direct(x, weight):
        return _forward(x, None, weight, eps)[0]
    if eager(x, weight):
        return _Norm.apply(x, weight, eps)
    return torch.ops.miles_cuda.rms_norm(x, weight, eps)


@at_home
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(s), s) of s = round(x + residual), both [..., H]: the residual stream and the next block's input in one pass."""
    if direct(x, residual, weight):
        return _add(x, residual, weight, eps)
    if eager(x, residual, weight):
        return _AddNorm.apply(x, residual, weight, eps)
    return torch.ops.miles_cuda.add_rms_norm(x, residual, weight, eps)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return _forward(x, None, weight, eps)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        return *_backward(grad, None, x, weight, ctx.eps), None


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        out, total = _add(x, residual, weight, eps)
        ctx.save_for_backward(total, weight)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return out, total

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, extra: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        if grad is None:
            return extra, extra, None, None
        total, weight = ctx.saved_tensors
        dx, dw = _backward(grad, extra, total, weight, ctx.eps)
        return dx, dx, dw, None


def _add(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if weight.ndim != 1 or residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(f"add_rms_norm: x {tuple(x.shape)} {x.dtype}, residual {tuple(residual.shape)} {residual.dtype}")
    out, total = _forward(x, residual, weight, eps)
    assert total is not None
    return out, total


def _rows(x: Tensor, weight: Tensor) -> tuple[Tensor, int, int]:
    """(x as [tokens, heads, H] with unit last stride, beginning at a multiple of 16 bytes, tokens, heads)."""
    heads = weight.shape[0] if weight.ndim == 2 else 1
    if x.shape[-weight.ndim :] != weight.shape:
        raise ValueError(f"rms_norm: x {tuple(x.shape)} does not end in the shape of weight {tuple(weight.shape)}")
    flat = x.reshape(-1, heads, x.shape[-1])
    if flat.stride(2) != 1:
        flat = flat.contiguous()
    if x.shape[-1] * x.element_size() % 16 == 0:  # else the rows of one matrix begin anywhere, and no wide load is chosen
        flat = aligned(flat)
    return flat, flat.shape[0], heads


def row_sizes(width: int) -> tuple[int, int, int]:
    """(padded width, rows per program, warps): a function of the width alone."""
    pad = next_power_of_2(width)
    if pad <= 256:
        return pad, 2048 // pad, 4
    return pad, 1, 4 if pad <= 4096 else 8


def _forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor | None]:
    from miles_kernels.cuda.norm_kernels import rms_forward

    flat, tokens, heads = _rows(x, weight)
    other = None if residual is None else _rows(residual, weight)[0]
    weight = aligned(weight.contiguous())
    width = x.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = None if residual is None else torch.empty_like(out)
    pad, rows, warps = row_sizes(width)
    if x.numel():
        early = early_for(tokens, flat)
        rms_forward[(cdiv(tokens * heads, rows),)](
            flat, flat if other is None else other, weight, out, out if total is None else total,
            tokens * heads, heads, eps,
            flat.stride(0), flat.stride(1), width if other is None else other.stride(0), heads * width, width,
            H=width, H_PAD=pad, ROWS=rows, HAS_RESIDUAL=residual is not None, EARLY=early, num_warps=warps,
            launch_pdl=early,
        )  # fmt: skip
    return out, total


@torch.library.custom_op(
    "miles_cuda::rms_norm", mutates_args=(), device_types="cuda", schema="(Tensor x, Tensor weight, float eps) -> Tensor"
)
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _forward(x, None, weight, eps)[0]


@torch.library.custom_op(
    "miles_cuda::add_rms_norm",
    mutates_args=(),
    device_types="cuda",
    schema="(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
)
def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _add(x, residual, weight, eps)


@torch.library.custom_op(
    "miles_cuda::rms_norm_backward",
    mutates_args=(),
    device_types="cuda",
    schema="(Tensor grad, Tensor? extra, Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
)
def _rms_norm_backward(grad: Tensor, extra: Tensor | None, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _backward(grad, extra, x, weight, eps)


def _backward(grad: Tensor, extra: Tensor | None, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor | None]:
    """(gradient of x, `extra` added before the rounding; gradient of the weight)."""
    from miles_kernels.cuda.norm_kernels import rms_backward, sum_parts

    flat, tokens, heads = _rows(x, weight)
    g, _, _ = _rows(grad, weight)
    width = x.shape[-1]
    pad = next_power_of_2(width)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    weight_given, weight = weight, aligned(weight.contiguous())
    dw = torch.zeros_like(weight)
    if not x.numel():
        return dx, dw
    # one program per block of tokens and head: a tile of rows of one head, its share of the weight gradient behind it
    main = main_of(weight_given)
    rows = max(1, min(32 if main is None else UNIT, TILE // pad))
    steps = (UNIT if main is not None else max(16, SHARE // pad)) // rows
    blocks = cdiv(tokens, rows * steps)
    part = torch.empty((heads, blocks, width), dtype=torch.float32, device=x.device)
    rms_backward[(blocks, heads)](
        flat, weight, g, flat if extra is None else extra.contiguous(), dx, part, tokens, heads, eps,
        flat.stride(0), flat.stride(1), g.stride(0), g.stride(1),
        H=width, H_PAD=pad, ROWS=rows, STEPS=steps, HAS_EXTRA=extra is not None, num_warps=4 if pad <= 4096 else 8,
    )  # fmt: skip
    if main is not None:
        from miles_kernels.cuda.chain import add_parts

        add_parts(main, part, (1,) * heads)
        return dx, None
    sum_parts[(cdiv(width, 32), heads)](part, dw, blocks, width, ROWS=64, COLS=32, num_warps=4)
    return dx, dw


@torch.library.register_fake("miles_cuda::rms_norm")
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("miles_cuda::add_rms_norm")
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@torch.library.register_fake("miles_cuda::rms_norm_backward")
def _(grad: Tensor, extra: Tensor | None, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), torch.empty_like(weight, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[0], inputs[1])
    ctx.eps = inputs[2]


def _grad(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weight = ctx.saved_tensors
    dx, dw = torch.ops.miles_cuda.rms_norm_backward(grad, None, x, weight, ctx.eps)
    return dx, dw, None


def _save_add(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(output[1], inputs[2])
    ctx.eps = inputs[3]


def _grad_add(ctx: Any, grad: Tensor, extra: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    total, weight = ctx.saved_tensors
    ds, dw = torch.ops.miles_cuda.rms_norm_backward(grad, extra, total, weight, ctx.eps)
    return ds, ds.clone(), dw, None


_rms_norm.register_autograd(_grad, setup_context=_save)
_add_rms_norm.register_autograd(_grad_add, setup_context=_save_add)
