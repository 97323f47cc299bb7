"""Who may ask what, endpoint by endpoint; where weights may come from; what error replies keep to themselves; limits."""

import asyncio
import base64
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from test_conformance import TOKENIZER, load_weights
from test_server_sockets import raw_request

from miles_rollout.router import RouterConfig, create_router
from miles_rollout.router import app as router_app
from miles_rollout.server import ServerConfig, create_app, lifecycle
from miles_rollout.server import app as server_app
from miles_rollout.server.admin import confined
from miles_rollout.server.errors import scrub
from miles_rollout.server.transfer import accept_weights
from miles_rollout.testing import ScriptedEngine, serving

SECRET = "s3cret-Token-9"
OPEN = {
    ("POST", "/generate"), ("PUT", "/generate"), ("POST", "/v1/completions"), ("POST", "/v1/chat/completions"),
    *(("GET", path) for path in (
        "/health", "/health_generate", "/health_live", "/model_info", "/get_model_info", "/server_info", "/get_server_info",
        "/metrics", "/openapi.json", "/v1/models", "/v1/models/x",
    )),
}  # fmt: skip
SERVER_CLOSED = {
    ("GET", "/status"), ("POST", "/abort_request"), ("POST", "/flush_cache"), ("POST", "/update_weights_from_disk"),
    ("POST", "/pause_generation"), ("POST", "/continue_generation"), ("POST", "/release_memory_occupation"),
    ("POST", "/resume_memory_occupation"), ("POST", "/start_profile"), ("POST", "/stop_profile"),
    ("POST", "/update_weights_from_tensor"), ("POST", "/update_weights_from_distributed"),
    ("POST", "/init_weights_update_group"), ("POST", "/destroy_weights_update_group"),
}  # fmt: skip
ROUTER_CLOSED = {
    ("GET", "/status"), ("GET", "/workers"), ("POST", "/workers"), ("DELETE", "/workers"), ("GET", "/list_workers"),
    ("POST", "/add_worker"), ("POST", "/remove_worker"), ("POST", "/update_weights_from_disk"), ("POST", "/abort_request"),
    ("POST", "/flush_cache"), ("POST", "/pause_generation"), ("POST", "/continue_generation"),
}  # fmt: skip


class NoSink:
    """Whoever gets here has the right to."""

    async def update(self, update: Any) -> Any:
        raise ValueError("nothing comes")

    async def join(self, invitation: Any) -> None:
        raise ValueError("nobody meets")

    async def leave(self, name: str) -> bool:
        return False


def routes_of(app: Any) -> set[tuple[str, str]]:
    found = {(method, route.path) for route in app.routes for method in route.methods}
    return {(method, path.replace("{model:path}", "x")) for method, path in found}


@contextlib.asynccontextmanager
async def application(kind: str, token: str | None) -> AsyncIterator[Any]:
    if kind == "server":
        app = create_app(ScriptedEngine(TOKENIZER), TOKENIZER, ServerConfig(admin_token=token), load_weights=load_weights)
        accept_weights(app, NoSink())
        yield app
    else:
        app = create_router([], RouterConfig(admin_token=token, wait_s=0.05))
        yield app
        await app.state.service.close()


def caller(app: Any, host: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app, client=(host, 1)), base_url="http://t")


