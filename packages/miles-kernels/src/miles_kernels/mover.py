"""Copies and checksums of many stretches of memory at once, in one kernel launch on a GPU: what a weight update is made of.

The stretches (tensors of a model) have fixed sizes and fixed places in one stream of bytes; a window of the stream is moved at a
time. Sources and targets are addresses, because at a few microseconds a tensor torch's own views would take longer than the copy.
A byte is read once: what is copied is also what is summed.
"""

from __future__ import annotations

import ctypes
import threading
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from miles_kernels.checksum import BLOCK_BYTES, aligned, as_hex, blocks_sum, byte_view, finals, native, sums_for


@dataclass(frozen=True)
class Places:
    """An address for every stretch, where the mover can use them."""

    host: Tensor
    """int64 [n] on the CPU."""
    device: Tensor
    """The same on the mover's device."""
    align: int
    """16 where all of them are multiples of 16, else 8: how wide a kernel loads."""


_PLACES_KEPT = 8


class Mover:
    """Moves stretches of `sizes` bytes, each at its place of a stream, and sums their blocks (`miles_kernels.checksum`).

    `offsets` are their places in the stream, ascending and not overlapping; one after the other when left out. Windows that cut a
    stretch must cut it at a multiple of `BLOCK_BYTES` from its start. All memory is of `device`, starts at multiples of 8, and
    is kept alive by the caller. Nothing waits for the device but `checksums`.

    Example: mover = Mover([a.nbytes], a.device); mover.move(mover.places([a.data_ptr()])); mover.checksums()
    """

    def __init__(self, sizes: Sequence[int], device: torch.device | str, offsets: Sequence[int] | None = None) -> None:
        self.device = torch.device(device)
        self.sizes = tuple(sizes)
        self.offsets = tuple(offsets) if offsets is not None else _one_after_the_other(self.sizes)
        assert len(self.offsets) == len(self.sizes), f"{len(self.offsets)} offsets for {len(self.sizes)} sizes"
        self._stop = self.offsets[-1] + self.sizes[-1] if self.sizes else 0
        self._cuda: Any = None
        if self.device.type == "cuda":
            from miles_kernels.cuda import checksum

            if checksum.available() and checksum.proven(self.device):
                self._cuda = checksum.tables(self.sizes, self.offsets, self.device)
        self._sums = torch.zeros(len(self.sizes), dtype=torch.int64, device=self.device if self._cuda else "cpu")
        self._bytes = torch.tensor(self.sizes, dtype=torch.int64)
        self._offsets = self._cuda.offsets if self._cuda else torch.tensor(self.offsets, dtype=torch.int64)
        self._offsets_align = _align(self._offsets)
        self._known: dict[tuple[int, ...] | int, Places] = {}
        """By addresses, or by the beginning of a stream."""

    def places(self, addresses: Sequence[int] | Tensor) -> Places:
        """Where every stretch lies now; reusable for as long as that is so. Addresses of stretches not moved may be anything.

        Those of a sequence are remembered: asked for again, nothing travels to the device.
        """
        if isinstance(addresses, Tensor):
            return self._places(addresses)
        key = tuple(addresses)
        return self._known.get(key) or self._kept(key, self._places(torch.tensor(key, dtype=torch.int64)))

    def places_in(self, base: int) -> Places:
        """Where they lie in a stream that begins at address `base`."""
        if self._cuda is None:
            return self._places(self._offsets + base)
        if base not in self._known:
            assert base % 8 == 0, "a stream at a multiple of 8"
            align = min(self._offsets_align, 8 if base % 16 else 16)
            self._kept(base, Places(self._offsets + base, self._cuda.offsets_there + base, align))  # nothing travels
        return self._known[base]

    def move(
        self, source: Places, target: Places | None = None, *, start: int = 0, stop: int | None = None, hashed: bool = True
    ) -> None:
        """Copy to `target`, where given, and sum what lies in bytes [start, stop) of the stream (default: all of it)."""
        stop = self._stop if stop is None else stop
        if self._cuda is not None:
            into, align = (None, source.align) if target is None else (target.device, min(source.align, target.align))
            self._cuda.launch(source.device, into, self._sums if hashed else None, start, stop, align)
            return
        first = max(0, bisect_right(self.offsets, start) - 1)
        for number in range(first, len(self.sizes)):
            begin = self.offsets[number]
            if begin >= stop:
                break
            a, b = max(start, begin), min(stop, begin + self.sizes[number])
            if a < b:
                self._move_one(number, a - begin, b - a, source, target, hashed)

    def checksums(self) -> Tensor:
        """int64 [n] on the CPU, of all that was moved since this object was made or `reset`. Waits for the device."""
        return finals(self._sums.cpu(), self._bytes)

    def expecting(self, checksums: Tensor) -> Callable[[], bool]:
        """Whether all that was moved has these checksums, int64 [n] on the CPU: a question to be asked later, which then
        waits for the device and does little else."""
        wanted = sums_for(checksums, self._bytes)
        return lambda: torch.equal(self._sums.cpu(), wanted)

    def reset(self) -> None:
        """Sums to zero."""
        self._sums.zero_()

    def _places(self, host: Tensor) -> Places:
        align = _align(host)
        assert host.shape == self._bytes.shape and align >= 8, "an address for each, at multiples of 8"
        return Places(host, host.to(self.device, non_blocking=True) if self._cuda else host, align)

    def _kept(self, key: tuple[int, ...] | int, places: Places) -> Places:
        if len(self._known) >= _PLACES_KEPT:
            self._known.clear()
        self._known[key] = places
        return places

    def _move_one(self, number: int, at: int, size: int, source: Places, target: Places | None, hashed: bool) -> None:
        """Bytes [at, at + size) of one stretch without the kernel; the target is read again, so that it is what is summed."""
        assert at % BLOCK_BYTES == 0, f"a window begins {at} bytes into a tensor, which is inside a block"
        block = at // BLOCK_BYTES
        from_ = int(source.host[number]) + at
        into = None if target is None else int(target.host[number]) + at
        function = native() if self.device.type == "cpu" and hashed else None
        if function is not None:
            found = function(from_, into, size, block)
        else:
            data = _view(from_, size, self.device)
            if into is not None:
                data = _view(into, size, self.device).copy_(data)
            found = blocks_sum(data, block) if hashed else 0
        self._sums[number] += found - (1 << 64) if found >> 63 else found


