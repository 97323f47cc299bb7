"""Differences of weights: every bit comes back for any bits of any dtype, small steps are small, and damage is refused."""

from __future__ import annotations

import random
import zlib

import pytest
import torch
from torch import Tensor

from miles_rollout.weights import delta
from miles_rollout.weights.offer import WIDTHS


def raw(size: int, seed: int) -> Tensor:
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def there_and_back(old: Tensor, new: Tensor, dtype: str) -> int:
    """Bytes of the encoding; the new bytes must come back from it and the old ones."""
    parts, step, found, total = delta.encode(old, new, dtype, delta.compressor()), delta.chunk_bytes(dtype), [], 0
    for number, chunk in enumerate(parts):
        found.append(delta.decode(chunk, old[number * step : (number + 1) * step], dtype, delta.decompressor()))
        total += len(chunk)
    assert len(found) == delta.num_chunks(new.numel(), dtype) and torch.equal(torch.cat(found), new)
    return total


@pytest.mark.parametrize("dtype", sorted(WIDTHS))
def test_any_bits_come_back(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delta, "CHUNK_BYTES", 4000)
    seed = random.randrange(10**6)
    for count in (1, 4, 5, 6, 1999, 5000):
        old = raw(count * WIDTHS[dtype], seed)
        new = raw(old.numel(), seed + 1)  # NaN, infinities, both zeros, all differences
        new[0] ^= torch.equal(old, new)  # a single byte may be drawn twice; nothing is encoded then
        there_and_back(old, new, dtype)
        few = old.clone()
        few[seed % few.numel()] ^= 0x80
        there_and_back(old, few, dtype)
    assert list(delta.encode(old, old.clone(), dtype, delta.compressor())) == []


def adam_step(lr: float) -> tuple[Tensor, Tensor]:
    """bf16 weights before and after a step that moves every float32 master by about lr."""
    draw = torch.Generator().manual_seed(random.randrange(10**6))
    master = torch.randn(200_000, generator=draw) * 0.02
    after = master - lr * torch.randn(master.shape, generator=draw).clamp(-1, 1)
    return master.bfloat16().view(torch.uint8), after.bfloat16().view(torch.uint8)


@pytest.mark.parametrize(("lr", "bound"), [(1e-6, 0.02), (1e-5, 0.07), (3e-5, 0.12)])
def test_a_step_of_the_size_of_a_learning_rate_is_small(lr: float, bound: float) -> None:
    old, new = adam_step(lr)
    size = there_and_back(old, new, "bfloat16")
    planes = torch.bitwise_xor(old, new).view(-1, 2).t().contiguous()
    assert size < bound * new.numel()
    assert size < 0.75 * len(zlib.compress(planes.numpy().tobytes(), 9)), "smaller than xor in byte planes"


def test_what_is_no_chunk_is_refused() -> None:
    old, new = adam_step(1e-5)
    (chunk,) = delta.encode(old, new, "bfloat16", delta.compressor())
    for wrong in (b"", b"1234", chunk[:-3], chunk[4:], chunk[:4] + chunk[8:], chunk + b"x" * 40):
        try:
            found = delta.decode(wrong, old, "bfloat16", delta.decompressor())
        except ValueError:
            continue
        assert torch.equal(found, new), "accepted with other bits"  # zstd ignores what follows a frame
    with pytest.raises(ValueError, match="packed bytes for"):
        delta.decode(chunk, old[:-20], "bfloat16", delta.decompressor())
