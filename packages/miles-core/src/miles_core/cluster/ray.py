"""Workers as Ray actors: the only module that knows Ray. Extra `miles-core[ray]`.

One driver, one actor per worker, in a placement group: colocated, a bundle holds a trainer and its engine; disaggregated, each
has a bundle of its own. Calls carry bytes, so Ray's serialisation sees nothing of ours but bytes and names.
"""

from __future__ import annotations

import os
import socket
import traceback
from typing import TYPE_CHECKING, Any

import msgspec

from miles_core.cluster.fleet import WorkerDied, as_error
from miles_rollout.waits import expired, thread_stacks

if TYPE_CHECKING:
    from miles_core.cluster.fleet import Handle
    from miles_core.cluster.start import Seat

OBJECT_STORE_BYTES = 128 << 20
"""Of a Ray started here. Weights do not pass through it."""
END_S = 10.0


class Actor:
    """A worker inside a Ray actor. Errors come back as words, not as exceptions."""

    def __init__(self) -> None:
        self._worker: Any = None

    def call(self, method: str, payload: bytes) -> tuple[bytes, str, str]:
        """(answer, name of the error, its words)."""
        try:
            if method == "build":
                from miles_core.cluster.worker import Build, make_worker

                self._worker = make_worker(msgspec.msgpack.decode(payload, type=Build))
                return b"", "", ""
            return self._worker.call(method, payload), "", ""
        except Exception as error:  # told to the driver, which decides
            traceback.print_exc()
            return b"", type(error).__name__, str(error)

    def where(self) -> tuple[str, int, int, str]:
        """Address of this node, a free port on it, pid, id of the node."""
        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            port = int(probe.getsockname()[1])
        return ray.util.get_node_ip_address(), port, os.getpid(), ray.get_runtime_context().get_node_id()

    def dump(self) -> str:
        """Where every thread stands."""
        return thread_stacks()

    def close(self) -> None:
        """Let go of peers and servers."""
        if self._worker is not None:
            self._worker.close()


class RayHandle:
    """One actor, as `fleet.Handle`."""

    def __init__(self, name: str, actor: Any) -> None:
        import ray

        self._ray = ray
        self.name = name
        self.actor = actor
        self.facts: tuple[str, int, int, str] = ("", 0, 0, "")
        self._pending: Any = None
        self._calling = ""
        self._closed = False

    def start(self, method: str, payload: bytes) -> None:
        """See `Handle`."""
        self._calling = method
        self._pending = self.actor.call.remote(method, payload)

    def poll(self, wait_s: float) -> bytes | None:
        """See `Handle`."""
        if self._pending is None:  # not in a call: only whether it lives
            self._get(self.actor.where.remote(), END_S)
            return None
        ready, _ = self._ray.wait([self._pending], timeout=wait_s)
        if not ready:
            return None
        pending, self._pending = self._pending, None
        payload, error, message = self._get(pending, END_S)
        self._calling = ""
        if error:
            raise as_error(self.name, error, message)
        return bytes(payload)

    def dump(self) -> str:
        """See `Handle`."""
        try:
            return str(self._ray.get(self.actor.dump.remote(), timeout=5.0))
        except Exception as error:  # any reason will do: this is said beside the real error
            return f"no answer ({type(error).__name__})"

    def close(self) -> None:
        """See `Handle`."""
        if self._closed:
            return
        self._closed = True
        if not self._calling:
            try:
                self._ray.get(self.actor.close.remote(), timeout=END_S)
            except self._ray.exceptions.RayError:
                pass  # dead, or busy: killed next
        self._ray.kill(self.actor)

    def _get(self, reference: Any, deadline_s: float) -> Any:
        try:
            return self._ray.get(reference, timeout=deadline_s)
        except self._ray.exceptions.GetTimeoutError:
            raise expired(f"{self.name} (a Ray actor) to answer", deadline_s) from None
        except self._ray.exceptions.RayActorError as error:
            when = f" during {self._calling!r}" if self._calling else ""
            raise WorkerDied(f"{self.name} (pid {self.facts[2]}, a Ray actor) has died{when}: {error}") from None


class RayPlacement:
    """A placement group and its actors, in a Ray cluster at `address`, or in one started here and ended by `close`."""

    def __init__(
        self, *, num_trainers: int, num_engines: int, colocated: bool, cuda: bool, address: str | None, deadline_s: float
    ) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
        try:
            import ray
        except ImportError as error:
            raise ImportError(f'cluster.kind = "ray" needs Ray: pip install "miles-core[ray]" ({error})') from None
        self._ray = ray
        self._num_trainers, self._num_engines, self._cuda = num_trainers, num_engines, cuda
        self._colocated = colocated and num_trainers > 0
        self._deadline_s = deadline_s
        self.single_host = True
        self._group: Any = None
        self._own = not self._ray.is_initialized()
        if self._own:
            options: dict[str, Any] = {"log_to_driver": False, "configure_logging": False, "namespace": None}
            if address is None:
                options |= {
                    "num_cpus": max(1, len(self._bundles())), "include_dashboard": False,
                    "object_store_memory": OBJECT_STORE_BYTES,
                    "_system_config": {"worker_niceness": 0},  # 15 by default: workers would yield to everything else here
                }  # fmt: skip
            self._ray.init(address=address or "local", **options)

    def place(self, seats: list[Seat]) -> list[Handle]:
        """See `start.Placement`."""
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        bundles = self._bundles()
        self._group = placement_group(bundles, strategy="PACK")
        if not self._group.wait(timeout_seconds=min(60.0, self._deadline_s)):
            raise ValueError(
                f"Ray has no room for {len(bundles)} bundles of {bundles[0]} within a minute; it has "
                f"{self._ray.available_resources()} free. Lower cluster.num_trainers or num_engines, or add nodes"
            )
        handles: list[Handle] = []
        for seat in seats:
            bundle, share = self._seat(seat)
            strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=bundle)
            remote = self._ray.remote(
                num_cpus=share, num_gpus=share if self._cuda else 0, max_restarts=0, max_concurrency=2,
                scheduling_strategy=strategy,
            )(Actor)  # fmt: skip
            handles.append(RayHandle(seat.name, remote.remote()))
        nodes = set()
        for handle in handles:
            assert isinstance(handle, RayHandle)
            handle.facts = handle._get(handle.actor.where.remote(), min(120.0, self._deadline_s))
            nodes.add(handle.facts[3])
        self.single_host = len(nodes) <= 1
        return handles

    def meeting(self, first: Handle) -> tuple[str, int]:
        """See `start.Placement`."""
        assert isinstance(first, RayHandle)
        return ("127.0.0.1" if self.single_host else first.facts[0]), first.facts[1]

    def host(self, handle: Handle) -> str:
        """See `start.Placement`."""
        assert isinstance(handle, RayHandle)
        return "127.0.0.1" if self.single_host else handle.facts[0]

    def close(self) -> None:
        """See `start.Placement`."""
        if self._group is not None:
            from ray.util.placement_group import remove_placement_group

            remove_placement_group(self._group)
            self._group = None
        if self._own and self._ray.is_initialized():
            self._ray.shutdown()

    def _bundles(self) -> list[dict[str, float]]:
        count = max(self._num_trainers, self._num_engines) if self._colocated else self._num_trainers + self._num_engines
        return [{"CPU": 1.0} | ({"GPU": 1.0} if self._cuda else {}) for _ in range(count)]

    def _seat(self, seat: Seat) -> tuple[int, float]:
        """Bundle and share of it."""
        if self._colocated:
            return seat.number, 0.5
        return seat.number + (self._num_trainers if seat.role == "engine" else 0), 1.0
