"""Workers of our own: started, restarted at once when they die or hang, ended with us."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence

from miles_rollout.child import Child
from miles_rollout.router.fleet import Fleet, Worker
from miles_rollout.upstream import UpstreamError

logger = logging.getLogger("miles_rollout.supervisor")
LOOK_S = 0.1
MAX_PAUSE_S = 5.0
MISTAKE = 2
"""Exit code of `serve` for a bad option, a bad model or a port in use."""


class Supervisor:
    """Keeps one process per port running and its worker in the fleet. The fleet brings a fresh worker its weights.

    `command(port)` is the command line of the worker that listens on the port. A process that answers no health check for
    `hung_s`, though it has served before, is killed; one that never served within `start_s` too. One that says its command is
    wrong before any has served is not started again: `mistaken` is set. `gpus` are dealt to the ports in
    turn: what CUDA_VISIBLE_DEVICES says to each process. A worker that is removed from the fleet finishes what it serves there;
    then its process is stopped and not started again.
    """

    def __init__(
        self,
        fleet: Fleet,
        command: Callable[[int], Sequence[str]],
        ports: Sequence[int],
        *,
        env: Mapping[str, str] | None = None,
        gpus: Sequence[str] = (),
        hung_s: float = 10.0,
        start_s: float = 900.0,
        grace_s: float = 35.0,
    ) -> None:
        self._fleet, self._command, self._env = fleet, command, env
        self._hung_s, self._start_s, self._grace_s = hung_s, start_s, grace_s
        self._ports = list(ports)
        self._gpus = {port: gpus[i % len(gpus)] for i, port in enumerate(ports)} if gpus else {}
        self.children: dict[int, Child] = {}
        """Port to the process that runs there now."""
        self.mistaken = asyncio.Event()
        """Set when a first worker ended for a mistake in its command, which starting it again does not mend: see `mistake`."""
        self.mistake = ""
        self._any_served = False
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin; call inside a running event loop."""
        self._tasks = [asyncio.ensure_future(self._keep(port)) for port in self._ports]

    async def stop(self) -> None:
        """End the processes, each with its own drain."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(child.stop(self._grace_s + 5) for child in self.children.values() if child.running))

    def _env_of(self, port: int) -> Mapping[str, str] | None:
        if port not in self._gpus:
            return self._env
        return dict(os.environ if self._env is None else self._env) | {"CUDA_VISIBLE_DEVICES": self._gpus[port]}

    async def _keep(self, port: int) -> None:
        """Until the worker is removed from the fleet, or its command is found mistaken."""
        pause_s = 0.0
        worker: Worker | None = None
        while worker is None or not worker.leaving:
            started = time.monotonic()
            try:
                child = await Child.start(self._command(port), grace_s=self._grace_s, env=self._env_of(port))
            except (ValueError, OSError, TimeoutError) as error:
                logger.error("the worker on port %d cannot be started: %s", port, error)
            else:
                self.children[port] = child
                worker = self._join(port, worker)
                if worker is not None:
                    await self._while_running(child, worker)
                if worker is None or worker.leaving:
                    await child.stop(self._grace_s + 5)
                    break
                if child.exit_code == MISTAKE and not self._any_served:
                    self.mistake = f"the worker on port {port} cannot start as it was asked to; its own message is above"
                    self.mistaken.set()
                    return
                self._fleet.lost(worker, UpstreamError(f"{worker.url}: its process has ended with code {child.exit_code}"))
            lived_s = time.monotonic() - started
            pause_s = 0.0 if lived_s > 30 else min(MAX_PAUSE_S, pause_s * 2 or 0.1)
            logger.warning("the worker on port %d ended after %.1f s; starting it again in %.1f s", port, lived_s, pause_s)
            self._fleet.counts["restarts"] += 1
            await asyncio.sleep(pause_s)
        logger.info("the worker on port %d was removed; its process has ended and is not started again", port)

    def _join(self, port: int, before: Worker | None) -> Worker | None:
        """The worker in the fleet; None when it was removed from there while no process of it ran."""
        if before is not None and before.leaving:
            return None
        try:
            return self._fleet.add(f"http://127.0.0.1:{port}")
        except ValueError as error:
            logger.warning("%s", error)
            return None

    async def _while_running(self, child: Child, worker: Worker) -> None:
        """Until the process has ended, killing it when it hangs, or the worker has left the fleet."""
        well = time.monotonic()
        served = False
        while child.running and self._fleet.workers.get(worker.url) is worker:
            now = time.monotonic()
            if worker.serves:
                well, served = now, True
                self._any_served = True
            elif self._fleet.paused:
                well = now  # nothing tells whether it is well; whether it has served stands as it was
            elif worker.state in ("joining", "down"):
                worker.check_now.set()  # nothing to lose by asking often
            else:
                well = now  # it answers; what it lacks is on its way
            limit = self._hung_s if served else self._start_s
            if now - well > limit:
                logger.error("worker %s has not answered for %.1f s and is killed: %s", worker.url, now - well, worker.reason)
                child.kill()
                await child.wait()
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await child.wait()
