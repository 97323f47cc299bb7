"""A server that answers with recorded replies: the same request, method, path and body, gets the reply that was recorded.

A request that was recorded several times gets the replies in turn, the last one for ever."""

import asyncio
import contextlib
import copy
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse

from miles_rollout.server import bind, listen

RECORDED = Path(__file__).with_name("recorded") / "sglang.json"
Cases = list[dict[str, Any]]


def recorded() -> dict[str, Any]:
    """Where the replies come from, what to send to meet them, and the cases: method, path, body or raw, status, reply."""
    return json.loads(RECORDED.read_text())


def key(method: str, path: str, body: bytes) -> str:
    """Requests with the same key get the same reply."""
    with contextlib.suppress(ValueError):
        body = json.dumps(json.loads(body), sort_keys=True).encode()
    return f"{method} {path} {body.decode()}"


def mutated(cases: Cases, name: str, change: Callable[[Any], None]) -> Cases:
    """The cases, with the reply of case `name` changed."""
    changed = copy.deepcopy(cases)
    found = [case for case in changed if case["name"] == name]
    assert len(found) == 1, f"{len(found)} cases are called {name}"
    change(found[0])
    return changed


def replay_app(cases: Cases) -> Starlette:
    """`app.state.missed` lists requests nobody recorded; `app.state.seen` the names of the cases that were asked for."""
    table: dict[str, Cases] = {}
    for case in cases:
        body = case["raw"].encode() if "raw" in case else json.dumps(_grown(case["body"])).encode() if "body" in case else b""
        table.setdefault(key(case["method"], case["path"], body), []).append(case)
    missed: list[str] = []
    seen: set[str] = set()

    async def answer(request: Request) -> Response:
        asked = key(request.method, request.url.path, await request.body())
        if asked not in table:
            missed.append(asked[:300])
            return PlainTextResponse("nobody recorded this request", status_code=599)
        queue = table[asked]
        case = queue.pop(0) if len(queue) > 1 else queue[0]
        seen.add(case["name"])
        if "sse" in case:
            events = [f"data: {json.dumps(event)}\n\n" for event in case["sse"]]
            return StreamingResponse(iter([*events, "data: [DONE]\n\n"]), media_type="text/event-stream")
        if "json" in case:
            return Response(json.dumps(case["json"]), case["status"], media_type="application/json")
        return PlainTextResponse(case.get("text", ""), case["status"])

    async def any_path(scope: Any, receive: Any, send: Any) -> None:
        await (await answer(Request(scope, receive)))(scope, receive, send)

    app = Starlette()
    app.router.default = any_path
    app.state.missed, app.state.seen = missed, seen
    return app


def _grown(body: Any) -> Any:
    """Prompts of one repeated token are kept as {"repeat": [token, times]}."""
    if isinstance(body, dict):
        if set(body) == {"repeat"}:
            return [body["repeat"][0]] * body["repeat"][1]
        return {name: _grown(value) for name, value in body.items()}
    return body


@contextlib.asynccontextmanager
async def listening(app: Any, timeout_s: float = 10.0) -> AsyncIterator[str]:
    """Any ASGI application on a free port of 127.0.0.1, as a URL."""
    import uvicorn

    sock = bind("127.0.0.1", 0)
    listen(sock)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off", access_log=False, ws="none"))
    task = asyncio.ensure_future(server.serve(sockets=[sock]))
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        server.should_exit = True
        await asyncio.wait_for(task, timeout_s)
        sock.close()
