"""Reports and the endpoints that change things: who may, what they answer."""

import asyncio
import itertools
import json
import re
from collections.abc import Callable, Coroutine
from typing import Any

import httpx
import pytest

from miles_rollout.server import ServerConfig, create_app
from miles_rollout.server.admin import _is_loopback
from miles_rollout.testing import ScriptedEngine
from miles_rollout.text import CharTokenizer
from miles_rollout.wire import GenerateRequest, SamplingParams, TensorSpec, WeightManifest

TOKENIZER = CharTokenizer("0123456789+= ")
ADMIN = ("/abort_request", "/flush_cache", "/update_weights_from_disk")


def load_weights(directory: str, version: int, digest: str) -> Any:
    """Pretends to read two tensors; "bad" is damaged, "short" lacks one."""
    if directory == "bad":
        raise ValueError("bad/model.safetensors: tensor b is cut off")
    specs = tuple(TensorSpec(name=name, dtype="float32", shape=(2,), hash="0") for name in "ab")
    names = "a" if directory == "short" else "ab"
    return WeightManifest(version=version, tensors=specs, contract_digest=digest), [(name, None) for name in names]


class Setting:
    """A server in this process and callers at several addresses."""

    def __init__(self, token: str | None = None, flushable: bool = False) -> None:
        self.engine = FlushableEngine(TOKENIZER) if flushable else ScriptedEngine(TOKENIZER)
        config = ServerConfig(served_model_name="tiny", admin_token=token, health_s=0.2)
        self.app = create_app(self.engine, TOKENIZER, config, load_weights=load_weights)
        self.http = self.caller("127.0.0.1")

    def caller(self, host: str) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.ASGITransport(self.app, client=(host, 1)), base_url="http://test")


class FlushableEngine(ScriptedEngine):
    """With a cache to flush while idle."""

    async def flush_cache(self) -> bool:
        return self.metrics()["num_running"] == 0


def run(test: Callable[[Setting], Coroutine[Any, Any, None]], **options: Any) -> None:
    """Run an async test with a deadline."""

    async def main() -> None:
        async with asyncio.timeout(30):
            await test(Setting(**options))

    asyncio.run(main())


def test_without_a_token_only_loopback_may() -> None:
    async def body(s: Setting) -> None:
        for path in ADMIN:
            assert (await s.http.post(path, json={"model_path": "x"})).status_code != 403
            for caller, headers in (
                ("10.0.0.7", {}),
                ("::ffff:10.0.0.7", {}),
                ("127.0.0.1", {"x-forwarded-for": "10.0.0.7"}),
                ("127.0.0.1", {"origin": "http://evil.example"}),
                ("10.0.0.7", {"authorization": "Bearer None"}),
            ):
                response = await s.caller(caller).post(path, json={"abort_all": True}, headers=headers)
                assert response.status_code == 403, (path, caller, headers)
                assert "admin token" in response.json()["error"]["message"]

    run(body)


def test_with_a_token_everybody_needs_it() -> None:
    async def body(s: Setting) -> None:
        for path in ADMIN:
            for headers in (
                {},
                {"authorization": "Bearer wrong"},
                {"authorization": "secret"},
                {"authorization": "Basic secret"},
            ):
                response = await s.http.post(path, json={}, headers=headers)
                assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
                assert "secret" not in response.text
            response = await s.caller("10.0.0.7").post(path, json={}, headers={"authorization": "bearer secret"})
            assert response.status_code not in (401, 403)
        assert (await s.caller("10.0.0.7").get("/health")).status_code == 200, "what only reports stays open"

    run(body, token="secret")


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("::ffff:127.0.0.1", True), ("::1%lo", True)]
    + [("10.0.0.1", False), ("::ffff:8.8.8.8", False), ("testclient", False), ("", False), ("localhost", False)],
)
def test_loopback_addresses(host: str, local: bool) -> None:
    assert _is_loopback(host) is local


def test_abort() -> None:
    async def body(s: Setting) -> None:
        s.engine.hold()
        sampling = {"max_new_tokens": 20, "ignore_eos": True}
        asks = [
            asyncio.ensure_future(s.http.post("/generate", json={"rid": f"r{i}", "input_ids": [5], "sampling_params": sampling}))
            for i in range(3)
        ]
        await s.engine.until(lambda: len(s.engine.started) == 3)
        again = await s.http.post("/generate", json={"rid": "r1", "input_ids": [5]})
        assert again.status_code == 400 and "already in use" in again.text
        for ignored in ({"rid": "nobody"}, {}):
            response = await s.http.post("/abort_request", json=ignored)
            assert (response.status_code, response.text) == (200, "")
        assert (await s.http.post("/abort_request", json={"rid": "r1"})).status_code == 200
        reply = (await asks[1]).json()
        assert reply["meta_info"]["finish_reason"] == {
            "type": "abort",
            "message": "Aborted",
            "status_code": None,
            "err_type": None,
        }
        assert reply["meta_info"]["weight_version"] is None and reply["output_ids"] == []
        assert not asks[0].done() and not asks[2].done()
        await s.http.post("/abort_request", json={"abort_all": True})
        for ask in (asks[0], asks[2]):
            assert (await ask).json()["meta_info"]["finish_reason"]["type"] == "abort"
        wrong = await s.http.post("/abort_request", json={"request_id": "r1"})
        assert wrong.status_code == 400 and "request_id" in wrong.text

    run(body)


