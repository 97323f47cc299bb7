"""Attention on CUDA: one numeric definition for prefill, chunks, cached prefixes, paged decode, verification and packed training.

Legend: T = packed query tokens, H = query heads, Hkv = key/value heads, D, DV = head sizes, N = pool slots, B = sequences.

Which kernel runs (tile height, one pass or chunks of 512 keys, Triton or the warp-specialised kernel) follows from the shape
alone and changes no bit: see `attention_kernels` for the order of every sum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from miles_kernels.cuda.launch import MOST_PROGRAMS, early_for

SPLIT = 512
"""Keys per chunk: the unit of the split for small batches, and of the fold everywhere."""
BLOCK_N = 64
FULL_MACHINE = 264
"""Programs that keep 132 multiprocessors busy; fewer, and long sequences are split into chunks."""


@dataclass(frozen=True, eq=False)
class KVBatch:
    """Where each sequence's queries and keys lie. Queries are the last `q_len` positions of their sequence.

    Example: KVBatch.packed([5, 3], device="cuda"); KVBatch.paged([1, 1], [17, 40], table, page_size=16)
    """

    cu_q: Tensor
    """int32 [B + 1], query token offsets"""
    kv_len: Tensor
    """int32 [B], keys of each sequence, its own queries included"""
    kv_start: Tensor
    """int32 [B], first slot of a contiguous sequence (unused when paged)"""
    table: Tensor | None
    """int32 [B, pages], page ids; None when contiguous"""
    page_size: int
    """slots per page: 1, 2, 4 .. 32 or a multiple of 64; 0 when contiguous"""
    max_q: int
    max_kv: int
    self_attention: bool = False
    """keys are exactly the queries' own tokens, in the same order (what the backward needs)"""
    cache: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def packed(cls, lengths: list[int], device: torch.device | str = "cuda") -> KVBatch:
        """Sequences one after the other, keys and values being the same stream (training)."""
        cu = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        cu[1:] = torch.tensor(lengths, dtype=torch.int32).cumsum(0)
        length = cu.diff().to(device)
        cu = cu.to(device)
        return cls(cu, length, cu[:-1].contiguous(), None, 0, max(lengths), max(lengths), True)

    @classmethod
    def paged(cls, q_lens: list[int], kv_lens: list[int], table: Tensor, page_size: int, *, max_kv: int | None = None) -> KVBatch:
        """Keys and values in pages; `table` int32 [B, pages] on the device. `max_kv` fixes the bound for graph capture."""
        if page_size < 1 or (page_size % 64 and 64 % page_size):
            raise ValueError(f"page_size={page_size} must divide 64 or be a multiple of it")
        cu = torch.zeros(len(q_lens) + 1, dtype=torch.int32)
        cu[1:] = torch.tensor(q_lens, dtype=torch.int32).cumsum(0)
        device = table.device
        length = torch.tensor(kv_lens, dtype=torch.int32, device=device)
        return cls(cu.to(device), length, length, table, page_size, max(q_lens), max_kv or max(kv_lens))


def _next_power(x: int) -> int:
    return max(16, 1 << (x - 1).bit_length())


