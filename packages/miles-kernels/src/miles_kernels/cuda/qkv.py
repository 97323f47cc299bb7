"""From the fused q, k, v projection to the output of attention in two kernels: head norms with rotation, then attention.

Legend: T = tokens, H, Hkv = query and key/value heads, D = head size, N = pool slots.

The gradient comes back as one tensor, written in place: no copies join the parts, and no atomics sum the weight gradient of the
head norms.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from miles_kernels.cuda import attention as base
from miles_kernels.cuda.attention import KVBatch
from miles_kernels.cuda.attention_op import run as attend
from miles_kernels.cuda.launch import aligned, at_home, cdiv, early_for, next_power_of_2
from miles_kernels.ops.chain import UNIT, main_of

GRAD_TOKENS = 128
"""Tokens whose weight gradients one program sums: fixed, so the fold of the shares never changes."""


Target = tuple[Tensor, Tensor, Tensor]
"""Where a layer's new keys and values go: pools [Hkv, N, D] of keys and of values, the slot of each token int64 [T]."""


class Heads(NamedTuple):
    """What the op needs beside tensors."""

    heads: int
    kv_heads: int
    scale: float
    window: int | None
    eps: float


@at_home
def attention_of(
    qkv: Tensor, qk_norm: Tensor | None, cos: Tensor, sin: Tensor, batch: KVBatch, sizes: Heads, target: Target | None = None
) -> Tensor:
    """Attention [T, H, D] of qkv[T, (H + 2 Hkv) * D] after the head norms `qk_norm[2, D]` (None: none) and the rotation.

    With `target` keys and values are stored there and read from there along `batch` (no gradient); without it they are the
    stream itself, `batch` is `KVBatch.packed`, and the result is differentiable. Raises ValueError when a gradient is asked
    for through a cache.
    """
    if torch.is_grad_enabled() and (qkv.requires_grad or (qk_norm is not None and qk_norm.requires_grad)):
        if target is not None or batch.page_size:
            raise ValueError("attention over a cache has no gradient: call under torch.no_grad(), or train on KVBatch.packed")
        return _Attend.apply(qkv, qk_norm, cos, sin, batch, sizes)
    turned = turn(qkv, qk_norm, cos, sin, sizes, target)
    if target is not None:
        k, v = (pool.transpose(0, 1) for pool in target[:2])
        return attend(turned, k, v, batch, sizes.scale, sizes.window)[0]
    q, k, v = _parts(qkv, turned, sizes)
    return attend(q, k, v, batch, sizes.scale, sizes.window)[0]


def _parts(qkv: Tensor, turned: Tensor, sizes: Heads) -> tuple[Tensor, Tensor, Tensor]:
    heads, kv_heads = sizes.heads, sizes.kv_heads
    v = qkv.view(qkv.shape[0], heads + 2 * kv_heads, -1)[:, heads + kv_heads :]
    return turned[:, :heads], turned[:, heads:], v


