"""A run's trainer and engine, when they are workers: the same protocols, every call with a deadline."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
from torch import Tensor

from miles_core.cluster.codec import RawTensor, pack_batch, unpack_stats, unpack_tensor
from miles_core.cluster.fleet import Fleet
from miles_core.cluster.worker import EngineAnswer, Peers, PublishTo
from miles_core.trainer.base import StepStats
from miles_core.trainer.batch import TrainBatch
from miles_kernels.contract import Contract
from miles_rollout.client import RolloutClient
from miles_rollout.wire import EngineInfo, GenerateChunk, GenerateRequest, GenerateResult, WeightManifest


class _Info(msgspec.Struct, frozen=True):
    contract: Contract
    num_updates: int


class ClusterTrainer:
    """A `Trainer` whose processes are a fleet. `publish` replaces `export_weights`: weights do not pass through the driver."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._state = self._ask()

    @property
    def contract(self) -> Contract:
        """The workers' numeric contract; all state the same."""
        return self._state.contract

    @property
    def num_updates(self) -> int:
        """Optimizer updates since the first weights."""
        return self._state.num_updates

    def forward_logprobs(self, batch: TrainBatch) -> Tensor:
        """log p [N] fp32 of every trained token."""
        reply = self._fleet.call("forward_logprobs", pack_batch(batch))[0]
        return unpack_tensor(msgspec.msgpack.decode(reply, type=RawTensor))

    def step(self, batch: TrainBatch) -> StepStats:
        """Train on the batch."""
        stats = unpack_stats(self._fleet.call("step", pack_batch(batch))[0])
        self._state = msgspec.structs.replace(self._state, num_updates=self._state.num_updates + stats.num_updates)
        return stats

    def export_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Not from here: the workers publish, see `publish`."""
        raise ValueError("the weights are in worker processes; publish them, or save a checkpoint and read that")

    def publish(self, version: int, peers: Peers) -> WeightManifest:
        """Bring the engines to the present weights."""
        reply = self._fleet.call("publish", msgspec.msgpack.encode(PublishTo(version=version, peers=peers)))[0]
        return msgspec.msgpack.decode(reply, type=WeightManifest)

    def weights_hash(self) -> str:
        """One hash over all weights; every process must give the same."""
        found = set(self._fleet.call("hash"))
        if len(found) != 1:
            raise ValueError(f"{len(self._fleet.handles)} trainer processes hold {len(found)} different sets of weights")
        return found.pop().decode()

    def save(self, directory: Path) -> None:
        """Write weights, optimizer and counters."""
        directory.mkdir(parents=True, exist_ok=True)
        self._fleet.call("save", str(directory.absolute()).encode())

    def load(self, directory: Path) -> None:
        """Read what `save` wrote."""
        self._fleet.call("load", str(directory.absolute()).encode())
        self._state = self._ask()

    def _ask(self) -> _Info:
        answers = [msgspec.msgpack.decode(reply, type=_Info) for reply in self._fleet.call("info")]
        digests = {answer.contract.digest for answer in answers}
        if len(digests) != 1:
            raise ValueError(f"the trainer processes disagree on the numeric contract: {', '.join(sorted(digests))}")
        return answers[0]


class ClusterEngine:
    """An `Engine` that is several servers, asked in turn. Sampling is keyed, so it does not matter which one answers."""

    def __init__(self, fleet: Fleet, token: str | None, *, timeout_s: float, shared_host: bool, shared_gpu: bool) -> None:
        self._fleet = fleet
        answers = [msgspec.msgpack.decode(reply, type=EngineAnswer) for reply in fleet.call("info")]
        self._info = answers[0].engine
        self.peers = Peers(
            urls=tuple(answer.url for answer in answers), names=tuple(handle.name for handle in fleet.handles), token=token,
            shared_host=shared_host, shared_gpu=shared_gpu,
        )  # fmt: skip
        # A whole batch connects at once, to a server that may have little of the processor just then.
        connect_s = min(60.0, timeout_s)
        self._clients = [RolloutClient(url, token, timeout_s=timeout_s, connect_s=connect_s) for url in self.peers.urls]
        self._turn = itertools.count()
        self._where: dict[str, RolloutClient] = {}
        self._watch = threading.Lock()

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        """All completions of one request. Raises WorkerDied naming the engine when that is why it failed."""
        async with self._at_one(request) as client:
            return await client.generate(request)

    async def stream(self, request: GenerateRequest) -> AsyncIterator[GenerateChunk]:
        """The same, token by token."""
        async with self._at_one(request) as client:
            async for chunk in client.stream(request):
                yield chunk

    @asynccontextmanager
    async def _at_one(self, request: GenerateRequest) -> AsyncIterator[RolloutClient]:
        """The server whose turn it is, where the request can be aborted."""
        client = self._clients[next(self._turn) % len(self._clients)]
        self._where[request.request_id] = client
        try:
            yield client
        except Exception:
            await self._name_the_dead()
            raise
        finally:
            self._where.pop(request.request_id, None)

    async def abort(self, request_id: str) -> bool:
        """End a request now."""
        client = self._where.get(request_id)
        return False if client is None else await client.abort(request_id)

    async def update_weights(self, manifest: WeightManifest, tensors: Iterable[tuple[str, Any]]) -> None:
        """Not through the driver: the trainer's workers publish."""
        raise ValueError("weights go from trainer workers to engine workers; use ClusterTrainer.publish")

    def info(self) -> EngineInfo:
        """What the first engine stated last."""
        return self._info

    def published(self, version: int) -> None:
        """Note that all engines serve `version` now."""
        self._info = msgspec.structs.replace(self._info, weight_version=version)

    def metrics(self) -> dict[str, float]:
        """Nothing here; every server has /metrics."""
        return {}

    async def close(self) -> None:
        """Close the connections; the workers belong to the cluster."""
        for client in self._clients:
            await client.close()

    async def _name_the_dead(self) -> None:
        for _ in range(10):  # the connection may break a moment before the process is gone
            with self._watch:
                self._fleet.check()
            await asyncio.sleep(0.05)
