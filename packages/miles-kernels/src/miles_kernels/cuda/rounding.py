"""Stochastic rounding on CUDA in one pass."""

from __future__ import annotations

from torch import Tensor

from miles_kernels.cuda.launch import at_home, cdiv

BLOCK = 1024


@at_home
def round_by_chance(wide: Tensor, out: Tensor, first: int, starts: tuple[int, int]) -> Tensor:
    """Write `wide` fp32 into `out` bfloat16, both contiguous and of one size, rounded up with the probability of what is cut.

    `first` is the number of the first element; `starts` (int64) are what the two rounds of SplitMix64's finaliser add to one.
    Raises ValueError for tensors that do not fit.
    """
    from miles_kernels.cuda.rounding_kernels import round_by_chance as kernel

    if not (wide.is_contiguous() and out.is_contiguous() and wide.numel() == out.numel()):
        raise ValueError(f"rounding wants contiguous tensors of one size, got {tuple(wide.shape)} and {tuple(out.shape)}")
    if wide.numel():
        kernel[(cdiv(wide.numel(), BLOCK),)](wide, out, wide.numel(), first, *starts, BLOCK=BLOCK, num_warps=4)
    return out
