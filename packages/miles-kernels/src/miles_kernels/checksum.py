"""The checksum of a tensor's bytes that weight updates and records use: 64 bits, the same on every device.

    block sum   S_b = sum over words j of block b of  fold((w_j xor (j + 1) * GOLDEN) * ODD)
    hash            = mix(sum over blocks b of mix(S_b + (b + 1) * GOLDEN) + num_bytes * GOLDEN)

All arithmetic is modulo 2^64; words are 8 bytes, little-endian, row-major, the last one padded with zero bytes; blocks are
`BLOCK_WORDS` words; fold(x) = x xor (x >> 32); mix is the finalizer of splitmix64 (Steele, Lea, Flood 2014).

Why this and not a known hash: every term can be computed by itself and integer sums do not depend on their order, so a GPU
computes it at memory speed, inside the kernel that copies the tensor, and gets the same digits as a CPU. Every step is a
bijection of each word, so a change inside one word is always noticed; others are missed with probability about 2^-64.
It guards against faults, not against forgery.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
ODD = 0xD6E8FEB86659FD93
BLOCK_WORDS = 2048
_MASK = (1 << 64) - 1
_ROWS = 4  # blocks hashed at once on a CPU: the scratch stays in its nearest caches
_DEVICE_ROWS = 1 << 13


def dtype_name(dtype: torch.dtype) -> str:
    """The bare name: "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


def tensor_hash(tensor: Tensor) -> str:
    """Checksum of a tensor's bytes in row-major order, 16 hex digits. Any dtype, any device; dtype and shape do not enter."""
    return tensor_hashes([tensor])[0]


def tensor_hashes(tensors: Sequence[Tensor]) -> list[str]:
    """The checksum of each tensor; those on one CUDA device take one kernel launch together."""
    spans = device_spans(tensors)
    if spans is not None:
        return as_hex(span_hashes(spans, tensors[0].device))
    flat = [byte_view(tensor) for tensor in tensors]
    return _finished(flat, _sums(flat, None))


def device_spans(tensors: Sequence[Tensor]) -> list[tuple[int, int]] | None:
    """(address, bytes) of tensors the kernel can take: contiguous, of one CUDA device, at multiples of 8; else None."""
    if not tensors or not tensors[0].is_cuda:
        return None
    from miles_kernels.cuda import checksum

    device = tensors[0].device
    if not checksum.available() or not all(t.is_contiguous() and t.device == device for t in tensors):
        return None
    spans = [(t.data_ptr(), t.nbytes) for t in tensors]
    return None if any(address % 8 for address, _ in spans) else spans


def span_hashes(spans: Sequence[tuple[int, int]], device: torch.device, into: Sequence[int] | None = None) -> Tensor:
    """The checksums of stretches of a CUDA device's memory, copied to the addresses `into` on the way; see `finals`. Waits."""
    from miles_kernels.cuda import checksum

    rows = [(a, b, size) for (a, size), b in zip(spans, into if into is not None else [a for a, _ in spans], strict=True)]
    found = checksum.launch(rows, device, copy=into is not None)
    return finals(found.cpu(), torch.tensor([size for _, size in spans], dtype=torch.int64))


def copy_spans(pairs: Sequence[tuple[tuple[int, int], tuple[int, int]]], device: torch.device) -> None:
    """Copy (address, bytes) to (address, bytes) of the same device, all in one launch on the current stream."""
    from miles_kernels.cuda import checksum

    assert all(source[1] == target[1] for source, target in pairs)
    checksum.launch([(source[0], target[0], source[1]) for source, target in pairs], device, copy=True, hashed=False)


def triton_available() -> bool:
    """Whether the CUDA kernel can be used at all."""
    from miles_kernels.cuda import checksum

    return checksum.available()


