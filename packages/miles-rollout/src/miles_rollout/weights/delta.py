"""The difference of two versions of a tensor, losslessly: xor, sorted into byte planes, compressed with zstd.

A step of reinforcement learning changes few bf16 values, and those in their lowest bits: xor leaves mostly zeros, and the low
bytes of all elements side by side compress far better than mixed with the high ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

CHUNK_BYTES = 16 << 20
LEVEL = 3


def compressor(level: int = LEVEL) -> Any:
    """A zstd compressor. Raises ImportError naming the extra when the library is missing."""
    return _zstandard().ZstdCompressor(level=level)


def decompressor() -> Any:
    """A zstd decompressor."""
    return _zstandard().ZstdDecompressor()


def encode(old: Tensor, new: Tensor, width: int, zstd: Any) -> Iterator[bytes]:
    """Compressed chunks of old xor new, flat uint8 CPU tensors of elements of `width` bytes; nothing when they are equal."""
    if torch.equal(old, new):
        return
    step = CHUNK_BYTES // width * width
    for start in range(0, new.numel(), step):
        changed = torch.bitwise_xor(old[start : start + step], new[start : start + step])
        yield zstd.compress(changed.view(-1, width).t().contiguous().numpy())


def decode(chunk: bytes, base: Tensor, width: int, zstd: Any) -> Tensor:
    """The new bytes of one chunk, given the old ones. Raises ValueError when the chunk is no such chunk."""
    try:
        plain = zstd.decompress(chunk, max_output_size=base.numel())
    except _zstandard().ZstdError as error:
        raise ValueError(f"not a chunk of a delta ({error})") from None
    if len(plain) != base.numel():
        raise ValueError(f"a chunk of {len(plain)} bytes for {base.numel()}")
    changed = torch.frombuffer(bytearray(plain), dtype=torch.uint8).view(width, -1).t().reshape(-1)
    return torch.bitwise_xor(base, changed)


def num_chunks(size: int, width: int) -> int:
    """Chunks of a changed tensor of `size` bytes."""
    return -(-size // (CHUNK_BYTES // width * width))


def chunk_bytes(width: int) -> int:
    """Bytes of a whole chunk before compression."""
    return CHUNK_BYTES // width * width


def _zstandard() -> Any:
    from miles_rollout.extras import require

    return require("zstandard", extra="embedded", purpose="weight updates as deltas")
