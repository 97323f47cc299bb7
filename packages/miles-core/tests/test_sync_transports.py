"""Every transport, engines in this process and in another: the same bits arrive, and every fault is named and changes nothing."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor

from miles_core.algorithm.config import AlgorithmConfig
from miles_core.config.sections import SyncConfig
from miles_core.sync.links import HttpLink, Link, LocalLink
from miles_core.sync.publisher import Publisher
from miles_core.sync.transports import (
    BroadcastTransport,
    DiskTransport,
    LentTransport,
    SlotsTransport,
    Transport,
    make_transport,
)  # fmt: skip
from miles_core.trainer.config import OptimizerConfig, TrainerConfig
from miles_core.trainer.fsdp import FsdpTrainer
from miles_kernels.checksum import as_numbers, dtype_name, tensor_hash
from miles_kernels.nn.checkpoint import random_decoder, save_decoder
from miles_kernels.nn.config import DecoderConfig
from miles_rollout.client import RolloutClient
from miles_rollout.engines.embedded import EmbeddedConfig, EmbeddedEngine
from miles_rollout.text import CharTokenizer
from miles_rollout.weights.offer import layout
from miles_rollout.weights.pack import Packer
from miles_rollout.weights.receiver import WeightReceiver
from miles_rollout.weights.shm import folder
from miles_rollout.weights.stage import check_manifest, make_manifest, outline, seal, stage, swap
from miles_rollout.wire import EngineInfo, GenerateRequest, GenerateResult, SamplingParams, WeightManifest

DIGEST = "mk1-aaaaaaaaaaaa"


def tensors(seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shapes: list[tuple[int, ...]] = [(70, 33), (5,), (), (0, 4), (301, 17), (1, 1)]
    found = {f"layer.{i}.weight": torch.randn(shape, generator=draw) for i, shape in enumerate(shapes)}
    found["half"] = torch.randn(333, 3, generator=draw).bfloat16()
    found["rows"] = torch.randn(8, 40, generator=draw).t()
    return found


class Trained:
    """A trainer, as far as publishing goes."""

    class contract:
        digest = DIGEST

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights
        self.num_exports = 0

    def export_weights(self) -> Iterator[tuple[str, Tensor]]:
        self.num_exports += 1
        yield from {name: tensor.clone() for name, tensor in self.weights.items()}.items()


@contextmanager
def flipped_on_the_way(at: int) -> Iterator[None]:
    """Bit 2 of byte `at` of the stream flips between packing and sending, in this process."""
    packed = Packer.windows

    def windows(self: Packer, room: Callable[[int], Tensor]) -> Iterator[tuple[int, Tensor]]:
        for number, window in packed(self, room):
            if number == at // self._size:
                window[at % self._size] ^= 4
            yield number, window

    Packer.windows = windows
    try:
        yield
    finally:
        Packer.windows = packed


class Holder:
    """An engine that holds tensors and updates them as the embedded one does."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.held = {name: tensor.clone() for name, tensor in weights.items()}
        self.version = 0
        self.device = torch.device("cpu")

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.held.items()

    def info(self) -> EngineInfo:
        facts = {"vocab_size": 9, "max_context": 9, "max_running": 9}
        return EngineInfo(model="m", contract_digest=DIGEST, weight_version=self.version, **facts)

    async def update_weights(self, manifest: WeightManifest, given: Iterable[tuple[str, Any]]) -> None:
        shapes = {name: (tuple(t.shape), dtype_name(t.dtype)) for name, t in self.held.items()}
        check_manifest(manifest, shapes, version=self.version, contract_digest=DIGEST)
        swap(self.held.items(), await asyncio.to_thread(stage, manifest, given))
        self.version = manifest.version


def transports(tmp_path: Path) -> dict[str, Callable[[], Transport]]:
    return {
        "shared_memory": lambda: SlotsTransport(bucket_bytes=1000, deadline_s=5),
        "broadcast": lambda: BroadcastTransport(bucket_bytes=1000, deadline_s=10),
        "disk": lambda: DiskTransport(tmp_path / "store", full_every=3),
    }


