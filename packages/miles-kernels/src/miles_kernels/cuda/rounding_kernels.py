"""Triton kernel of stochastic rounding."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["first", "start_0", "start_1"])
def round_by_chance(wide_ptr, out_ptr, count, first, start_0, start_1, BLOCK: tl.constexpr):
    """bfloat16 of fp32 [count]: 16 bits of noise are added below the cut. Two rounds of SplitMix64's finaliser on the number
    of the element; `start_0` and `start_1` are what each round adds first, int64 that wraps."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    bits = tl.load(wide_ptr + at, mask=mask, other=0.0).to(tl.int32, bitcast=True)
    x = at + first.to(tl.int64)
    for turn in tl.static_range(2):
        x += (start_1 if turn else start_0).to(tl.int64)
        x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
        x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685  # 0x94D049BB133111EB
        x = x ^ ((x >> 31) & 0x1FFFFFFFF)
    raised = (bits + ((x >> 16) & 0xFFFF).to(tl.int32)) & -65536
    tl.store(out_ptr + at, raised.to(tl.float32, bitcast=True).to(out_ptr.dtype.element_ty), mask=mask)
