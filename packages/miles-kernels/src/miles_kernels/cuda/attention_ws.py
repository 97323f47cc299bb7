"""Launch of the warp-specialised attention forward, and where it applies."""

from __future__ import annotations

import functools
import logging
import math

import torch
from torch import Tensor

from miles_kernels.cuda import attention as base
from miles_kernels.cuda.attention import SPLIT, KVBatch

logger = logging.getLogger("miles_kernels.attention")
STAGES = 4
PROBE_LENGTHS = (700, 33, 129, 1)


def unsupported(q: Tensor, k: Tensor, v: Tensor, batch: KVBatch) -> str | None:
    """Why this call cannot use the kernel; None when it can."""
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"dtype {q.dtype}"
    if q.shape[2] not in (64, 128) or v.shape[2] not in (64, 128):
        return f"head sizes {q.shape[2]} and {v.shape[2]}"
    if batch.page_size % 64:
        return f"pages of {batch.page_size}"
    if any(_plane(x) is None for x in (k, v)):
        return "pools that are neither [N, Hkv, D] nor [Hkv, N, D] in memory"
    if (_plane(k)[1] == 0) != (_plane(v)[1] == 0):  # type: ignore[index]
        return "pools of different memory order"
    return None


@functools.cache
def proven(device: int, dim: int, dim_v: int, dtype: torch.dtype, paged: bool, windowed: bool) -> bool:
    """Whether the kernel has the bits of the plain one on this device. Once per process and kind of call.

    The plain kernel defines attention and serves where this is False, as on a machine whose compiler cannot build this one.
    """
    generator = torch.Generator(device=f"cuda:{device}").manual_seed(0)
    lengths = list(PROBE_LENGTHS)
    pages = -(-max(lengths) // 64)

    def draw(rows: int, heads: int, size: int) -> Tensor:
        return torch.randn(rows, heads, size, device=f"cuda:{device}", generator=generator).to(dtype)

    with torch.no_grad(), torch.cuda.device(device):
        rows = max(sum(lengths), len(lengths) * pages * 64)
        k, v = draw(rows, 2, dim), draw(rows, 2, dim_v)
        if paged:  # a later chunk of each sequence
            table = torch.randperm(len(lengths) * pages, device=k.device, generator=generator).view(len(lengths), pages)
            counts = [max(1, n // 2) for n in lengths]
            batch = KVBatch.paged(counts, lengths, table.int(), 64)
        else:
            counts = lengths
            batch = KVBatch.packed(lengths, k.device)
        q, window = draw(sum(counts), 8, dim), 100 if windowed else None
        want, _ = base.forward(q, k, v, batch, scale=dim**-0.5, window=window)
        try:
            got, _ = forward(q, k, v, batch, scale=dim**-0.5, window=window)
        except Exception as error:  # whatever a compiler or a driver raises: the plain kernel serves
            what = f"{type(error).__name__}: {error}"
            logger.warning(
                "the warp-specialised attention cannot be used on device %d; the plain kernel serves: %s", device, what
            )
            return False
        same = torch.equal(got, want)
        if not same:
            logger.warning("the warp-specialised attention has other bits on device %d; the plain kernel serves", device)
        return same


def _plane(x: Tensor) -> tuple[list[int], int, int, int] | None:
    """(shape of the 2-D view, rows per head, columns per head, row stride) of a pool [N, heads, D]."""
    slots, heads, dim = x.shape
    if x.stride(2) != 1 or x.data_ptr() % 16:
        return None
    if x.stride(1) == dim and x.stride(0) % 8 == 0:
        return [slots, heads * dim], 0, dim, x.stride(0)
    if x.stride(0) == dim and x.stride(1) == slots * dim:
        return [heads * slots, dim], slots, 0, dim
    return None


def forward(
    q: Tensor, k: Tensor, v: Tensor, batch: KVBatch, *, scale: float, window: int | None = None, stages: int = STAGES
) -> tuple[Tensor, Tensor]:
    """`attention.forward` with the same bits; the caller has checked `unsupported`."""
    import triton
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from miles_kernels.cuda.attention_ws_kernels import attend_ws

    tokens, heads, dim = q.shape
    kv_heads, dim_v = k.shape[1], v.shape[2]
    group = heads // kv_heads
    out = torch.empty((tokens, heads, dim_v), dtype=q.dtype, device=q.device)
    lse = torch.empty((tokens, heads), dtype=torch.float32, device=q.device)
    if tokens == 0:
        return out, lse
    element = gl.bfloat16 if q.dtype is torch.bfloat16 else gl.float16
    k_plane, v_plane = _plane(k), _plane(v)
    assert k_plane is not None and v_plane is not None

    def describe(x: Tensor, plane: tuple[list[int], int, int, int], size: int) -> TensorDescriptor:
        layout = gl.NVMMASharedLayout.get_default_for([64, size], element)
        return TensorDescriptor(x, plane[0], [plane[3], 1], [64, size], layout)

    table = batch.table if batch.table is not None else batch.kv_len
    attend_ws[(triton.cdiv(batch.max_q * group, 128), kv_heads, batch.kv_len.shape[0])](
        q, describe(k, k_plane, dim), describe(v, v_plane, dim_v), out, lse, table, batch.cu_q, batch.kv_len, batch.kv_start,
        scale * math.log2(math.e), heads, q.stride(0), q.stride(1), out.stride(0), out.stride(1), table.stride(0),
        k_plane[1], k_plane[2], v_plane[2],
        G=group, D=dim, DV=dim_v, SPLIT=SPLIT, WINDOW=window or 0, PAGE=batch.page_size, STAGES=stages,
        num_warps=4, maxnreg=168,
    )  # fmt: skip
    return out, lse
