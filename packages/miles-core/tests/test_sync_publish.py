"""Publishing to an engine: what arrives is what was stated, and every lie is noticed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from miles_core.sync.inprocess import manifest, publish
from miles_core.trainer.hashing import combined_hash, dtype_name, tensor_hash
from miles_rollout.wire import EngineInfo, WeightManifest


class FakeContract:
    digest = "mk1-aaaaaaaaaaaa"


class FakeTrainer:
    contract = FakeContract()

    def __init__(self) -> None:
        self.fused = torch.randn(12, 6)
        self.alive = 0

    def export_weights(self) -> Iterable[tuple[str, Tensor]]:
        yield "q.weight", self.fused[:4]
        yield "k.weight", self.fused[4:].t()
        yield "norm.weight", torch.ones(6, dtype=torch.bfloat16)


class FakeEngine:
    """Checks like a real one, unless told to lie."""

    def __init__(self, digest: str = "mk1-aaaaaaaaaaaa", deaf: bool = False) -> None:
        self.digest, self.deaf, self.version, self.weights = digest, deaf, 3, {}

    def info(self) -> EngineInfo:
        return EngineInfo(
            model="m", contract_digest=self.digest, weight_version=self.version, vocab_size=9, max_context=9, max_running=9
        )

    async def update_weights(self, stated: WeightManifest, tensors: Iterable[tuple[str, Any]]) -> None:
        staged = {}
        for spec, (name, tensor) in zip(stated.tensors, tensors, strict=True):
            if (name, tensor_hash(tensor), tuple(tensor.shape)) != (spec.name, spec.hash, spec.shape):
                raise ValueError(f"{name}: hash mismatch")
            staged[name] = tensor.clone()
        self.weights = staged
        if not self.deaf:
            self.version = stated.version


def test_the_engine_ends_with_the_trainers_bits() -> None:
    trainer, engine = FakeTrainer(), FakeEngine()
    stated = asyncio.run(publish(trainer, engine, 7))
    assert engine.version == 7 and [spec.dtype for spec in stated.tensors] == ["float32", "float32", "bfloat16"]
    assert all(torch.equal(engine.weights[name], tensor) for name, tensor in trainer.export_weights())


def test_unequal_contracts_versions_and_silent_engines_are_refused() -> None:
    with pytest.raises(ValueError, match=r"disagree on the numeric contract \(mk1-b and mk1-a"):
        asyncio.run(publish(FakeTrainer(), FakeEngine(digest="mk1-b"), 7))
    with pytest.raises(ValueError, match="weight version 3 does not grow: the engine already serves version 3"):
        asyncio.run(publish(FakeTrainer(), FakeEngine(), 3))
    with pytest.raises(ValueError, match="published weight version 7, but the engine states version 3"):
        asyncio.run(publish(FakeTrainer(), FakeEngine(deaf=True), 7))


def test_a_weight_that_changes_between_manifest_and_transfer_is_refused() -> None:
    class Torn(FakeTrainer):
        calls = 0

        def export_weights(self) -> Iterable[tuple[str, Tensor]]:
            self.calls += 1
            if self.calls == 2:
                self.fused[0, 0] += 1
            return super().export_weights()

    engine = FakeEngine()
    with pytest.raises(ValueError, match=r"q.weight: hash mismatch"):
        asyncio.run(publish(Torn(), engine, 7))
    assert engine.version == 3 and engine.weights == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.float8_e4m3fn])
def test_hashes_are_of_the_bytes_in_row_major_order(dtype: torch.dtype) -> None:
    tensor = (torch.randn(5, 8) * 9).to(dtype)
    raw = tensor.view(torch.uint8)
    assert tensor_hash(tensor) == tensor_hash(raw)
    assert tensor_hash(tensor.t()) == tensor_hash(tensor.t().contiguous()) != tensor_hash(tensor)
    assert tensor_hash(tensor[2:]) == tensor_hash(raw[2:].clone())
    assert tensor_hash(tensor[:0]) == tensor_hash(torch.empty(0))
    assert dtype_name(dtype) == str(dtype)[6:]


def test_a_combined_hash_sees_names_shapes_and_bits() -> None:
    a = torch.randn(4, 4)
    base = combined_hash([("a", a)])
    flipped = a.clone()
    flipped.view(torch.int32)[1, 1] ^= 1
    others = [[("b", a)], [("a", a.reshape(2, 8))], [("a", flipped)], [("a", a.view(torch.int32))], [("a", a), ("a", a)]]
    assert base == combined_hash([("a", a.clone())])
    assert len({base, *(combined_hash(other) for other in others)}) == 6


def test_the_manifest_states_the_contract() -> None:
    assert manifest(FakeTrainer(), 4).contract_digest == "mk1-aaaaaaaaaaaa"
