"""The router when workers hang, leave, come late or are paused: what each does to the others."""

import asyncio
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from test_router import ASK, fleet, run

from miles_rollout.child import free_port
from miles_rollout.router import RouterConfig, proxy
from miles_rollout.router.fleet import Fleet, Target, Worker
from miles_rollout.router.supervise import Supervisor
from miles_rollout.upstream import UpstreamError


def test_an_update_waits_for_no_worker_that_hangs() -> None:
    async def main() -> None:
        async with fleet() as f, httpx.AsyncClient(base_url=f.url, timeout=50) as http:
            ill = f.router.fleet.workers[f.urls[0]]
            push, refuses, well, hanging = f.router.fleet._push, [True], asyncio.Event(), asyncio.Event()

            async def ill_push(worker: Worker, target: Target) -> str | None:
                if worker is ill and refuses[0]:
                    refuses[0] = False
                    return "it refuses"
                if worker is ill:
                    hanging.set()
                    await well.wait()
                return await push(worker, target)

            f.router.fleet._push = ill_push
            first = await http.post("/update_weights_from_disk", json={"model_path": "good", "weight_version": 1})
            assert first.json()["workers"] == {f.urls[0]: "it refuses", f.urls[1]: None}
            async with asyncio.timeout(20):
                await hanging.wait()  # its watch tries again
            async with asyncio.timeout(20):
                done = await http.post("/update_weights_from_disk", json={"model_path": "good", "weight_version": 2})
            found = done.json()["workers"]
            assert done.json()["success"] and found[f.urls[1]] is None and "stale" in found[f.urls[0]], found
            assert "1 workers lack it" in done.json()["message"]
            well.set()
            await f.states("ready", "ready")
            assert [e.version for e in f.engines] == [2, 2] and f.router.fleet.counts["repushes"] >= 2

            f.router.fleet._turn(ill, "stale", "no worker is ready")
            f.router.fleet._turn(f.router.fleet.workers[f.urls[1]], "stale", "no worker is ready")
            third = f.router.fleet.update({"model_path": "good", "weight_version": 3})
            assert set((await third)[1].values()) == {None}, "with none ready, those that lack a version are brought the new one"

    run(main)


class Process:
    """Stands for a child of the supervisor; `looks` holds what happens at each look at it, and it ends after the last."""

    def __init__(self, looks: list[Callable[[], object]]) -> None:
        self._looks = looks
        self.killed = False

    @property
    def running(self) -> bool:
        if self._looks:
            self._looks.pop(0)()
            return True
        return False

    async def wait(self) -> int:
        return 0

    def kill(self) -> None:
        self.killed = True


def test_a_pause_does_not_count_as_having_served() -> None:
    async def main() -> None:
        for has_served in (False, True):
            fleet = Fleet(RouterConfig())
            worker = Worker("http://127.0.0.1:9", fleet.config)
            fleet.workers[worker.url] = worker
            supervisor = Supervisor(fleet, lambda port: [], [], hung_s=1e-9, start_s=1000)

            def paused(on: bool, fleet: Fleet = fleet) -> None:
                fleet.paused = on

            def turned(state: Any, worker: Worker = worker) -> None:
                worker.state = state

            first = [lambda: turned("ready")] * has_served + [lambda: turned("joining")]
            looks = [*first, lambda: paused(True), lambda: None, lambda: paused(False), lambda: None, lambda: None]
            process: Any = Process(looks)
            await supervisor._while_running(process, worker)
            assert process.killed == has_served, "who has served is hung after hung_s, who still loads after start_s"
            assert supervisor._any_served == has_served

    run(main)


def test_a_removed_server_of_our_own_ends_and_is_not_started_again() -> None:
    async def main() -> None:
        for ends in (True, False):  # its process ends by itself while it drains, or once it has left
            fleet = Fleet(RouterConfig(drain_s=1000 if ends else 0.01))
            port = free_port()
            starts = []

            def command(port: int, starts: list[int] = starts) -> list[str]:
                starts.append(port)
                return [sys.executable, "-c", "import time; time.sleep(600)"]

            supervisor = Supervisor(fleet, command, [port], start_s=1000, grace_s=5)
            supervisor.start()
            try:
                async with asyncio.timeout(30):
                    while not fleet.workers:
                        await asyncio.sleep(0.01)
                worker = next(iter(fleet.workers.values()))
                worker.num_active = 1
                assert fleet.remove(worker.url) is worker
                if ends:
                    supervisor.children[port].kill()
                (kept,) = supervisor._tasks
                await asyncio.wait([kept], timeout=30)
                assert kept.done() and kept.exception() is None
                assert len(starts) == 1 and not fleet.counts["restarts"]
                assert not supervisor.children[port].running
            finally:
                await supervisor.stop()
                await fleet.close()

    run(main)


