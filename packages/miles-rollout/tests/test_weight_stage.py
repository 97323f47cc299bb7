"""One update after the other: what is kept between them carries nothing of one into the next."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from miles_kernels.checksum import tensor_hash
from miles_kernels.mover import IdleMovers, Mover
from miles_rollout.weights import stage as staging
from miles_rollout.weights.offer import layout
from miles_rollout.weights.stage import SpanSource, make_manifest, stage, swap

SHAPES = {"a": (3000, 5), "b": (8,), "empty": (0,), "c": (2, 2, 3)}


class Lying(SpanSource):
    """Tensors where they lie."""

    device = torch.device("cpu")

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def addresses(self) -> tuple[int, ...]:
        return tuple(tensor.data_ptr() for tensor in self.tensors.values())


def drawn() -> dict[str, Tensor]:
    return {name: torch.randn(shape) for name, shape in SHAPES.items()}


@pytest.fixture(autouse=True)
def taken(monkeypatch: pytest.MonkeyPatch) -> set[Mover]:
    """The movers that took part in a test."""
    movers: set[Mover] = set()

    class Counted(IdleMovers):
        def take(self, sizes: tuple[int, ...], device: torch.device, offsets: tuple[int, ...]) -> Mover:
            movers.add(found := super().take(sizes, device, offsets))
            return found

    monkeypatch.setattr(staging, "idle_movers", Counted())
    return movers


def test_the_next_updates_are_other_weights_through_the_same_mover(taken: set[Mover]) -> None:
    held, tensors = drawn(), drawn()
    source = Lying(tensors)
    for version in range(1, 5):
        for tensor in tensors.values():
            tensor.normal_()
        swap(held.items(), stage(make_manifest(tensors.items(), version=version, contract_digest="x"), source))
        assert all(torch.equal(held[name], tensors[name]) for name in SHAPES)
    assert len(taken) == 1
    moved = {name: tensor.clone() for name, tensor in tensors.items()}  # the same model, elsewhere
    moved["b"].add_(1)
    swap(held.items(), stage(make_manifest(moved.items(), version=5, contract_digest="x"), Lying(moved)))
    assert all(torch.equal(held[name], moved[name]) for name in SHAPES) and len(taken) == 1
    more = moved | {"d": torch.randn(7)}
    assert stage(make_manifest(more.items(), version=6, contract_digest="x"), Lying(more)).keys() == more.keys()
    assert len(taken) == 2


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_a_bit_that_flips_is_refused_in_every_update_and_the_next_one_goes_through(name: str) -> None:
    tensors = drawn()
    source = Lying(tensors)
    for version in range(1, 6):
        manifest = make_manifest(tensors.items(), version=version, contract_digest="x")
        assert tensor_hash(stage(manifest, source)[name]) == tensor_hash(tensors[name])
        tensors[name].view(torch.int32).view(-1)[-1] ^= 1 << int(torch.randint(31, ()))
        with pytest.raises(ValueError, match=f"weight update: {name} hashes to"):
            stage(manifest, source)
        with pytest.raises(ValueError, match="hashes to"):  # what the refused one summed does not make up for it
            stage(manifest, source)


def test_two_at_once_do_not_share_a_mover() -> None:
    models = [drawn() for _ in range(2)]
    manifests = [make_manifest(model.items(), version=1, contract_digest="x") for model in models]

    def updates(number: int) -> bool:
        found = [stage(manifests[number], Lying(models[number])) for _ in range(20)]
        return all(torch.equal(each[name], models[number][name]) for each in found for name in SHAPES)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(updates, range(2))) == [True, True]
    movers, where = IdleMovers(), layout(manifests[0])

    def take() -> Mover:
        return movers.take(where.sizes, torch.device("cpu"), where.offsets)

    first, second = take(), take()
    movers.keep(first)
    assert first is not second and take() is first and take() is not first
    movers.keep(first)
    movers.forget()
    assert take() is not first


def test_what_inference_mode_staged_is_no_hindrance_later() -> None:
    tensors = drawn()
    manifest = make_manifest(tensors.items(), version=1, contract_digest="x")
    with torch.inference_mode():
        stage(manifest, Lying(tensors))
    assert tensor_hash(stage(manifest, Lying(tensors))["a"]) == tensor_hash(tensors["a"])
