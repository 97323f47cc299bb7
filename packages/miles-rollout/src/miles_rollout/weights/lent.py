"""Tensors read straight from the publisher's GPU memory: one copy, from its weights into the staging area.

While the engine is told and copies, the publisher sums its own weights; the checksums follow through a file of shared memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from miles_kernels.mover import Mover
from miles_rollout.waits import wait_until
from miles_rollout.weights import cudaipc
from miles_rollout.weights.offer import CudaStorage, LentOffer, layout, size_bytes
from miles_rollout.weights.shm import SharedMemory
from miles_rollout.wire import WeightManifest

_opened: dict[tuple[bytes, int], Tensor] = {}
"""Storages of the present publisher, mapped once: mapping costs more than copying a small tensor."""
_SEALED, _FAILED = 0, 1
"""Counters: checksums are there, none will come."""


class Lender:
    """The publisher's end: hands out its tensors, and again without new handles as long as they stay where they are."""

    def __init__(self, deadline_s: float = 60.0) -> None:
        self._known: dict[int, tuple[int, CudaStorage]] = {}
        self._deadline_s = deadline_s
        self._mover: Mover | None = None
        self._memory: SharedMemory | None = None

    def offer(self, tensors: Sequence[Tensor]) -> LentOffer:
        """Lend contiguous CUDA tensors and begin to sum them. Raises ValueError naming the position of one that is not."""
        storages: list[CudaStorage] = []
        numbers: dict[int, int] = {}
        places = []
        for position, tensor in enumerate(tensors):
            if not tensor.is_cuda or not tensor.is_contiguous() or tensor.data_ptr() % 8:
                raise ValueError(f"tensor {position} is not a contiguous CUDA tensor and cannot be lent; use sync.kind cuda_ipc")
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
        torch.cuda.current_stream(tensors[0].device).synchronize()  # what the trainer wrote is there
        memory = self._sealing(tensors)
        return LentOffer(storages=tuple(storages), places=tuple(places), seals=memory.name, deadline_s=self._deadline_s)

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
        if self._memory is not None:
            self._memory.unlink()
            self._memory = None

    def _sealing(self, tensors: Sequence[Tensor]) -> SharedMemory:
        if self._memory is None or self._memory.data().numel() != 8 * len(tensors):
            self.close()
            self._memory = SharedMemory.create(8 * len(tensors))
        self._memory.set_counter(_SEALED, 0)
        self._memory.set_counter(_FAILED, 0)
        self._mover = Mover([tensor.nbytes for tensor in tensors], tensors[0].device)
        self._mover.move(self._mover.places([tensor.data_ptr() for tensor in tensors]))
        return self._memory


class LentSource:
    """The receiver's end: a `SpanSource` that is `Sealed`; iterates (name, tensor) over the publisher's memory as well."""

    def __init__(self, manifest: WeightManifest, offer: LentOffer) -> None:
        if len(offer.places) != len(manifest.tensors) or not offer.places:
            raise ValueError(f"weight update: {len(offer.places)} places for {len(manifest.tensors)} tensors")
        self._manifest, self._offer = manifest, offer
        self._memory = SharedMemory.open(offer.seals, 8 * len(manifest.tensors))
        self._mapped = self._map()
        self.device = self._mapped[0].device

    def addresses(self) -> list[int]:
        """See `weights.stage.SpanSource`."""
        lent = [(each.data_ptr(), each.numel()) for each in self._mapped]
        found = []
        for position, ((number, offset), size) in enumerate(zip(self._offer.places, layout(self._manifest).sizes, strict=True)):
            base, limit = lent[number] if 0 <= number < len(lent) else (0, -1)
            if not 0 <= offset <= limit - size or offset % 8:
                name = self._manifest.tensors[position].name
                raise ValueError(f"weight update: {name} lies outside the memory that was lent")
            found.append(base + offset)
        return found

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
        self.addresses()  # all of them are inside
        for spec, (number, offset) in zip(self._manifest.tensors, self._offer.places, strict=True):
            data = self._mapped[number][offset : offset + size_bytes(spec)]
            yield spec.name, data.view(getattr(torch, spec.dtype)).view(spec.shape)

    def _map(self) -> list[Tensor]:
        wanted = {(each.handle, each.offset_bytes): each for each in self._offer.storages}
        for key in _opened.keys() - wanted.keys():
            del _opened[key]
        for key, each in wanted.items():
            if key not in _opened or _opened[key].numel() != each.size_bytes:
                _opened[key] = cudaipc.open_shared(each)
        return [_opened[each.handle, each.offset_bytes] for each in self._offer.storages]
