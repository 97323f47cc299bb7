"""What a request got wrong, and the two reply shapes that say so: SGLang's native one and OpenAI's."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from miles_rollout.engine import EngineRefusal

logger = logging.getLogger("miles_rollout.server")
Handler = Callable[[Request], Awaitable[Response]]


class RequestError(ValueError):
    """A request that cannot be served as it stands; `param` names the field at fault, `status` is the HTTP status."""

    challenge = "Bearer"

    def __init__(self, message: str, *, param: str | None = None, status: int = 400, code: str | int | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.status = status
        self.code = status if code is None else code


class ClientGone(Exception):
    """The caller hung up; nobody reads the reply."""


def note(scope: Scope, why: str) -> None:
    """Have the log line of this request say why it was refused or ended early."""
    scope.setdefault("state", {})["error"] = why[:500]


class JSONResponse(Response):
    """A reply written by msgspec; structs are welcome."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """JSON bytes of `content`."""
        return msgspec.json.encode(content)


def as_request_error(error: Exception) -> RequestError:
    """The reply an exception deserves. What nobody foresaw is logged here and told apart from the caller's mistakes."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, EngineRefusal):
        return RequestError(str(error))
    logger.error("a request failed", exc_info=error)
    return RequestError("internal error; the server's log says more", status=500)


_PATH = re.compile(r"(?<![\w./:-])/(?!v1/)(?:[\w.@+~=-]+/)+([\w.@+~=-]*)")


def scrub(message: str) -> str:
    """A message without directories of this machine: of an absolute path only the last part stays."""
    return _PATH.sub(lambda found: found.group(1) or "...", message)


def native_body(error: RequestError) -> dict[str, Any]:
    """The error shape of SGLang's native routes."""
    return {"error": {"message": scrub(str(error))}}


def openai_body(error: RequestError) -> dict[str, Any]:
    """The error shape of the /v1 routes. An unknown model gets the shape OpenAI clients look for."""
    if error.status == 404:
        return {
            "error": {"message": scrub(str(error)), "type": "invalid_request_error", "param": error.param, "code": error.code}
        }
    type_ = "BadRequestError" if error.status < 500 else "InternalServerError"
    return {"object": "error", "message": scrub(str(error)), "type": type_, "param": error.param, "code": error.code}


def stream_error_body(error: RequestError) -> dict[str, Any]:
    """The event that ends a stream which failed after it had begun."""
    type_ = "BadRequestError" if error.status < 500 else "InternalServerError"
    return {"error": {"message": scrub(str(error)), "type": type_, "code": error.status, "retryable": False}}


def error_response(error: RequestError, *, openai: bool) -> Response:
    """The whole reply."""
    headers = (
        {"retry-after": "1"}
        if error.status in (429, 503)
        else {"www-authenticate": error.challenge}
        if error.status == 401
        else None
    )
    return JSONResponse(openai_body(error) if openai else native_body(error), status_code=error.status, headers=headers)


def answers_errors(handler: Handler, *, openai: bool) -> Handler:
    """Wrap a route so that every exception becomes a reply in the route's own error shape."""

    async def endpoint(request: Request) -> Response:
        try:
            return await handler(request)
        except ClientGone:
            note(request.scope, "the caller hung up")
            return Response(status_code=499)  # nobody reads it; the number is for /metrics
        except Exception as error:  # the last resort of a route: answered, and logged when unforeseen
            refusal = as_request_error(error)
            note(request.scope, str(refusal))
            return error_response(refusal, openai=openai)

    return endpoint


def counted(counts: Counter[tuple[str, int]], path: str, handler: Handler) -> Handler:
    """Wrap a route so that its replies are counted by status, for /metrics."""

    async def endpoint(request: Request) -> Response:
        response = await handler(request)
        counts[path, response.status_code] += 1
        return response

    return endpoint


async def http_error(request: Request, error: Exception) -> Response:
    """Unknown route and wrong method, in SGLang's shape."""
    assert isinstance(error, HTTPException)
    return JSONResponse({"detail": error.detail}, status_code=error.status_code, headers=error.headers)