def same(held: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return held.keys() == wanted.keys() and all(torch.equal(held[name], wanted[name]) for name in held)


def limited(coroutine: Any) -> Any:
    async def run() -> Any:
        async with asyncio.timeout(60):
            return await coroutine

    return asyncio.run(run())


@pytest.mark.parametrize("kind", ["shared_memory", "broadcast", "disk"])
def test_two_engines_end_with_the_trainers_bits_update_after_update(kind: str, tmp_path: Path) -> None:
    async def main() -> None:
        trainer = Trained(tensors(1))
        engines = [Holder(tensors(0)), Holder(tensors(0))]
        links: list[Link] = [LocalLink(engine, f"engine {i}") for i, engine in enumerate(engines)]
        publisher = Publisher(trainer, links, transports(tmp_path)[kind]())
        for version in (1, 2, 5, 6, 7):
            trainer.weights = tensors(version)
            if version == 6:  # little changes, as in a real step
                trainer.weights = {name: tensor.clone() for name, tensor in tensors(5).items()}
                trainer.weights["half"][7] += 1
            await publisher.publish(version)
            assert all(engine.version == version and same(engine.held, trainer.weights) for engine in engines)
        await publisher.close()

    before = {path.name for path in folder().glob("miles-*")}
    limited(main())
    assert {path.name for path in folder().glob("miles-*")} <= before


@pytest.mark.parametrize("kind", ["shared_memory", "broadcast"])
def test_a_flipped_bit_is_refused_by_name_and_the_next_update_works(kind: str, tmp_path: Path) -> None:
    async def main() -> None:
        trainer, engine = Trained(tensors(1)), Holder(tensors(0))
        publisher = Publisher(trainer, [LocalLink(engine)], transports(tmp_path)[kind]())
        where = layout(outline(tensors(1).items(), version=0, contract_digest=""))
        for version, name in ((3, "half"), (4, "layer.4.weight")):
            number = list(tensors(1)).index(name)
            for at in (where.offsets[number], where.offsets[number] + where.sizes[number] - 1):
                message = rf"weight version {version}: engine: .*{name} hashes to .*no engine has taken it"
                with flipped_on_the_way(at), pytest.raises(ValueError, match=message):
                    await publisher.publish(version)
                assert engine.version == 0 and same(engine.held, tensors(0))
        await publisher.publish(4)
        assert engine.version == 4 and same(engine.held, tensors(1))
        await publisher.close()

    limited(main())


def test_an_update_takes_one_pass_over_the_weights_and_notices_when_they_become_others() -> None:
    async def main() -> None:
        trainer, engine = Trained(tensors(1)), Holder(tensors(0))
        publisher = Publisher(trainer, [LocalLink(engine)], SlotsTransport(deadline_s=5))
        for version in (1, 2, 3):
            found = await publisher.publish(version)
            assert found == make_manifest(tensors(1).items(), version=version, contract_digest=DIGEST)
        assert trainer.num_exports == 4, "once for the names, then once each"
        for change, message in (
            (lambda given: given.pop("half"), "gives rows where it gave half before"),
            (lambda given: given.update(half=given["half"].float()), r"half as float32 \[333, 3\], before as bfloat16"),
            (lambda given: given.update(extra=torch.zeros(2)), "gives extra behind all"),
            (lambda given: given.pop("rows"), "gives nothing more where it gave rows"),
        ):
            change(trainer.weights)
            version += 1
            with pytest.raises(ValueError, match=message):
                await publisher.publish(version)
            assert engine.version == version - 1 and same(engine.held, tensors(1))
            trainer.weights = tensors(1)
            await publisher.publish(version)
        await publisher.close()

    limited(main())


def test_an_engine_that_takes_tensors_one_by_one_gets_them_verified() -> None:
    class Plain(Holder):
        async def update_weights(self, manifest: WeightManifest, given: Iterable[tuple[str, Any]]) -> None:
            taken = await asyncio.to_thread(lambda: {name: tensor.clone() for name, tensor in given})
            self.held, self.version = taken, manifest.version

    async def main(transport: Transport) -> None:
        engine = Plain(tensors(0))
        publisher = Publisher(Trained(tensors(1)), [LocalLink(engine)], transport)
        with flipped_on_the_way(0), pytest.raises(ValueError, match="layer.0.weight hashes to"):
            await publisher.publish(1)
        await publisher.publish(2)
        assert engine.version == 2 and same(engine.held, tensors(1))
        await publisher.close()

    for transport in (SlotsTransport(bucket_bytes=1000, deadline_s=5), BroadcastTransport(bucket_bytes=1000, deadline_s=10)):
        limited(main(transport))


def test_a_manifest_without_checksums_needs_a_transport_that_brings_them() -> None:
    given = tensors(1)
    planned = outline(given.items(), version=1, contract_digest=DIGEST)
    with pytest.raises(ValueError, match="states no checksum of layer.0.weight"):
        stage(planned, iter(given.items()))
    assert seal(planned, as_numbers([tensor_hash(t) for t in given.values()])) == make_manifest(
        given.items(), version=1, contract_digest=DIGEST
    )


@pytest.mark.parametrize("kind", ["shared_memory", "broadcast", "disk"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda given: given.pop("half"), "tensors missing: half"),
        (lambda given: given.update(extra=torch.zeros(2)), "tensors unexpected: extra"),
        (lambda given: given.update(renamed=given.pop("half")), "tensors missing: half; tensors unexpected: renamed"),
        (lambda given: given.update(half=given["half"].float()), r"half is float32 \[333, 3\], the engine holds bfloat16"),
    ],
)
def test_other_tensors_than_the_engines_are_refused_by_name(kind: str, change: Any, message: str, tmp_path: Path) -> None:
    async def main() -> None:
        wrong = tensors(1)
        change(wrong)
        trainer, engine = Trained(wrong), Holder(tensors(0))
        publisher = Publisher(trainer, [LocalLink(engine)], transports(tmp_path)[kind]())
        with pytest.raises(ValueError, match=message):
            await publisher.publish(1)
        assert engine.version == 0 and same(engine.held, tensors(0))
        trainer.weights = tensors(2)
        await publisher.publish(2)
        assert same(engine.held, tensors(2))
        await publisher.close()

    limited(main())


