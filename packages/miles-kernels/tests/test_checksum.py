"""The checksum of tensor bytes: against a naive loop over Python integers, and against every small fault."""

from __future__ import annotations

import random
import weakref

import pytest
import torch

from miles_kernels.checksum import BLOCK_BYTES as BLOCK
from miles_kernels.checksum import (
    BLOCK_WORDS,
    GOLDEN,
    HIGH,
    LOW,
    as_hex,
    as_numbers,
    dtype_name,
    finals,
    forget_tables,
    sums_for,
    tensor_hash,
    tensor_hashes,
)  # fmt: skip
from miles_kernels.mover import Mover, copy_hashed, idle_movers

MASK = (1 << 64) - 1


def mix(x: int) -> int:
    """The finalizer of splitmix64, written from its definition."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = ((x ^ x >> shift) * factor) & MASK
    return x ^ x >> 31


def naive(data: bytes) -> str:
    words = [int.from_bytes(data[at : at + 8].ljust(8, b"\0"), "little") for at in range(0, len(data), 8)]
    total = 0
    for block in range(0, len(words), BLOCK_WORDS):
        inner = 0
        for j, word in enumerate(words[block : block + BLOCK_WORDS]):
            x, y = (word % 2**32 + (j + 1) * LOW) % 2**32, (word // 2**32 + (j + 1) * HIGH) % 2**32
            inner += (x + 2**32) * (y + 1) - 2**32
        total += mix((inner + (block // BLOCK_WORDS + 1) * GOLDEN) & MASK)
    return f"{mix((total + len(data) * GOLDEN) & MASK):016x}"


def of(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, BLOCK - 3, BLOCK, BLOCK + 5, 5 * BLOCK + 13, 9 * BLOCK])
def test_equals_a_naive_loop(size: int) -> None:
    data = random.randbytes(size)
    source, target = of(data), torch.empty(size, dtype=torch.uint8)
    assert tensor_hash(source) == naive(data)
    assert copy_hashed([source], [target]) == [naive(data)] and torch.equal(source, target)


def test_any_change_inside_one_word_is_noticed_and_so_are_swaps() -> None:
    tensor = torch.randint(0, 3, (3 * BLOCK_WORDS,), dtype=torch.int64)
    seen = {tensor_hash(tensor)}
    places = [(random.randrange(tensor.numel()), bit) for bit in range(63)]
    for at, bit in places:
        changed = tensor.clone()
        changed[at] ^= 1 << bit
        seen.add(tensor_hash(changed))
    assert len(seen) == 1 + len(set(places))
    for _ in range(50):
        a, b = random.sample(range(tensor.numel()), 2)
        if tensor[a] != tensor[b]:
            changed = tensor.clone()
            changed[a], changed[b] = tensor[b].clone(), tensor[a].clone()
            seen.add(tensor_hash(changed))
    blocks = tensor.view(3, BLOCK_WORDS)[[1, 0, 2]].contiguous()
    longer = torch.cat([tensor, torch.zeros(1, dtype=torch.int64)])
    assert len({tensor_hash(blocks), tensor_hash(longer), tensor_hash(tensor[:-1]), *seen}) == len(seen) + 3


def test_the_bytes_count_in_row_major_order_whatever_the_dtype_and_the_memory() -> None:
    tensor = torch.randn(40, 24)
    assert tensor_hash(tensor.t()) == tensor_hash(tensor.t().contiguous()) != tensor_hash(tensor)
    assert tensor_hash(tensor.view(torch.int32)) == tensor_hash(tensor) == naive(tensor.numpy().tobytes())
    odd = tensor.bfloat16().reshape(-1)[1:]  # its first byte is not at a multiple of 8
    assert tensor_hash(odd) == tensor_hash(odd.clone())
    assert tensor_hashes([tensor, odd]) == [tensor_hash(tensor), tensor_hash(odd)]
    assert dtype_name(torch.bfloat16) == "bfloat16"


@pytest.mark.gpu
def test_cuda_gives_the_digits_of_the_cpu_alone_and_while_copying() -> None:
    tensors = [torch.randn(size).to(dtype) for size in (1, 5, 4099, 1 << 20) for dtype in (torch.float32, torch.bfloat16)]
    there = [tensor.cuda() for tensor in tensors]
    room = [torch.empty_like(tensor) for tensor in there]
    wanted = tensor_hashes(tensors)
    assert tensor_hashes(there) == wanted == copy_hashed(there, room) == tensor_hashes(room)
    assert tensor_hash(there[-1][1:]) == tensor_hash(tensors[-1][1:])


def test_equal_flips_in_two_words_do_not_cancel() -> None:
    """Flips of the same bit in two words of a block, signs above all, are what a sum of words is weak at."""
    tensor = torch.randint(-(2**62), 2**62, (512,), dtype=torch.int64)
    base, missed = tensor_hash(tensor), 0
    for bit in (63, 62, 61, 47, 31, 30, 15, 0):
        for _ in range(60):
            changed = tensor.clone()
            for at in random.sample(range(tensor.numel()), 2):
                changed.view(torch.uint8)[8 * at + bit // 8] ^= 1 << bit % 8
            missed += tensor_hash(changed) == base
    assert missed == 0


def test_torch_and_c_give_the_same_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [of(random.randbytes(size)) for size in (0, 5, BLOCK - 8, BLOCK, 7 * BLOCK + 1)]
    room = [torch.empty_like(tensor) for tensor in tensors]
    wanted = tensor_hashes(tensors)
    monkeypatch.setattr("miles_kernels.mover.native", lambda: None)
    assert tensor_hashes(tensors) == wanted == copy_hashed(tensors, room)
    assert all(torch.equal(a, b) for a, b in zip(tensors, room, strict=True))


def test_checksums_tell_the_sums_they_are_made_of() -> None:
    sums, sizes = torch.randint(-(2**63), 2**63 - 1, (5000,)), torch.randint(0, 2**45, (5000,))
    assert torch.equal(sums_for(finals(sums, sizes), sizes), sums) and torch.equal(finals(sums_for(sums, sizes), sizes), sums)
    known = mix((int(sums[0]) + int(sizes[0]) * GOLDEN) & MASK)
    assert torch.equal(sums_for(as_numbers([f"{known:016x}"]), sizes[:1]), sums[:1])


def test_what_is_expected_is_what_was_moved_and_nothing_else() -> None:
    tensors = [of(random.randbytes(size)) for size in (40, BLOCK, 3 * BLOCK + 3)]
    mover = Mover([each.numel() for each in tensors], "cpu")
    places = mover.places([each.data_ptr() for each in tensors])
    arrived = mover.expecting(as_numbers(tensor_hashes(tensors)))
    assert not arrived()
    mover.move(places)
    assert arrived()
    mover.reset()
    tensors[1][5] ^= 16
    mover.move(places)
    assert not arrived()


def test_places_are_remembered_by_their_addresses() -> None:
    mover = Mover([16, 24], "cpu")
    first = mover.places([16, 32])
    assert mover.places((16, 32)) is first and first.align == 16 and mover.places([16, 40]).align == 8
    for number in range(20):
        assert mover.places([16 * number, 64]).host.tolist() == [16 * number, 64]
    assert len(mover._known) <= 8 and mover.places([16, 32]).host.tolist() == [16, 32]
    for wrong in ([16, 33], [16], [4, 16]):
        with pytest.raises(AssertionError, match="multiples of 8"):
            mover.places(wrong)


def test_windows_of_a_stream_add_up_and_move_only_what_lies_in_them() -> None:
    sizes = [3 * BLOCK + 5, 0, 40, 40, 2 * BLOCK]
    offsets = [0, 4 * BLOCK, 4 * BLOCK, 4 * BLOCK + 256, 5 * BLOCK]
    sources = [of(random.randbytes(size)) for size in sizes]
    stream = torch.zeros(7 * BLOCK, dtype=torch.uint8)
    mover = Mover(sizes, "cpu", offsets)
    source, target = mover.places([each.data_ptr() for each in sources]), mover.places_in(stream.data_ptr())
    cuts = [0, BLOCK, 3 * BLOCK, 5 * BLOCK, 6 * BLOCK, 7 * BLOCK]
    for start, stop in zip(cuts, cuts[1:], strict=False):
        before = stream.clone()
        mover.move(source, target, start=start, stop=stop)
        assert torch.equal(stream[:start], before[:start]) and torch.equal(stream[stop:], before[stop:])
    assert as_hex(mover.checksums()) == tensor_hashes(sources)
    for each, at in zip(sources, offsets, strict=True):
        assert torch.equal(stream[at : at + each.numel()], each)
    mover.reset()
    mover.move(target)
    assert as_hex(mover.checksums()) == tensor_hashes(sources)
    copied = torch.zeros_like(stream)
    mover.reset()
    mover.move(target, mover.places_in(copied.data_ptr()), hashed=False)
    assert torch.equal(copied, stream) and not bool(mover._sums.any())
    with pytest.raises(AssertionError, match="inside a block"):
        mover.move(source, target, start=24, stop=BLOCK)


def test_tables_that_are_forgotten_are_gone() -> None:
    from miles_kernels.cuda import checksum

    made = checksum.tables((70_000, 5), (0, 81_920), torch.device("cpu"))
    assert checksum.tables((70_000, 5), (0, 81_920), torch.device("cpu")) is made
    left = weakref.ref(made)
    del made
    assert left() is not None
    mover = Mover([16], "cpu")
    idle_movers.keep(mover)
    kept = weakref.ref(mover)
    del mover
    assert kept() is not None
    forget_tables()
    assert left() is None and kept() is None
