"""Tables and launches of the kernel that copies and checksums stretches of GPU memory; see `miles_kernels.mover`.

Which blocks there are depends on sizes alone: those tables are made once per model and kept on the device, 8 bytes a block. An
update brings addresses, 16 bytes a tensor.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

logger = logging.getLogger("miles_kernels.checksum")
_COPY_WARPS, _SUM_WARPS = 16, 8
"""Measured on an H200: 0.98 of a plain device copy, and 4.3 TB/s (docs/measured/training.md)."""


@lru_cache(maxsize=1)
def available() -> bool:
    """Whether triton is installed."""
    return find_spec("triton") is not None


@lru_cache(maxsize=16)
def proven(device: torch.device) -> bool:
    """Whether the kernel, on this device, copies every byte and gives the digits of torch operations; tried once per process.

    Where it does not, that is logged and torch operations serve: slower, and right.
    """
    from miles_kernels.checksum import BLOCK_BYTES, blocks_sum

    draw = torch.Generator().manual_seed(1)
    sizes = (1, 13, BLOCK_BYTES - 8, BLOCK_BYTES, 3 * BLOCK_BYTES + 5)
    offsets = tuple(4 * BLOCK_BYTES * number for number in range(len(sizes)))
    stream = torch.randint(0, 256, (4 * BLOCK_BYTES * len(sizes),), dtype=torch.uint8, generator=draw)
    wanted = [blocks_sum(stream[at : at + size]) for at, size in zip(offsets, sizes, strict=True)]
    try:
        source, target = stream.to(device), torch.zeros(stream.numel(), dtype=torch.uint8, device=device)
        places = [torch.tensor(offsets, device=device) + each.data_ptr() for each in (source, target)]
        sums = [torch.zeros(len(sizes), dtype=torch.int64, device=device) for _ in range(2)]
        made = Tables(sizes, offsets, device)
        made.launch(places[0], places[1], sums[0], 0, stream.numel(), 16)
        made.launch(places[1], None, sums[1], 0, stream.numel(), 8)
        same = all(torch.equal(target[at : at + size], source[at : at + size]) for at, size in zip(offsets, sizes, strict=True))
        found = [[value & ((1 << 64) - 1) for value in each.tolist()] for each in sums]
        untouched = int(target.count_nonzero()) <= sum(sizes)
    except Exception as error:  # whatever a compiler or a driver raises: the other way serves
        what = f"{type(error).__name__}: {error}"
        logger.warning("checksum kernel cannot be used on %s (%s); torch operations serve", device, what)
        return False
    good = same and untouched and found == [wanted, wanted]
    if not good:
        logger.warning("checksum kernel gives other bits than torch operations on %s; these serve", device)
    return good


class Tables:
    """The blocks of stretches at their places of a stream: whole ones, and the last one of each where it is not whole."""

    def __init__(self, sizes: tuple[int, ...], offsets: tuple[int, ...], device: torch.device) -> None:
        from miles_kernels.checksum import BLOCK_BYTES

        self._device = device
        size, offset = torch.tensor(sizes, dtype=torch.int64), torch.tensor(offsets, dtype=torch.int64)
        owners = torch.arange(len(sizes), dtype=torch.int64)
        whole = size // BLOCK_BYTES
        owner = torch.repeat_interleave(owners, whole)
        block = torch.arange(owner.numel(), dtype=torch.int64) - torch.repeat_interleave(whole.cumsum(0) - whole, whole)
        partial = owners[size % BLOCK_BYTES > 0]
        self._whole_at = offset[owner] + block * BLOCK_BYTES
        self._partial_at = offset[partial] + whole[partial] * BLOCK_BYTES
        self._whole = ((owner << 32) + block).to(device)
        self._partial = ((partial << 32) + whole[partial]).to(device)
        self._sizes = size.to(device)
        self._stop = max((at + size for at, size in zip(offsets, sizes, strict=True)), default=0)
        assert not bool((offset % 8).any()), "stretches at multiples of 8"
        self.offsets, self.offsets_there = offset, offset.to(device)

    def launch(self, source: Tensor, target: Tensor | None, sums: Tensor | None, start: int, stop: int, align: int) -> None:
        """Copy and sum the blocks that begin in [start, stop) of the stream, on the current stream, without waiting.

        `source`, `target`: int64 [n] addresses on the device. `sums`: int64 [n], added to modulo 2^64.
        """
        from miles_kernels.checksum import BLOCK_WORDS, GOLDEN, HIGH, LOW
        from miles_kernels.cuda.checksum_kernels import move_blocks

        bounds = None if start <= 0 and stop >= self._stop else torch.tensor([start, stop])
        with torch.cuda.device(self._device):
            for blocks, at, full in ((self._whole, self._whole_at, True), (self._partial, self._partial_at, False)):
                first, last = (0, blocks.numel()) if bounds is None else torch.searchsorted(at, bounds).tolist()
                if last > first:
                    move_blocks[(last - first,)](
                        blocks, first, source, source if target is None else target, self._sizes,
                        source if sums is None else sums, GOLDEN=GOLDEN, LOW=LOW, HIGH=HIGH, BLOCK=BLOCK_WORDS,
                        COPY=target is not None, HASH=sums is not None, FULL=full, ALIGN=align,
                        num_warps=_SUM_WARPS if target is None else _COPY_WARPS,
                    )  # fmt: skip


@lru_cache(maxsize=4)
def tables(sizes: tuple[int, ...], offsets: tuple[int, ...], device: torch.device) -> Tables:
    """The tables of a model, made at its first update."""
    return Tables(sizes, offsets, device)
