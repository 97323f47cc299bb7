"""The router's ASGI application: SGLang's and OpenAI's routes passed on, admin routes sent to every worker."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from miles_rollout.router.config import RouterConfig
from miles_rollout.router.fleet import CONTINUE, PAUSE, NoWorker, Worker
from miles_rollout.router.proxy import Router
from miles_rollout.server.admin import guarded
from miles_rollout.server.errors import Handler, JSONResponse, RequestError, answers_errors, counted, http_error
from miles_rollout.server.observe import Observed
from miles_rollout.server.openapi import document
from miles_rollout.server.params import read_body, read_object
from miles_rollout.server.status import table_page
from miles_rollout.upstream import UpstreamError

RouterHandler = Callable[[Router, Request], Awaitable[Response]]
SUMMED = {
    "sglang:num_running_reqs": "gauge", "sglang:num_queue_reqs": "gauge", "sglang:prompt_tokens_total": "counter",
    "sglang:generation_tokens_total": "counter", "sglang:cached_tokens_total": "counter",
}  # fmt: skip
"""Figures of the workers that the router adds up under the same name."""


PER_WORKER: tuple[tuple[str, str, Callable[[Worker], int]], ...] = (
    ("miles_router_worker_ready", "gauge", lambda worker: int(worker.serves)),
    ("miles_router_worker_active", "gauge", lambda worker: worker.num_active),
    ("miles_router_worker_served_total", "counter", lambda worker: worker.num_served),
    ("miles_router_worker_failed_total", "counter", lambda worker: worker.num_failed),
)


async def forward(router: Router, request: Request) -> Response:
    """Pass a request to a worker."""
    return await router.forward(request)


async def health(router: Router, request: Request) -> Response:
    """GET /health: 200 when at least one worker serves."""
    serves = not router.draining and any(worker.serves for worker in router.fleet.workers.values())
    return Response(status_code=200 if serves else 503)


async def live(router: Router, request: Request) -> Response:
    """GET /health_live: 200, whatever the workers do: restarting a router brings no worker back."""
    return Response(status_code=200)


async def workers(router: Router, request: Request) -> Response:
    """GET /workers: every worker's state, version and load."""
    fleet = router.fleet
    return JSONResponse(
        {
            "workers": [worker.describe() for worker in fleet.workers.values()],
            "weight_version": fleet.target.version if fleet.target is not None else None,
            "contract_digest": fleet.digest,
            "num_waiting": fleet.num_waiting,
            "num_running": len(router.running),
        }
    )


async def status(router: Router, request: Request) -> Response:
    """GET /status: the same as a page for people."""
    fleet = router.fleet
    facts = {
        "weight version": fleet.target.version if fleet.target is not None else "as the workers say", "contract": fleet.digest,
        "waiting": fleet.num_waiting, "running": len(router.running), "draining": router.draining, "paused": fleet.paused,
        **{name: fleet.counts[name] for name in ("updates", "repushes", "retries", "restarts", "refused", "broken_streams")},
    }  # fmt: skip
    return table_page("miles-rollout router", facts, [worker.describe() for worker in fleet.workers.values()])


async def openapi(router: Router, request: Request) -> Response:
    """GET /openapi.json: this document."""
    tables = {
        path: (methods, _summary(path, function), False) for table in (OPEN, V1) for path, (function, methods) in table.items()
    }
    for path, function, method in ADMIN:
        known = tables.get(path, ([], function.__doc__ or "", True))
        tables[path] = ([*known[0], method], known[1], True)
    return JSONResponse(document(tables, title="miles-rollout router", statuses=("502", "503", "504", "429", "400")))


def _summary(path: str, function: RouterHandler) -> str:
    return f"{path}, passed to a worker." if function is forward else function.__doc__ or ""


async def list_workers(router: Router, request: Request) -> Response:
    """GET /list_workers, as SGLang's router has it."""
    return JSONResponse({"urls": list(router.fleet.workers)})