@pytest.mark.parametrize("kind", ["server", "router"])
def test_every_route_is_in_the_matrix_and_answers_as_it_says(kind: str) -> None:
    closed = SERVER_CLOSED if kind == "server" else ROUTER_CLOSED
    callers = (
        ("nothing", "10.0.0.7", {}, 401),
        ("wrong", "10.0.0.7", {"authorization": "Bearer s3cret-Token-8"}, 401),
        ("prefix", "10.0.0.7", {"authorization": f"Bearer {SECRET[:-1]}"}, 401),
        ("longer", "10.0.0.7", {"authorization": f"Bearer {SECRET}x"}, 401),
        ("not ascii", "10.0.0.7", {"authorization": "Bearer \xff".encode("latin-1")}, 401),
        ("local", "127.0.0.1", {}, 401),
        ("right", "10.0.0.7", {"authorization": f"Bearer {SECRET}"}, None),
        ("case", "10.0.0.7", {"authorization": f"bEARER  {SECRET}"}, None),
    )

    async def main() -> None:
        async with application(kind, SECRET) as app:
            assert routes_of(app) == OPEN | closed, "a route without a line in this matrix"
            for method, path in sorted(OPEN | closed):
                for name, host, headers, expected in callers:
                    async with caller(app, host) as http:
                        body = None if method == "GET" else {}
                        response = await http.request(method, path, json=body, headers=headers)
                    refused = expected if (method, path) in closed else None
                    assert (response.status_code == 401) == (refused == 401), (method, path, name, response.status_code)
                    assert SECRET not in response.text and "Traceback" not in response.text
                if (method, path) in closed:
                    basic = base64.b64encode(f"me:{SECRET}".encode()).decode()
                    async with caller(app, "10.0.0.7") as http:
                        status = (await http.request(method, path, headers={"authorization": f"Basic {basic}"})).status_code
                    assert (status == 401) != (path == "/status"), "Basic is for the page alone"
        async with application(kind, None) as app:
            for method, path in sorted(closed):
                for host, headers in (
                    ("10.0.0.7", {}),
                    ("127.0.0.1", {"via": "1.1 proxy"}),
                    ("127.0.0.1", {"origin": "http://e"}),
                ):
                    async with caller(app, host) as http:
                        assert (await http.request(method, path, headers=headers)).status_code == 403, (method, path, host)
                async with caller(app, "127.0.0.1") as http:
                    assert (await http.request(method, path, json={})).status_code not in (401, 403), (method, path)

    asyncio.run(main())


def test_the_matrix_notices_a_route_that_is_left_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(server_app.OPEN, "/flush_cache", server_app.ADMIN["/flush_cache"])
    with pytest.raises(AssertionError):
        test_every_route_is_in_the_matrix_and_answers_as_it_says("server")


