"""The router over servers on real sockets: conformance, lost workers, weight versions, back-pressure, rights."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from replay import listening
from test_conformance import TOKENIZER, load_weights

from miles_rollout.conformance import Options, run_suite
from miles_rollout.router import RouterConfig, create_router
from miles_rollout.router.proxy import Router
from miles_rollout.server import ServerConfig
from miles_rollout.testing import ScriptedEngine, serving
from miles_rollout.upstream import Upstream
from miles_rollout.wire import GenerateRequest, SamplingParams

ASK = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 6, "ignore_eos": True, "sampling_seed": 3}}
REQUEST = GenerateRequest(request_id="r", input_ids=(5, 6, 7), sampling=SamplingParams(seed=3, ignore_eos=True))


class Fleet:
    """Two scripted engines behind a router."""

    def __init__(self, url: str, app: Any, engines: list[ScriptedEngine], urls: list[str]) -> None:
        self.url, self.router, self.engines, self.urls = url, app.state.service, engines, urls

    async def states(self, *wanted: str) -> None:
        async with asyncio.timeout(10):
            while sorted(w.state for w in self.router.fleet.workers.values()) != sorted(wanted):
                await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def fleet(token: str | None = None, load: Any = load_weights, **options: Any) -> AsyncIterator[Fleet]:
    async with contextlib.AsyncExitStack() as stack:
        engines = [ScriptedEngine(TOKENIZER, max_context=2048) for _ in range(2)]
        config = ServerConfig(admin_token=token, drain_s=0.2)
        urls = [await stack.enter_async_context(serving(e, TOKENIZER, config, load_weights=load)) for e in engines]
        settings = RouterConfig(admin_token=token, worker_token=token, health_interval_s=0.05, **options)
        app = create_router(urls, settings)
        stack.push_async_callback(app.state.service.close)
        found = Fleet(await stack.enter_async_context(listening(app)), app, engines, urls)
        await found.states("ready", "ready")
        yield found


def expected(engine: ScriptedEngine, count: int) -> list[int]:
    return [engine.token(REQUEST, 0, 3 + i)[0] for i in range(count)]


def run(main: Any) -> None:
    asyncio.run(asyncio.wait_for(main(), 60))


def test_the_router_conforms() -> None:
    async def main() -> None:
        async with fleet("secret") as f:
            report = await run_suite(f.url, Options(admin_token="secret", weights="good", timeout_s=10.0))
        others = {r.name: r.status for r in report.results if r.status != "pass"}
        assert others == {"admin/flush": "unsupported"}, report.text()

    run(main)


def test_a_request_goes_elsewhere_while_nothing_was_delivered_and_never_after() -> None:
    async def main() -> None:
        async with fleet(policy="least-loaded") as f, httpx.AsyncClient(base_url=f.url, timeout=20) as http:
            for engine in f.engines:
                engine.hold()
            plain = asyncio.ensure_future(http.post("/generate", json=ASK))
            async with asyncio.timeout(10):
                while not any(e.started for e in f.engines if any(not s.startswith("health") for s in e.started)):
                    await asyncio.sleep(0.01)
            busy = next(w for w in f.router.fleet.workers.values() if w.num_active)
            busy.data.abort_all()  # the connection breaks before a byte of the reply
            for engine in f.engines:
                await engine.release()
            reply = (await plain).json()
            assert reply["output_ids"] == expected(f.engines[0], 6)
            assert f.router.fleet.counts["retries"] == 1 and busy.num_failed == 1
            await f.states("ready", "ready")  # re-admitted by its next health check

            for engine in f.engines:
                engine.hold_after(2)
            body = ASK | {"stream": True}
            events = []
            async with http.stream("POST", "/generate", json=body) as response:
                async for line in response.aiter_lines():
                    if line.startswith("data: "):
                        events.append(line[6:])
                    if len(events) == 1:
                        next(w for w in f.router.fleet.workers.values() if w.num_active).data.abort_all()
            assert events[-1] == "[DONE]" and "lost in mid-stream" in events[-2]
            assert f.router.fleet.counts["retries"] == 1, "a stream that had begun was sent again"
            for engine in f.engines:
                await engine.release()

    run(main)


def test_a_worker_without_the_new_weights_serves_nothing_until_it_has_them() -> None:
    broken = {"on": True}
    calls: list[int] = []

    def load(directory: str, version: int, digest: str) -> Any:
        calls.append(version)
        if directory == "half" and broken["on"] and len(calls) % 2 == 0:
            raise ValueError("tensor b is cut off")
        return load_weights("good" if directory == "half" else directory, version, digest)

    async def main() -> None:
        async with fleet(load=load) as f, httpx.AsyncClient(base_url=f.url, timeout=20) as http:
            bad = await http.post("/update_weights_from_disk", json={"model_path": "bad"})
            assert bad.status_code == 400 and bad.json()["success"] is False and f.router.fleet.target is None
            calls[:] = []
            for worker in f.router.fleet.workers.values():
                assert worker.serves
            real, f.router.fleet._push_again = f.router.fleet._push_again, _nothing  # no second try yet
            done = await http.post("/update_weights_from_disk", json={"model_path": "half", "weight_version": 7})
            assert done.status_code == 200 and "1 workers lack it" in done.json()["message"]
            await f.states("ready", "stale")
            assert sorted(e.version for e in f.engines) == [0, 7]
            for _ in range(8):
                reply = (await http.post("/generate", json=ASK)).json()
                assert reply["meta_info"]["weight_version"] == "7"
            broken["on"] = False
            f.router.fleet._push_again = real
            await f.states("ready", "ready")
            assert [e.version for e in f.engines] == [7, 7]
            assert (
                await http.post("/update_weights_from_disk", json={"model_path": "good", "weight_version": 7})
            ).status_code == 400

    run(main)


async def _nothing(worker: Any) -> None:
    pass


def test_too_much_is_refused_and_none_is_503() -> None:
    async def main() -> None:
        limits = {"max_per_worker": 1, "max_waiting": 1, "wait_s": 0.3}
        async with fleet(**limits) as f, httpx.AsyncClient(base_url=f.url, timeout=20) as http:
            for engine in f.engines:
                engine.hold()
            replies = [asyncio.ensure_future(http.post("/generate", json=ASK)) for _ in range(6)]
            await asyncio.wait(replies, timeout=1.0)
            refused = [r.result() for r in replies if r.done()]
            assert [r.status_code for r in refused] == [429] * 4 and all(r.headers["retry-after"] for r in refused)
            for engine in f.engines:
                await engine.release()
            assert sorted(r.status_code for r in await asyncio.gather(*replies)) == [200, 200, 429, 429, 429, 429]
            for url in f.urls:
                assert (await http.request("DELETE", "/workers", json={"url": url})).json()["state"] == "draining"
            assert (await http.get("/health")).status_code == 503
            assert (await http.post("/generate", json=ASK)).status_code == 503
            assert (await http.post("/workers", json={"url": "ftp://x"})).status_code == 400

    run(main)


def test_sessions_and_prefixes_stay_and_members_need_the_token() -> None:
    async def main() -> None:
        async with fleet("secret") as f, httpx.AsyncClient(base_url=f.url, timeout=20) as http:
            for path, method in (
                ("/workers", "GET"),
                ("/workers", "POST"),
                ("/workers", "DELETE"),
                ("/update_weights_from_disk", "POST"),
            ):
                assert (await http.request(method, path, json={"url": f.urls[0]})).status_code == 401
            for headers, body in (({"x-session-id": "s"}, ASK), ({}, ASK | {"input_ids": [5] * 64})):
                before = [w.num_served for w in f.router.fleet.workers.values()]
                for _ in range(6):
                    assert (await http.post("/generate", json=body, headers=headers)).status_code == 200
                after = [w.num_served for w in f.router.fleet.workers.values()]
                assert sorted(b - a for a, b in zip(before, after, strict=True)) == [0, 6]
            assert "miles_router_prefix_hits_total 5" in (await http.get("/metrics")).text
            workers = (await http.get("/workers", headers={"authorization": "Bearer secret"})).json()
            assert [w["state"] for w in workers["workers"]] == ["ready", "ready"]

    run(main)


def test_a_path_reaches_the_worker_as_it_was_sent() -> None:
    async def main() -> None:
        async with fleet() as f, httpx.AsyncClient(base_url=f.url, timeout=20) as http:
            reply = await http.get("/v1/models/a%20b")  # decoded, it would break the request line
            assert reply.status_code == 404 and "'a b'" in reply.json()["error"]["message"], reply.text

    run(main)


def test_a_slow_worker_is_hedged_where_that_is_wanted() -> None:
    async def main() -> None:
        for hedge_s, hedges in ((0.0, 0), (0.1, 2)):
            async with fleet(policy="least-loaded", hedge_s=hedge_s) as f, httpx.AsyncClient(base_url=f.url, timeout=20) as http:
                slow = f.engines[0]
                slow.hold()
                workers = list(f.router.fleet.workers.values())
                workers[0].num_active = 0
                workers[1].num_active = 1  # so that the slow one is asked first
                whole = asyncio.ensure_future(http.post("/generate", json=ASK))
                done, _ = await asyncio.wait([whole], timeout=1.5)
                assert bool(done) == (hedge_s > 0)
                if hedge_s:
                    assert (await whole).json()["output_ids"] == expected(slow, 6)
                    streamed = await http.post("/generate", json=ASK | {"stream": True, "stream_incremental": True})
                    assert streamed.text.count('"output_ids"') == 6 and streamed.text.endswith("data: [DONE]\n\n")
                    await slow.until(lambda slow=slow: len([r for r in slow.aborted if "health" not in r]) >= 2)
                assert f.router.fleet.counts["hedges"] == hedges
                await slow.release()
                await whole
                workers[1].num_active -= 1
                for worker in workers:
                    assert worker.num_active == 0, "every attempt has been released"

    run(main)


def test_after_an_update_nothing_old_is_sampled_anywhere() -> None:
    async def main() -> None:
        async with fleet() as f, httpx.AsyncClient(base_url=f.url, timeout=30) as http:
            stop = asyncio.Event()
            confirmed, seen = [0], [0]

            async def caller(i: int) -> None:
                while not stop.is_set():
                    least = confirmed[0]
                    body = ASK | {"sampling_params": ASK["sampling_params"] | {"max_new_tokens": 30}, "stream": i % 2 == 0}
                    reply = await http.post("/generate", json=body)
                    assert reply.status_code == 200, reply.text
                    last = json.loads(reply.text.split("data: ")[-2]) if i % 2 == 0 else reply.json()
                    spans = last["meta_info"]["weight_spans"]
                    assert [span["version"] for span in spans] == sorted({span["version"] for span in spans})
                    assert spans[0]["version"] >= least, f"sent under {least}, sampled under {spans[0]['version']}"
                    seen[0] += 1

            callers = [asyncio.ensure_future(caller(i)) for i in range(8)]
            for version in range(1, 13):
                await asyncio.sleep(0.03)
                reply = await http.post("/update_weights_from_disk", json={"model_path": "good", "weight_version": version})
                assert reply.json()["success"] and set(reply.json()["workers"].values()) == {None}
                confirmed[0] = version
            stop.set()
            await asyncio.gather(*callers)
            assert seen[0] > 12

    run(main)


def test_metrics_keep_the_lines_of_a_metric_together() -> None:
    async def main() -> None:
        async with fleet() as f, httpx.AsyncClient(base_url=f.url) as http:
            lines = (await http.get("/metrics")).text.splitlines()
        names = [line.split("{")[0].split()[2 if line.startswith("#") else 0] for line in lines]
        assert names.count("miles_router_worker_active") == 3, "its type and two workers"
        together = [name for i, name in enumerate(names) if not i or name != names[i - 1]]
        assert len(together) == len(set(together))

    run(main)


def test_a_state_file_that_cannot_be_written_loses_no_update(tmp_path: Path) -> None:
    state = tmp_path / "there" / "fleet.json"
    state.parent.mkdir()

    async def main() -> None:
        async with fleet(state=state) as f, httpx.AsyncClient(base_url=f.url) as http:
            reply = await http.post("/update_weights_from_disk", json={"model_path": "good", "weight_version": 3})
            assert reply.json()["success"] and "could not" not in reply.json()["message"]
            state.unlink()
            state.parent.rmdir()  # the disk has gone
            reply = await http.post("/update_weights_from_disk", json={"model_path": "good", "weight_version": 4})
            assert reply.status_code == 200 and "fleet.json could not be written (No such file" in reply.json()["message"]
            await f.states("ready", "ready")
            assert (await http.get("/workers")).json()["weight_version"] == "4"
            assert (await http.post("/generate", json=ASK)).json()["meta_info"]["weight_version"] == "4"
            state.parent.mkdir()
            async with asyncio.timeout(10):
                while not state.exists():
                    await asyncio.sleep(0.01)
            assert json.loads(state.read_bytes())["version"] == "4" and f.router.fleet.unsaved == ""

    run(main)


def test_what_a_router_ends_at_its_end_is_told_so() -> None:
    async def main() -> None:
        async with (
            fleet(policy="least-loaded", drain_s=0.1, max_per_worker=1) as f,
            httpx.AsyncClient(base_url=f.url, timeout=50) as http,
        ):
            workers = f.router.fleet.workers.values()

            async def busy(num_active: int, num_waiting: int) -> None:
                async with asyncio.timeout(20):
                    while (sum(w.num_active for w in workers), f.router.fleet.num_waiting) != (num_active, num_waiting):
                        await asyncio.sleep(0.01)

            for engine in f.engines:
                engine.hold_after(2)
            body = ASK | {"stream": True, "stream_incremental": True}
            async with http.stream("POST", "/generate", json=body) as stream:
                lines = stream.aiter_lines()
                assert (await anext(lines)).startswith("data: {")
                await busy(1, 0)
                whole = asyncio.ensure_future(http.post("/generate", json=ASK))
                await busy(2, 0)
                waiting = asyncio.ensure_future(http.post("/generate", json=ASK))
                await busy(2, 1)
                await f.router.drain()
                rest = [line async for line in lines if line]
            assert rest[-1] == "data: [DONE]" and '"code":503' in rest[-2] and "shutting down; what was sent" in rest[-2]
            for reply in await asyncio.gather(whole, waiting):
                assert reply.status_code == 503 and "shutting down before it was served" in reply.text
            assert not f.router.fleet.counts["retries"] and not any(w.num_failed for w in workers)
            for engine in f.engines:
                await engine.release()

    run(main)


def test_a_router_ends_whenever_a_check_is_asked_for() -> None:
    async def main() -> None:
        for pause in range(6):  # one of these is the moment at which the watcher has been woken and not yet run
            fleet = Router(RouterConfig(health_interval_s=50)).fleet
            worker = fleet.add("http://127.0.0.1:9")
            async with asyncio.timeout(30):
                while worker.state == "joining" or worker.check_now.is_set():
                    await asyncio.sleep(0.001)
                await asyncio.sleep(0.001)
            worker.check_now.set()
            for _ in range(pause):
                await asyncio.sleep(0)
            ending = asyncio.ensure_future(fleet.close())
            done, _ = await asyncio.wait({ending}, timeout=10)
            assert done, f"hangs when closed {pause} turns after"

    run(main)


def test_a_place_that_keeps_no_state_is_told_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{}")
    for place, words in (("none/fleet.json", "is no directory"), (".", "Is a directory"), ("bad.json", "not a router's state")):
        with pytest.raises(ValueError, match=words):
            create_router([], RouterConfig(state=tmp_path / place))


def test_a_worker_address_that_is_none_is_named() -> None:
    for url in ("http://h:99999", "http://h:x", "h:1", "http://"):
        with pytest.raises(ValueError, match="is no worker address.*give http://HOST:PORT"):
            Upstream(url)