async def _url(router: Router, request: Request) -> str:
    url: Any = request.query_params.get("url")
    if url is None:
        url = (await read_object(request, router.config.max_body_bytes, router.config.body_s)).get("url")
    if not isinstance(url, str):
        raise RequestError('name the worker: "url"', param="url")
    return url


async def add_worker(router: Router, request: Request) -> Response:
    """POST /workers {"url"} or /add_worker?url=: the worker joins once it is healthy and holds the fleet's weights."""
    try:
        worker = router.fleet.add(await _url(router, request))
    except ValueError as error:
        raise error if isinstance(error, RequestError) else RequestError(str(error), param="url") from None
    return JSONResponse(worker.describe())


async def remove_worker(router: Router, request: Request) -> Response:
    """DELETE /workers {"url"} or POST /remove_worker?url=: the worker gets nothing new, finishes, and is forgotten."""
    try:
        worker = router.fleet.remove(await _url(router, request))
    except ValueError as error:
        raise error if isinstance(error, RequestError) else RequestError(str(error), param="url") from None
    return JSONResponse(worker.describe())


async def update_weights(router: Router, request: Request) -> Response:
    """POST /update_weights_from_disk: one transaction over all workers."""
    body = await read_object(request, router.config.max_body_bytes, router.config.body_s)
    if not isinstance(body.get("model_path"), str):
        raise RequestError('parameter "model_path" is missing', param="model_path")
    version = body.get("weight_version")
    if version is not None and not isinstance(version, str | int):
        raise RequestError("weight_version must be an integer or a string", param="weight_version")
    # Shielded: a caller who hangs up must not leave the fleet between two versions.
    try:
        target, found = await asyncio.shield(asyncio.ensure_future(router.fleet.update(body)))
    except NoWorker as error:
        raise RequestError(str(error), status=503) from None
    except ValueError as error:
        raise RequestError(str(error), param="weight_version") from None
    lacking = {url: why for url, why in found.items() if why is not None}
    reply: dict[str, Any] = {"success": target is not None, "num_paused_requests": 0, "workers": found}
    if target is None:
        first = next(iter(lacking.items()))
        reply["message"] = f"no worker took the update; {first[0]}: {first[1]}"
        return JSONResponse(reply, status_code=400)
    reply["message"] = f"Succeeded to update model weights. Weight version updated to {target.version}."
    if lacking:
        reply["message"] += f" {len(lacking)} workers lack it and serve nothing until they have it."
    if router.fleet.unsaved:
        reply["message"] += f" {router.fleet.unsaved}."
    return JSONResponse(reply)


async def everywhere(router: Router, request: Request) -> Response:
    """POST to every worker; the reply is the first that is no success, else the first."""
    path = request.url.path
    body = await read_body(request, router.config.max_body_bytes, router.config.body_s)
    fleet = router.fleet
    replies = await (fleet.rest(path, body) if path in (PAUSE, CONTINUE) else fleet.everywhere(path, body))
    if not replies:
        raise RequestError("no worker serves", status=503)
    status, content = next((reply for reply in replies.values() if reply[0] != 200), next(iter(replies.values())))
    is_json = content[:1] in (b"{", b"[")
    return Response(content, status, media_type="application/json" if is_json else "text/plain")


async def metrics(router: Router, request: Request) -> Response:
    """GET /metrics: the router's own figures, each worker's state, and sums of the workers' token counts."""
    fleet = router.fleet
    lines: list[str] = []
    for name, kind, figure in PER_WORKER:  # the format wants all lines of a metric together
        lines.append(f"# TYPE {name} {kind}")
        lines += [f'{name}{{worker="{worker.url}"}} {figure(worker)}' for worker in fleet.workers.values()]
    gauges = {"waiting": fleet.num_waiting, "running": len(router.running)}
    lines += [
        line for name, value in gauges.items() for line in (f"# TYPE miles_router_{name} gauge", f"miles_router_{name} {value}")
    ]
    for name in ("retries", "refused", "broken_streams", "prefix_hits", "updates", "repushes", "hedges", "restarts"):
        lines += [f"# TYPE miles_router_{name}_total counter", f"miles_router_{name}_total {fleet.counts[name]}"]
    lines.append("# TYPE miles_router_responses_total counter")
    for (path, status), count in sorted(router.num_replies.items()):
        lines.append(f'miles_router_responses_total{{path="{path}",status="{status}"}} {count}')
    for name, value in (await _summed(router)).items():
        lines += [f"# TYPE {name} {SUMMED[name]}", f"{name} {value!r}"]
    return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")