def test_flush() -> None:
    async def refused(s: Setting) -> None:
        response = await s.http.post("/flush_cache")
        assert response.status_code == 400 and "weight update" in response.text

    async def flushed(s: Setting) -> None:
        assert (await s.http.post("/flush_cache")).status_code == 200
        s.engine.hold()
        ask = asyncio.ensure_future(s.http.post("/generate", json={"input_ids": [5]}))
        await s.engine.until(lambda: len(s.engine.started) == 1)
        assert (await s.http.post("/flush_cache")).status_code == 400
        await s.engine.release()
        await ask

    run(refused)
    run(flushed, flushable=True)


def test_weights_from_disk() -> None:
    async def body(s: Setting) -> None:
        update = "/update_weights_from_disk"
        reply = (await s.http.post(update, json={"model_path": "good"})).json()
        assert reply["success"] is True and "updated to 1" in reply["message"]
        reply = (await s.http.post(update, json={"model_path": "good", "weight_version": "7"})).json()
        assert reply["success"] is True and s.engine.version == 7
        assert (await s.http.get("/model_info")).json()["weight_version"] == "7"
        for request, words in (
            ({"model_path": "bad"}, "cut off"),
            ({"model_path": "short"}, "differ"),
            ({"model_path": "good", "weight_version": 7}, "does not grow"),
            ({"model_path": "good", "weight_version": "v8"}, "integers"),
            ({"model_path": "good", "weight_version": 2**63}, "below 2^63"),
            ({"model_path": "good", "load_format": "pt"}, "load_format"),
            ({"model_path": "good", "flush_cache": False}, "flush_cache"),
            ({}, "model_path"),
        ):
            response = await s.http.post(update, json=request)
            assert response.status_code == 400 and words in response.text, (request, response.text)
            assert s.engine.version == 7, "a refused update leaves the old weights"
        s.engine.hold()
        ask = asyncio.ensure_future(s.http.post("/generate", json={"rid": "r", "input_ids": [5]}))
        await s.engine.until(lambda: len(s.engine.started) == 1)
        reply = (await s.http.post(update, json={"model_path": "good", "abort_all_requests": True})).json()
        assert reply["success"] is True and (await ask).json()["meta_info"]["finish_reason"]["type"] == "abort"

    run(body)


def test_a_server_that_cannot_load_weights_says_so() -> None:
    async def main() -> None:
        app = create_app(ScriptedEngine(TOKENIZER), TOKENIZER)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app, client=("127.0.0.1", 1)), base_url="http://test") as http:
            response = await http.post("/update_weights_from_disk", json={"model_path": "x"})
            assert response.status_code == 400 and "does not load" in response.text

    asyncio.run(main())


def test_health_means_that_tokens_are_made() -> None:
    async def body(s: Setting) -> None:
        for path in ("/health", "/health_generate"):
            response = await s.http.get(path)
            assert (response.status_code, response.text) == (200, "")
        s.engine.hold()
        assert (await s.http.get("/health")).status_code == 503
        await s.engine.release()
        s.engine.fail_after = 0
        assert (await s.http.get("/health")).status_code == 503
        s.engine.fail_after = None
        s.app.state.service.draining = True
        assert (await s.http.get("/health")).status_code == 503
        refused = await s.http.post("/generate", json={"input_ids": [5]})
        assert refused.status_code == 503 and refused.headers["retry-after"] == "1" and "shutting down" in refused.text

    run(body)


def test_a_live_server_may_have_reasons_not_to_generate_but_not_hang() -> None:
    async def body(s: Setting) -> None:
        assert (await s.http.get("/health_live")).status_code == 200
        await s.http.post("/pause_generation", json={"mode": "abort"})
        assert [(await s.http.get(path)).status_code for path in ("/health_live", "/health")] == [200, 503]
        await s.http.post("/continue_generation", json={})
        s.app.state.service.released = {"kv_cache"}
        assert (await s.http.get("/health_live")).status_code == 200
        s.app.state.service.released = set()
        s.engine.hold()
        assert (await s.http.get("/health_live")).status_code == 503, "it hangs"
        s.app.state.service.draining = True
        assert (await s.http.get("/health_live")).status_code == 200

    run(body)


