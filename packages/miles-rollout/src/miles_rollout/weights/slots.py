"""A stream of bytes from one process to others of the same machine, through a few slots that are filled and drained in turn.

Counter 0 says how many windows have been filled, and one more when the checksums lie behind the slots; counter 1 that the
publisher has given up, counter 2 + r how many windows receiver r has drained. While receivers copy one slot out, the publisher
fills the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor

from miles_rollout.waits import wait_until
from miles_rollout.weights import cudaipc
from miles_rollout.weights.offer import HEADER_COUNTERS, WINDOW, Layout, SlotsOffer, layout, window_bytes
from miles_rollout.weights.pack import Packer
from miles_rollout.weights.shm import SharedMemory
from miles_rollout.weights.stage import stage
from miles_rollout.wire import WeightManifest

FILLED, FAILED, DRAINED = 0, 1, 2


class SlotWriter:
    """The publisher's end; it may be used for many updates, one after the other, between `begin` and `end`."""

    def __init__(
        self, *, slot_bytes: int, num_slots: int, num_receivers: int, num_tensors: int, device: torch.device | str = "cpu",
        deadline_s: float = 60.0,
    ) -> None:  # fmt: skip
        if not 1 <= num_receivers <= HEADER_COUNTERS - DRAINED:
            raise ValueError(
                f"{num_receivers} receivers on one machine; the slots have room for 1 to {HEADER_COUNTERS - DRAINED}"
            )
        self.device = torch.device(device)
        self._shape = (num_slots, window_bytes(slot_bytes))
        self._size = num_slots * self._shape[1]
        self.num_tensors = num_tensors
        self._num_receivers = num_receivers
        self._deadline_s = deadline_s
        on_host = self.device.type == "cpu"
        self._memory = SharedMemory.create((self._size if on_host else 0) + 8 * num_tensors)
        data = self._memory.data()
        self._seals = data[len(data) - 8 * num_tensors :].view(torch.int64)
        self._flat = data[: self._size] if on_host else torch.empty(self._size, dtype=torch.uint8, device=self.device)
        self._slots = self._flat.view(self._shape)

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

    def send(self, where: Layout, tensors: Iterable[Tensor], given_up: Callable[[], bool]) -> Tensor:
        """Write the tensors of a layout through the slots, and wait until every receiver has drained them.

        Returns their checksums, int64 [n], which the receivers find behind the slots.
        """
        packer = Packer(where, tensors, self._shape[1], self.device)
        num_slots, count = self._shape[0], 0

        def room(number: int) -> Tensor:
            self.await_drained(number - num_slots + 1, given_up)
            return self._slots[number % num_slots]

        for number, _ in packer.windows(room):
            if self.device.type == "cuda":
                torch.cuda.current_stream(self.device).synchronize()
            count = number + 1
            self._memory.set_counter(FILLED, count)
        found = packer.checksums()
        self._seals.copy_(found)
        self._memory.set_counter(FILLED, count + 1)
        self.await_drained(count, given_up)
        return found

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


class SlotSource:
    """The receiver's end of one update: a `WindowSource` that is `Sealed`."""

    def __init__(self, manifest: WeightManifest, offer: SlotsOffer) -> None:
        cut = offer.num_slots >= 1 and offer.slot_bytes >= 1 and offer.slot_bytes % WINDOW == 0
        if not cut or not 0 <= offer.receiver < offer.num_receivers:
            raise ValueError(
                f"weight update: slots {offer.num_slots} x {offer.slot_bytes}, receiver {offer.receiver}: out of range"
            )
        self._manifest, self._offer = manifest, offer
        size, seals = offer.num_slots * offer.slot_bytes, 8 * len(manifest.tensors)
        self._memory = SharedMemory.open(offer.name, seals + (0 if offer.cuda else size))
        data = self._memory.data()
        self._seals = data[len(data) - seals :].view(torch.int64)
        flat = cudaipc.open_shared(offer.cuda) if offer.cuda else data
        self._slots = flat[:size].view(offer.num_slots, offer.slot_bytes)
        self._count = -(-layout(manifest).total_bytes // offer.slot_bytes)

    def windows(self) -> Iterator[tuple[int, Tensor]]:
        """See `weights.stage.WindowSource`. Raises WaitExpired when the publisher does not fill the next window in time."""
        offer, total = self._offer, layout(self._manifest).total_bytes
        for number in range(self._count):
            self._await(number, f"window {number} of the weight update from the publisher")
            start = number * offer.slot_bytes
            yield start, self._slots[number % offer.num_slots][: total - start]
            if self._slots.is_cuda:
                torch.cuda.current_stream(self._slots.device).synchronize()
            self._memory.set_counter(DRAINED + offer.receiver, number + 1)

    def seals(self) -> Tensor:
        """See `weights.stage.Sealed`."""
        self._await(self._count, "the checksums of the weight update from the publisher")
        return self._seals.clone()

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """For engines that take tensors one by one: all of them, verified."""
        yield from stage(self._manifest, self).items()

    def _await(self, number: int, what: str) -> None:
        wait_until(partial(self._is_filled, number), what, self._offer.deadline_s)
        if self._memory.counter(FILLED) <= number:
            raise ValueError(f"weight update: the publisher gave up after {self._memory.counter(FILLED)} windows")

    def _is_filled(self, number: int) -> bool:
        return self._memory.counter(FILLED) > number or self._memory.counter(FAILED) != 0
