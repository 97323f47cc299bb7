"""Places in lent memory: the tensors they say, and nothing outside of it. Memory of a CPU stands in for another process' GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from miles_rollout.weights import lent
from miles_rollout.weights.lent import LentSource
from miles_rollout.weights.offer import CudaStorage, LentOffer
from miles_rollout.weights.shm import SharedMemory
from miles_rollout.wire import TensorSpec, WeightManifest

SPECS = (("a", (3, 4)), ("b", (8,)), ("empty", (0,)))
STORAGES = (torch.arange(64, dtype=torch.uint8), torch.arange(100, 148, dtype=torch.uint8))


@pytest.fixture
def seals(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    opened = {(bytes([number]), 0): storage for number, storage in enumerate(STORAGES)}
    monkeypatch.setattr(lent, "_opened", opened)
    memory = SharedMemory.create(8 * len(SPECS))
    yield memory.name
    memory.unlink()


def source(places: tuple[tuple[int, int], ...], seals: str) -> LentSource:
    storages = tuple(
        CudaStorage(
            device_uuid="", handle=bytes([number]), size_bytes=each.nbytes, offset_bytes=0, ref_counter_handle=b"",
            ref_counter_offset=0, event_handle=b"", event_sync_required=False,
        )
        for number, each in enumerate(STORAGES)
    )  # fmt: skip
    tensors = tuple(TensorSpec(name=name, dtype="bfloat16", shape=shape, hash="") for name, shape in SPECS)
    manifest = WeightManifest(version=1, tensors=tensors, contract_digest="x")
    return LentSource(manifest, LentOffer(storages=storages, places=places, seals=seals))


def test_addresses_and_tensors_are_where_the_offer_says(seals: str) -> None:
    lent_source = source(((0, 40), (1, 32), (1, 48)), seals)
    assert lent_source.addresses() == [STORAGES[0].data_ptr() + 40, STORAGES[1].data_ptr() + 32, STORAGES[1].data_ptr() + 48]
    found = dict(lent_source)
    assert found["a"].shape == (3, 4) and torch.equal(found["a"].view(torch.uint8).flatten(), STORAGES[0][40:64])
    assert torch.equal(found["b"].view(torch.uint8), STORAGES[1][32:48])


@pytest.mark.parametrize("place", [(0, 48), (0, -8), (0, 12), (2, 0), (-1, 0), (0, 2**70)])
def test_places_outside_are_refused_by_name(place: tuple[int, int], seals: str) -> None:
    with pytest.raises(ValueError, match="weight update: a lies outside the memory that was lent"):
        source((place, (1, 0), (1, 0)), seals).addresses()