def answering(worker: Worker, path: str, first: Callable[[], Awaitable[object]]) -> None:
    """Before the router's next request for `path` goes to the worker, `first` is awaited."""
    real = worker.control.request

    async def request(method: str, asked: str, *args: Any, **options: Any) -> tuple[int, bytes]:
        if asked == path:
            worker.control.request = real
            await first()
        return await real(method, asked, *args, **options)

    worker.control.request = request


async def unwatched(fleet: Fleet) -> list[Worker]:
    """The workers, which are checked from now on only when a test does it."""
    for worker in fleet.workers.values():
        worker.watch.cancel()
    await asyncio.gather(*(worker.watch for worker in fleet.workers.values()), return_exceptions=True)
    return list(fleet.workers.values())


def test_who_pauses_first_is_not_down() -> None:
    async def main() -> None:
        async with fleet() as f, httpx.AsyncClient(base_url=f.url, timeout=50) as http:
            one, other = await unwatched(f.router.fleet)
            refused = await http.post("/pause_generation", json={"mode": "nonsense"})
            assert refused.status_code == 400 and not f.router.fleet.paused

            async def check_the_first() -> None:
                async with httpx.AsyncClient(timeout=20) as direct, asyncio.timeout(20):
                    while (await direct.get(one.url + "/health")).status_code != 503:
                        await asyncio.sleep(0.01)
                await f.router.fleet._check(one)
                assert one.state == "ready", one.reason

            answering(other, "/pause_generation", check_the_first)
            assert (await http.post("/pause_generation", json={"mode": "abort"})).status_code == 200
            assert f.router.fleet.paused and other.state == "ready"
            assert (await http.post("/continue_generation", json={})).status_code == 200 and not f.router.fleet.paused

            answering(one, "/health", lambda: http.post("/pause_generation", json={"mode": "abort"}))
            await f.router.fleet._check(one)  # its health was asked for before the pause, and is told after it
            assert one.state == "ready" and f.router.fleet.paused, one.reason

    run(main)


def test_a_request_whose_body_comes_after_the_drain_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with fleet() as f, httpx.AsyncClient(base_url=f.url, timeout=50) as http:
            read = proxy.read_body

            async def slow_body(*args: Any) -> bytes:
                await f.router.drain()  # nothing runs: it is over at once
                return await read(*args)

            monkeypatch.setattr(proxy, "read_body", slow_body)
            reply = await http.post("/generate", json=ASK)
            assert reply.status_code == 503 and "shutting down" in reply.text, reply.text
            assert not any(worker.num_served for worker in f.router.fleet.workers.values())

    run(main)


def test_who_is_down_or_joins_rests_and_goes_on_with_the_fleet() -> None:
    async def healths(f: Any) -> list[int]:
        async with httpx.AsyncClient(timeout=20) as direct:
            return [(await direct.get(url + "/health")).status_code for url in f.urls]

    async def main() -> None:
        pause, go_on = ("/pause_generation", {"mode": "abort"}), ("/continue_generation", {})
        async with fleet() as f, httpx.AsyncClient(base_url=f.url, timeout=50) as http:

            async def post(path: str, body: dict[str, Any]) -> int:
                return (await http.post(path, json=body)).status_code

            one, other = await unwatched(f.router.fleet)
            assert await post(*pause) == 200 and await healths(f) == [503, 503]
            f.router.fleet._turn(one, "down", "for a moment")
            assert await post(*go_on) == 200 and await healths(f) == [200, 200], "one that is down is told too"

            # One that comes while the fleet is paused, with a process that knows nothing of it, rests before it is ready.
            assert await post(*pause) == 200 and await healths(f) == [200, 503]
            await f.router.fleet._check(one)
            assert one.state == "ready" and await healths(f) == [503, 503]

            async def unreachable() -> None:
                raise UpstreamError("out of reach")

            answering(one, "/continue_generation", unreachable)
            f.router.fleet._turn(one, "down", "out of reach")
            assert await post(*go_on) == 200 and await healths(f) == [503, 200], "it does not fail the call"
            await f.router.fleet._check(one)
            assert one.state == "ready" and await healths(f) == [200, 200], "and is told when it is back"
            answering(other, "/continue_generation", unreachable)
            await f.router.fleet._check(other)
            assert other.state == "ready", "nothing is sent to those that go on already"

            # A router that starts while its workers are paused has all of them down; they go on all the same.
            assert await post(*pause) == 200
            f.router.fleet._said, f.router.fleet.paused = ("/continue_generation", b"{}"), False
            for worker in (one, other):
                f.router.fleet._turn(worker, "down", "the router is new")
            other.control.request = type(other.control).request.__get__(other.control)
            assert await post(*go_on) == 200 and await healths(f) == [200, 200]

    run(main)