def test_one_engine_that_refuses_does_not_stop_the_other_and_the_message_says_who_has_what(tmp_path: Path) -> None:
    async def main(kind: str) -> None:
        other = {name: tensor for name, tensor in tensors(0).items() if name != "half"}
        engines = [Holder(tensors(0)), Holder(other)]
        links: list[Link] = [LocalLink(engine, f"engine {i}") for i, engine in enumerate(engines)]
        publisher = Publisher(Trained(tensors(1)), links, transports(tmp_path)[kind]())
        with pytest.raises(ValueError, match=r"engine 1: .*unexpected: half"):
            await publisher.publish(1)
        assert same(engines[1].held, other)
        await publisher.close()

    limited(main("broadcast"))


def test_a_silent_publisher_and_a_silent_engine_are_named_within_the_deadline() -> None:
    class Mute(SlotsTransport):
        def send(self, *_: object) -> None:
            time.sleep(0.8)

    class Deaf(Holder):
        async def update_weights(self, manifest: WeightManifest, given: Iterable[tuple[str, Any]]) -> None:
            await asyncio.sleep(1.0)
            raise ValueError("woke up")

    async def main() -> None:
        engine = Holder(tensors(0))
        mute = Publisher(Trained(tensors(1)), [LocalLink(engine)], Mute(bucket_bytes=1000, deadline_s=0.3))
        with pytest.raises(TimeoutError, match=r"engine: waited 0.3 s for window 0 of the weight update from the publisher"):
            await mute.publish(1)
        assert engine.version == 0 and same(engine.held, tensors(0))
        deaf = Publisher(Trained(tensors(1)), [LocalLink(Deaf(tensors(0)))], SlotsTransport(bucket_bytes=1000, deadline_s=0.3))
        with pytest.raises(TimeoutError, match=r"waited 0.3 s for receiver 0 of 1 to drain window 1") as caught:
            await deaf.publish(1)
        assert "await_drained" in caught.value.__cause__.stacks
        await mute.close()
        await deaf.close()

    limited(main())


def test_leaving_a_group_does_not_hold_up_the_loop() -> None:
    """gloo waits for a broadcast that is under way, which can take until its deadline."""

    class Busy:
        def __init__(self) -> None:
            self.over = threading.Event()

        def close(self) -> None:
            assert self.over.wait(20), "nothing else could run meanwhile"

    async def main() -> None:
        receiver, transport, groups = WeightReceiver(Holder(tensors(0))), BroadcastTransport(), [Busy(), Busy()]
        receiver._groups["w"], transport._group = groups  # type: ignore[assignment]
        leaving = [asyncio.ensure_future(receiver.leave("w")), asyncio.ensure_future(transport.close())]
        await asyncio.sleep(0.05)
        for group in groups:
            group.over.set()
        assert await asyncio.gather(*leaving) == [True, None]

    limited(main())


