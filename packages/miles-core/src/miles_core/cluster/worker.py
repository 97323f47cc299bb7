"""What runs in a worker process, whoever started it: a trainer among its peers, or an engine behind HTTP.

A worker answers `call(method, payload)`: bytes in, bytes out, one call at a time.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import msgspec

from miles_core.cluster.codec import pack_batch, pack_stats, pack_tensor, unpack_batch
from miles_core.config.schema import RunConfig
from miles_rollout.wire import EngineInfo

__all__ = ["Build", "EngineWorker", "Peers", "PublishTo", "TrainerWorker", "make_worker", "pack_batch"]

OWN_HOST = "127.0.0.1"


class Build(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker is to be. `config` is the run's configuration as JSON."""

    role: Literal["trainer", "engine"]
    config: str
    mode: Literal["train", "sft", "rollout"] = "train"
    rank: int = 0
    size: int = 1
    master: str = OWN_HOST
    port: int = 0
    """Where the trainers meet; unused when there is one."""
    token: str | None = None
    """Admin token of an engine's server."""
    host: str = OWN_HOST
    """The address an engine listens on."""
    deadline_s: float = 600.0


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """How a run brings its weights to a service."""

    offset: int
    """Added to the run's versions there."""
    folder: str
    """Where they are written."""


class Peers(msgspec.Struct, frozen=True, kw_only=True):
    """Engines a trainer publishes to."""

    urls: tuple[str, ...]
    names: tuple[str, ...]
    token: str | None
    shared_host: bool
    """Whether all engines run on the trainer's machine."""
    shared_gpu: bool = False
    service: Served | None = None
    """The engine is the configuration's service."""


class PublishTo(msgspec.Struct, frozen=True, kw_only=True):
    """One update."""

    version: int
    peers: Peers


def make_worker(build: Build) -> TrainerWorker | EngineWorker:
    """Load model and all; takes seconds. Raises ValueError as a run of one process would."""
    return TrainerWorker(build) if build.role == "trainer" else EngineWorker(build)


def _prepare(config: RunConfig) -> None:
    from miles_core.models import use_threads
    from miles_kernels.env import prepare_process

    prepare_process()
    use_threads(config.run.threads)


class TrainerWorker:
    """One process of the trainer. All of them get the same calls; the first one publishes."""

    def __init__(self, build: Build) -> None:
        from miles_core.compose import make_trainer
        from miles_core.draft.build import load_draft, with_draft
        from miles_core.models import load_model

        self._build = build
        config = RunConfig.model_validate_json(build.config)
        self._config = config
        _prepare(config)
        if build.size > 1:
            self._meet(config.model.device)
        model = load_model(config, lambda line: None)
        draft = load_draft(config, model.decoder)  # of the whole policy, before it is cut
        trainer = make_trainer(config, build.mode, model.decoder)
        self._trainer: Any = trainer if draft is None else with_draft(trainer, config, draft)
        self._runner = asyncio.Runner()
        self._publisher: Any = None
        self._published = False

    def call(self, method: str, payload: bytes) -> bytes:
        """Do one thing. Raises ValueError for a method this worker does not know."""
        methods: dict[str, Callable[[bytes], bytes]] = {
            "info": self._info, "step": self._step, "forward_logprobs": self._forward, "publish": self._publish,
            "save": self._save, "load": self._load, "hash": self._hash,
        }  # fmt: skip
        if method not in methods:
            raise ValueError(f"a trainer does not know {method!r}; it knows {', '.join(methods)}")
        return methods[method](payload)

    def close(self) -> None:
        """Leave peers and engines."""
        from miles_core.trainer.processes import leave

        try:
            if self._publisher is not None:
                self._runner.run(self._publisher.close())
            self._runner.close()
            self._trainer.close()
        finally:
            if self._build.size > 1:
                leave()

    def _meet(self, device: str) -> None:
        import torch
        import torch.distributed as dist

        build = self._build
        os.environ.update(RANK=str(build.rank), WORLD_SIZE=str(build.size), MASTER_ADDR=build.master, MASTER_PORT=str(build.port))
        backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
        if device != "cpu":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", build.rank % torch.cuda.device_count())))
        dist.init_process_group(backend, rank=build.rank, world_size=build.size, timeout=timedelta(seconds=build.deadline_s))

    def _info(self, _: bytes) -> bytes:
        return msgspec.msgpack.encode({"contract": self._trainer.contract, "num_updates": self._trainer.num_updates})

    def _step(self, payload: bytes) -> bytes:
        stats = self._trainer.step(unpack_batch(payload))
        return pack_stats(stats) if self._build.rank == 0 else b""

    def _forward(self, payload: bytes) -> bytes:
        found = self._trainer.forward_logprobs(unpack_batch(payload))
        return msgspec.msgpack.encode(pack_tensor(found)) if self._build.rank == 0 else b""

    def _hash(self, _: bytes) -> bytes:
        from miles_core.trainer.hashing import combined_hash

        return combined_hash(self._trainer.export_weights()).encode()

    def _publish(self, payload: bytes) -> bytes:
        if self._build.rank > 0:
            for _ in range(1 if self._published else 2):  # putting tensors together takes all processes; see Publisher
                for _ in self._trainer.export_weights():
                    pass
            self._published = True
            return b""
        order = msgspec.msgpack.decode(payload, type=PublishTo)
        if self._publisher is None:
            self._publisher = _publisher(self._trainer, order.peers, self._config, self._build.size == 1)
        manifest = self._runner.run(self._publisher.publish(order.version))
        return msgspec.msgpack.encode(manifest)

    def _save(self, payload: bytes) -> bytes:
        self._trainer.save(Path(payload.decode()))
        return b""

    def _load(self, payload: bytes) -> bytes:
        self._trainer.load(Path(payload.decode()))
        return b""


