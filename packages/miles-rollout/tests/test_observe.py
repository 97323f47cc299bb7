"""What an operator sees: request ids in replies and logs, spans, metrics that the dashboard shows, the page."""

import asyncio
import contextlib
import json
import logging
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from replay import listening
from test_conformance import TOKENIZER, load_weights

from miles_rollout.router import RouterConfig, create_router
from miles_rollout.server.figures import Histogram
from miles_rollout.server.logs import announce, setup_logging
from miles_rollout.server.tracing import Tracing, setup_tracing, use
from miles_rollout.testing import ScriptedEngine, serving

DEPLOY = Path(__file__).parent.parent / "deploy"
ASK: dict[str, Any] = {"input_ids": [5, 6], "sampling_params": {"max_new_tokens": 3, "ignore_eos": True}}


@contextlib.asynccontextmanager
async def fleet() -> AsyncIterator[tuple[str, str]]:
    """(router, server) addresses."""
    async with contextlib.AsyncExitStack() as stack:
        url = await stack.enter_async_context(serving(ScriptedEngine(TOKENIZER), TOKENIZER))
        app = create_router([url], RouterConfig(health_interval_s=0.05))
        stack.push_async_callback(app.state.service.close)
        router = await stack.enter_async_context(listening(app))
        while not all(worker.serves for worker in app.state.service.fleet.workers.values()):
            await asyncio.sleep(0.01)
        yield router, url


def run(main: Any) -> None:
    asyncio.run(asyncio.wait_for(main(), 60))


@pytest.fixture
def json_log() -> Iterator[None]:
    """A JSON log on standard error; logging put back afterwards."""
    root = logging.getLogger()
    kept, level = root.handlers[:], root.level
    root.handlers[:] = []
    setup_logging("info", "json")
    yield
    root.handlers[:] = kept
    root.setLevel(level)


def test_a_request_id_goes_all_the_way(json_log: None, capsys: pytest.CaptureFixture[str]) -> None:
    async def main() -> None:
        async with fleet() as (router, _), httpx.AsyncClient(base_url=router) as http:
            reply = await http.post("/generate", json=ASK, headers={"x-request-id": "job-7/step:3"})
            assert reply.headers.get_list("x-request-id") == ["job-7/step:3"]
            for bad in ("a b", "x" * 200, 'q"'):
                drawn = (await http.post("/generate", json=ASK, headers={"x-request-id": bad})).headers["x-request-id"]
                assert re.fullmatch("[0-9a-f]{32}", drawn)
            async with http.stream("POST", "/generate", json=ASK | {"stream": True}, headers={"x-request-id": "s1"}) as response:
                assert response.headers["x-request-id"] == "s1" and "[DONE]" in (await response.aread()).decode()

    run(main)
    written = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    lines = [line for line in written if line["logger"] == "miles_rollout.access"]
    mine = [line for line in lines if line["request_id"] == "job-7/step:3"]
    assert len(mine) == 2, "the router's line and the server's"
    assert all(line["path"] == "/generate" and line["status"] == 200 and line["duration_ms"] > 0 for line in mine)
    assert not any(line["path"].startswith(("/health", "/get_model_info")) for line in lines), "polls are quiet"


def test_the_log_says_why_and_what_the_operator_did(json_log: None, capsys: pytest.CaptureFixture[str]) -> None:
    async def main() -> None:
        async with (
            serving(ScriptedEngine(TOKENIZER), TOKENIZER, load_weights=load_weights) as url,
            httpx.AsyncClient(base_url=url) as http,
        ):
            await http.post("/generate", json=ASK | {"no\nsuch": 1})
            for name in ("good", "bad"):
                await http.post("/update_weights_from_disk", json={"model_path": name})
            await http.post("/pause_generation", json={})
            await http.post("/continue_generation", json={})

    run(main)
    written = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    refused = next(line for line in written if line.get("path") == "/generate")
    assert refused["status"] == 400 and 'unknown parameter "no\nsuch"' in refused["error"]
    said = [(line["level"], line["message"]) for line in written if line["logger"] == "miles_rollout.server"]
    assert ("info", "weight version 1, from good, is served; before it 0") in said
    assert any(level == "warning" and message.startswith("weight version 2 was refused, 1 stays: ") for level, message in said)
    assert [message for _, message in said if "generation" in message] == [
        "generation is paused with mode abort; new requests wait", "generation goes on",
    ]  # fmt: skip


