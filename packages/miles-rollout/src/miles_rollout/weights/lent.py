"""Tensors read straight from the publisher's GPU memory: one copy, from its weights into the staging area.

While the engine is told and copies, the publisher sums its own weights; the checksums follow through a file of shared memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from miles_kernels.mover import Mover, Places
from miles_rollout.waits import wait_until
from miles_rollout.weights import cudaipc
from miles_rollout.weights.offer import CudaStorage, LentOffer, layout, size_bytes
from miles_rollout.weights.shm import SharedMemory
from miles_rollout.weights.stage import SpanSource
from miles_rollout.wire import WeightManifest

_SEALED, _FAILED = 0, 1
"""Counters: checksums are there, none will come."""


class Lender:
    """The publisher's end: hands out its tensors, and again without new handles as long as they stay where they are."""

    def __init__(self, deadline_s: float = 60.0) -> None:
        self._deadline_s = deadline_s
        self._lent: tuple[list[tuple[int, int]], int] | None = None
        """Addresses and sizes of the tensors of `_offer`, and how often the device had been given memory back then."""
        self._offer: LentOffer | None = None
        self._known: dict[int, tuple[int, CudaStorage]] = {}
        self._mover: Mover | None = None
        self._places: Places | None = None
        self._memory: SharedMemory | None = None

    def offer(self, tensors: Sequence[Tensor]) -> LentOffer:
        """Lend contiguous CUDA tensors and begin to sum them. Raises ValueError naming the position of one that is not."""
        where = [(tensor.data_ptr(), tensor.nbytes) for tensor in tensors]
        for position, (tensor, (address, _)) in enumerate(zip(tensors, where, strict=True)):
            if not tensor.is_cuda or not tensor.is_contiguous() or address % 8:
                raise ValueError(f"tensor {position} is not a contiguous CUDA tensor and cannot be lent; use sync.kind cuda_ipc")
        now = (where, _segments_freed(tensors[0].device))
        if self._offer is None or now != self._lent:
            if self._lent is None or now[1] != self._lent[1]:
                self._known.clear()  # what is at an address now need not be what a handle of then leads to
            self._offer, self._lent = self._described(tensors), now
            self._mover = Mover([size for _, size in where], tensors[0].device)
            self._places = self._mover.places([address for address, _ in where])
        torch.cuda.current_stream(tensors[0].device).synchronize()  # what the trainer wrote is there
        assert self._mover is not None and self._places is not None and self._memory is not None
        self._memory.set_counter(_SEALED, 0)
        self._memory.set_counter(_FAILED, 0)
        self._mover.reset()
        self._mover.move(self._places)
        return self._offer

    def seal(self) -> Tensor:
        """Wait for the sums and hand them to the receivers; int64 [n]."""
        assert self._mover is not None and self._memory is not None
        found = self._mover.checksums()
        self._memory.data().view(torch.int64).copy_(found)
        self._memory.set_counter(_SEALED, 1)
        return found

    def give_up(self) -> None:
        """Tell receivers that no checksums will come."""
        if self._memory is not None:
            self._memory.set_counter(_FAILED, 1)

    def close(self) -> None:
        """Take the file's name away. Idempotent."""
        self._offer = self._lent = None
        if self._memory is not None:
            self._memory.unlink()
            self._memory = None

    def _described(self, tensors: Sequence[Tensor]) -> LentOffer:
        """Where the tensors lie, and a file for their checksums."""
        storages: list[CudaStorage] = []
        numbers: dict[int, int] = {}
        places = []
        for tensor in tensors:
            storage = tensor.untyped_storage()
            base = storage.data_ptr()
            if base not in numbers:
                size, shared = self._known.get(base, (-1, None))
                if shared is None or size != storage.nbytes():
                    shared = cudaipc.share(tensor)
                    self._known[base] = (storage.nbytes(), shared)
                numbers[base] = len(storages)
                storages.append(shared)
            places.append((numbers[base], tensor.data_ptr() - base))
        if self._memory is None or self._memory.data().numel() != 8 * len(tensors):
            self.close()
            self._memory = SharedMemory.create(8 * len(tensors))
        return LentOffer(storages=tuple(storages), places=tuple(places), seals=self._memory.name, deadline_s=self._deadline_s)


