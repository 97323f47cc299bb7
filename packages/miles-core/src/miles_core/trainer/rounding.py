"""Stochastic rounding to bfloat16 with noise that is a function of a key and an element's number."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_NOISE_CHUNK = 1 << 22


def round_by_chance(wide: Tensor, key: int, first: int = 0, into: Tensor | None = None) -> Tensor:
    """`wide` fp32 rounded to bfloat16, up with the probability of the share that is cut off (stochastic rounding).

    The noise of an element is a function of `key` and its number (`first` for the first one), so cutting a tensor changes
    nothing. Values stay exact where bfloat16 holds them. Writes to `into`, contiguous, if given. One kernel on CUDA.
    """
    out = torch.empty(wide.shape, dtype=torch.bfloat16, device=wide.device) if into is None else into
    if wide.is_cuda and _kernel_rounds(wide.device):
        _round_on_cuda(wide, key, first, out)
    else:
        _round_plainly(wide, key, first, out)
    return out


def _round_plainly(wide: Tensor, key: int, first: int, out: Tensor) -> None:
    flat, target = wide.reshape(-1), out.view(-1)
    for start in range(0, flat.numel(), _NOISE_CHUNK):
        part = flat[start : start + _NOISE_CHUNK]
        noise = _noise(key, first + start, part.numel(), part.device)
        raised = (part.view(torch.int32) + noise) & -65536
        target[start : start + _NOISE_CHUNK] = raised.view(torch.float32).to(torch.bfloat16)


def _round_on_cuda(wide: Tensor, key: int, first: int, out: Tensor) -> None:
    from miles_kernels.cuda.rounding import round_by_chance as in_one_kernel

    in_one_kernel(wide.contiguous(), out, first, (_start(key), _start(0)))


@functools.cache
def _kernel_rounds(device: torch.device) -> bool:
    """Whether the kernel has the bits of torch's operations on this device: tried once per process before it serves."""
    wide = torch.linspace(-3.0, 3.0, 5003, device=device).exp()
    for key, first in ((3 << 32 | 1, 0), (2**64 - 9, 2**33 + 7)):
        want, got = (torch.zeros(wide.shape, dtype=torch.bfloat16, device=device) for _ in range(2))
        _round_plainly(wide, key, first, want)
        try:
            _round_on_cuda(wide, key, first, got)
        except (RuntimeError, ImportError, OSError, AttributeError):
            return False
        if not torch.equal(want, got):
            return False
    return True


def _noise(key: int, first: int, count: int, device: torch.device) -> Tensor:
    """int32 [count] in 0 .. 65535: the finaliser of SplitMix64 (Steele, Lea & Flood 2014) of key and number."""
    x = torch.arange(first, first + count, dtype=torch.int64, device=device)
    for salt in (key, 0):
        x = x + _start(salt)
        x = (x ^ ((x >> 30) & (1 << 34) - 1)) * _signed(0xBF58476D1CE4E5B9)
        x = (x ^ ((x >> 27) & (1 << 37) - 1)) * _signed(0x94D049BB133111EB)
        x = x ^ ((x >> 31) & (1 << 33) - 1)
    return ((x >> 16) & 0xFFFF).to(torch.int32)


def _start(salt: int) -> int:
    """What a round adds to the number of an element, int64."""
    return _signed(salt * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15)


def _signed(value: int) -> int:
    """The low 64 bits as torch's int64."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value