def _schedule(rows: int, dim: int, dim_v: int, item_bytes: int, paged: bool) -> tuple[int, int, int]:
    """(rows per program, warps, stages): keys and values of `stages` blocks fit into shared memory, sums into registers."""
    block = next((size for size in (16, 32, 64) if rows <= size), 128)
    if (_next_power(dim) + _next_power(dim_v)) * item_bytes > 768:  # as heads of 256 in bfloat16
        block = min(block, 64)
        return block, 8 if block == 64 else 4, 2
    return block, 8 if block == 128 else 4, 5 if paged else 3


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch: KVBatch,
    *,
    scale: float,
    window: int | None = None,
    partial: bool | None = None,
    block_m: int | None = None,
    num_warps: int | None = None,
    stages: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(out [T, H, DV], base-2 log-sum-exp fp32 [T, H]) of q[T, H, D] over pools k[N, Hkv, D], v[N, Hkv, DV].

    `partial`, `block_m`, `num_warps` and `stages` choose among bit-equal schedules; None chooses by shape.
    """
    import triton

    from miles_kernels.cuda.attention_kernels import attend, fold_partials

    check(q, k, v, batch, window)
    tokens, heads, dim = q.shape
    kv_heads, dim_v = k.shape[1], v.shape[2]
    group = heads // kv_heads
    num_seqs = batch.kv_len.shape[0]
    out = torch.empty((tokens, heads, dim_v), dtype=q.dtype, device=q.device)
    lse = torch.empty((tokens, heads), dtype=torch.float32, device=q.device)
    if tokens == 0:
        return out, lse
    rows = batch.max_q * group
    fitting = _schedule(rows, dim, dim_v, q.element_size(), batch.page_size > 0)
    block_m, num_warps, stages = (given or fits for given, fits in zip((block_m, num_warps, stages), fitting, strict=True))
    tiles = triton.cdiv(rows, block_m)
    chunks = triton.cdiv(batch.max_kv, SPLIT)
    if partial is None:
        partial = chunks > 1 and tiles * kv_heads * num_seqs < FULL_MACHINE and rows <= 128
    if partial:
        part = torch.empty((tokens, heads, chunks, dim_v), dtype=torch.float32, device=q.device)
        part_top = torch.empty((2, tokens, heads, chunks), dtype=torch.float32, device=q.device)
    else:
        part, part_top, chunks = lse, lse.unsqueeze(0).expand(2, -1, -1), 1
    table = batch.table if batch.table is not None else batch.kv_len
    early = early_for(tokens, q)
    attend[(tiles * chunks, kv_heads, num_seqs)](
        q, k, v, out, lse, part, part_top[0], part_top[1],
        table, batch.cu_q, batch.kv_len, batch.kv_start,
        scale * math.log2(math.e), heads, chunks,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), out.stride(0), out.stride(1),
        table.stride(0),
        G=group, D=dim, D_PAD=_next_power(dim), DV=dim_v, DV_PAD=_next_power(dim_v),
        BM=block_m, SPLIT=SPLIT, WINDOW=window or 0, PAGE=batch.page_size, PARTIAL=partial, STAGES=stages,
        EARLY=early, num_warps=num_warps, launch_pdl=early,
    )  # fmt: skip
    if partial:
        head_rows = min(16, _power_of_two(heads))
        fold_partials[(batch.max_q, triton.cdiv(heads, head_rows), num_seqs)](
            part, part_top[0], part_top[1], out, lse, batch.cu_q, batch.kv_len, heads, chunks, out.stride(0), out.stride(1),
            DV=dim_v, DV_PAD=_next_power(dim_v), SPLIT=SPLIT, WINDOW=window or 0, ROWS=head_rows, num_warps=4,
        )  # fmt: skip
    return out, lse


def _power_of_two(x: int) -> int:
    return 1 << (x - 1).bit_length()


def check(q: Tensor, k: Tensor, v: Tensor, batch: KVBatch, window: int | None) -> None:
    if q.shape[1] % k.shape[1] or q.shape[2] != k.shape[2] or k.shape[:2] != v.shape[:2]:
        raise ValueError(
            f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; need q [T, H, D], k [N, Hkv, D], "
            "v [N, Hkv, DV] with H a multiple of Hkv"
        )
    if q.stride(2) != 1 or k.stride(2) != 1 or v.stride(2) != 1:
        raise ValueError("attention: the last dimension of q, k and v must be contiguous")
    if batch.kv_len.shape[0] > MOST_PROGRAMS:
        raise ValueError(f"attention: {batch.kv_len.shape[0]} sequences; at most {MOST_PROGRAMS} at once")
    if window is not None and window < 1:
        raise ValueError(f"attention: window={window} must be at least 1")


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad: Tensor,
    batch: KVBatch,
    *,
    scale: float,
    window: int | None = None,
    kv_tile: tuple[int, int, int, int] | None = None,
    q_tile: tuple[int, int, int, int] | None = None,
    into: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) for `forward` over a packed batch. Tiles are (rows, keys, warps, stages); None chooses by head size.

    `into` gives the three tensors to write, strided but contiguous in their last dimension.
    """
    import triton

    from miles_kernels.cuda.attention_grad_kernels import grad_kv, grad_q, row_delta

    if batch.page_size:
        raise ValueError("attention backward needs contiguous keys and values (KVBatch.packed), not pages")
    if grad.stride(2) != 1:
        grad = grad.contiguous()
    tokens, heads, dim = q.shape
    kv_heads, dim_v = k.shape[1], v.shape[2]
    group, num_seqs = heads // kv_heads, batch.kv_len.shape[0]
    delta = torch.empty((tokens, heads), dtype=torch.float32, device=q.device)
    dq, dk, dv = into or tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    sizes: dict[str, Any] = {"D": dim, "D_PAD": _next_power(dim), "DV": dim_v, "DV_PAD": _next_power(dim_v)}
    row_delta[(triton.cdiv(tokens * heads, 16),)](
        out, grad, delta, tokens * heads, out.stride(0), out.stride(1), grad.stride(0), grad.stride(1), heads,
        DV=dim_v, DV_PAD=_next_power(dim_v), ROWS=16, num_warps=4,
    )  # fmt: skip
    strides = (
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), grad.stride(0), grad.stride(1)
    )  # fmt: skip
    scale_log2 = scale * math.log2(math.e)
    wide = max(sizes["D_PAD"], sizes["DV_PAD"]) > 128
    rows, keys, warps, stages = kv_tile or ((32, 64, 4, 1) if wide else (64, 64, 4, 2))
    grad_kv[(triton.cdiv(batch.max_kv, keys), kv_heads, num_seqs)](
        q, k, v, grad, lse, delta, dk, dv, batch.cu_q, batch.kv_len, batch.kv_start, scale, scale_log2, heads,
        *strides, dk.stride(0), dk.stride(1), dv.stride(0), dv.stride(1),
        G=group, BM=rows, BK=keys, WINDOW=window or 0, STAGES=stages, num_warps=warps, **sizes,
    )  # fmt: skip
    rows, keys, warps, stages = q_tile or ((64, 64, 4, 1) if wide else (128, 64, 8, 3))
    grad_q[(triton.cdiv(batch.max_q * group, rows), kv_heads, num_seqs)](
        q, k, v, grad, lse, delta, dq, batch.cu_q, batch.kv_len, batch.kv_start, scale, scale_log2, heads,
        *strides, dq.stride(0), dq.stride(1),
        G=group, BM=rows, BK=keys, WINDOW=window or 0, STAGES=stages, num_warps=warps, **sizes,
    )  # fmt: skip
    return dq, dk, dv
