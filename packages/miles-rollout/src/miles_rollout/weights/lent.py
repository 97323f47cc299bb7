"""Tensors read straight from the publisher's GPU memory: one copy, from its weights into the staging area."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from miles_rollout.weights import cudaipc
from miles_rollout.weights.offer import CudaStorage, LentOffer, size_bytes
from miles_rollout.wire import WeightManifest

_opened: dict[tuple[bytes, int], Tensor] = {}
"""Storages of the present publisher, mapped once: mapping costs more than copying a small tensor."""


class Lender:
    """The publisher's end: hands out its tensors, and again without new handles as long as they stay where they are."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[int, CudaStorage]] = {}

    def offer(self, tensors: Sequence[Tensor]) -> LentOffer:
        """Lend contiguous CUDA tensors. Raises ValueError naming the position of one that is not."""
        storages: list[CudaStorage] = []
        numbers: dict[int, int] = {}
        places = []
        for position, tensor in enumerate(tensors):
            if not tensor.is_cuda or not tensor.is_contiguous():
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
        return LentOffer(storages=tuple(storages), places=tuple(places))


class LentSource:
    """The receiver's end: iterates (name, tensor) over the publisher's memory."""

    def __init__(self, manifest: WeightManifest, offer: LentOffer) -> None:
        if len(offer.places) != len(manifest.tensors):
            raise ValueError(f"weight update: {len(offer.places)} places for {len(manifest.tensors)} tensors")
        self._manifest, self._offer = manifest, offer

    def spans(self) -> list[tuple[int, int]]:
        """See `weights.stage.SpanSource`."""
        mapped = self._map()
        bases = [each.data_ptr() for each in mapped]
        return [(bases[number] + offset, size) for number, offset, size in self._places(mapped)]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        mapped = self._map()
        for spec, (number, offset, size) in zip(self._manifest.tensors, self._places(mapped), strict=True):
            data = mapped[number][offset : offset + size]
            yield spec.name, data.view(getattr(torch, spec.dtype)).view(spec.shape)

    def _places(self, mapped: Sequence[Tensor]) -> Iterator[tuple[int, int, int]]:
        limits = [each.numel() for each in mapped]
        for spec, (number, offset) in zip(self._manifest.tensors, self._offer.places, strict=True):
            size = size_bytes(spec)
            if not 0 <= number < len(limits) or not 0 <= offset <= limits[number] - size or offset % 8:
                raise ValueError(f"weight update: {spec.name} lies outside the memory that was lent")
            yield number, offset, size

    def _map(self) -> list[Tensor]:
        wanted = {(each.handle, each.offset_bytes): each for each in self._offer.storages}
        for key in _opened.keys() - wanted.keys():
            del _opened[key]
        for key, each in wanted.items():
            if key not in _opened or _opened[key].numel() != each.size_bytes:
                _opened[key] = cudaipc.open_shared(each)
        return [_opened[each.handle, each.offset_bytes] for each in self._offer.storages]
