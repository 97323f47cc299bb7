"""Tensors that come one after the other, packed into windows of a stream and summed in the same pass."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from miles_kernels.checksum import aligned
from miles_kernels.mover import Mover
from miles_rollout.weights.offer import WINDOW, Layout


class Packer:
    """Fills windows of `size` bytes, a multiple of `WINDOW`, on `device`: one launch a window, each tensor read once.

    Only the tensors of the present window are held, so an export may make them one at a time.
    """

    def __init__(self, where: Layout, tensors: Iterable[Tensor], size: int, device: torch.device | str) -> None:
        assert size % WINDOW == 0, f"windows of {size} bytes"
        self._where, self._tensors, self._size = where, tensors, size
        self._mover = Mover(where.sizes, device, where.offsets)

    def windows(self, room: Callable[[int], Tensor]) -> Iterator[tuple[int, Tensor]]:
        """(number, filled memory) of every window; `room(number)` gives the memory and may wait for it. Kernels may still run."""
        where, device = self._where, self._mover.device
        given, addresses = iter(self._tensors), torch.zeros(len(where.sizes), dtype=torch.int64)
        held: deque[tuple[int, Tensor]] = deque()
        taken = 0

        def take(until: int) -> int:
            number = taken
            while number < len(where.sizes) and where.offsets[number] < until:
                flat = aligned(next(given)).to(device)
                assert flat.numel() == where.sizes[number], f"{flat.numel()} bytes, the layout has {where.sizes[number]}"
                addresses[number] = flat.data_ptr()
                held.append((where.offsets[number] + where.sizes[number], flat))
                number += 1
            return number

        for number, start in enumerate(range(0, where.total_bytes, self._size)):
            stop = min(start + self._size, where.total_bytes)
            taken = take(stop)
            memory = room(number)
            mover = self._mover
            mover.move(mover.places(addresses), mover.places_in(memory.data_ptr() - start), start=start, stop=stop)
            yield number, memory[: stop - start]
            while held and held[0][0] <= stop:
                held.popleft()
        take(where.total_bytes + 1)  # tensors without bytes at the very end
        assert next(given, None) is None, "more tensors than the layout has"

    def checksums(self) -> Tensor:
        """int64 [n] of what was packed, on the CPU. Waits for the device."""
        return self._mover.checksums()
