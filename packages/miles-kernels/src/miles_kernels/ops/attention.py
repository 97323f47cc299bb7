"""Attention over a pool of keys and values by slot: prefill, chunks, cached prefixes, paged decode, packed training.

Per query row: float32 scores, -inf where a key is not visible, softmax with the exact maximum and a lane-ordered row
sum, then probability times value in ascending blocks of 128 keys. Keys beyond the visible ones contribute exact zeros,
and the GEMMs stay in the proven shape range, so a row's bits depend on its own query and keys only.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from miles_kernels.native import Library, kernels_for
from miles_kernels.ops.attention_plan import (
    AttentionBucket,
    AttentionPlan,
    Segment,
    decode_plan,
    packed_plan,
    plan_attention,
    table_plan,
)
from miles_kernels.ops.matmul import Mode, attention_rows, bmm_nt, bmm_pv, default_mode, softmax_rows

__all__ = [
    "AttentionBucket",
    "AttentionPlan",
    "Segment",
    "attention",
    "decode_plan",
    "packed_plan",
    "plan_attention",
    "table_plan",
]

HEAD_MULTIPLE = 8
NATIVE_DIM = 512
"""Largest head of the C kernel."""


class _Shape(NamedTuple):
    """Sizes of one call. kv = Hkv, group = G, dim = D."""

    tokens: int
    kv: int
    group: int
    dim: int
    window: int | None
    mode: Mode


def attention(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    plan: AttentionPlan,
    *,
    scale: float,
    window: int | None = None,
    mode: Mode | None = None,
) -> Tensor:
    """Causal attention of `q[T, H, D]` over `k_pool`, `v_pool` [Hkv, N, D] along `plan`, as [T, H, D] in q's dtype.

    A query at position p sees keys 0 .. p of its segment, with `window` only the last `window` of them. Backward
    recomputes the probabilities; gradients of q and both pools are deterministic, summed in bucket order.
    Raises ValueError when T, H or D do not fit the plan and the pools, or the plan names a slot that no pool has.
    """
    if q.is_cuda:
        return _on_cuda(q, k_pool, v_pool, plan, scale, window)
    tokens, heads, dim = q.shape
    kv = k_pool.shape[0]
    pools = k_pool.shape
    if tokens != plan.num_tokens or heads % kv or dim != pools[2] or dim % HEAD_MULTIPLE or v_pool.shape != pools:
        raise ValueError(
            f"attention: q {tuple(q.shape)}, pools {tuple(pools)} and {tuple(v_pool.shape)}, plan of {plan.num_tokens} tokens; "
            f"need T as in the plan, H a multiple of Hkv, equal pools, equal D and D a multiple of {HEAD_MULTIPLE}"
        )
    if window is not None and window < 1:
        raise ValueError(f"attention: window must be at least 1, got {window}")
    if not tokens:
        return q.clone()
    shape = _Shape(tokens, kv, heads // kv, dim, window, mode or default_mode())
    if torch.is_grad_enabled() and (q.requires_grad or k_pool.requires_grad or v_pool.requires_grad):
        return _Attention.apply(q, k_pool, v_pool, plan, scale, shape)
    return _forward(q, k_pool, v_pool, plan, scale, shape)


def _on_cuda(q: Tensor, k_pool: Tensor, v_pool: Tensor, plan: object, scale: float, window: int | None) -> Tensor:
    from miles_kernels.cuda.attention import KVBatch
    from miles_kernels.cuda.attention_op import attention as on_cuda

    if not isinstance(plan, KVBatch):
        raise ValueError(f"attention on CUDA reads a KVBatch (KVBatch.packed or .paged), not {type(plan).__name__}")
    return on_cuda(q, k_pool.transpose(0, 1), v_pool.transpose(0, 1), plan, scale=scale, window=window)


def _by_head(x: Tensor, shape: _Shape) -> Tensor:
    """[T, H, D] -> view [Hkv, T, G * D]."""
    return x.reshape(shape.tokens, shape.kv, shape.group * shape.dim).transpose(0, 1)


def _gather_queries(x: Tensor, bucket: AttentionBucket, shape: _Shape) -> Tensor:
    """[Hkv, T, G * D] -> [Hkv * S, rows * G, D]."""
    segments = bucket.q_index.shape[0]
    return x.index_select(1, bucket.layout(shape.group).q_gather).view(shape.kv * segments, -1, shape.dim)


def _gather_keys(pool: Tensor, bucket: AttentionBucket, shape: _Shape) -> Tensor:
    """[Hkv, N, D] -> float32 [Hkv * S, Lk, D]."""
    segments, keys = bucket.kv_index.shape
    return pool.index_select(1, bucket.slots()).view(shape.kv * segments, keys, shape.dim).float()


def _probabilities(q: Tensor, k: Tensor, bucket: AttentionBucket, start: int, stop: int, shape: _Shape) -> Tensor:
    """[Hkv * S, (stop - start) * G, keys]; rows that only pad a short segment hold something else (never read)."""
    segments, queries = bucket.q_index.shape
    rows = bucket.layout(shape.group).rows
    keys = k.shape[1]
    scores = bmm_nt(q, k, shape.mode)
    if queries == 1:
        mask = bucket.mask(1, 0, 1, keys, shape.window).squeeze(1)
        return softmax_rows(scores.view(shape.kv, segments, -1, keys).add_(mask), shape.mode).view_as(scores)
    used = min(stop, queries) - start
    mask = bucket.mask(rows, start, start + used, keys, shape.window)
    if used == stop - start:
        masked = scores.view(shape.kv, segments, used, shape.group, keys).add_(mask)
        return softmax_rows(masked, shape.mode).view_as(scores)
    real = scores[:, : used * shape.group]
    masked = real.view(shape.kv, segments, used, shape.group, keys) + mask
    real.copy_(softmax_rows(masked, shape.mode).view_as(real))
    return scores


def _tiles(bucket: AttentionBucket, shape: _Shape) -> list[tuple[int, int, int]]:
    return bucket.tiles(bucket.layout(shape.group).rows, -(-attention_rows() // shape.group))


def _bucket_forward(q: Tensor, k: Tensor, v: Tensor, bucket: AttentionBucket, shape: _Shape) -> Tensor:
    outs = []
    tiles = _tiles(bucket, shape)
    for start, stop, keys in tiles:
        q_tile, k_tile, v_tile = q, k, v
        if len(tiles) > 1:
            q_tile, k_tile, v_tile = q[:, start * shape.group : stop * shape.group], k[:, :keys], v[:, :keys]
        outs.append(bmm_pv(_probabilities(q_tile, k_tile, bucket, start, stop, shape), v_tile, shape.mode))
    return outs[0] if len(outs) == 1 else torch.cat(outs, 1)


def _forward(q: Tensor, k_pool: Tensor, v_pool: Tensor, plan: AttentionPlan, scale: float, shape: _Shape) -> Tensor:
    for bucket in plan.buckets:
        bucket.check(k_pool.shape[1])
    kernels = kernels_for(q, k_pool, v_pool)
    if kernels is not None and shape.dim <= NATIVE_DIM:
        return _native(kernels, q, k_pool, v_pool, plan, scale, shape)
    by_head = _by_head(q.float() * scale, shape)
    width = shape.group * shape.dim
    outs = []
    for bucket in plan.buckets:
        k, v = _gather_keys(k_pool, bucket, shape), _gather_keys(v_pool, bucket, shape)
        out = _bucket_forward(_gather_queries(by_head, bucket, shape), k, v, bucket, shape)
        outs.append(out.view(shape.kv, -1, width))
    if plan.one_each:
        packed = outs[0].view(shape.kv, shape.tokens, -1, width)[:, :, 0].transpose(0, 1)
    else:
        packed = _to_tokens(outs, plan, shape)
    return packed.reshape(q.shape).to(q.dtype)


def _native(
    kernels: Library, q: Tensor, k_pool: Tensor, v_pool: Tensor, plan: AttentionPlan, scale: float, shape: _Shape
) -> Tensor:
    """Query by query, over the visible keys only."""
    q = q.contiguous()
    if k_pool.stride(2) != 1 or k_pool.stride() != v_pool.stride():
        k_pool, v_pool = k_pool.contiguous(), v_pool.contiguous()
    out = torch.empty_like(q)
    for bucket in plan.buckets:
        index = (bucket.q_index, bucket.q_pos, bucket.kv_index)
        kernels.attention(q, k_pool, v_pool, index, out, scale=scale, window=shape.window)
    return out


def _to_tokens(outs: list[Tensor], plan: AttentionPlan, shape: _Shape) -> Tensor:
    """Padded bucket rows [Hkv, rows, G * D] -> [T, Hkv, G * D]."""
    joined = outs[0] if len(outs) == 1 else torch.cat(outs, 1)
    return joined.transpose(0, 1).index_select(0, plan.inverse(shape.group))


def _bucket_backward(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, bucket: AttentionBucket, shape: _Shape
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the gathered (scaled) q, k and v of one bucket."""
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for start, stop, keys in _tiles(bucket, shape):
        rows = slice(start * shape.group, stop * shape.group)
        q_tile, g_tile, k_tile, v_tile = q[:, rows], grad[:, rows], k[:, :keys], v[:, :keys]
        p = _probabilities(q_tile, k_tile, bucket, start, stop, shape)
        dv[:, :keys] += torch.bmm(p.transpose(1, 2), g_tile)
        ds = torch.bmm(g_tile, v_tile.transpose(1, 2)).mul_(p)
        ds -= p.mul_(ds.sum(-1, keepdim=True))
        dk[:, :keys] += torch.bmm(ds.transpose(1, 2), q_tile)
        dq[:, rows] = torch.bmm(ds, k_tile)
    return dq, dk, dv


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k_pool: Tensor, v_pool: Tensor, plan: AttentionPlan, scale: float, shape: _Shape) -> Tensor:
        ctx.save_for_backward(q, k_pool, v_pool)
        ctx.plan, ctx.scale, ctx.shape = plan, scale, shape
        return _forward(q, k_pool, v_pool, plan, scale, shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k_pool, v_pool = ctx.saved_tensors
        plan, scale, shape = ctx.plan, ctx.scale, ctx.shape
        by_head, g_by_head = _by_head(q.float() * scale, shape), _by_head(grad.float(), shape)
        slots, width = k_pool.shape[1], shape.kv * shape.dim
        dk_pool, dv_pool = q.new_zeros((2, slots, width), dtype=torch.float32)
        dqs = []
        for bucket in plan.buckets:
            k, v = _gather_keys(k_pool, bucket, shape), _gather_keys(v_pool, bucket, shape)
            g = _gather_queries(g_by_head, bucket, shape)
            valid = bucket.layout(shape.group).valid
            if valid is not None:
                g.view(shape.kv, -1, shape.group * shape.dim).mul_(valid)
            dq, dk, dv = _bucket_backward(_gather_queries(by_head, bucket, shape), k, v, g, bucket, shape)
            dqs.append(dq.view(shape.kv, -1, shape.group * shape.dim))
            for pool, part in ((dk_pool, dk), (dv_pool, dv)):
                part = part.view(shape.kv, -1, shape.dim).transpose(0, 1).reshape(-1, width)
                pool.index_add_(0, bucket.slots(), part)
        dq_tokens = _to_tokens(dqs, plan, shape).mul_(scale).reshape(q.shape).to(q.dtype)
        dk_out, dv_out = (
            pool.view(slots, shape.kv, shape.dim).transpose(0, 1).to(like.dtype)
            for pool, like in ((dk_pool, k_pool), (dv_pool, v_pool))
        )
        return dq_tokens, dk_out, dv_out, None, None, None