def test_requests_that_wait_for_a_pause_to_end_can_be_aborted() -> None:
    async def body(s: Setting) -> None:
        gate = s.app.state.service.gate

        def send(**fields: Any) -> asyncio.Future[httpx.Response]:
            return asyncio.ensure_future(s.http.post("/generate", json=fields))

        async def held(count: int) -> None:
            while gate.num_held != count:
                await asyncio.sleep(0.001)

        await s.http.post("/pause_generation", json={"mode": "abort"})
        one = send(rid="one", input_ids=[5, 6], return_logprob=True, logprob_start_len=0)
        two = send(rid=["two", "three"], input_ids=[[5], [6]])
        stream = send(rid="four", input_ids=[5], stream=True, sampling_params={"n": 2})
        patient = send(rid="five", input_ids=[5], sampling_params={"max_new_tokens": 2, "ignore_eos": True})
        await held(5)
        await s.http.post("/pause_generation", json={"mode": "abort"})  # again: what waits was told that it will go on
        assert gate.num_held == 5
        await s.http.post("/abort_request", json={"rid": "one"})
        found = (await one).json()
        assert found["meta_info"]["finish_reason"]["type"] == "abort" and found["output_ids"] == []
        assert found["meta_info"]["weight_spans"] == found["meta_info"]["input_token_logprobs"] == []
        for rid in ("two", "four"):
            await s.http.post("/abort_request", json={"rid": rid})
        events = [json.loads(line[6:]) for line in (await stream).text.splitlines() if line.startswith("data: {")]
        assert [(e["index"], e["meta_info"]["finish_reason"]["type"]) for e in events] == [(0, "abort"), (1, "abort")]
        await held(2)
        assert s.engine.started == [], "none of them reached the engine"
        await s.http.post("/continue_generation", json={})
        kinds = [each["meta_info"]["finish_reason"]["type"] for each in (await two).json()]
        assert kinds[0] == "abort" and kinds[1] != "abort", "of a batch the one that was named"
        assert len((await patient).json()["output_ids"]) == 2 and gate.num_held == 0
        await s.http.post("/pause_generation", json={"mode": "abort"})
        late = send(rid="late", input_ids=[5])
        await held(1)
        await s.app.state.service.abort_all()  # as at the end of draining
        assert (await late).json()["meta_info"]["finish_reason"]["type"] == "abort"

    run(body)


def test_health_of_a_busy_engine_is_its_progress() -> None:
    async def body(s: Setting) -> None:
        s.engine.hold()
        count = itertools.count()
        s.engine.metrics = lambda: {"num_generated_tokens": next(count)}  # type: ignore[method-assign]
        assert (await s.http.get("/health")).status_code == 200

    run(body)


def test_model_and_server_info() -> None:
    async def body(s: Setting) -> None:
        info = (await s.http.get("/get_model_info")).json()
        assert info == (await s.http.get("/model_info")).json()
        assert (info["model_path"], info["weight_version"], info["is_generation"]) == ("scripted", "0", True)
        assert info["contract_digest"] == "mk1-scripted" and info["eos_token_ids"] == [2]
        server = (await s.http.get("/get_server_info")).json()
        assert server["engine"]["model"] == "scripted" and server["context_length"] == 512 and server["num_requests"] == 0

    run(body)


def test_metrics_are_prometheus_text() -> None:
    async def body(s: Setting) -> None:
        params = SamplingParams(max_new_tokens=3, ignore_eos=True)
        await s.engine.generate(GenerateRequest(request_id="m", input_ids=(5, 6), sampling=params))
        await s.http.post("/generate", content=b"{", headers={"content-type": "application/json"})
        response = await s.http.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain")
        lines = response.text.splitlines()
        values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        assert values['miles_rollout_num_generated_tokens{model_name="tiny"}'] == "3.0"
        assert values['sglang:generation_tokens_total{model_name="tiny"}'] == "3.0"
        assert values['sglang:num_running_reqs{model_name="tiny"}'] == "0.0"
        assert values['miles_rollout_http_responses_total{path="/generate",status="400"}'] == "1"
        families = [line.split()[2] for line in lines if line.startswith("# TYPE")]
        assert len(families) == len(set(families))
        names = {key.split("{")[0] for key in values}
        assert {re.sub("_(bucket|sum|count)$", "", name) if "seconds_" in name else name for name in names} == set(families)

    run(body)
