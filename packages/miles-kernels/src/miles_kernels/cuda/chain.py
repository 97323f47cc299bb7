"""Sums of weight gradients on CUDA that go on where the last micro-batch left them; see `ops.chain`."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from miles_kernels.cuda.gemm_triton import Tile, descriptor, num_sms, strides_fit_tma
from miles_kernels.cuda.launch import cdiv
from miles_kernels.ops.chain import UNIT, begin, take

COLS = 32
TILE = Tile(128, 256, 64, 8, 3)
NARROW = Tile(128, 128, 64, 8, 4)
WIDE = 132 * 128 * 256
"""Elements of a gradient from which the large tile keeps all multiprocessors busy."""


class Tail(NamedTuple):
    """Rows of each of E experts that fill no unit yet; `count[E]` int32 of the `UNIT` places are taken."""

    grad: Tensor
    """[E, UNIT, N]"""
    x: Tensor
    """[E, UNIT, K]"""
    count: Tensor


def add_product(total: Tensor, grad: Tensor, x: Tensor, tile: Tile | None = None) -> None:
    """total[N, K] float32 goes on with grad[T, N]^T x[T, K]: its values are where the accumulators start.

    Raises ValueError when rows do not start at multiples of 16 bytes.
    """
    if x.dtype is not grad.dtype or x.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"chained gradients on CUDA: operands must be bfloat16, got {grad.dtype} and {x.dtype}")
    if grad.shape[0] and not (strides_fit_tma(grad) and strides_fit_tma(x)):
        raise ValueError("chained gradients on CUDA: rows must be contiguous and start at multiples of 16 bytes")
    rows, m, n = grad.shape[0], grad.shape[1], x.shape[1]
    if not rows:
        return
    from miles_kernels.cuda.chain_kernels import chain_product

    tile = tile or (TILE if m * n >= WIDE else NARROW)
    programs = min(num_sms(x.device.index or 0) * tile.per_sm, cdiv(m, tile.rows) * cdiv(n, tile.cols))
    chain_product[(programs,)](
        descriptor(grad, tile.depth, tile.rows), descriptor(x, tile.depth, tile.cols), total, m, n, rows, total.stride(0),
        BM=tile.rows, BN=tile.cols, BK=tile.depth, GROUP_M=8, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def add_grouped(weight: Tensor, grad: Tensor, x: Tensor, offsets: Tensor) -> None:
    """The main gradient [E, N, K] of `weight` goes on with the rows of each expert, grad[R, N] and x[R, K].

    Expert e has the rows offsets[e] .. offsets[e + 1] - 1 (int32, on the device). Nothing waits for the device.
    """
    total: Tensor = weight.chain_sum  # type: ignore[attr-defined]
    experts, n, k = total.shape
    tail: Tail | None = weight.chain_tail  # type: ignore[attr-defined]
    if tail is None:
        count = torch.zeros(experts, dtype=torch.int32, device=grad.device)
        tail = Tail(grad.new_zeros((experts, UNIT, n)), x.new_zeros((experts, UNIT, k)), count)
    rows = grad.shape[0]
    sizes = tail.count + offsets.diff()
    starts = sizes.cumsum(0, dtype=torch.int32) - sizes
    row, unit = (torch.arange(size, dtype=torch.int32, device=grad.device) for size in (rows, UNIT))
    expert = torch.searchsorted(offsets[1:], row, right=True, out_int32=True)
    place = row + (starts + tail.count - offsets[:-1])[expert]
    nowhere = rows + experts * UNIT
    kept = torch.where(unit < tail.count[:, None], starts[:, None] + unit, nowhere).view(-1)
    whole = sizes // UNIT * UNIT
    left = ((starts + whole)[:, None] + unit).clamp_(max=nowhere).view(-1)
    both = []
    for old, new in ((tail.grad, grad), (tail.x, x)):
        joined = new.new_empty((nowhere + 1, new.shape[1]))
        joined.index_copy_(0, kept.long(), old.view(-1, new.shape[1]))
        joined.index_copy_(0, place.long(), new)
        both.append(joined)
    _chain_grouped(total, both[0], both[1], starts, whole)
    kept_grad, kept_x = (joined.index_select(0, left).view(experts, UNIT, -1) for joined in both)
    weight.chain_tail = Tail(kept_grad, kept_x, sizes - whole)  # type: ignore[attr-defined]


def end_tail(total: Tensor, tail: Tail | None) -> None:
    """total[E, N, K] float32 goes on with the rows that still wait, filled up with zeros."""
    if tail is not None:
        experts = len(tail.count)
        starts = torch.arange(0, experts * UNIT, UNIT, dtype=torch.int32, device=total.device)
        _chain_grouped(total, tail.grad.view(experts * UNIT, -1), tail.x.view(experts * UNIT, -1), starts, tail.count)


def _chain_grouped(total: Tensor, grad: Tensor, x: Tensor, starts: Tensor, sizes: Tensor) -> None:
    from miles_kernels.cuda.chain_kernels import chain_grouped

    experts, n, k = total.shape
    programs = min(num_sms(x.device.index or 0) * 2, experts * cdiv(n, 128) * cdiv(k, 128))
    chain_grouped[(programs,)](grad, x, total, starts, sizes, experts, n, k, BN=128, BK=128, BT=64, num_warps=8, num_stages=3)


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
    sums = [_grouped_sum(grad, x, cuts) for cuts in ((0, rows), (0, 5, 333, 340, rows))]
    unequal = int((sums[0] != sums[1]).sum())
    return f"{unequal} elements of experts' products over {rows} rows change when they are cut" if unequal else None


def _grouped_sum(grad: Tensor, x: Tensor, cuts: tuple[int, ...]) -> Tensor:
    """The chained gradient of three experts that get the rows in turns, cut at some of them."""
    weight = torch.empty((3, grad.shape[1], x.shape[1]), dtype=grad.dtype, device=grad.device)
    begin(weight)
    for first, last in zip(cuts, cuts[1:], strict=False):
        ids, order = torch.sort(torch.arange(first, last, device=grad.device) % 3, stable=True)
        offsets = torch.searchsorted(ids, torch.arange(4, device=grad.device), out_int32=True)
        add_grouped(weight, grad[first:last][order], x[first:last][order], offsets)
    return take(weight)


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
