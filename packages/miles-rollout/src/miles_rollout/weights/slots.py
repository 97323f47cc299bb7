"""A stream of bytes from one process to others of the same machine, through a few slots that are filled and drained in turn.

Counter 0 says how many windows have been filled, counter 1 that the publisher has given up, counter 2 + r how many windows
receiver r has drained. While receivers copy one slot out, the publisher fills the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor

from miles_kernels.checksum import byte_view
from miles_rollout.waits import wait_until
from miles_rollout.weights import cudaipc
from miles_rollout.weights.offer import HEADER_COUNTERS, Layout, SlotsOffer
from miles_rollout.weights.shm import SharedMemory

FILLED, FAILED, DRAINED = 0, 1, 2


class SlotWriter:
    """The publisher's end; it may be used for many updates, one after the other, between `begin` and `end`."""

    def __init__(
        self, *, slot_bytes: int, num_slots: int, num_receivers: int, device: torch.device | str = "cpu", deadline_s: float = 60.0
    ) -> None:
        if not 1 <= num_receivers <= HEADER_COUNTERS - DRAINED:
            raise ValueError(
                f"{num_receivers} receivers on one machine; the slots have room for 1 to {HEADER_COUNTERS - DRAINED}"
            )
        self.device = torch.device(device)
        self._shape = (num_slots, slot_bytes)
        self._num_receivers = num_receivers
        self._deadline_s = deadline_s
        on_host = self.device.type == "cpu"
        self._memory = SharedMemory.create(num_slots * slot_bytes if on_host else 0)
        flat = self._memory.data() if on_host else torch.empty(num_slots * slot_bytes, dtype=torch.uint8, device=self.device)
        self._slots = flat.view(self._shape)
        self._flat = flat

    def offers(self) -> list[SlotsOffer]:
        """What each receiver is told."""
        return [
            SlotsOffer(
                name=self._memory.name, slot_bytes=self._shape[1], num_slots=self._shape[0], num_receivers=self._num_receivers,
                receiver=receiver, cuda=cudaipc.share(self._flat) if self.device.type == "cuda" else None,
                deadline_s=self._deadline_s,
            )
            for receiver in range(self._num_receivers)
        ]  # fmt: skip

    def begin(self) -> None:
        """Counters to zero. No receiver may be at work."""
        for number in range(DRAINED + self._num_receivers):
            self._memory.set_counter(number, 0)

    def send(self, where: Layout, tensors: Iterable[Tensor], given_up: Callable[[], bool]) -> None:
        """Write the tensors of a layout through the slots and wait until every receiver has drained them."""
        window = _Window(self, given_up)
        for start, size, tensor in zip(where.offsets, where.sizes, tensors, strict=True):
            data = byte_view(tensor)
            assert data.numel() == size, f"{data.numel()} bytes, the layout has {size}"
            window.write(start, data)
        window.finish(where.total_bytes)

    def give_up(self) -> None:
        """Tell receivers that nothing more will come."""
        self._memory.set_counter(FAILED, 1)

    def close(self) -> None:
        """Take the name away. Idempotent."""
        self._memory.unlink()

    def _has_drained(self, receiver: int, number: int) -> bool:
        return self._memory.counter(DRAINED + receiver) >= number

    def await_drained(self, number: int, given_up: Callable[[], bool]) -> None:
        """Wait until every receiver has drained `number` windows."""
        for receiver in range(self._num_receivers):
            wait_until(
                partial(self._has_drained, receiver, number),
                f"receiver {receiver} of {self._num_receivers} to drain window {number} of the weight update",
                self._deadline_s,
                given_up=given_up,
            )


class _Window:
    """The window being filled."""

    def __init__(self, writer: SlotWriter, given_up: Callable[[], bool]) -> None:
        self._writer, self._given_up = writer, given_up
        self._num_slots, self._size = writer._shape
        self._number = 0
        self._open = False

    def write(self, start: int, data: Tensor) -> None:
        at = 0
        while at < data.numel():
            number, inside = divmod(start + at, self._size)
            self._advance(number)
            count = min(data.numel() - at, self._size - inside)
            self._writer._slots[number % self._num_slots][inside : inside + count].copy_(data[at : at + count], non_blocking=True)
            at += count

    def finish(self, total_bytes: int) -> None:
        windows = -(-total_bytes // self._size)
        self._advance(windows)
        self._writer.await_drained(windows, self._given_up)

    def _advance(self, number: int) -> None:
        """Close windows until `number` is the open one, which needs its slot to be drained."""
        if self._open and number == self._number:
            return
        if number > self._number or not self._open:
            if self._writer.device.type == "cuda":
                torch.cuda.current_stream(self._writer.device).synchronize()
            self._writer._memory.set_counter(FILLED, number)
        self._number, self._open = number, True
        self._writer.await_drained(number - self._num_slots + 1, self._given_up)


class SlotSource:
    """The receiver's end of one update: a `StreamSource`."""

    def __init__(self, offer: SlotsOffer) -> None:
        if offer.slot_bytes < 1 or offer.num_slots < 1 or not 0 <= offer.receiver < offer.num_receivers:
            raise ValueError(
                f"weight update: slots {offer.num_slots} x {offer.slot_bytes}, receiver {offer.receiver}: out of range"
            )
        self._offer = offer
        size = offer.num_slots * offer.slot_bytes
        self._memory = SharedMemory.open(offer.name, 0 if offer.cuda else size)
        flat = cudaipc.open_shared(offer.cuda) if offer.cuda else self._memory.data()
        self._slots = flat[:size].view(offer.num_slots, offer.slot_bytes)

    def into(self, stream: Tensor) -> Iterator[int]:
        """See `weights.stage.StreamSource`. Raises WaitExpired when the publisher does not fill the next window in time."""
        offer, memory = self._offer, self._memory
        for number in range(-(-stream.numel() // offer.slot_bytes)):
            wait_until(
                partial(self._is_filled, number),
                f"window {number} of the weight update from the publisher",
                offer.deadline_s,
            )
            if memory.counter(FILLED) <= number:
                raise ValueError(f"weight update: the publisher gave up after {number} windows")
            start = number * offer.slot_bytes
            part = stream[start : start + offer.slot_bytes]
            part.copy_(self._slots[number % offer.num_slots][: part.numel()], non_blocking=True)
            if stream.is_cuda:
                torch.cuda.current_stream(stream.device).synchronize()
            memory.set_counter(DRAINED + offer.receiver, number + 1)
            yield start + part.numel()
        if stream.numel() == 0:
            yield 0

    def _is_filled(self, number: int) -> bool:
        return self._memory.counter(FILLED) > number or self._memory.counter(FAILED) != 0