def _segments_freed(device: torch.device) -> int:
    """How many stretches of memory torch has given back to the driver: other ones may lie at their addresses since."""
    return int(torch.cuda.memory_stats_as_nested_dict(device)["segment"]["all"]["freed"])


@dataclass(frozen=True, eq=False)
class _Loan:
    """The memory of one offer, mapped, and the addresses in it: mapping costs more than copying a small tensor."""

    storages: tuple[CudaStorage, ...]
    places: tuple[tuple[int, int], ...]
    sizes: tuple[int, ...]
    mapped: tuple[Tensor, ...]
    """Flat uint8, one per storage."""
    addresses: tuple[int, ...]
    """One per tensor of the manifest."""

    @classmethod
    def of(cls, offer: LentOffer, manifest: WeightManifest, last: _Loan | None) -> _Loan:
        """The last one if the offer is that of last time. Raises ValueError naming a tensor outside the memory that was lent."""
        sizes = layout(manifest).sizes
        if last is not None and (last.places, last.sizes, last.storages) == (offer.places, sizes, offer.storages):
            return last
        held = {} if last is None else {_key(each): flat for each, flat in zip(last.storages, last.mapped, strict=True)}
        mapped = []
        for each in offer.storages:
            flat = held.get(_key(each))
            mapped.append(cudaipc.open_shared(each) if flat is None else flat)
        lent = [(each.data_ptr(), each.numel()) for each in mapped]
        found = []
        for position, ((number, offset), size) in enumerate(zip(offer.places, sizes, strict=True)):
            base, limit = lent[number] if 0 <= number < len(lent) else (0, -1)
            if not 0 <= offset <= limit - size or offset % 8:
                raise ValueError(f"weight update: {manifest.tensors[position].name} lies outside the memory that was lent")
            found.append(base + offset)
        return cls(offer.storages, offer.places, sizes, tuple(mapped), tuple(found))


def _key(storage: CudaStorage) -> tuple[bytes, int, int]:
    return storage.handle, storage.offset_bytes, storage.size_bytes


_LAST: list[_Loan] = []
"""Of the present publisher."""


class LentSource(SpanSource):
    """The receiver's end: a `SpanSource` that is `Sealed`; iterates (name, tensor) over the publisher's memory as well."""

    def __init__(self, manifest: WeightManifest, offer: LentOffer) -> None:
        if len(offer.places) != len(manifest.tensors) or not offer.places:
            raise ValueError(f"weight update: {len(offer.places)} places for {len(manifest.tensors)} tensors")
        self._manifest, self._offer = manifest, offer
        self._memory = SharedMemory.open(offer.seals, 8 * len(manifest.tensors))
        self._loan = _Loan.of(offer, manifest, _LAST[0] if _LAST else None)
        _LAST[:] = [self._loan]
        self.device = self._loan.mapped[0].device

    def addresses(self) -> tuple[int, ...]:
        """See `weights.stage.SpanSource`."""
        return self._loan.addresses

    def seals(self) -> Tensor:
        """See `weights.stage.Sealed`."""
        wait_until(
            lambda: self._memory.counter(_SEALED) != 0 or self._memory.counter(_FAILED) != 0,
            "the checksums of the weight update from the publisher",
            self._offer.deadline_s,
        )
        if self._memory.counter(_SEALED) == 0:
            raise ValueError("weight update: the publisher gave up before it had summed its weights")
        return self._memory.data().view(torch.int64).clone()

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for spec, (number, offset) in zip(self._manifest.tensors, self._offer.places, strict=True):
            data = self._loan.mapped[number][offset : offset + size_bytes(spec)]
            yield spec.name, data.view(getattr(torch, spec.dtype)).view(spec.shape)