def copy_hashed(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> list[str]:
    """Copy each source over its target (same number of bytes, contiguous) and return the checksums of what was written.

    On a CUDA device, both sides on it, copy and checksum are one kernel over all tensors. Elsewhere the targets are read again.
    """
    flat = [byte_view(tensor) for tensor in sources]
    into = [byte_view(tensor) for tensor in targets]
    for source, target in zip(flat, into, strict=True):
        assert source.numel() == target.numel(), f"{source.numel()} bytes do not fit {target.numel()}"
    return _finished(flat, _sums(flat, into))


def byte_view(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, row-major, as a flat uint8 tensor; a view when the tensor is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def mix(x: int) -> int:
    """The finalizer of splitmix64, a bijection of 64-bit numbers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _sums(flat: Sequence[Tensor], into: Sequence[Tensor] | None) -> list[int]:
    """Sum over blocks of each tensor's bytes, copied to `into` first when that is given."""
    assert sys.byteorder == "little"
    tensors = [*flat, *(into or ())]
    if tensors and all(tensor.is_cuda and tensor.device == flat[0].device for tensor in tensors):
        from miles_kernels.cuda import checksum

        if checksum.available() and all(tensor.data_ptr() % 8 == 0 for tensor in tensors):
            return checksum.sums(flat, into)
    if into is not None:
        for source, target in zip(flat, into, strict=True):
            target.copy_(source)
        flat = into
    return [_sum_of(tensor) for tensor in flat]


def finals(sums: Tensor, sizes: Tensor) -> Tensor:
    """The checksums as int64 tensors (to be read modulo 2^64) of sums over blocks and bytes, both int64 on the CPU."""
    return _mix(sums + sizes * _signed(GOLDEN))


def as_numbers(hashes: Sequence[str]) -> Tensor:
    """Checksums in hex as the int64 tensor that `finals` returns."""
    return torch.tensor([_signed(int(each, 16)) for each in hashes], dtype=torch.int64)


def as_hex(numbers: Tensor) -> list[str]:
    """The other way."""
    return [f"{value & _MASK:016x}" for value in numbers.tolist()]


def _finished(flat: Sequence[Tensor], sums: Iterable[int]) -> list[str]:
    return [f"{mix((total + each.numel() * GOLDEN) & _MASK):016x}" for each, total in zip(flat, sums, strict=True)]


def _sum_of(data: Tensor) -> int:
    """The torch formulation, on any device: whole blocks some rows at a time, then what is left."""
    num_words, rest = divmod(data.numel(), 8)
    if data.data_ptr() % 8 and data.numel():
        data = data.clone()
    words = data[: num_words * 8].view(torch.int64)
    if rest:
        last = torch.zeros(8, dtype=torch.uint8, device=data.device)
        last[:rest] = data[num_words * 8 :]
    keys = _keys(data.device)
    num_blocks = num_words // BLOCK_WORDS
    blocks = words[: num_blocks * BLOCK_WORDS].view(num_blocks, BLOCK_WORDS)
    rows = _DEVICE_ROWS if data.is_cuda else _ROWS
    room = [torch.empty(min(rows, num_blocks), BLOCK_WORDS, dtype=torch.int64, device=data.device) for _ in range(2)]
    parts = [_terms(blocks[start : start + rows], keys, room).sum(1) for start in range(0, num_blocks, rows)]
    tail = words[num_blocks * BLOCK_WORDS :]
    if rest:
        tail = torch.cat([tail, last.view(torch.int64)])
    if tail.numel():
        tail = tail[None]
        parts.append(_terms(tail, keys[: tail.shape[1]], [torch.empty_like(tail) for _ in range(2)]).sum(1))
    if not parts:
        return 0
    sums = torch.cat(parts)
    order = torch.arange(1, sums.numel() + 1, dtype=torch.int64, device=data.device) * _signed(GOLDEN)
    return int(_mix(sums + order).sum()) & _MASK


@lru_cache(maxsize=16)
def _keys(device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.arange(1, BLOCK_WORDS + 1, dtype=torch.int64, device=device) * _signed(GOLDEN)


def _terms(words: Tensor, keys: Tensor, room: Sequence[Tensor]) -> Tensor:
    """fold((w xor key) * ODD), into the scratch of `room`."""
    out, high = (each[: words.shape[0]] for each in room)
    torch.bitwise_xor(words, keys, out=out)
    out.mul_(_signed(ODD))
    torch.bitwise_right_shift(out, 32, out=high)
    return out.bitwise_xor_(high.bitwise_and_(0xFFFFFFFF))  # the shift is arithmetic, so the copied signs are cut off


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x
