"""Triton kernel of the checksum in `miles_kernels.checksum`, alone or while copying.

One program takes one block of one tensor, so a table of addresses serves any number of tensors in one launch. Sums are of
integers modulo 2^64, and so are the atomic additions: their order does not change a bit.
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
def checksum_blocks(
    table_ptr, owner_ptr, sum_ptr, GOLDEN: tl.constexpr, ODD: tl.constexpr, BLOCK: tl.constexpr, COPY: tl.constexpr,
    HASH: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """sum[t] += mix(block sum + (b + 1) * GOLDEN). table[t] = source and target address, bytes, first block, blocks."""
    program = tl.program_id(0)
    owner = tl.load(owner_ptr + program).to(tl.int64)
    row = table_ptr + owner * 5
    num_bytes = tl.load(row + 2)
    block = program - tl.load(row + 3)
    start = block * BLOCK
    source = tl.load(row).to(tl.pointer_type(tl.uint64))
    target = tl.load(row + 1).to(tl.pointer_type(tl.uint64))
    source = tl.multiple_of(source + start, ALIGN)
    target = tl.multiple_of(target + start, ALIGN)
    left = num_bytes // 8 - start
    j = tl.arange(0, BLOCK)
    golden = tl.full((), GOLDEN, tl.uint64)
    odd = tl.full((), ODD, tl.uint64)
    if left >= BLOCK:  # without a mask, so that 16 bytes move at a time
        word = tl.load(source + j)
        if COPY:
            tl.store(target + j, word)
    else:
        word = tl.load(source + j, mask=j < left, other=0)
        if COPY:
            tl.store(target + j, word, mask=j < left)
    total = tl.full((), 0, tl.uint64)
    if HASH:
        x = (word ^ ((j + 1).to(tl.uint64) * golden)) * odd
        total = tl.sum(tl.where(j < left, x ^ (x >> 32), 0), 0)
    rest = num_bytes % 8
    if (left < BLOCK) & (rest > 0):  # the last bytes of the tensor make a word of their own
        k = tl.arange(0, 8)
        at = left * 8 + k
        byte = tl.load(source.to(tl.pointer_type(tl.uint8)) + at, mask=k < rest, other=0)
        if COPY:
            tl.store(target.to(tl.pointer_type(tl.uint8)) + at, byte, mask=k < rest)
        if HASH:
            last = tl.sum(byte.to(tl.uint64) << (k.to(tl.uint64) * 8), 0)
            y = (last ^ ((left + 1).to(tl.uint64) * golden)) * odd
            total += y ^ (y >> 32)
    if HASH:
        value = _mix(total + (block + 1).to(tl.uint64) * golden)
        tl.atomic_add(sum_ptr + owner, value.to(tl.int64, bitcast=True))
