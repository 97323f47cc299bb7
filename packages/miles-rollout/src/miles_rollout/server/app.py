"""The ASGI application: which path leads to which handler, in which error shape, open to whom."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from miles_rollout.engine import Engine
from miles_rollout.server import admin, chat, completions, info, native, profile
from miles_rollout.server.errors import Handler, JSONResponse, answers_errors, counted, http_error
from miles_rollout.server.observe import Observed
from miles_rollout.server.openapi import document
from miles_rollout.server.service import ServerConfig, Service, WeightLoader
from miles_rollout.text import Tokenizer


async def openapi(service: Service, request: Request) -> Response:
    """GET /openapi.json: this document."""
    tables = {path: (methods, function.__doc__ or "", table is ADMIN) for table in (OPEN, V1, ADMIN)
              for path, (function, methods) in table.items()}  # fmt: skip
    tables |= {path: (["POST"], text, True) for path, text in service.weight_routes.items()}
    return JSONResponse(document(tables, title="miles-rollout"))


ServiceHandler = Callable[[Service, Request], Awaitable[Response]]

OPEN: dict[str, tuple[ServiceHandler, list[str]]] = {
    "/generate": (native.generate, ["POST", "PUT"]),
    "/health": (info.health, ["GET"]),
    "/health_generate": (info.health, ["GET"]),
    "/health_live": (info.live, ["GET"]),
    "/model_info": (info.model_info, ["GET"]),
    "/get_model_info": (info.model_info, ["GET"]),
    "/server_info": (info.server_info, ["GET"]),
    "/get_server_info": (info.server_info, ["GET"]),
    "/metrics": (info.metrics, ["GET"]),
    "/openapi.json": (openapi, ["GET"]),
}
V1: dict[str, tuple[ServiceHandler, list[str]]] = {
    "/v1/models": (info.models, ["GET"]),
    "/v1/models/{model:path}": (info.model, ["GET"]),
    "/v1/completions": (completions.completions, ["POST"]),
    "/v1/chat/completions": (chat.chat_completions, ["POST"]),
}
ADMIN: dict[str, tuple[ServiceHandler, list[str]]] = {
    "/status": (info.status, ["GET"]),
    "/abort_request": (admin.abort_request, ["POST"]),
    "/flush_cache": (admin.flush_cache, ["POST"]),
    "/pause_generation": (admin.pause_generation, ["POST"]),
    "/continue_generation": (admin.continue_generation, ["POST"]),
    "/release_memory_occupation": (admin.release_memory, ["POST"]),
    "/resume_memory_occupation": (admin.resume_memory, ["POST"]),
    "/update_weights_from_disk": (admin.update_weights_from_disk, ["POST"]),
    "/start_profile": (profile.start_profile, ["POST"]),
    "/stop_profile": (profile.stop_profile, ["POST"]),
}


def create_app(
    engine: Engine,
    tokenizer: Tokenizer | None = None,
    config: ServerConfig | None = None,
    *,
    load_weights: WeightLoader | None = None,
) -> Starlette:
    """An ASGI application that serves `engine`, which stays the caller's to close. `app.state.service` is its Service."""
    service = Service(engine, tokenizer, config or ServerConfig(), load_weights)
    routes = []
    for table, openai, closed in ((OPEN, False, False), (V1, True, False), (ADMIN, False, True)):
        for path, (function, methods) in table.items():
            handler: Handler = functools.partial(function, service)
            if closed:
                handler = admin.guarded(service.config.admin_token, handler, browser=path == "/status")
            handler = counted(service.num_replies, path, answers_errors(handler, openai=openai))
            route = Route(path, handler, methods=methods)
            if route.methods is not None and "HEAD" in route.methods:
                route.methods.discard("HEAD")  # as SGLang: a HEAD is refused rather than run like a GET
            routes.append(route)
    app = Starlette(routes=routes, exception_handlers={HTTPException: http_error}, middleware=[Middleware(Observed)])
    app.state.service = service
    return app