def exports_own(config: RunConfig) -> bool:
    """Whether the trainer exports tensors of its own, always the same, which an engine on its GPU may read where they lie.

    Proven on a GPU for an fsdp trainer without a draft and engines of one GPU; megatron-core's are put together for every export.
    """
    return config.trainer.backend == "fsdp" and config.draft.model == "none" and config.engine.tensor_parallel == 1


def _publisher(trainer: Any, peers: Peers, config: RunConfig, single: bool) -> Any:
    if peers.service is not None:
        from miles_core.models import load_shape
        from miles_core.sync.service import service_publisher

        shape, _ = load_shape(config.model, lambda line: None)
        return service_publisher(trainer, shape, config.service, peers.service.offset, peers.service.folder)
    from miles_core.sync.links import HttpLink
    from miles_core.sync.publisher import Publisher
    from miles_core.sync.transports import make_transport

    deadline_s = config.sync.deadline_s
    links = [
        HttpLink(url, peers.token, name=name, deadline_s=2 * deadline_s)
        for url, name in zip(peers.urls, peers.names, strict=True)
    ]
    transport = make_transport(
        config.sync, device=config.model.device, shared_host=peers.shared_host, shared_gpu=peers.shared_gpu,
        single_trainer=single, exports_own=exports_own(config),
    )  # fmt: skip
    return Publisher(trainer, links, transport)


class EngineWorker:
    """An embedded engine and its HTTP server, on a thread of their own."""

    def __init__(self, build: Build) -> None:
        from miles_core.compose import make_engine
        from miles_core.draft.build import load_draft
        from miles_core.models import load_model
        from miles_rollout.server import ServerConfig, bind, create_app
        from miles_rollout.server.transfer import accept_weights
        from miles_rollout.weights.receiver import WeightReceiver

        config = RunConfig.model_validate_json(build.config)
        _prepare(config)
        # A trainer publishes before anything is generated, so an engine reads no weights of its own. In float32 on a CPU it does:
        # which products are used is tried on the weights (miles_kernels.native.gemm); and in fp8, where scales come from them.
        tried = config.model.device == "cpu" and config.model.dtype == "float32"
        own = build.mode == "rollout" or tried or config.model.precision != "full"
        model = load_model(config, lambda line: None, weights=own, divided=config.engine.tensor_parallel > 1)
        draft, version = load_draft(config, model.decoder), 0 if build.mode == "rollout" else -1
        self._engine = make_engine(config, model, model.decoder, weight_version=version, draft=draft)
        app = create_app(self._engine, model.tokenizer, ServerConfig(admin_token=build.token, drain_s=0.0))
        accept_weights(app, WeightReceiver(self._engine))
        sock = bind(build.host, 0)
        sock.listen(2048)
        self._url = f"http://{build.host}:{sock.getsockname()[1]}"
        self._stop: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(app, sock), name="engine-server", daemon=True)
        self._thread.start()

    def call(self, method: str, payload: bytes) -> bytes:
        """ "info" says where the server listens and what the engine states."""
        if method != "info":
            raise ValueError(f"an engine does not know {method!r}; it knows info")
        if not self._thread.is_alive():
            raise RuntimeError(f"the server has ended: {self._failure}")
        return msgspec.msgpack.encode({"url": self._url, "engine": self._engine.info()})

    def close(self) -> None:
        """Abort what runs and end the server."""
        loop, stop = self._loop, self._stop
        if loop is not None and stop is not None and self._thread.is_alive():
            loop.call_soon_threadsafe(stop.set)
        self._thread.join(30)

    def _run(self, app: Any, sock: Any) -> None:
        from miles_rollout.server import serve

        async def main() -> None:
            self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
            await serve(app, sock, stop=self._stop, log_level="warning")

        try:
            asyncio.run(main())
        except BaseException as error:
            self._failure = error
            raise


class EngineAnswer(msgspec.Struct, frozen=True):
    """The reply of an engine worker's "info"."""

    url: str
    engine: EngineInfo
