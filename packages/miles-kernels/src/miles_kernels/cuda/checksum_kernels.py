"""Triton kernel of the checksum in `miles_kernels.checksum`, alone or while copying.

One program takes one block of one stretch. Sums are of integers modulo 2^64, and so are the atomic additions: their order changes
no bit. Whole blocks have a variant without masks: half the registers, 16 bytes at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _mix(x):
    x = (x ^ (x >> 30)) * tl.full((), 0xBF58476D1CE4E5B9, tl.uint64)
    x = (x ^ (x >> 27)) * tl.full((), 0x94D049BB133111EB, tl.uint64)
    return x ^ (x >> 31)


@triton.jit
def _terms(word, j, LOW: tl.constexpr, HIGH: tl.constexpr):
    x = word.to(tl.uint32) + (j + 1).to(tl.uint32) * tl.full((), LOW, tl.uint32)
    y = (word >> 32).to(tl.uint32) + (j + 1).to(tl.uint32) * tl.full((), HIGH, tl.uint32)
    wide = x.to(tl.uint64)
    return wide * y.to(tl.uint64) + ((y.to(tl.uint64) << 32) | wide)


@triton.jit(do_not_specialize=["first"])
def move_blocks(
    block_ptr, first, source_ptr, target_ptr, size_ptr, sum_ptr, GOLDEN: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    BLOCK: tl.constexpr, COPY: tl.constexpr, HASH: tl.constexpr, FULL: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """target = source; sum[t] += mix(block sum + (b + 1) * GOLDEN). block[p] = (t << 32) + b, from p = first on."""
    entry = tl.load(block_ptr + (first + tl.program_id(0)).to(tl.int64))
    owner = entry >> 32
    block = entry & 0xFFFFFFFF
    source = tl.multiple_of(tl.load(source_ptr + owner).to(tl.pointer_type(tl.uint64)) + block * BLOCK, ALIGN)
    target = tl.multiple_of(tl.load(target_ptr + owner).to(tl.pointer_type(tl.uint64)) + block * BLOCK, ALIGN)
    j = tl.arange(0, BLOCK)
    if FULL:
        word = tl.load(source + j)
        if COPY:
            tl.store(target + j, word)
        total = tl.full((), 0, tl.uint64)
        if HASH:
            total = tl.sum(_terms(word, j, LOW, HIGH), 0)
    else:  # the last bytes of a stretch make a word of their own
        left = tl.load(size_ptr + owner) - block * (BLOCK * 8)
        words = left // 8
        rest = left % 8
        k = tl.arange(0, 8)
        byte = tl.load(source.to(tl.pointer_type(tl.uint8)) + words * 8 + k, mask=k < rest, other=0)
        word = tl.load(source + j, mask=j < words, other=0)
        if COPY:
            tl.store(target + j, word, mask=j < words)
            tl.store(target.to(tl.pointer_type(tl.uint8)) + words * 8 + k, byte, mask=k < rest)
        last = tl.sum(byte.to(tl.uint64) << (k.to(tl.uint64) * 8), 0)
        word = tl.where(j == words, last, word)
        total = tl.sum(tl.where(j * 8 < left, _terms(word, j, LOW, HIGH), 0), 0)
    if HASH:
        value = _mix(total + (block + 1).to(tl.uint64) * tl.full((), GOLDEN, tl.uint64))
        tl.atomic_add(sum_ptr + owner, value.to(tl.int64, bitcast=True), sem="relaxed")