def test_a_caller_cannot_write_lines_of_the_text_log(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    kept, level = root.handlers[:], root.level
    root.handlers[:] = []
    try:
        setup_logging("info", "text")
        fields = {"path": "/generate", "error": 'unknown "x\n2026-11-28 INFO a line of its own"'}
        logging.getLogger("miles_rollout.access").info("request", extra={"fields": fields})
    finally:
        root.handlers[:] = kept
        root.setLevel(level)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(r'request path=/generate error="unknown \"x\n2026-11-28 INFO a line of its own\""')


def test_the_address_is_told_in_the_form_of_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    announce("serving on http://[::1]:9", "text")
    announce("serving on http://[::1]:9", "json")
    plain, line = capsys.readouterr().err.splitlines()
    assert plain == json.loads(line)["message"] == "serving on http://[::1]:9"


def test_spans_of_router_and_server_are_one_trace() -> None:
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    tracing = Tracing("test", exporter)
    use(tracing)
    try:

        async def main() -> None:
            async with fleet() as (router, _), httpx.AsyncClient(base_url=router) as http:
                trace = "0af7651916cd43dd8448eb211c80319c"
                headers = {"traceparent": f"00-{trace}-b7ad6b7169203331-01", "x-request-id": "t1"}
                assert (await http.post("/generate", json=ASK, headers=headers)).status_code == 200

        run(main)
    finally:
        use(None)
        tracing.close()
    server, router = exporter.get_finished_spans()
    assert {f"{span.context.trace_id:032x}" for span in (server, router)} == {"0af7651916cd43dd8448eb211c80319c"}
    assert server.parent.span_id == router.context.span_id and f"{router.parent.span_id:016x}" == "b7ad6b7169203331"
    assert server.attributes["http.response.status_code"] == 200 and server.attributes["miles.request_id"] == "t1"


def test_traces_need_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    with pytest.raises(ValueError, match="OTEL_EXPORTER_OTLP_ENDPOINT"):
        setup_tracing("x")


def test_the_dashboard_shows_what_is_exported() -> None:
    dashboard = json.loads((DEPLOY / "grafana.json").read_text())
    shown = {
        name
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in re.findall(r"\b(?:sglang:|miles_)[a-z0-9_:]+", target["expr"])
    }
    assert len(shown) > 12

    async def main() -> None:
        async with fleet() as (router, server), httpx.AsyncClient() as http:
            await http.post(f"{router}/generate", json=ASK)
            await http.post(f"{router}/generate", json=ASK | {"stream": True})
            pages = [(await http.get(f"{url}/metrics")).text for url in (router, server)]
        exported = {line.split("{")[0].split(" ")[0] for page in pages for line in page.splitlines() if line[:1] != "#"}
        assert shown <= exported, shown - exported
        for page in pages:
            families = [line.split()[2] for line in page.splitlines() if line.startswith("# TYPE")]
            assert len(families) == len(set(families))
            for line in page.splitlines():
                assert re.fullmatch(r'(#.*|[a-zA-Z_:][\w:]*(\{([a-z_]+="[^"]*",?)*\})? [-+\w.]+)', line), line

    run(main)


def test_the_page() -> None:
    async def main() -> None:
        async with fleet() as (router, server), httpx.AsyncClient() as http:
            page = await http.get(f"{router}/status")
            assert (
                page.headers["content-type"].startswith("text/html")
                and "default-src 'none'" in page.headers["content-security-policy"]
            )
            assert server in page.text and "<td>ready" in page.text and "<script" not in page.text
            own = await http.get(f"{server}/status")
            assert "mk1-scripted" in own.text and "num_generated_tokens" in own.text
            await http.post(f"{router}/add_worker?url=http://127.0.0.1:9/%3Cb%3E")
            assert "<b>" not in (await http.get(f"{router}/status")).text

    run(main)


def test_histograms_count_every_value_once() -> None:
    histogram = Histogram("h", (1.0, 2.0))
    for value, times in ((0.5, 1), (1.0, 2), (1.5, 1), (9.0, 1)):
        histogram.add(value, times)
    assert histogram.lines('a="b"')[1:] == [
        'h_bucket{a="b",le="1.0"} 3', 'h_bucket{a="b",le="2.0"} 4', 'h_bucket{a="b",le="+Inf"} 5',
        'h_sum{a="b"} 13.0', 'h_count{a="b"} 5',
    ]  # fmt: skip
