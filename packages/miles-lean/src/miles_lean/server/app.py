"""The HTTP face: routes, authorisation, limits on bodies, status codes. What happens behind is in `service`."""

from __future__ import annotations

import hmac
import json
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from miles_lean.server import kimina
from miles_lean.server.admission import Overloaded, Waited, retry_header
from miles_lean.server.service import Service, while_connected

Endpoint = Callable[[Request], Awaitable[Response]]
OPEN_PATHS = ("/", "/health")
"""Answered without an API key."""


def make_app(service: Service, *, api_key: str | None = None) -> Starlette:
    """The application. With `api_key` every path but / and /health wants "Authorization: Bearer KEY" or "X-API-Key: KEY"."""

    def guarded(endpoint: Endpoint) -> Endpoint:
        async def answer(request: Request) -> Response:
            if api_key and request.url.path not in OPEN_PATHS and not _authorised(request, api_key):
                return _error(401, "this server wants an API key: Authorization: Bearer KEY")
            try:
                return await endpoint(request)
            except Overloaded as error:
                headers = {"Retry-After": retry_header(error.retry_after_s)}
                return _error(503 if service.admission.draining else 429, str(error), headers)
            except Waited as error:
                return _error(503, str(error), {"Retry-After": retry_header(service.admission.retry_after_s)})
            except ValueError as error:
                return _error(422, str(error))

        return answer

    async def root(request: Request) -> Response:
        return PlainTextResponse("miles-lean: POST /v1/verify, /v1/check, /verify, /api/check; GET /health, /metrics\n")

    async def health(request: Request) -> Response:
        found = service.health()
        return JSONResponse(found, 200 if found["status"] == "ok" else 503)

    async def metrics(request: Request) -> Response:
        return PlainTextResponse(service.metrics.text())

    async def kimina_check(request: Request) -> Response:
        return await _connected(request, service.answer_kimina(kimina.parse_check(await _body(request, service))))

    async def kimina_verify(request: Request) -> Response:
        return await _connected(request, service.answer_kimina(kimina.parse_verify(await _body(request, service))))

    async def verify(request: Request) -> Response:
        body = _object(await _body(request, service))
        proofs = body.get("proofs") if "proofs" in body else [body.get("proof")]
        if not isinstance(proofs, list) or not proofs or not all(isinstance(proof, str) for proof in proofs):
            raise ValueError("give proof, a string, or proofs, a list of strings")
        outcomes = service.verify(_text(body, "statement"), proofs, header=str(body.get("header") or ""))

        async def rows() -> dict[str, Any]:
            return {"results": [outcome.as_dict() for outcome in await outcomes]}

        return await _connected(request, rows())

    async def check(request: Request) -> Response:
        body = _object(await _body(request, service))
        timeout = body.get("timeout", 60.0)
        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or timeout <= 0:
            raise ValueError(f"timeout = {timeout!r} must be a positive number of seconds")
        return await _connected(request, service.check(_text(body, "source"), float(timeout)))

    routes = [("/", root, "GET"), ("/health", health, "GET"), ("/metrics", metrics, "GET"), ("/api/check", kimina_check, "POST")]
    routes += [("/verify", kimina_verify, "POST"), ("/v1/verify", verify, "POST"), ("/v1/check", check, "POST")]
    return Starlette(routes=[Route(path, guarded(endpoint), methods=[method]) for path, endpoint, method in routes])


async def _connected(request: Request, work: Awaitable[Any]) -> Response:
    return JSONResponse(await while_connected(work, request.is_disconnected))


async def _body(request: Request, service: Service) -> Any:
    """The JSON body; ValueError when it is none, or longer than allowed."""
    limit = service.limits.max_body_bytes
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > limit:
            raise ValueError(f"the body is longer than {limit} bytes; send fewer files at once")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the body is not JSON: {error}") from error


def _object(body: Any) -> dict[str, Any]:
    if not isinstance(body, dict):
        raise ValueError(f"the body is a JSON {type(body).__name__}; it must be an object")
    return body


def _text(body: dict[str, Any], field: str) -> str:
    value = body.get(field)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{field} must hold Lean source")
    return value


def _authorised(request: Request, key: str) -> bool:
    given = request.headers.get("x-api-key") or request.headers.get("authorization", "").removeprefix("Bearer ").strip()
    return hmac.compare_digest(given.encode(), key.encode())


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"detail": message}, status, headers=headers)
