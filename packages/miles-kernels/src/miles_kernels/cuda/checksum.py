"""Checksums, and copies that state what they wrote, of many stretches of GPU memory in one launch; see `miles_kernels.checksum`.

Stretches are (source address, target address, bytes): at a few microseconds a tensor, torch's own views would take longer than
the copy. Everything that grows with the number of blocks is made on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

_WARPS = 8
Span = tuple[int, int, int]


def available() -> bool:
    """Whether triton is installed."""
    return find_spec("triton") is not None


def sums(sources: Sequence[Tensor], targets: Sequence[Tensor] | None) -> list[int]:
    """Block sums of flat uint8 tensors of one device, copied to `targets` on the way. Waits for the device."""
    into = targets if targets is not None else sources
    spans = [(a.data_ptr(), b.data_ptr(), a.numel()) for a, b in zip(sources, into, strict=True)]
    found = launch(spans, sources[0].device, copy=targets is not None)
    return [int(value) & ((1 << 64) - 1) for value in found.tolist()]


def launch(spans: Sequence[Span], device: torch.device, *, copy: bool, hashed: bool = True) -> Tensor:
    """Copy and sum the spans on the current stream, without waiting: int64 [spans], to be read modulo 2^64.

    All addresses are multiples of 8 and belong to `device`; whoever calls keeps the memory alive.
    """
    from miles_kernels.checksum import BLOCK_WORDS, GOLDEN, ODD
    from miles_kernels.cuda.checksum_kernels import checksum_blocks

    found = torch.zeros(len(spans), dtype=torch.int64, device=device)
    if not spans:
        return found
    rows = torch.tensor(spans, dtype=torch.int64)
    counts = (rows[:, 2] + (8 * BLOCK_WORDS - 1)) // (8 * BLOCK_WORDS)
    total = int(counts.sum())
    if total == 0:
        return found
    align = 16 if int((rows[:, :2] % 16).sum()) == 0 else 8
    table = torch.cat([rows, (counts.cumsum(0) - counts)[:, None], counts[:, None]], 1).to(device, non_blocking=True)
    owner = torch.repeat_interleave(table[:, 4], output_size=total)
    with torch.cuda.device(device):
        checksum_blocks[(total,)](
            table, owner, found, GOLDEN=GOLDEN, ODD=ODD, BLOCK=BLOCK_WORDS, COPY=copy, HASH=hashed, ALIGN=align, num_warps=_WARPS
        )
    return found