def turn(qkv: Tensor, qk_norm: Tensor | None, cos: Tensor, sin: Tensor, sizes: Heads, target: Target | None) -> Tensor:
    """Normed and rotated heads: queries and keys [T, H + Hkv, D], with a target queries only [T, H, D]."""
    from miles_kernels.cuda.qkv_kernels import turn_forward

    heads, kv_heads = sizes.heads, sizes.kv_heads
    tokens, dim = qkv.shape[0], qkv.shape[1] // (heads + 2 * kv_heads)
    kept = heads if target is not None else heads + kv_heads
    moved = heads + 2 * kv_heads if target is not None else kept
    qkv = aligned(qkv.contiguous())
    qk_norm = None if qk_norm is None else aligned(qk_norm)
    out = torch.empty((tokens, kept, dim), dtype=qkv.dtype, device=qkv.device)
    k, v, slots = (out[:, heads:], out, _no_slots(qkv.device)) if target is None else target
    if target is None:
        strides = (kept, 1, 0, 0)
    else:
        _require_rows(k, v, dim)
        strides = (k.stride(1) // dim, k.stride(0) // dim, v.stride(1) // dim, v.stride(0) // dim)
    rows = max(1, 2048 // next_power_of_2(dim))
    if tokens:
        early = early_for(tokens, qkv)
        turn_forward[(cdiv(tokens * moved, rows),)](
            qkv, cos.contiguous(), sin.contiguous(), qk_norm if qk_norm is not None else qkv, out, k, v,
            slots, tokens * moved, heads, kv_heads, moved, int(target is not None), kept, *strides, sizes.eps,
            D=dim, HALF=next_power_of_2(dim // 2), ROWS=rows, NORM=qk_norm is not None, EARLY=early,
            num_warps=4, launch_pdl=early,
        )  # fmt: skip
    return out


def _require_rows(k: Tensor, v: Tensor, dim: int) -> None:
    if any(x.stride(2) != 1 or x.stride(0) % dim or x.stride(1) % dim or x.data_ptr() % 16 for x in (k, v)):
        raise ValueError(f"cache: pools must be made of whole rows of {dim}, got strides {k.stride()} and {v.stride()}")


@functools.cache
def _no_slots(device: torch.device) -> Tensor:
    """A stand-in of the type and alignment of slots."""
    return torch.zeros(2, dtype=torch.int64, device=device)


def turn_back(grad: Tensor, qkv: Tensor, qk_norm: Tensor | None, cos: Tensor, sin: Tensor, sizes: Heads) -> Tensor | None:
    """Gradients of turned heads in grad[T, (H + 2 Hkv) * D] become those of qkv, in place; returns that of `qk_norm`."""
    from miles_kernels.cuda.qkv_kernels import sum_kinds, turn_backward

    heads, kv_heads = sizes.heads, sizes.kv_heads
    tokens, dim = qkv.shape[0], qkv.shape[1] // (heads + 2 * kv_heads)
    norm = qk_norm is not None
    rows = max(1, 2048 // next_power_of_2(dim))
    main = None if qk_norm is None else main_of(qk_norm)
    if main is not None:
        rows, steps = min(rows, UNIT), UNIT // min(rows, UNIT)
    else:
        steps = max(1, GRAD_TOKENS // rows)
    blocks = cdiv(tokens, rows * steps)
    part = torch.empty((heads + kv_heads, blocks, dim) if norm else (1,), dtype=torch.float32, device=qkv.device)
    if tokens:
        turn_backward[(blocks, heads + kv_heads)](
            grad, qkv, cos, sin, qk_norm if qk_norm is not None else qkv, part, tokens, heads, sizes.eps, qkv.stride(0), dim,
            D=dim, HALF=next_power_of_2(dim // 2), ROWS=rows, STEPS=steps, NORM=norm, num_warps=4,
        )  # fmt: skip
    if qk_norm is None:
        return None
    if not tokens:
        return torch.zeros_like(qk_norm)
    if main is not None:
        from miles_kernels.cuda.chain import add_parts

        add_parts(main, part, (heads, kv_heads))
        return None
    d_norm = torch.empty_like(qk_norm)
    sum_kinds[(cdiv(dim, 32), 2)](part, d_norm, blocks, heads, kv_heads, D=dim, ROWS=64, COLS=32, num_warps=4)
    return d_norm


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, qk_norm: Tensor | None, cos: Tensor, sin: Tensor, batch: KVBatch, sizes: Heads) -> Tensor:
        turned = turn(qkv, qk_norm, cos, sin, sizes, None)
        out, lse = attend(*_parts(qkv, turned, sizes), batch, sizes.scale, sizes.window)
        ctx.save_for_backward(qkv, qk_norm, cos, sin, turned, out, lse)
        ctx.batch, ctx.sizes = batch, sizes
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, qk_norm, cos, sin, turned, out, lse = ctx.saved_tensors
        sizes: Heads = ctx.sizes
        d_qkv = torch.empty_like(qkv)
        heads, kv_heads = sizes.heads, sizes.kv_heads
        parts = d_qkv.view(qkv.shape[0], heads + 2 * kv_heads, -1).split((heads, kv_heads, kv_heads), 1)
        base.backward(
            *_parts(qkv, turned, sizes), out, lse, grad, ctx.batch, scale=sizes.scale, window=sizes.window, into=tuple(parts)
        )
        return d_qkv, turn_back(d_qkv, qkv, qk_norm, cos, sin, sizes), None, None, None, None