class IdleMovers:
    """Movers of what was moved last, for the next time: their tables and places serve again. One in use is nobody else's."""

    def __init__(self, most: int = 2) -> None:
        self._idle: list[Mover] = []
        self._most = most
        self._lock = threading.Lock()

    def take(self, sizes: tuple[int, ...], device: torch.device, offsets: tuple[int, ...]) -> Mover:
        """One with sums of zero."""
        with self._lock:
            for mover in self._idle:
                if mover.device == device and mover.sizes == sizes and mover.offsets == offsets:
                    self._idle.remove(mover)
                    mover.reset()
                    return mover
        with torch.inference_mode(False):  # its sums are written by whoever takes it next
            return Mover(sizes, device, offsets)

    def keep(self, mover: Mover) -> None:
        """For the next time."""
        with self._lock:
            self._idle = [*self._idle, mover][-self._most :]

    def forget(self) -> None:
        """Let go of all of them, and of the memory of their devices."""
        with self._lock:
            self._idle = []


idle_movers = IdleMovers()


def copy_hashed(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> list[str]:
    """Copy each source over its target (same bytes, contiguous, of any devices): the checksums of what was written, in hex."""
    flat, into = [aligned(tensor) for tensor in sources], [byte_view(tensor) for tensor in targets]
    for source, target in zip(flat, into, strict=True):
        assert source.numel() == target.numel(), f"{source.numel()} bytes do not fit {target.numel()}"
    if not into:
        return []
    device = into[0].device
    assert all(target.device == device and target.data_ptr() % 8 == 0 for target in into), "targets of one device, aligned"
    flat = [source.to(device) for source in flat]
    mover = Mover([target.numel() for target in into], device)
    mover.move(mover.places([each.data_ptr() for each in flat]), mover.places([each.data_ptr() for each in into]))
    return as_hex(mover.checksums())


def _align(places: Tensor) -> int:
    """The largest of 16, 8 and 1 that divides all of int64 [n]."""
    rest = places & 15
    return 16 if not bool(rest.any()) else 8 if not bool((rest & 7).any()) else 1


class _CudaMemory:
    """GPU memory as torch takes it from others (the CUDA array interface, version 2)."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (address, False), "version": 2}


def _view(address: int, size: int, device: torch.device) -> Tensor:
    """Memory at an address as flat uint8; nothing keeps it alive."""
    if device.type == "cuda":
        return torch.as_tensor(_CudaMemory(address, size), device=device)
    return torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=torch.uint8)


def _one_after_the_other(sizes: Sequence[int]) -> tuple[int, ...]:
    """Offsets that leave every stretch whole blocks, so that any window at a multiple of a block cuts well."""
    offsets, at = [], 0
    for size in sizes:
        offsets.append(at)
        at += -(-size // BLOCK_BYTES) * BLOCK_BYTES
    return tuple(offsets)