def test_weights_come_from_their_roots_alone(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "root-of-others"
    (root / "v1").mkdir(parents=True)
    outside.mkdir()
    (root / "link").symlink_to(outside)
    roots = (str(root),)
    assert confined(str(root / "v1"), roots) == str(root / "v1") and confined(str(root), roots) == str(root)
    for bad in (
        outside,
        root / ".." / "root-of-others",
        root / "link",
        "/etc",
        "relative",
        root / "v1" / ".." / "..",
        "/dev/shm",
    ):
        with pytest.raises(ValueError, match="leads out"):
            confined(str(bad), roots)
    with pytest.raises(ValueError, match="null byte"):
        confined("a\0b", roots)

    async def main() -> None:
        config = ServerConfig(weight_roots=roots)
        async with serving(ScriptedEngine(TOKENIZER), TOKENIZER, config, load_weights=load_weights) as url:
            async with httpx.AsyncClient(base_url=url) as http:
                replies = [
                    (await http.post("/update_weights_from_disk", json={"model_path": str(path)}))
                    for path in (outside, "/no/such")
                ]
        assert [reply.status_code for reply in replies] == [400, 400]
        assert replies[0].text == replies[1].text, "the reply must not tell what exists"
        assert str(tmp_path) not in replies[0].text

    asyncio.run(main())


def test_error_replies_hold_no_directories(tmp_path: Path) -> None:
    assert scrub("/a/b/c.safetensors: tensor x is cut off") == "c.safetensors: tensor x is cut off"
    assert (
        scrub("see '/srv/models/q': no") == "see 'q': no"
        and scrub("POST /v1/completions and /generate") == "POST /v1/completions and /generate"
    )
    assert scrub("http://127.0.0.1:1/a/b stays") == "http://127.0.0.1:1/a/b stays"

    def load(directory: str, version: int, digest: str) -> Any:
        raise ValueError(f"{tmp_path}/model.safetensors: tensor b is cut off")

    async def main() -> None:
        async with (
            serving(ScriptedEngine(TOKENIZER), TOKENIZER, load_weights=load) as url,
            httpx.AsyncClient(base_url=url) as http,
        ):
            message = (await http.post("/update_weights_from_disk", json={"model_path": "x"})).json()["message"]
        assert message == "model.safetensors: tensor b is cut off"

    asyncio.run(main())


def test_limits_of_requests_tokens_and_time(monkeypatch: pytest.MonkeyPatch) -> None:
    ask: dict[str, Any] = {"input_ids": [5, 6], "sampling_params": {"max_new_tokens": 400, "ignore_eos": True}}

    async def main() -> None:
        engine = ScriptedEngine(TOKENIZER)
        config = ServerConfig(max_requests=2, max_tokens=1000, request_s=0.5, body_s=0.3, max_body_bytes=4096)
        async with serving(engine, TOKENIZER, config) as url, httpx.AsyncClient(base_url=url, timeout=20) as http:
            engine.hold()
            held = [asyncio.ensure_future(http.post("/generate", json=ask)) for _ in range(2)]
            await engine.until(lambda: len(engine.started) == 2)
            assert (await http.post("/generate", json=ask)).status_code == 429
            for reply in await asyncio.gather(*held):
                assert reply.status_code == 504 and "limit of 0.5 s" in reply.text
            assert len(engine.aborted) == 2, "what is too late is not computed on"
            stream = (await http.post("/generate", json=ask | {"stream": True})).text
            assert "limit of 0.5 s" in stream
            await engine.release()
            many = ask | {"sampling_params": ask["sampling_params"] | {"n": 3}}
            assert "1202 tokens; this server's limit is 1000" in (await http.post("/generate", json=many)).text
            stops = {"input_ids": [5], "sampling_params": {"stop": [str(i) for i in range(65)]}}
            assert "at most 64 stop strings" in (await http.post("/generate", json=stops)).text
            assert (await http.post("/generate", json=ask | {"rid": "x" * 5000})).status_code == 413
            host, port = url.removeprefix("http://").split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            head = "POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 10\r\n\r\n{"
            writer.write(head.encode())
            assert b"408" in await asyncio.wait_for(reader.readline(), 5)
            writer.close()
            reader, writer = await raw_request(url, {"input_ids": [5], "sampling_params": {"max_new_tokens": 1}})
            assert b"200" in await asyncio.wait_for(reader.readline(), 5)
            writer.close()

    asyncio.run(asyncio.wait_for(main(), 30))


def test_a_head_that_never_ends_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "HEAD_S", 0.3)

    async def main() -> None:
        async with serving(ScriptedEngine(TOKENIZER), TOKENIZER) as url:
            host, port = url.removeprefix("http://").split(":")
            for first in (b"", b"GET /hea"):
                reader, writer = await asyncio.open_connection(host, int(port))
                writer.write(first)
                assert await asyncio.wait_for(reader.read(), 4) == b""
                writer.close()
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n")
            assert b"200 OK" in await asyncio.wait_for(reader.readuntil(b"}]}"), 4)
            writer.write(b"GET /me")
            assert await asyncio.wait_for(reader.read(), 4) == b""
            writer.close()

    asyncio.run(main())


def test_settings_out_of_range_are_named() -> None:
    for wrong in ({"max_requests": 0}, {"request_s": 0.0}, {"drain_s": -1.0}, {"admin_token": " "}, {"max_tokens": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ServerConfig(**wrong).validate()  # type: ignore[arg-type]
    for name, value in (("hedge_s", -1.0), ("admin_token", ""), ("body_s", 0.0)):
        with pytest.raises(ValueError, match=name):
            msgspec.structs.replace(RouterConfig(), **{name: value}).validate()
    assert router_app.ADMIN and server_app.ADMIN
