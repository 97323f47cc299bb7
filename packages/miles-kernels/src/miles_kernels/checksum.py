"""The checksum of a tensor's bytes that weight updates and records use: 64 bits, the same on every device.

    term   f(w, j) = x * y + y * 2^32 + x,  x = (low half of w) + (j + 1) * LOW mod 2^32,  y the same of the high half and HIGH
    block  S_b     = sum over words j of block b of f(w_j, j)
    hash           = mix(sum over blocks b of mix(S_b + (b + 1) * GOLDEN) + num_bytes * GOLDEN)

Sums are modulo 2^64; words are 8 bytes, little-endian, row-major, the last one padded with zero bytes; blocks are `BLOCK_WORDS`
words; mix is the finalizer of splitmix64 (Steele, Lea, Flood 2014). The products of keyed halves are those of NH (Black, Halevi,
Krawczyk, Krovetz, Rogaway: UMAC, 1999), one multiplication a word on a GPU and on AVX2 alike.

Why this and not a known hash: every term can be computed by itself and integer sums do not depend on their order, so a GPU
computes it at memory speed, inside the kernel that copies the tensor, and gets the same digits as a CPU. f = (x + 2^32)(y + 1) -
2^32, so a change inside one half of a word, that is of one float32 or of two neighbouring bfloat16, is always noticed. Others are
missed with probability about 2^-64, or 2^-31 where a few words change by amounts chosen for it. It guards against faults, not
against forgery.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
LOW = 0x9E3779B1
HIGH = 0x85EBCA77
BLOCK_WORDS = 2048
BLOCK_BYTES = 8 * BLOCK_WORDS
_MASK = (1 << 64) - 1
_HALF = (1 << 32) - 1
_ROWS = 4  # blocks hashed at once in torch on a CPU: the scratch stays in its nearest caches
_DEVICE_ROWS = 1 << 13


def dtype_name(dtype: torch.dtype) -> str:
    """The bare name: "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


def tensor_hash(tensor: Tensor) -> str:
    """Checksum of a tensor's bytes in row-major order, 16 hex digits. Any dtype, any device; dtype and shape do not enter."""
    return tensor_hashes([tensor])[0]


def tensor_hashes(tensors: Sequence[Tensor]) -> list[str]:
    """The checksum of each tensor; those on one CUDA device take one kernel launch together."""
    from miles_kernels.mover import Mover

    flat = [aligned(tensor) for tensor in tensors]
    if not flat:
        return []
    if any(each.device != flat[0].device for each in flat):
        return [tensor_hash(each) for each in flat]
    mover = Mover([each.numel() for each in flat], flat[0].device)
    mover.move(mover.places([each.data_ptr() for each in flat]))
    return as_hex(mover.checksums())


def forget_tables() -> None:
    """Give back the GPU memory that is kept for the next checksums of the same stretches, 8 bytes for each of their blocks."""
    from miles_kernels.cuda import checksum
    from miles_kernels.mover import idle_movers

    idle_movers.forget()
    checksum.tables.cache_clear()


def byte_view(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, row-major, as a flat uint8 tensor; a view when the tensor is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def aligned(tensor: Tensor) -> Tensor:
    """The same, starting at a multiple of 8: a copy where it does not."""
    flat = byte_view(tensor)
    return flat.clone() if flat.data_ptr() % 8 else flat


def finals(sums: Tensor, sizes: Tensor) -> Tensor:
    """The checksums as int64 tensors (to be read modulo 2^64) of sums over blocks and bytes, both int64, on any device."""
    return _mix(sums + sizes * _signed(GOLDEN))


def sums_for(checksums: Tensor, sizes: Tensor) -> Tensor:
    """The other way: the sums over blocks that make these checksums, int64 as they are. There is one for each."""
    return _unmix(checksums) - sizes * _signed(GOLDEN)


def as_numbers(hashes: Sequence[str]) -> Tensor:
    """Checksums in hex as the int64 tensor that `finals` returns."""
    return torch.tensor([_signed(int(each, 16)) for each in hashes], dtype=torch.int64)


def as_hex(numbers: Tensor) -> list[str]:
    """The other way."""
    return [f"{value & _MASK:016x}" for value in numbers.tolist()]


@lru_cache(maxsize=1)
def native() -> Any:
    """The compiled sum over blocks, `mk_checksum` of native/checksum; None without a compiler or on a big-endian machine."""
    from miles_kernels.native import SWITCH
    from miles_kernels.native.build import CHECKSUM, Unavailable, load

    if sys.byteorder != "little" or os.environ.get(SWITCH, "1") in ("0", "off", "false"):
        return None
    try:
        function = load(CHECKSUM, "checksum").mk_checksum
    except Unavailable:
        return None
    function.restype = ctypes.c_uint64
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long, ctypes.c_long]
    return function


