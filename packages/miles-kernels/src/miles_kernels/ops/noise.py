"""Standard Gumbel noise as a hash of (seed, sample id, absolute position, id of a token or of a block of tokens); no generator.

Legend: B = rows, V = vocabulary, K = ids per row.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from miles_kernels.native import library

# Odd constants of SplitMix64's finaliser (Steele, Lea, Flood 2014) and of 32-bit finalisers in the style of MurmurHash3.
# The last of each is only added: a finaliser maps 0 to 0, so seed 0, sample 0, token 0 must not start there.
_WIDE = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0x9E3779B97F4A7C15, 0xD1342543DE82EF95, 0x243F6A8885A308D3)
_NARROW = (0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35, 0x27D4EB2F, 0x13198A2F)


class _Constants(NamedTuple):
    """Hash constants as 0-dim tensors: a Python scalar costs each small op a conversion, more than the op itself."""

    wide: tuple[Tensor, ...]
    narrow: tuple[Tensor, ...]
    shift: dict[tuple[torch.dtype, int], tuple[Tensor, Tensor]]
    """(dtype, s) -> s, and the mask that makes an arithmetic right shift by s a logical one."""


@functools.lru_cache(maxsize=8)
def _constants(device: torch.device) -> _Constants:
    def signed(values: tuple[int, ...], bits: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return tuple(torch.tensor(v - (1 << bits) if v >> (bits - 1) else v, dtype=dtype, device=device) for v in values)

    shifts = [(torch.int64, 64, s) for s in (30, 27, 31)] + [(torch.int32, 32, s) for s in (16, 15, 13)]
    table = {
        (dtype, s): (torch.tensor(s, dtype=dtype, device=device), torch.tensor((1 << (bits - s)) - 1, dtype=dtype, device=device))
        for dtype, bits, s in shifts
    }
    return _Constants(signed(_WIDE, 64, torch.int64), signed(_NARROW, 32, torch.int32), table)


def _xor_shift(x: Tensor, shift: int, constants: _Constants, out: Tensor | None = None) -> Tensor:
    """x ^= x >>> shift, in place."""
    by, mask = constants.shift[x.dtype, shift]
    return x.bitwise_xor_(torch.bitwise_right_shift(x, by, out=out).bitwise_and_(mask))


def _mix64(x: Tensor, constants: _Constants) -> Tensor:
    """SplitMix64's finaliser on int64 (wrapping) values, in place."""
    _xor_shift(x, 30, constants).mul_(constants.wide[0])
    _xor_shift(x, 27, constants).mul_(constants.wide[1])
    return _xor_shift(x, 31, constants)


def row_keys(seed: Tensor | int, sample_id: Tensor, position: Tensor) -> Tensor:
    """Two int32 keys of each row, [B, 2]. Multiples of the golden ratio keep (seed, id) pairs apart before the first mix."""
    constants = _constants(sample_id.device)
    sample_id, position = sample_id.to(torch.int64), position.to(torch.int64)
    if not isinstance(seed, Tensor):
        seed = torch.tensor(seed, dtype=torch.int64, device=sample_id.device)
    state = _mix64((seed * constants.wide[2] + sample_id).add_(constants.wide[4]), constants)
    return _mix64(state + position * constants.wide[3], constants).view(torch.int32).view(-1, 2)


def _token_bits(token_ids: Tensor) -> Tensor:
    """First, unkeyed round of the hash of int32 token ids: the same for every row."""
    constants = _constants(token_ids.device)
    return _xor_shift((token_ids * constants.narrow[0]).add_(constants.narrow[4]), 16, constants)


@functools.lru_cache(maxsize=8)
def _vocab_ids(vocab: int, device: torch.device) -> Tensor:
    """Every token id, int32 [1, V]."""
    return torch.arange(vocab, dtype=torch.int32, device=device)[None]


@functools.lru_cache(maxsize=8)
def block_ids(num_blocks: int, device: torch.device) -> Tensor:
    """Noise ids of the blocks, int32 [1, num_blocks]: -1, -2, .."""
    return ~_vocab_ids(num_blocks, device)


@functools.lru_cache(maxsize=8)
def _vocab_bits(vocab: int, device: torch.device) -> Tensor:
    """`_token_bits` of the whole vocabulary [1, V]."""
    return _token_bits(_vocab_ids(vocab, device))


def gumbel(keys: Tensor, token_ids: Tensor | int) -> Tensor:
    """Gumbel noise fp32 of int32 token ids [B, K], or of the whole vocabulary (its size given), under row keys [B, 2].

    Keyed rounds of a 32-bit finaliser give 32 bits k; v = (k + 0.5) / 2^32, -log1p(-v) is exponential, its -log is Gumbel.
    Small v, which make the large values that win, keep their full resolution.
    """
    kernels = None if keys.device.type != "cpu" else library()
    if kernels is not None:
        return kernels.gumbel(keys, _vocab_ids(token_ids, keys.device) if isinstance(token_ids, int) else token_ids)
    constants = _constants(keys.device)
    token_bits = _vocab_bits(token_ids, keys.device) if isinstance(token_ids, int) else _token_bits(token_ids)
    bits = torch.bitwise_xor(token_bits, keys[:, :1])
    spare = torch.empty_like(bits)
    _xor_shift(bits.mul_(constants.narrow[1]), 15, constants, spare).add_(keys[:, 1:])
    _xor_shift(bits.mul_(constants.narrow[2]), 13, constants, spare)
    _xor_shift(bits.mul_(constants.narrow[3]), 16, constants, spare)
    minus_v = bits.view(torch.uint32).to(torch.float32).add_(0.5).mul_(-(2.0**-32)).clamp_(min=2.0**-24 - 1)
    return minus_v.log1p_().abs_().log_().neg_()


def keyed_gumbel(seed: Tensor | int, sample_id: Tensor, position: Tensor, vocab: int) -> Tensor:
    """Standard Gumbel noise [B, V] fp32 of every token for each row's (seed, sample id, position), int64 [B] each.

    `sample` uses the part of it that belongs to the block it drew by `keyed_block_gumbel`.
    """
    return gumbel(row_keys(seed, sample_id, position), vocab)


def keyed_block_gumbel(seed: Tensor | int, sample_id: Tensor, position: Tensor, num_blocks: int) -> Tensor:
    """The same for blocks of `BLOCK` tokens [B, num_blocks]: block b has the noise of id -1 - b, which no token has."""
    return gumbel(row_keys(seed, sample_id, position), block_ids(num_blocks, sample_id.device))
