"""Sums of weight gradients on CUDA that go on where the last micro-batch left them; see `ops.chain`."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from miles_kernels.cuda.gemm_triton import Tile, descriptor, num_sms, strides_fit_tma
from miles_kernels.cuda.launch import cdiv

COLS = 32
TILE = Tile(128, 256, 64, 8, 3)
NARROW = Tile(128, 128, 64, 8, 4)
WIDE = 132 * 128 * 256
"""Elements of a gradient from which the large tile keeps all multiprocessors busy."""


def add_product(total: Tensor, grad: Tensor, x: Tensor, tile: Tile | None = None) -> None:
    """total[N, K] float32 goes on with grad[T, N]^T x[T, K]: its values are where the accumulators start.

    Raises ValueError when rows do not start at multiples of 16 bytes.
    """
    if x.dtype is not grad.dtype or x.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"chained gradients on CUDA: operands must be bfloat16, got {grad.dtype} and {x.dtype}")
    if not (strides_fit_tma(grad) and strides_fit_tma(x)):
        raise ValueError("chained gradients on CUDA: rows must be contiguous and start at multiples of 16 bytes")
    from miles_kernels.cuda.chain_kernels import chain_product

    rows, m, n = grad.shape[0], grad.shape[1], x.shape[1]
    tile = tile or (TILE if m * n >= WIDE else NARROW)
    programs = min(num_sms(x.device.index or 0) * tile.per_sm, cdiv(m, tile.rows) * cdiv(n, tile.cols))
    chain_product[(programs,)](
        descriptor(grad, tile.depth, tile.rows), descriptor(x, tile.depth, tile.cols), total, m, n, rows, total.stride(0),
        BM=tile.rows, BN=tile.cols, BK=tile.depth, GROUP_M=8, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


@functools.cache
def disagreement(device: str) -> str | None:
    """Try on this GPU whether a cut between units changes the bits of a product: what differs, in words; None if nothing does."""
    generator = torch.Generator(device).manual_seed(0)
    rows, m, n = 1040, 256, 384
    grad, x = (torch.randn((rows, k), generator=generator, device=device).to(torch.bfloat16) for k in (m, n))
    for tile in (TILE, NARROW):
        whole, cut = (torch.zeros((m, n), device=device) for _ in range(2))
        add_product(whole, grad, x, tile)
        for first, last in ((0, 16), (16, 528), (528, 624), (624, rows)):
            add_product(cut, grad[first:last], x[first:last], tile)
        unequal = int((whole != cut).sum())
        if unequal:
            return f"{unequal} of {m * n} elements of a product over {rows} rows change when it is cut (tile {tile.name})"
    return None


def add_parts(total: Tensor, parts: Tensor, kinds: tuple[int, ...]) -> None:
    """total[G, H] float32 goes on with parts[heads, blocks, H] float32, block by block, in each the heads in order.

    `kinds` are the numbers of consecutive heads that belong to each of the G rows.
    """
    from miles_kernels.cuda.chain_kernels import chain_parts

    _, blocks, width = parts.shape
    first = 0
    for row, heads in zip(total.view(len(kinds), width), kinds, strict=True):
        chain_parts[(cdiv(width, COLS),)](parts[first:], row, blocks, heads, width, COLS=COLS, num_warps=1)
        first += heads


def add_lookup(total: Tensor, token_ids: Tensor, grad: Tensor) -> None:
    """total[V, H] float32 goes on with the gradient rows grad[T, H] of looked-up rows, one by one in token order."""
    from miles_kernels.cuda.chain_kernels import chain_lookup

    if len(token_ids):
        ids, order = torch.sort(token_ids, stable=True)
        grad, block = grad.contiguous(), 1024
        width = grad.shape[1]
        chain_lookup[(len(ids), cdiv(width, block))](ids, order, grad, total, len(ids), width, BLOCK=block, num_warps=4)