def blocks_sum(data: Tensor, first_block: int = 0) -> int:
    """Sum over the blocks of flat bytes, the first of them block `first_block` of its tensor: torch operations, on any device."""
    assert sys.byteorder == "little"
    num_words, rest = divmod(data.numel(), 8)
    if data.numel() and data.data_ptr() % 8:
        data = data.clone()
    words = data[: num_words * 8].view(torch.int64)
    keys = _keys(data.device)
    num_blocks = num_words // BLOCK_WORDS
    blocks = words[: num_blocks * BLOCK_WORDS].view(num_blocks, BLOCK_WORDS)
    rows = _DEVICE_ROWS if data.is_cuda else _ROWS
    room = [torch.empty(min(rows, num_blocks), BLOCK_WORDS, dtype=torch.int64, device=data.device) for _ in range(2)]
    parts = [_terms(blocks[start : start + rows], keys, room).sum(1) for start in range(0, num_blocks, rows)]
    tail = words[num_blocks * BLOCK_WORDS :]
    if rest:
        last = torch.zeros(8, dtype=torch.uint8, device=data.device)
        last[:rest] = data[num_words * 8 :]
        tail = torch.cat([tail, last.view(torch.int64)])
    if tail.numel():
        tail = tail[None]
        parts.append(_terms(tail, keys, [torch.empty_like(tail) for _ in range(2)]).sum(1))
    if not parts:
        return 0
    sums = torch.cat(parts)
    order = torch.arange(first_block + 1, first_block + 1 + sums.numel(), dtype=torch.int64, device=data.device)
    return int(_mix(sums + order * _signed(GOLDEN)).sum()) & _MASK


@lru_cache(maxsize=16)
def _keys(device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):
        j = torch.arange(1, BLOCK_WORDS + 1, dtype=torch.int64, device=device)
        return (j * LOW) & _HALF, (j * HIGH) & _HALF


def _terms(words: Tensor, keys: tuple[Tensor, Tensor], room: Sequence[Tensor]) -> Tensor:
    """f of words [rows, n], into the scratch of `room`. Shifts are arithmetic; the masks cut the copied signs off."""
    x, y = (each[: words.shape[0]] for each in room)
    low, high = (each[: words.shape[1]] for each in keys)
    torch.bitwise_and(words, _HALF, out=x).add_(low).bitwise_and_(_HALF)
    torch.bitwise_right_shift(words, 32, out=y).add_(high).bitwise_and_(_HALF)
    return y.mul_(x + (1 << 32)).add_(x)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _unmix(x: Tensor) -> Tensor:
    """Undoes `_mix`: the multipliers are the inverses of its own modulo 2^64."""
    x = x ^ _shifted(x, 31) ^ _shifted(x, 62)
    x = x * _signed(pow(0x94D049BB133111EB, -1, 1 << 64))
    x = x ^ _shifted(x, 27) ^ _shifted(x, 54)
    x = x * _signed(pow(0xBF58476D1CE4E5B9, -1, 1 << 64))
    return x ^ _shifted(x, 30) ^ _shifted(x, 60)


def _shifted(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x