# ---------------------------------------------------------------- another process

TOKENIZER = CharTokenizer("abcdefghijklmnopqrst")
SHAPE = DecoderConfig(
    family="qwen3", vocab_size=TOKENIZER.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=64, initializer_range=0.3,
)  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The address of `miles-rollout serve` in a process of its own, and a folder it reads updates from."""
    root = tmp_path_factory.mktemp("served")
    save_decoder(random_decoder(SHAPE, 0), root / "model")
    TOKENIZER.save(root / "model")
    command = [sys.executable, "-m", "miles_rollout.cli", "serve", str(root / "model"), "--port", "0", "--threads", "1"]
    log = (root / "log").open("w")
    process = subprocess.Popen([*command, "--num-pages", "32"], stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        end = time.monotonic() + 60
        while (found := re.search(r"on (http://\S+)", (root / "log").read_text())) is None:
            assert process.poll() is None and time.monotonic() < end, (root / "log").read_text()
            time.sleep(0.05)
        yield found[1], root
    finally:
        process.terminate()
        process.wait(30)
        log.close()


def test_an_engine_in_another_process_takes_every_transport_and_refuses_faults(server: tuple[str, Path]) -> None:
    url, root = server
    trainer = FsdpTrainer(random_decoder(SHAPE, 0), AlgorithmConfig(), TrainerConfig(), OptimizerConfig())
    request = GenerateRequest(request_id="a", input_ids=(5, 6, 7), sampling=SamplingParams(max_new_tokens=6, ignore_eos=True))

    async def expected() -> GenerateResult:
        engine = EmbeddedEngine(deepcopy(trainer.decoder), TOKENIZER, EmbeddedConfig(num_pages=32))
        result = await engine.generate(request)
        await engine.close()
        return result

    async def check(client: RolloutClient, kind: str, make: Callable[[], Transport], version: int) -> None:
        name = f"server over {kind}"
        publisher = Publisher(trainer, [HttpLink(url, name=name)], make())
        for number in (version + 1, version + 2):
            with torch.no_grad():
                for parameter in trainer.decoder.parameters():
                    parameter.mul_(1.25)
            await publisher.publish(number)
            found, wanted = (await client.generate(request)).completions[0], (await expected()).completions[0]
            assert (found.token_ids, found.logprobs) == (wanted.token_ids, wanted.logprobs), kind
            assert {span.version for span in found.weight_spans} == {number}
        if kind != "disk":
            with flipped_on_the_way(1), pytest.raises(ValueError, match=f"{name}: .*embed_tokens.weight hashes to"):
                await publisher.publish(version + 3)
            assert (await client.refresh()).weight_version == version + 2
        await publisher.close()

    async def main() -> None:
        async with RolloutClient(url) as client:
            for number, (kind, make) in enumerate(transports(root).items()):
                await check(client, kind, make, 10 * number)

    limited(main())
    refused = httpx.post(f"{url}/update_weights_from_tensor", json={"serialized_named_tensors": ["gASVAA=="]}, timeout=30)
    assert refused.status_code == 400 and "pickle" in refused.text
    elsewhere = Publisher(trainer, [HttpLink(url)], DiskTransport(root.parent / "elsewhere"))
    with pytest.raises(ValueError, match="leads out of the directories"):
        limited(elsewhere.publish(90))


@pytest.mark.parametrize(
    ("device", "places", "wanted"),
    [
        ("cuda", {"shared_gpu": True, "exports_own": True}, LentTransport),
        ("cuda", {"shared_gpu": True, "exports_own": True, "single_trainer": False}, SlotsTransport),
        ("cuda", {"shared_gpu": True}, SlotsTransport),
        ("cuda", {"shared_gpu": False, "exports_own": True}, BroadcastTransport),
        ("cpu", {"shared_gpu": False, "exports_own": True}, SlotsTransport),
        ("cpu", {"shared_gpu": False, "shared_host": False}, BroadcastTransport),
    ],
)
def test_auto_goes_by_where_the_parts_run(
    device: str, places: dict[str, bool], wanted: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("miles_core.sync.transports._own_gpu", lambda: torch.device("cuda", 0))
    made = make_transport(SyncConfig(), device=device, **{"shared_host": True} | places)  # type: ignore[arg-type]
    assert type(made) is wanted
