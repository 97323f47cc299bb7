"""Places in lent memory: the tensors they say, and nothing outside of it. Memory of a CPU stands in for another process' GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from miles_kernels.checksum import as_hex, tensor_hash
from miles_rollout.weights import lent
from miles_rollout.weights.lent import Lender, LentSource
from miles_rollout.weights.offer import CudaStorage, LentOffer
from miles_rollout.weights.shm import SharedMemory
from miles_rollout.wire import TensorSpec, WeightManifest

SPECS = (("a", (3, 4)), ("b", (8,)), ("empty", (0,)))
STORAGES = (torch.arange(64, dtype=torch.uint8), torch.arange(100, 148, dtype=torch.uint8))


@pytest.fixture
def seals(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(lent, "_LAST", [])
    monkeypatch.setattr(lent.cudaipc, "open_shared", opening)
    memory = SharedMemory.create(8 * len(SPECS))
    OPENED.clear()
    yield memory.name
    memory.unlink()


OPENED: list[int] = []


def opening(shared: CudaStorage) -> torch.Tensor:
    OPENED.append(shared.handle[0])
    return STORAGES[shared.handle[0]]


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
    wanted = [STORAGES[0].data_ptr() + 40, STORAGES[1].data_ptr() + 32, STORAGES[1].data_ptr() + 48]
    assert list(lent_source.addresses()) == wanted
    found = dict(lent_source)
    assert found["a"].shape == (3, 4) and torch.equal(found["a"].view(torch.uint8).flatten(), STORAGES[0][40:64])
    assert torch.equal(found["b"].view(torch.uint8), STORAGES[1][32:48])


@pytest.mark.parametrize("place", [(0, 48), (0, -8), (0, 12), (2, 0), (-1, 0), (0, 2**70)])
def test_places_outside_are_refused_by_name(place: tuple[int, int], seals: str) -> None:
    with pytest.raises(ValueError, match="weight update: a lies outside the memory that was lent"):
        source((place, (1, 0), (1, 0)), seals)


def test_memory_is_mapped_once_and_places_may_move(seals: str) -> None:
    first = source(((0, 40), (1, 32), (1, 48)), seals)
    again = source(((0, 40), (1, 32), (1, 48)), seals)
    assert OPENED == [0, 1] and again.addresses() is first.addresses()
    moved = source(((0, 32), (1, 32), (1, 48)), seals)
    assert OPENED == [0, 1] and moved.addresses()[0] == STORAGES[0].data_ptr() + 32
    assert first.addresses()[0] == STORAGES[0].data_ptr() + 40  # an update at work keeps its own


# ---- the publisher's end


class OnGpu:
    """A tensor of the CPU that says it lies on a GPU."""

    is_cuda = True

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.device, self.nbytes = tensor, tensor.device, tensor.nbytes

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensor, name)


class Driver:
    """What the publisher asks of CUDA."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shared: list[int] = []
        self.freed = 0
        stats = lambda device: {"segment": {"all": {"freed": self.freed}}}  # noqa: E731
        monkeypatch.setattr(lent.torch.cuda, "memory_stats_as_nested_dict", stats)
        monkeypatch.setattr(lent.torch.cuda, "current_stream", lambda device: self)
        monkeypatch.setattr(lent.cudaipc, "share", self.share)

    def synchronize(self) -> None:
        pass

    def share(self, tensor: Any) -> CudaStorage:
        self.shared.append(tensor.untyped_storage().data_ptr())
        return CudaStorage(
            device_uuid="", handle=bytes([len(self.shared)]), size_bytes=tensor.untyped_storage().nbytes(), offset_bytes=0,
            ref_counter_handle=b"", ref_counter_offset=0, event_handle=b"", event_sync_required=False,
        )  # fmt: skip


def test_what_has_not_moved_is_lent_without_new_handles(monkeypatch: pytest.MonkeyPatch) -> None:
    driver, lender = Driver(monkeypatch), Lender()
    whole, alone = torch.randn(16, 8), torch.randn(5)
    tensors = [OnGpu(whole[:4]), OnGpu(whole[4:]), OnGpu(alone)]

    def lend() -> LentOffer:
        offer = lender.offer(tensors)  # type: ignore[arg-type]
        assert as_hex(lender.seal()) == [tensor_hash(each.tensor) for each in tensors]
        return offer

    first = lend()
    assert [number for number, _ in first.places] == [0, 0, 1] and first.places[1][1] == whole[:4].nbytes
    whole.add_(1)  # the next step
    assert lend() is first and len(driver.shared) == 2
    driver.freed += 1  # the trainer slept: the same addresses, perhaps other memory
    later = lend()
    assert len(driver.shared) == 4 and later.places == first.places and later.storages != first.storages
    tensors[2] = OnGpu(torch.randn(5))
    assert len(lend().storages) == 2 and driver.shared[4:] == [tensors[2].tensor.data_ptr()]
    lender.close()
    lend()
    assert len(driver.shared) == 7  # nothing of before is relied upon
    lender.close()
    with pytest.raises(ValueError, match="tensor 1 is not a contiguous CUDA tensor"):
        lender.offer([OnGpu(alone), OnGpu(whole.t())])  # type: ignore[list-item]
