"""The difference of two versions of a tensor, losslessly and small.

A step of reinforcement learning moves every weight by about the learning rate; by how many bf16 neighbours depends on its size:
large ones stay, small ones move by one, tiny ones by several. Hence:

1. Values are numbered in their order (neighbours differ by one), and the difference of the numbers is taken.
2. Differences are sorted by the exponent of the old value, which the reader has too: like stands beside like.
3. 0, +1 and others are digits of base 3, five to a byte; what the others are follows, in byte planes. zstd compresses both.

Measured beside xor and byte planes in docs/measured/training.md: about a third of their bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from miles_rollout.weights.offer import WIDTHS

CHUNK_BYTES = 16 << 20
LEVEL = 3
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_EXPONENTS = {
    "float64": (52, 0x7FF), "float32": (23, 0xFF), "bfloat16": (7, 0xFF), "float16": (10, 0x1F), "float8_e4m3fn": (3, 0xF),
    "float8_e5m2": (2, 0x1F),
}  # fmt: skip
"""Where the exponent lies: shift, mask."""
_DIGITS = 5
_POWERS = (1, 3, 9, 27, 81)
_HEAD = struct.Struct("<I")


def compressor(level: int = LEVEL) -> Any:
    """A zstd compressor. Raises ImportError naming the extra when the library is missing."""
    return _zstandard().ZstdCompressor(level=level)


def decompressor() -> Any:
    """A zstd decompressor."""
    return _zstandard().ZstdDecompressor()


def encode(old: Tensor, new: Tensor, dtype: str, zstd: Any) -> Iterator[bytes]:
    """Chunks of the difference of two flat uint8 CPU tensors that hold values of `dtype`; nothing when they are equal."""
    if torch.equal(old, new):
        return
    step, kind = chunk_bytes(dtype), _INTEGERS[WIDTHS[dtype]]
    for start in range(0, new.numel(), step):
        a, b = (each[start : start + step].clone().view(kind) for each in (old, new))
        difference = _ordered(b, dtype) - _ordered(a, dtype)
        order = _by_exponent(a, dtype)
        if order is not None:
            difference = difference[order]
        bits = 8 * kind.itemsize - 1
        folded = (difference << 1) ^ (difference >> bits)  # 0, -1, 1, -2, ... become 0, 1, 2, 3, ...
        other = (folded != 0) & (folded != 1)
        rest = folded[other].view(torch.uint8).view(-1, kind.itemsize).t().contiguous()
        first = zstd.compress(_packed((folded != 0).to(torch.uint8) + other.to(torch.uint8)).numpy())
        yield _HEAD.pack(len(first)) + first + zstd.compress(rest.numpy())


def decode(chunk: bytes, base: Tensor, dtype: str, zstd: Any) -> Tensor:
    """The new bytes of one chunk, given the old ones. Raises ValueError when the chunk is no such chunk."""
    kind = _INTEGERS[WIDTHS[dtype]]
    old = base.clone().view(kind)
    try:
        (length,) = _HEAD.unpack_from(chunk)
        first = zstd.decompress(chunk[_HEAD.size : _HEAD.size + length], max_output_size=old.numel() + 1)
        rest = zstd.decompress(chunk[_HEAD.size + length :], max_output_size=base.numel() + 1)
    except (_zstandard().ZstdError, struct.error) as error:
        raise ValueError(f"not a chunk of a delta ({error})") from None
    digits = _unpacked(first, old.numel())
    other = digits == 2
    count = int(other.sum())
    if len(rest) != count * kind.itemsize:
        raise ValueError(f"a chunk with {len(rest)} bytes for {count} values")
    folded = digits.to(kind)
    if count:
        planes = torch.frombuffer(bytearray(rest), dtype=torch.uint8).view(kind.itemsize, -1)
        folded[other] = planes.t().contiguous().view(-1).view(kind)
    difference = ((folded >> 1) & ((1 << (8 * kind.itemsize - 1)) - 1)) ^ -(folded & 1)
    order = _by_exponent(old, dtype)
    if order is not None:
        difference = torch.empty_like(difference).index_copy_(0, order, difference)
    return _ordered(_ordered(old, dtype) + difference, dtype).view(torch.uint8)


def num_chunks(size: int, dtype: str) -> int:
    """Chunks of a changed tensor of `size` bytes."""
    return -(-size // chunk_bytes(dtype))


def chunk_bytes(dtype: str) -> int:
    """Bytes of a whole chunk before compression."""
    return CHUNK_BYTES // WIDTHS[dtype] * WIDTHS[dtype]


def _ordered(values: Tensor, dtype: str) -> Tensor:
    """Signed integers in the order of the floats whose bits `values` are, and back: it is its own inverse."""
    if dtype not in _EXPONENTS:
        return values
    bits = 8 * values.element_size() - 1
    return values ^ ((values >> bits) & ((1 << bits) - 1))


def _by_exponent(values: Tensor, dtype: str) -> Tensor | None:
    """Positions sorted by exponent, those of one exponent in their order; None for integers."""
    if dtype not in _EXPONENTS:
        return None
    shift, mask = _EXPONENTS[dtype]
    return torch.sort(((values >> shift) & mask).to(torch.uint8 if mask < 256 else torch.int16), stable=True)[1]


def _packed(digits: Tensor) -> Tensor:
    """Five digits of base 3 to a byte."""
    padded = torch.zeros(-(-digits.numel() // _DIGITS) * _DIGITS, dtype=torch.uint8)
    padded[: digits.numel()] = digits
    return (padded.view(-1, _DIGITS) * torch.tensor(_POWERS, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def _unpacked(data: bytes, count: int) -> Tensor:
    if len(data) != -(-count // _DIGITS):
        raise ValueError(f"a chunk of {len(data)} packed bytes for {count} values")
    packed = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    if int(packed.max()) >= 3**_DIGITS:
        raise ValueError("a chunk whose digits are not of base 3")
    digits = (packed[:, None] // torch.tensor(_POWERS, dtype=torch.uint8)) % 3
    return digits.view(-1)[:count]


def _zstandard() -> Any:
    from miles_rollout.extras import require

    return require("zstandard", extra="embedded", purpose="weight updates as deltas")
