"""The service around a scripted Lean: admission, deadlines, status codes, Kimina's wire format, drain."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from lean_doubles import ScriptedBackend, scripted_judge

from miles_lean.reward import Verifier
from miles_lean.server.admission import Admission, Overloaded, Waited, retry_header
from miles_lean.server.app import make_app
from miles_lean.server.metrics import Metrics
from miles_lean.server.service import Limits, Service, while_connected

STATEMENT = "theorem t : 1 = 1 := by sorry"


@asynccontextmanager
async def client(limits: Limits | None = None, api_key: str | None = None, audit: Any = None) -> AsyncIterator[Any]:
    """An HTTP client of a service in this process; `.service` is what answers."""
    limits = limits or Limits(slots=2, queue_size=8, max_wait_s=5.0, drain_s=2.0)
    service = Service(Verifier(ScriptedBackend(), scripted_judge, workers=limits.slots, retry_s=0.001), limits, audit=audit)
    transport = httpx.ASGITransport(make_app(service, api_key=api_key))
    async with httpx.AsyncClient(transport=transport, base_url="http://lean") as made:
        made.service = service  # type: ignore[attr-defined]
        yield made
    await service.close()


def run(main: Any) -> Any:
    """The result of an async test body."""
    return asyncio.run(main())


def test_verdicts_over_http_with_their_times() -> None:
    async def main() -> None:
        async with client() as http:
            body = {"statement": STATEMENT, "proofs": ["rfl", "bad", "cheat", "infra", "/-"]}
            answer = (await http.post("/v1/verify", json=body)).json()["results"]
            assert [row["status"] for row in answer] == ["accepted", "rejected", "rejected", "infra_error", "rejected"]
            assert [row["category"] for row in answer] == ["proved", "lean_error", "judge", "infra", "bad_form"]
            assert set(answer[0]["times"]) == {"queue_s", "elaborate_s", "judge_s"} and answer[0]["identity"] == "scripted-1"
            text = (await http.get("/metrics")).text
            assert 'miles_lean_checks_total{category="proved",endpoint="verify"} 1' in text
            assert 'stage_seconds_count{stage="judge"} 2' in text

    run(main)


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/v1/verify", {"statement": "theorem t : 1 = 1", "proof": "rfl"}, "must end with"),
        ("/v1/verify", {"statement": STATEMENT}, "give proof"),
        ("/v1/verify", [], "must be an object"),
        ("/v1/check", {"source": " "}, "source must hold Lean"),
        ("/v1/check", {"source": "x", "timeout": True}, "timeout = True"),
        ("/api/check", {"snippets": []}, "nothing to check"),
        ("/api/check", {"snippets": [{"id": "a", "code": "x"}] * 2}, "'a' stands twice"),
        ("/api/check", {"snippets": [{"id": 3, "code": "x"}]}, "id is 3"),
        ("/verify", {"codes": [{"custom_id": "a"}]}, "needs proof or code"),
        ("/verify", {"codes": [{"proof": "x"}]}, "needs custom_id"),
        ("/verify", {"codes": "x"}, "list of objects"),
    ],
)
def test_wrong_requests_are_422_and_say_which_field(path: str, body: Any, message: str) -> None:
    async def main() -> None:
        async with client() as http:
            answer = await http.post(path, json=body)
            assert answer.status_code == 422 and message in answer.json()["detail"]
            assert (await http.post(path, content=b"{")).status_code == 422

    run(main)


def test_kimina_answers_in_both_layouts_and_in_order() -> None:
    codes = ["fine", "bad", "theorem x : 1 = 2 := by sorry", "hang", "crash", "infra", "flagged"]

    def audit(source: str, deadline: float) -> str:
        return "kernel: appTypeMismatch" if source == "flagged" else ""

    async def main() -> None:
        async with client(audit=audit) as http:
            snippets = [{"id": str(i), "code": code} for i, code in enumerate(codes)]
            body = {"snippets": snippets, "timeout": 3, "debug": True, "reuse": True}
            rows = (await http.post("/api/check", json=body)).json()["results"]
            assert [row["id"] for row in rows] == [str(i) for i in range(len(codes))]
            fine, bad, sorry, hang, crash, infra, flagged = rows
            assert fine["error"] is None and fine["response"] == {"env": 0} and "queue_s" in fine["diagnostics"]
            assert bad["response"]["messages"] == [
                {"severity": "error", "pos": {"line": 2, "column": 2}, "endPos": {"line": 2, "column": 5}, "data": "it is bad"}
            ]
            assert sorry["response"]["sorries"][0]["pos"] == {"line": 1, "column": 24}
            assert "timed out" in hang["error"] and hang["response"] is None
            assert crash["error"].startswith("crash") and infra["error"].startswith("infra")
            assert flagged["response"]["messages"][0]["data"] == "judge: kernel: appTypeMismatch"
            legacy = {"codes": [{"custom_id": "a", "proof": "fine"}, {"custom_id": 7, "code": "bad"}], "timeout": 3}
            old = (await http.post("/verify", json=legacy)).json()["results"]
            assert [row["custom_id"] for row in old] == ["a", "7"] and old[0]["response"]["time"] == 0.01

    run(main)


def test_a_full_queue_is_429_with_a_time_to_come_back() -> None:
    async def main() -> None:
        async with client(Limits(slots=1, queue_size=2, max_wait_s=5.0, drain_s=2.0)) as http:
            body = {"statement": STATEMENT, "proof": "slow"}
            calls = [http.post("/v1/verify", json=body | {"proof": f"slow {i}"}) for i in range(6)]
            answers = await asyncio.gather(*calls)
            codes = sorted(answer.status_code for answer in answers)
            assert codes == [200, 200, 200, 429, 429, 429]
            refused = next(answer for answer in answers if answer.status_code == 429)
            assert int(refused.headers["Retry-After"]) >= 1 and "do not fit" in refused.json()["detail"]
            assert (await http.post("/v1/verify", json={"statement": STATEMENT, "proofs": ["a"] * 4})).status_code == 429

    run(main)


def test_waiting_too_long_is_an_infrastructure_failure_not_a_verdict() -> None:
    async def main() -> None:
        async with client(Limits(slots=1, queue_size=4, max_wait_s=0.05, drain_s=2.0)) as http:
            first = asyncio.ensure_future(http.post("/v1/verify", json={"statement": STATEMENT, "proof": "slow"}))
            await asyncio.sleep(0.02)
            late = (await http.post("/v1/verify", json={"statement": STATEMENT, "proof": "rfl"})).json()["results"][0]
            assert late["status"] == "infra_error" and late["category"] == "overload"
            kimina = (await http.post("/api/check", json={"snippets": [{"id": "a", "code": "x"}]})).json()["results"][0]
            assert kimina["error"].startswith("overload") and kimina["response"] is None
            assert (await http.post("/v1/check", json={"source": "x"})).status_code == 503
            assert (await first).json()["results"][0]["status"] == "accepted"

    run(main)


def test_keys_bodies_and_health() -> None:
    async def main() -> None:
        limits = Limits(slots=1, queue_size=1, max_body_bytes=1000)
        async with client(limits, api_key="secret") as http:
            body = {"statement": STATEMENT, "proof": "rfl"}
            assert (await http.post("/v1/verify", json=body)).status_code == 401
            assert (await http.post("/v1/verify", json=body, headers={"X-API-Key": "secre"})).status_code == 401
            for headers in ({"X-API-Key": "secret"}, {"Authorization": "Bearer secret"}):
                assert (await http.post("/v1/verify", json=body, headers=headers)).status_code == 200
            long = await http.post("/v1/verify", json=body | {"proof": "x" * 2000}, headers={"X-API-Key": "secret"})
            assert long.status_code == 422 and "longer than 1000 bytes" in long.json()["detail"]
            health = await http.get("/health")
            assert health.status_code == 200 and health.json()["lean"]["identity"] == "scripted-1"
            http.service.admission.draining = True
            assert (await http.get("/health")).status_code == 503
            assert (await http.post("/v1/verify", json=body, headers={"X-API-Key": "secret"})).status_code == 503

    run(main)


def test_drain_lets_running_work_end_and_admits_no_more() -> None:
    async def main() -> None:
        admission = Admission(1, 4)
        entered: list[int] = []

        async def work(number: int) -> None:
            with admission.inside():
                async with admission.slot(1.0):
                    entered.append(number)
                    await asyncio.sleep(0.02)

        tasks = [asyncio.ensure_future(work(number)) for number in range(3)]
        await asyncio.sleep(0.005)
        assert admission.num_running == 1 and admission.num_waiting == 2
        assert await admission.drain(1.0) and entered == [0, 1, 2]
        with pytest.raises(Overloaded, match="shutting down"), admission.inside():
            pass
        await asyncio.gather(*tasks)

    run(main)


def test_admission_keeps_count_whatever_happens_to_those_who_wait() -> None:
    async def main() -> None:
        admission = Admission(2, 100)

        async def held(slot: Any, number: int) -> None:
            async with slot:
                await asyncio.sleep(0.01)
                assert admission.num_running <= 2
                if number % 5 == 0:
                    raise RuntimeError("work failed")

        async def work(number: int) -> str:
            try:
                with admission.inside():
                    slot = admission.slot(0.03 if number % 3 else 5.0)
                    await held(slot, number)
                return "done"
            except Waited:
                return "late"
            except RuntimeError:
                return "failed"

        tasks = [asyncio.ensure_future(work(number)) for number in range(60)]
        await asyncio.sleep(0.015)
        for task in tasks[::7]:
            task.cancel()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert {"done", "late", "failed"} <= {one for one in found if isinstance(one, str)}
        assert (admission.num_running, admission.num_waiting, admission.num_inside) == (0, 0, 0)
        assert await admission.drain(0.1)

    run(main)


def test_work_ends_when_its_client_has_gone() -> None:
    async def main() -> None:
        ended = asyncio.Event()

        async def work() -> None:
            try:
                await asyncio.sleep(30)
            finally:
                ended.set()

        async def gone() -> bool:
            return True

        started = time.monotonic()
        with pytest.raises(asyncio.CancelledError):
            await while_connected(work(), gone, look_s=0.01)
        await asyncio.sleep(0)
        assert ended.is_set() and time.monotonic() - started < 5

    run(main)


def test_metrics_count_and_escape() -> None:
    metrics = Metrics("x")
    metrics.count("a_total", kind='q"\n')
    metrics.observe("s_seconds", 0.02, stage="one")
    metrics.observe("s_seconds", 1e9, stage="one")
    metrics.gauge("g", lambda: 2.0)
    text = metrics.text()
    assert 'x_a_total{kind="q\\"\\n"} 1' in text and "x_g 2" in text
    assert 'x_s_seconds_bucket{stage="one",le="0.025"} 1' in text and 'x_s_seconds_bucket{stage="one",le="+Inf"} 2' in text
    assert 'x_s_seconds_count{stage="one"} 2' in text
    assert retry_header(0.2) == "1" and retry_header(2.1) == "3"