async def _summed(router: Router) -> dict[str, float]:
    ready = [worker for worker in router.fleet.workers.values() if worker.serves]
    pages = await asyncio.gather(
        *(worker.control.request("GET", "/metrics", timeout_s=2.0) for worker in ready), return_exceptions=True
    )
    sums = dict.fromkeys(SUMMED, 0.0)
    for page in pages:
        if isinstance(page, BaseException):
            if not isinstance(page, UpstreamError):
                raise page
            continue
        for line in page[1].decode(errors="replace").splitlines():
            name, _, rest = line.partition("{")
            if name in sums:
                sums[name] += float(rest.rpartition("}")[2])
    return sums


OPEN: dict[str, tuple[RouterHandler, list[str]]] = {
    "/generate": (forward, ["POST", "PUT"]),
    "/health": (health, ["GET"]),
    "/health_generate": (health, ["GET"]),
    "/health_live": (live, ["GET"]),
    "/metrics": (metrics, ["GET"]),
    "/openapi.json": (openapi, ["GET"]),
    **dict.fromkeys(("/model_info", "/get_model_info", "/server_info", "/get_server_info"), (forward, ["GET"])),
}
V1: dict[str, tuple[RouterHandler, list[str]]] = {
    "/v1/models": (forward, ["GET"]),
    "/v1/models/{model:path}": (forward, ["GET"]),
    "/v1/completions": (forward, ["POST"]),
    "/v1/chat/completions": (forward, ["POST"]),
}
ADMIN: tuple[tuple[str, RouterHandler, str], ...] = (
    ("/workers", workers, "GET"),
    ("/workers", add_worker, "POST"),
    ("/workers", remove_worker, "DELETE"),
    ("/status", status, "GET"),
    ("/list_workers", list_workers, "GET"),
    ("/add_worker", add_worker, "POST"),
    ("/remove_worker", remove_worker, "POST"),
    ("/update_weights_from_disk", update_weights, "POST"),
    ("/abort_request", everywhere, "POST"),
    ("/flush_cache", everywhere, "POST"),
    (PAUSE, everywhere, "POST"),
    (CONTINUE, everywhere, "POST"),
)


def create_router(worker_urls: Iterable[str], config: RouterConfig | None = None) -> Starlette:
    """An ASGI application that routes to the workers; call it inside a running event loop. `app.state.service` is its Router.

    Raises ValueError for settings out of range and for an address that is none.
    """
    router = Router(config or RouterConfig())
    routes: list[Route] = []
    tables: list[tuple[str, RouterHandler, list[str], bool, bool]] = []
    tables += [(path, function, methods, False, False) for path, (function, methods) in OPEN.items()]
    tables += [(path, function, methods, True, False) for path, (function, methods) in V1.items()]
    tables += [(path, function, [method], False, True) for path, function, method in ADMIN]
    for path, function, methods, openai, closed in tables:
        handler: Handler = functools.partial(function, router)
        if closed:
            handler = guarded(router.config.admin_token, handler, browser=path == "/status")
        route = Route(path, counted(router.num_replies, path, answers_errors(handler, openai=openai)), methods=methods)
        if route.methods is not None:
            route.methods.discard("HEAD")
        routes.append(route)
    for url in worker_urls:
        router.fleet.add(url)
    app = Starlette(routes=routes, exception_handlers={HTTPException: http_error}, middleware=[Middleware(Observed)])
    app.state.service = router
    return app
