"""Start the workers of a run, wherever they run, and join them into a trainer and an engine."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import msgspec

from miles_core.cluster.fleet import Fleet, Handle
from miles_core.cluster.parts import ClusterEngine, ClusterTrainer
from miles_core.cluster.worker import Build
from miles_core.config.schema import RunConfig
from miles_rollout.wire import WeightManifest

Role = Literal["trainer", "engine"]


@dataclass(frozen=True)
class Seat:
    """A worker to be: `engine-1` is Seat("engine", 1)."""

    role: Role
    number: int

    @property
    def name(self) -> str:
        """What errors call it."""
        return f"{self.role}-{self.number}"


class Placement(Protocol):
    """Where workers run. Implementations: `LocalPlacement`, `cluster.ray.RayPlacement`."""

    single_host: bool
    """Whether all workers run on one machine."""

    def place(self, seats: list[Seat]) -> list[Handle]:
        """Start an empty worker for every seat; they do not load anything yet. Raises ValueError when there is no room."""
        ...

    def meeting(self, first: Handle) -> tuple[str, int]:
        """Address and free port where the other trainers meet the first one."""
        ...

    def host(self, handle: Handle) -> str:
        """The address that a worker is reached at."""
        ...

    def close(self) -> None:
        """Release everything that was started. Idempotent."""
        ...


class LocalPlacement:
    """Processes of this machine, each with a log in `folder`. GPUs are dealt out in order; a colocated engine shares one.

    An engine gets `engine_gpus` of them, one after the other.
    """

    single_host = True

    def __init__(self, folder: Path, *, num_trainers: int, colocated: bool, cuda: bool, engine_gpus: int = 1) -> None:
        self._folder = folder
        self._engine_gpus = engine_gpus
        self._num_trainers, self._colocated, self._cuda = num_trainers, colocated, cuda

    def place(self, seats: list[Seat]) -> list[Handle]:
        """See `Placement`."""
        from miles_core.cluster.local import LocalHandle

        handles: list[Handle] = []
        try:
            for seat in seats:
                handles.append(LocalHandle(seat.name, self._folder / f"{seat.name}.log", environment=self._environment(seat)))
        except BaseException:
            for handle in handles:
                handle.close()
            raise
        return handles

    def meeting(self, first: Handle) -> tuple[str, int]:
        """See `Placement`."""
        from miles_core.cluster.local import free_port

        return "127.0.0.1", free_port()

    def host(self, handle: Handle) -> str:
        """See `Placement`."""
        return "127.0.0.1"

    def close(self) -> None:
        """Nothing: the handles own the processes."""

    def _environment(self, seat: Seat) -> dict[str, str]:
        environment = {"GLOO_SOCKET_IFNAME": "lo"}
        if self._cuda:
            import os

            shift = self._num_trainers if seat.role == "engine" and not self._colocated else 0
            count = self._engine_gpus if seat.role == "engine" else 1
            numbers = range(shift + seat.number * count, shift + (seat.number + 1) * count)
            visible = [each for each in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if each]
            if visible and numbers[-1] >= len(visible):
                raise ValueError(f"{seat.name} needs GPU number {numbers[-1]}; CUDA_VISIBLE_DEVICES names {len(visible)}")
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible[number] if visible else str(number) for number in numbers)
        return environment


class Cluster:
    """The workers of one run. Close it, or leave the `with` block, and no process is left."""

    def __init__(
        self, placement: Placement, trainers: Fleet | None, engines: Fleet | None, config: RunConfig, token: str
    ) -> None:
        self._placement, self._fleets = placement, [fleet for fleet in (trainers, engines) if fleet is not None]
        self.trainer = None if trainers is None else ClusterTrainer(trainers)
        self.engine: ClusterEngine | None = None
        if engines is not None:
            self.engine = ClusterEngine(
                engines, token, timeout_s=config.cluster.deadline_s, shared_host=placement.single_host,
                shared_gpu=config.cluster.layout == "colocated" and config.model.device == "cuda",
            )  # fmt: skip

    @property
    def handles(self) -> list[Handle]:
        """All workers, trainers first."""
        return [handle for fleet in self._fleets for handle in fleet.handles]

    def publish(self, version: int) -> WeightManifest:
        """Bring the engines to the trainer's weights."""
        assert self.trainer is not None and self.engine is not None
        manifest = self.trainer.publish(version, self.engine.peers)
        self.engine.published(version)
        return manifest

    def close(self) -> None:
        """End all workers. Idempotent."""
        try:
            for fleet in reversed(self._fleets):
                fleet.close()
        finally:
            self._placement.close()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def start(
    config: RunConfig,
    mode: Literal["train", "sft", "rollout"],
    folder: Path,
    say: Callable[[str], None],
    *,
    needs_engine: bool = True,
) -> Cluster:
    """Start workers, let them load, and join them. Raises what a worker raises, and TimeoutError naming one that is too slow.

    `folder` takes the logs of local workers.
    """
    cluster, cuda = config.cluster, config.model.device == "cuda"
    num_trainers = 0 if mode == "rollout" else cluster.num_trainers or 1
    num_engines = (cluster.num_engines or 1) if needs_engine else 0
    seats = [Seat("trainer", i) for i in range(num_trainers)] + [Seat("engine", i) for i in range(num_engines)]
    placement = _placement(config, folder, num_trainers, num_engines, cuda)
    handles: list[Handle] = []
    try:
        handles = placement.place(seats)
        say(f"cluster: {cluster.kind}, {num_trainers} trainer and {num_engines} engine processes, {cluster.layout}")
        token = secrets.token_hex(16)
        trainers = Fleet(handles[:num_trainers], cluster.deadline_s) if num_trainers else None
        engines = Fleet(handles[num_trainers:], cluster.deadline_s) if num_engines else None
        host, port = placement.meeting(handles[0]) if num_trainers > 1 else ("127.0.0.1", 0)
        text = config.model_dump_json()
        builds = [
            Build(
                role=seat.role, config=text, mode=mode, rank=seat.number, size=num_trainers if seat.role == "trainer" else 1,
                master=host, port=port, token=token, host=placement.host(handle), deadline_s=cluster.deadline_s,
            )
            for seat, handle in zip(seats, handles, strict=True)
        ]  # fmt: skip
        Fleet(handles, cluster.deadline_s).each("build", [msgspec.msgpack.encode(build) for build in builds])
        return Cluster(placement, trainers, engines, config, token)
    except BaseException:
        try:
            Fleet(handles, cluster.deadline_s).close()
        finally:
            placement.close()
        raise


def _placement(config: RunConfig, folder: Path, num_trainers: int, num_engines: int, cuda: bool) -> Placement:
    colocated = config.cluster.layout == "colocated"
    if config.cluster.kind == "ray":
        from miles_core.cluster.ray import RayPlacement

        return RayPlacement(
            num_trainers=num_trainers, num_engines=num_engines, colocated=colocated, cuda=cuda, address=config.cluster.address,
            deadline_s=config.cluster.deadline_s,
        )  # fmt: skip
    return LocalPlacement(
        folder, num_trainers=num_trainers, colocated=colocated, cuda=cuda, engine_gpus=config.engine.tensor_parallel
    )
