"""Checksums, and copies that state what they wrote, of many CUDA tensors in one launch; see `miles_kernels.checksum`."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

_WARPS = 8


def available() -> bool:
    """Whether triton is installed."""
    return find_spec("triton") is not None


def sums(sources: Sequence[Tensor], targets: Sequence[Tensor] | None, *, hashed: bool = True) -> list[int]:
    """Block sums of flat uint8 tensors of one device, copied to `targets` on the way; all zero when not `hashed`.

    Addresses must be multiples of 8. Waits for the device.
    """
    return [int(value) & ((1 << 64) - 1) for value in launch(sources, targets, hashed=hashed).tolist()]


def launch(sources: Sequence[Tensor], targets: Sequence[Tensor] | None, *, hashed: bool = True) -> Tensor:
    """The same on the current stream, without waiting: int64 [tensors], to be read modulo 2^64."""
    from miles_kernels.checksum import BLOCK_WORDS, GOLDEN, ODD
    from miles_kernels.cuda.checksum_kernels import checksum_blocks

    device = sources[0].device
    blocks = [-(-source.numel() // (8 * BLOCK_WORDS)) for source in sources]
    rows, first = [], 0
    for source, target, count in zip(sources, targets if targets is not None else sources, blocks, strict=True):
        rows.append((source.data_ptr(), target.data_ptr(), source.numel(), first))
        first += count
    found = torch.zeros(len(sources), dtype=torch.int64, device=device)
    if first == 0:
        return found
    table = torch.tensor(rows, dtype=torch.int64).to(device, non_blocking=True)
    owner = torch.repeat_interleave(torch.arange(len(blocks), dtype=torch.int32), torch.tensor(blocks))
    owner = owner.to(device, non_blocking=True)
    align = 16 if all(row[0] % 16 == 0 and row[1] % 16 == 0 for row in rows) else 8
    with torch.cuda.device(device):
        checksum_blocks[(first,)](
            table, owner, found, GOLDEN=GOLDEN, ODD=ODD, BLOCK=BLOCK_WORDS, COPY=targets is not None, HASH=hashed, ALIGN=align,
            num_warps=_WARPS,
        )  # fmt: skip
    return found
