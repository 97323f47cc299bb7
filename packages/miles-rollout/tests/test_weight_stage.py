"""One update after the other: what is kept between them carries nothing of one into the next."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from miles_kernels.checksum import tensor_hash
from miles_kernels.mover import Mover
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
def _none_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "_MOVERS", staging._Movers())


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Mover]:
    """The movers made during a test."""
    movers: list[Mover] = []

    class Counted(Mover):
        def __init__(self, *args: object) -> None:
            movers.append(self)
            super().__init__(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(staging, "Mover", Counted)
    return movers


def test_the_next_updates_are_other_weights_through_the_same_mover(made: list[Mover]) -> None:
    held, tensors = drawn(), drawn()
    source = Lying(tensors)
    for version in range(1, 5):
        for tensor in tensors.values():
            tensor.normal_()
        swap(held.items(), stage(make_manifest(tensors.items(), version=version, contract_digest="x"), source))
        assert all(torch.equal(held[name], tensors[name]) for name in SHAPES)
    assert len(made) == 1
    moved = {name: tensor.clone() for name, tensor in tensors.items()}  # the same model, elsewhere
    moved["b"].add_(1)
    swap(held.items(), stage(make_manifest(moved.items(), version=5, contract_digest="x"), Lying(moved)))
    assert all(torch.equal(held[name], moved[name]) for name in SHAPES) and len(made) == 1
    more = moved | {"d": torch.randn(7)}
    assert stage(make_manifest(more.items(), version=6, contract_digest="x"), Lying(more)).keys() == more.keys()
    assert len(made) == 2


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


def test_two_at_once_do_not_share_a_mover(made: list[Mover]) -> None:
    models = [drawn() for _ in range(2)]
    manifests = [make_manifest(model.items(), version=1, contract_digest="x") for model in models]

    def updates(number: int) -> bool:
        found = [stage(manifests[number], Lying(models[number])) for _ in range(20)]
        return all(torch.equal(each[name], models[number][name]) for each in found for name in SHAPES)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(updates, range(2))) == [True, True]
    movers = staging._Movers()
    where, cpu = layout(manifests[0]), torch.device("cpu")
    first, second = movers.take(where, cpu), movers.take(where, cpu)
    movers.keep(first)
    assert first is not second and movers.take(where, cpu) is first and movers.take(where, cpu) is not first


def test_what_inference_mode_staged_is_no_hindrance_later() -> None:
    tensors = drawn()
    manifest = make_manifest(tensors.items(), version=1, contract_digest="x")
    with torch.inference_mode():
        stage(manifest, Lying(tensors))
    assert tensor_hash(stage(manifest, Lying(tensors))["a"]) == tensor_hash(tensors["a"])
