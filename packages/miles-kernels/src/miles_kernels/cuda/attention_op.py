"""Attention as a registered op: autograd, fake tensors, and the choice of the kernel by shape."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from miles_kernels.cuda import attention as base
from miles_kernels.cuda import attention_ws
from miles_kernels.cuda.attention import KVBatch
from miles_kernels.cuda.launch import at_home, direct

WS_ROWS = 128
"""Packed query rows from which the warp-specialised kernel is used."""


@at_home
def attention(q: Tensor, k: Tensor, v: Tensor, batch: KVBatch, *, scale: float, window: int | None = None) -> Tensor:
    """Causal attention of q[T, H, D] over pools k[N, Hkv, D], v[N, Hkv, DV], as [T, H, DV].

    Packed training (with gradient), chunked prefill, cached prefixes, paged decode and verification of several tokens give a
    row the same bits. Raises ValueError for shapes that do not fit and for a gradient through pages.
    """
    if direct(q, k, v):
        return run(q, k, v, batch, scale, window)[0]
    out, _ = torch.ops.miles_cuda.attention(
        q, k, v, batch.cu_q, batch.kv_len, batch.kv_start, batch.table, batch.page_size, batch.max_q, batch.max_kv, scale, window
    )
    return out


def run(q: Tensor, k: Tensor, v: Tensor, batch: KVBatch, scale: float, window: int | None) -> tuple[Tensor, Tensor]:
    """(out, base-2 log-sum-exp) by the kernel the shape asks for, without autograd."""
    base.check(q, k, v, batch, window)
    group = q.shape[1] // k.shape[1]
    if batch.max_q * group >= WS_ROWS and attention_ws.unsupported(q, k, v, batch) is None:
        kind = (batch.page_size > 0, window is not None)
        if attention_ws.proven(q.device.index or 0, q.shape[2], v.shape[2], q.dtype, *kind):
            return attention_ws.forward(q, k, v, batch, scale=scale, window=window)
    return base.forward(q, k, v, batch, scale=scale, window=window)


def _batch(args: tuple[Any, ...]) -> KVBatch:
    cu_q, kv_len, kv_start, table, page_size, max_q, max_kv = args
    return KVBatch(cu_q, kv_len, kv_start, table, page_size, max_q, max_kv)


@torch.library.custom_op(
    "miles_cuda::attention",
    mutates_args=(),
    device_types="cuda",
    schema="(Tensor q, Tensor k, Tensor v, Tensor cu_q, Tensor kv_len, Tensor kv_start, Tensor? table, int page_size, "
    "SymInt max_q, SymInt max_kv, float scale, int? window) -> (Tensor, Tensor)",
)
def _attention(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, kv_len: Tensor, kv_start: Tensor, table: Tensor | None,
    page_size: int, max_q: int, max_kv: int, scale: float, window: int | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return run(q, k, v, _batch((cu_q, kv_len, kv_start, table, page_size, max_q, max_kv)), scale, window)


@torch.library.custom_op(
    "miles_cuda::attention_backward",
    mutates_args=(),
    device_types="cuda",
    schema="(Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor grad, Tensor cu_q, Tensor kv_len, Tensor kv_start, "
    "SymInt max_q, SymInt max_kv, float scale, int? window) -> (Tensor, Tensor, Tensor)",
)
def _attention_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad: Tensor, cu_q: Tensor, kv_len: Tensor, kv_start: Tensor,
    max_q: int, max_kv: int, scale: float, window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    batch = _batch((cu_q, kv_len, kv_start, None, 0, max_q, max_kv))
    return base.backward(q, k, v, out, lse, grad, batch, scale=scale, window=window)


@torch.library.register_fake("miles_cuda::attention")
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty((q.shape[0], q.shape[1], v.shape[2])), q.new_empty(q.shape[:2], dtype=torch.float32)


@torch.library.register_fake("miles_cuda::attention_backward")
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_q, kv_len, kv_start, _table, page_size, max_q, max_kv, scale, window = inputs
    ctx.save_for_backward(q, k, v, *output, cu_q, kv_len, kv_start)
    ctx.page_size, ctx.sizes = page_size, (max_q, max_kv, scale, window)


def _grad(ctx: Any, grad: Tensor, _lse: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.page_size:
        raise ValueError("attention over pages has no gradient; train on packed sequences (KVBatch.packed)")
    q, k, v, out, lse, cu_q, kv_len, kv_start = ctx.saved_tensors
    grads = torch.ops.miles_cuda.attention_backward(q, k, v, out, lse, grad, cu_q, kv_len, kv_start, *ctx.sizes)
    return (*grads, *(None,) * 9)


_attention.register_autograd(_grad, setup_context=_save)
